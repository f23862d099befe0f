"""Texts with shaded tokens as HTML: what a notebook shows of scored texts.

The shade is translucent and the text has the color of the page, so that it can be read on light and on dark pages.
Forges strip styles. Therefore the tokens with the largest values are bold, and a table of text lists their numbers.
There is no script, and no file is loaded.
"""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..metrics import Array
from .token_texts import visible

#: Color of the shade, and its opacity at the end of the scale.
SHADE, MAX_ALPHA = (200, 85, 61), 0.6
#: The scale ends at this value at least, nats. Below it, differences are rounding errors.
LEAST_END = 1e-3
#: Number of values in the legend, and of tokens per text in the table.
STEPS, MOST = 5, 5

OTHERS = "most probable in the mixture (range over draws)"
TEXT = "white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7; text-align: start"


@dataclass(frozen=True)
class ShownText:
    """One text of the page.

    Attributes:
        title: What stands above it.
        tokens: One row per token with the columns ``token``, ``log_mixture``, ``total`` and ``epistemic``.
        alternatives: Most probable tokens with the columns ``place``, ``token``, ``prob``, ``low`` and ``high``.
        values: (T,) values that decide the shade, nats.
        num_hidden: Number of tokens behind the last one that is shown.
    """

    title: str
    tokens: pd.DataFrame
    alternatives: pd.DataFrame
    values: Array
    num_hidden: int = 0


def page(texts: Sequence[ShownText], *, title: str, by: str, notes: Iterable[str] = ()) -> str:
    """Return texts with shaded tokens, and a legend.

    Args:
        texts: Texts to show.
        title: What stands above the legend.
        by: Name of the values that decide the shade.
        notes: Sentences below the legend.
    """
    end = end_of_scale([text.values for text in texts])
    shades = steps([text.values for text in texts])
    scale = "".join(f'<span style="{_style(v, end)}">&nbsp;{v:.2g}&nbsp;</span> ' for v in shades)
    lines = [f"<b>{_escape(title)}</b>", f"{_escape(by)} uncertainty per token, nats: {scale}", *map(_escape, notes)]
    head = "".join(f"<div>{line}</div>" for line in lines)
    return f"<div>{head}{''.join(_text(text, by, end) for text in texts)}</div>"


def end_of_scale(values: Iterable[Array]) -> float:
    """Return the value of the darkest shade: the largest one of all texts.

    Args:
        values: Values of each text, nats.
    """
    return max([LEAST_END, *(float(v.max()) for v in values if len(v))])


def steps(values: Sequence[Array]) -> list[float]:
    """Return the values of the legend: from 0 to the end of the scale, or 0 alone if all values are 0.

    Args:
        values: Values of each text, nats.
    """
    end = end_of_scale(values) if any(v.any() for v in values) else 0.0
    return np.linspace(0, end, STEPS).tolist() if end else [0.0]


def alpha(value: float, end: float) -> float:
    """Return the opacity of the shade of a value.

    Args:
        value: The value, nats.
        end: Value of the darkest shade, nats.
    """
    return MAX_ALPHA * min(max(value / end, 0.0), 1.0)


def _text(text: ShownText, by: str, end: float) -> str:
    largest = [int(i) for i in np.argsort(-text.values, kind="stable")[:MOST] if text.values[i] >= LEAST_END]
    numbers = [_numbers(row) for row in text.tokens.to_dict("records")]
    others = _others(text.alternatives)
    spans = []
    for place, (piece, value) in enumerate(zip(text.tokens["token"], text.values, strict=True)):
        facts = [f"{_quoted(piece)}, token {place + 1}", *(f"{name} {v}" for name, v in numbers[place].items())]
        facts += [OTHERS + ":", *others[place]] if place in others else []
        tip = _escape("\n".join(facts)).replace("\n", "&#10;")
        shown = f"<b>{_shown(piece)}</b>" if place in largest else _shown(piece)
        spans.append(f'<span title="{tip}" style="{_style(value, end)}">{shown}</span>')
    rest = f"<div>... and {text.num_hidden} more tokens.</div>" if text.num_hidden else ""
    table = _table(
        [[str(i + 1), _quoted(text.tokens["token"].iloc[i]), *numbers[i].values()] for i in largest], others, by
    )
    return f'<hr><div>{_escape(text.title)}</div><div dir="auto" style="{TEXT}">{"".join(spans)}</div>{rest}{table}'


def _numbers(row: Mapping[Any, Any]) -> dict[str, str]:
    """Return the numbers of a token as texts."""
    uncertainties = {f"{name} (nats)": f"{row[name]:.3f}" for name in ("total", "epistemic")}
    return {"probability": f"{np.exp(row['log_mixture']):.3g}"} | uncertainties


def _others(alternatives: pd.DataFrame) -> dict[int, list[str]]:
    """Return the most probable tokens at each place, as texts."""
    found: dict[int, list[str]] = {}
    for other in alternatives.to_dict("records"):
        span = f" ({other['low']:.2g} to {other['high']:.2g})"
        found.setdefault(int(other["place"]), []).append(f"{_quoted(other['token'])} {other['prob']:.3g}{span}")
    return found


def _table(lines: Sequence[Sequence[str]], others: Mapping[int, Sequence[str]], by: str) -> str:
    """Return the numbers of the tokens with the largest values, for readers without a mouse."""
    if not lines:
        return ""
    rows = ["".join(f"<th>{name}</th>" for name in ("", "token", "probability", "total (nats)", "epistemic (nats)"))]
    for line in lines:
        rows.append("".join(f"<td>{_escape(cell)}</td>" for cell in line))
        if here := others.get(int(line[0]) - 1):
            rows.append(f'<td></td><td colspan="4">{OTHERS}: {_escape(", ".join(here))}</td>')
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    summary = f"Bold tokens have the largest {_escape(by)} uncertainties: their numbers"
    return f"<details><summary>{summary}</summary><table>{body}</table></details>"


def _style(value: float, end: float) -> str:
    return f"background-color: rgba({', '.join(map(str, SHADE))}, {alpha(value, end):.3f})"


def _shown(piece: str) -> str:
    """Return a token as HTML that keeps its spaces and line breaks, also where styles are stripped."""
    text = visible(piece)
    is_gap = text.isspace() and len(text) > 1
    text = text.replace(" ", "\u00a0") if is_gap else re.sub(" (?= )", "\u00a0", text)
    return _escape(text).replace("\n", "<br>")


def _quoted(piece: str) -> str:
    """Return a token in quotes. Isolates (U+2068, U+2069) keep its direction away from the numbers beside it."""
    return f'\u2068"{visible(piece)}"\u2069'.replace("\n", "")


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
