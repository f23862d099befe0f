"""How all plots look: axes with an opaque face, and methods that differ in color, line and marker."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import matplotlib
from matplotlib import colors
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

MARK = "#0b4f8a"
QUIET = "#9aa5b1"
WARM = "#c8553d"

#: Colors of methods and of kinds of layers.
COLORS = (MARK, WARM, "#3d7d4f", "#7d4f9e", "#b58a1b", QUIET, "#1f9ea8", "#d06ca8", "#6b4a2b", "#444444")
#: Lines and markers, so that methods differ in a print without color.
LINES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1)), (0, (6, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

#: Mark of the artists that stand for one method each.
METHOD = "scalabl_pyro method"


class Style(NamedTuple):
    """How one method is drawn.

    Attributes:
        index: Number of methods that are drawn on the axes already.
        color: Color of line and markers.
        line: Line style.
        marker: Marker.
    """

    index: int
    color: str
    line: Any
    marker: str


def next_style(ax: Axes, color: str | None = None) -> Style:
    """Return the style of the next method on an axes; its main line must have ``gid=METHOD``.

    Args:
        ax: Axes that the method will be drawn on.
        color: Color, or None for the next one.
    """
    index = sum(line.get_gid() == METHOD for line in ax.lines)
    chosen = visible(COLORS[index % len(COLORS)], ax) if color is None else color
    return Style(index, chosen, LINES[index % len(LINES)], MARKERS[index % len(MARKERS)])


def cycled(ax: Axes) -> Iterator[tuple[str, str]]:
    """Yield (color, marker) pairs without end, for kinds of things on one axes."""
    return zip(itertools.cycle(visible(color, ax) for color in COLORS), itertools.cycle(MARKERS), strict=False)


def visible(color: str, ax: Axes) -> str:
    """Return a lighter shade of a color if the axes has a dark face, else the color itself."""
    if not is_dark(ax.get_facecolor()):
        return color
    return colors.to_hex([0.5 + 0.5 * part for part in colors.to_rgb(color)])


def is_dark(color: Any) -> bool:
    """Tell whether black text on a color is hard to read (relative luminance below one half)."""
    red, green, blue = colors.to_rgb(color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5


def axes(ax: Axes | None, *, width: float = 4.8, height: float = 3.6) -> Axes:
    """Return the given axes, or new ones in a figure of their own.

    The new figure has an opaque face, because text on a transparent one cannot be read in a notebook with a dark theme.
    The face is the one of the user's settings. If that is transparent, it is white under dark text and black under
    light text.

    Args:
        ax: Axes of the caller, or None.
        width: Width of the new figure, inches.
        height: Height of the new figure, inches.
    """
    if ax is not None:
        return ax
    face, inner = (_opaque(matplotlib.rcParams[f"{part}.facecolor"]) for part in ("figure", "axes"))
    options: dict[str, Any] = {"figsize": (width, height), "layout": "constrained", "facecolor": face}
    return plt.subplots(subplot_kw={"facecolor": inner}, **options)[1]


def _opaque(face: Any) -> Any:
    if colors.to_rgba(face)[3] == 1:
        return face
    return "white" if is_dark(matplotlib.rcParams["text.color"]) else "black"
