"""Write a report as a page of HTML, or as Markdown with a folder of pictures."""

import base64
import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from ..storage.directories import replace_file
from .report import Report
from .report_words import MEANING

#: Endings of the name of a report.
ENDINGS = (".html", ".md")
TITLE = "How good the predictions are"
INTERVAL = "low and high are the ends of a 95 % interval: other rows of the same kind would give other values."
#: Longest text of a cell, in characters.
MAX_CELL = 200
#: A cell with more characters than this is long.
LONG = 30
#: Colors follow the theme of the reader.
STYLE = """
:root { color-scheme: light dark; }
body { background: Canvas; color: CanvasText; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #8886; padding: .25rem .6rem; text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
td.long { min-width: 14rem; }
img { max-width: 100%; background: white; }
"""


def write_report(report: Report, path: Path) -> None:
    """Write a report. In Markdown, the pictures go to a folder beside it; in HTML, they are in the file.

    Args:
        report: The report.
        path: File that ends in ``.html`` or ``.md``.
    """
    if path.suffix.lower() == ".html":
        replace_file(path, _as_html(report).encode())
        return
    folder = path.with_name(f"{path.stem}_pictures")
    folder.mkdir(exist_ok=True)
    for number, (_, png) in enumerate(report.pictures.values()):
        replace_file(folder / f"{number}.png", png)
    replace_file(path, _as_markdown(report, folder.name).encode())


def _as_html(report: Report) -> str:
    parts = ["<h2>In short</h2>", *(f"<p>{html.escape(sentence)}</p>" for sentence in report.in_short)]
    parts += [_html_table(pd.DataFrame(report.facts.items(), columns=["", " "])), "<h2>Metrics</h2>"]
    parts.append(f"<p>{INTERVAL}</p>")
    parts.append(_html_table(_metrics_table(report)))
    for title, (words, png) in report.pictures.items():
        data = base64.b64encode(png).decode()
        parts.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(words)}</p>")
        parts.append(f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">')
    for title, (words, table) in report.tables.items():
        parts.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(words)}</p>{_html_table(table)}")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    body = "\n".join([f"<h1>{TITLE}</h1>", *parts])
    return f'<!doctype html><html lang="en"><head>{head}<title>{TITLE}</title></head><body>{body}</body></html>\n'


def _as_markdown(report: Report, folder: str) -> str:
    parts = [
        f"# {TITLE}",
        "## In short",
        *report.in_short,
        _markdown_table(pd.DataFrame(report.facts.items(), columns=["fact", "value"])),
    ]
    parts += ["## Metrics", INTERVAL, _markdown_table(_metrics_table(report))]
    for number, (title, (words, _)) in enumerate(report.pictures.items()):
        parts += [f"## {title}", words, f"![{title}]({folder}/{number}.png)"]
    for title, (words, table) in report.tables.items():
        parts += [f"## {title}", words, _markdown_table(table)]
    return "\n\n".join(parts) + "\n"


def _metrics_table(report: Report) -> pd.DataFrame:
    table = report.metrics.T.rename_axis("metric").reset_index()
    return table.assign(meaning=[MEANING.get(str(name), "") for name in table["metric"]])


def _html_table(table: pd.DataFrame) -> str:
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in table.columns)
    rows = ("".join(map(_html_cell, row)) for row in table.itertuples(index=False))
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def _html_cell(value: Any) -> str:
    """A cell. Long texts get room, and the table scrolls on a narrow screen."""
    text = _cell(value)
    return f"<td{' class=long' * (len(text) > LONG)}>{html.escape(text)}</td>"


def _markdown_table(table: pd.DataFrame) -> str:
    def line(values: Iterable[Any]) -> str:
        cells = (html.escape(_cell(v), quote=False).replace("|", "\\|") for v in values)
        return f"| {' | '.join(cells)} |"

    return "\n".join(
        [line(table.columns), line(["---"] * len(table.columns)), *map(line, table.itertuples(index=False))]
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if value != value else f"{value:.3f}"
    text = str(value)
    text = " ".join(text.split())
    return text if len(text) <= MAX_CELL else f"{text[:MAX_CELL]}..."
