"""Text whose tokens are shaded by their uncertainty."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from .._arguments import check_role, known_arguments
from ..metrics import Array
from ..prediction.scored_texts import ScoredTexts, Shade
from ..prediction.tokens_html import STEPS, alpha, end_of_scale, steps
from .style import QUIET, WARM, axes
from .wrapped_text import Part, wrapped

#: Distance of lines as a multiple of the font size.
PITCH = 1.7
#: Largest and smallest font size, points.
LARGEST, SMALLEST = 9.0, 5.0
#: Width of a new figure, and room for title, labels and legend above and below the text, inches.
WIDTH, ROOM = 6.4, 1.15
#: Cells per line of a new figure, about, and the largest number of lines for which it makes room.
COLUMNS, MAX_LINES = 76, 40
#: Width of an entry of the legend, as a multiple of its font size.
ENTRY = 7.0


class Page(NamedTuple):
    """A text broken into lines that fit on an axes.

    Attributes:
        size: Font size, points.
        columns: Width of the axes, cells.
        lines: Height of the axes, lines.
        parts: Parts of the tokens.
        num_shown: Number of tokens that fit.
        top: Lines above the text, for the legend.
        entries: Entries of the legend per line.
    """

    size: float
    columns: float
    lines: float
    parts: list[Part]
    num_shown: int
    top: float
    entries: int


@known_arguments
def tokens(scored: ScoredTexts, *, row: int = 0, by: Shade = "epistemic", ax: Axes | None = None) -> Axes:
    """Draw a text whose tokens are shaded by their uncertainty.

    A line break is an arrow. The text runs from left to right, also where its script does not. A text without enough
    room gets smaller letters, and then is cut; the label below it says so.

    Args:
        scored: Texts that ``posterior.score`` scored.
        row: Number of the text.
        by: Shade: ``"epistemic"``, what the draws disagree about, or ``"total"``, the entropy of the mixture.
        ax: Axes to draw on; None for new ones.

    Returns:
        The axes.

    Raises:
        TypeError: If something else than scored texts is given.
        ValueError: If ``by`` is another word, or if no text has this number.

    Example:
        >>> scored = posterior.score([{"prompt": "the sky is", "completion": " blue"}], num_draws=10)
        >>> scalabl_pyro.plots.tokens(scored, row=0, by="total")
    """
    check_role("scored", scored, "scores")
    pieces, values = _text_of(scored, row), scored.uncertainty(row, by)
    height = ROOM + min(wrapped(pieces, COLUMNS)[-1].line + 1, MAX_LINES) * LARGEST * PITCH / 72
    ax = axes(ax, width=WIDTH, height=height)
    ax.set(xticks=[], yticks=[], title=f"{by.capitalize()} uncertainty (nats)", ylabel=f"text {row}")
    ax.set_xlabel("two\nlines")  # takes its place before the room is measured
    ax.spines[:].set_visible(False)
    page = _fit(ax, pieces)
    ax.set(xlim=(0, page.columns), ylim=(page.lines, 0), xlabel=_facts(scored, row, by, page.num_shown))
    end = end_of_scale([values])
    _draw(ax, page, values, end)
    shades = [
        Patch(facecolor=_shade(v, end), edgecolor=QUIET, linewidth=0.5, label=f"{v:.2g}") for v in steps([values])
    ]
    options: dict[str, Any] = {"borderaxespad": 0.0, "fontsize": page.size, "handleheight": 1.1}
    ax.legend(handles=shades, loc="upper left", ncols=page.entries, frameon=False, **options)
    return ax


def _text_of(scored: ScoredTexts, row: int) -> list[str]:
    if row not in range(len(scored)):
        raise ValueError(f"row={row!r}: the texts have the numbers 0 to {len(scored) - 1}.")
    if not scored.pieces[row]:
        raise ValueError(f"row={row!r}: this text has no tokens. Choose another one.")
    return scored.pieces[row]


def _facts(scored: ScoredTexts, row: int, by: Shade, num_shown: int) -> str:
    count = len(scored.pieces[row])
    shown = f"{count} token{'s' * (count != 1)}" if num_shown == count else f"the first {num_shown} of {count} tokens"
    zero = ": one model, so it is 0" if by == "epistemic" and scored.num_draws < 2 else ""
    return f"{shown}, log probability {scored.log_prob[row]:.4g} nats\n{scored.source}{zero}"


def _fit(ax: Axes, pieces: Sequence[str]) -> Page:
    """Find the largest letters with which the whole text fits; cut it if the smallest ones are too large."""
    ax.figure.canvas.figure.draw_without_rendering()  # places the axes
    box = ax.get_window_extent()
    width, height = (72 * pixels / ax.figure.dpi for pixels in (box.width, box.height))
    for size in np.arange(LARGEST, SMALLEST - 0.25, -0.5).tolist():
        columns, lines = width / _advance(ax, size), height / (size * PITCH)
        entries = min(max(int(width / (size * ENTRY)), 1), STEPS)
        top = math.ceil(STEPS / entries) + 0.5
        parts = wrapped(pieces, max(int(columns), 2))
        if parts[-1].line + 1 + top <= lines:
            break
    cut = min((part.token for part in parts if part.line + 1 + top > lines), default=len(pieces))
    return Page(size, columns, lines, [part for part in parts if part.token < cut], cut, top, entries)


def _advance(ax: Axes, size: float) -> float:
    """Measure the width of a character, points. It depends on the resolution, because screens round it to pixels."""
    text = ax.text(0, 0, "0" * 40, fontsize=size, family="monospace")
    width = 72 * text.get_window_extent().width / ax.figure.dpi / 40
    text.remove()
    return width


def _draw(ax: Axes, page: Page, values: Array, end: float) -> None:
    for part in page.parts:
        x, y = part.column, page.top + part.line
        ax.add_patch(Rectangle((x + 0.05, y + 0.06), part.width - 0.1, 0.88, facecolor=_shade(values[part.token], end)))
        font: dict[str, Any] = {"fontsize": page.size, "family": "monospace"}
        ax.text(x, y + 0.5, part.text, va="center", parse_math=False, **font)


def _shade(value: float, end: float) -> tuple[float, float, float, float]:
    red, green, blue = colors.to_rgb(WARM)
    return red, green, blue, alpha(value, end)
