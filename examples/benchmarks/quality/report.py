"""The report of the quality benchmark: tables of means and ranks, and pictures, from the runs in a folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from scalabl_pyro import plots
from scalabl_pyro.prediction.predict import Prediction

from .scores import kept
from .table import Table, setting_key

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RANKED = ("nll", "ece", "brier")
SCALED = ("ts_nll", "ts_ece", "ts_brier")
#: Columns of the table: heading, column, factor, digits.
SHOWN = (
    ("accuracy %", "accuracy", 100, 1),
    ("NLL", "nll", 1, 3),
    ("ECE %", "ece", 100, 1),
    ("Brier", "brier", 1, 3),
    ("NLL, scaled", "ts_nll", 1, 3),
    ("ECE %, scaled", "ts_ece", 100, 1),
)
COST = (("extra parameters", "extra_parameters", 1, 0), ("train s", "train_seconds", 1, 1))
COST += (("predict s", "predict_seconds", 1, 2), ("peak GiB", "peak_gib", 1, 2))


def frame_of(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Make a table with one row per run and flat columns.

    The column ``line`` holds the method, and also a digest of its settings if the method has several.
    """
    flat = []
    for row in rows:
        own = {k: v for k, v in row.items() if not isinstance(v, dict | list)}
        if "error" not in row:
            own |= {f"{name}_parameters": n for name, n in row["parameters"].items()}
            own["peak_gib"] = np.nan if row["peak_bytes"] is None else row["peak_bytes"] / 2**30
            own |= {f"ood.{name}.{k}": v for name, found in row.get("ood", {}).items() for k, v in found.items()}
        flat.append(own | {"setting": setting_key(row)})
    frame = pd.DataFrame(flat)
    several = frame.groupby(["split", "method"])["setting"].transform("nunique") > 1
    frame["line"] = frame["method"].where(~several, frame["method"] + " #" + frame["setting"])
    return frame


def summary(frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Compute mean and standard error over seeds of each data set and line.

    Returns:
        Columns (name, "mean"), (name, "se"), and ("runs", "").
    """
    grouped = frame.groupby(["dataset", "line"], sort=False)
    parts: dict[Any, pd.Series] = {("runs", ""): grouped.size()}
    for column in columns:
        parts[column, "mean"] = grouped[column].mean()
        parts[column, "se"] = grouped[column].std(ddof=1) / np.sqrt(grouped[column].count())
    return pd.DataFrame(parts)


def ranks(frame: pd.DataFrame, columns: Sequence[str] = RANKED) -> pd.DataFrame:
    """Compute the mean rank of each line and its standard error over blocks. A block is a data set and a seed.

    Rank 1 is the smallest value. Ties share the mean of their ranks. Blocks in which a line has no run are left out, so
    that all lines are ranked on the same blocks. The column ``mean`` first averages the ranks of all ``columns`` within
    a block.
    """
    lines = frame["line"].unique()
    by_column = {}
    for column in columns:
        wide = frame.pivot_table(index=["dataset", "seed"], columns="line", values=column).reindex(columns=lines)
        by_column[column] = wide.dropna().rank(axis=1)
    blocks = pd.concat(by_column.values()).groupby(level=[0, 1])
    whole = blocks.mean()[blocks.size() == len(columns)] if len(by_column) else pd.DataFrame()
    table = pd.DataFrame({column: part.loc[whole.index].mean() for column, part in by_column.items()})
    table["mean"] = whole.mean()
    table["se"] = whole.std(ddof=1) / np.sqrt(len(whole))
    table["blocks"] = len(whole)
    return table.sort_values("mean")


def write(folder: Path) -> str:
    """Write ``report.md``, ``runs.csv`` and pictures beside the table.

    Returns:
        Text of the report.
    """
    rows = Table(folder).rows()
    if not rows:
        return f"{folder} does not contain any runs."
    frame = frame_of(rows)
    failed = frame[frame["error"].notna()] if "error" in frame else frame.iloc[:0]
    good = frame.drop(failed.index)
    parts = ["# Quality of the uncertainties", *map(markdown_of_failure, failed.to_dict("records"))]
    for split, part in good.groupby("split"):
        parts += [f"## Scored on {'validation' if split == 'val' else split}"]
        for name, own in part.groupby("dataset", sort=False):
            parts += [f"### {name}", dataset_table(own)]
        for columns in (RANKED, SCALED):
            if set(columns) <= set(part) and part[list(columns)].notna().any(axis=None):
                parts += [f"### Mean rank over {', '.join(columns)}", rank_table(ranks(part, columns), columns)]
        draw(part, folder, str(split))
    text = "\n\n".join(parts) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    good.to_csv(folder / "runs.csv", index=False)
    return text


def dataset_table(frame: pd.DataFrame) -> str:
    """Format the table of one data set in Markdown: mean ± standard error over seeds."""
    extra = [
        (c.removeprefix("ood."), c, 1, 3) for c in frame if c.startswith("ood.") and "auroc_" in c and "error" not in c
    ]
    shown = [s for s in (*SHOWN, *extra, *COST) if s[1] in frame and frame[s[1]].notna().any()]
    table = summary(frame, [column for _, column, _, _ in shown]).droplevel("dataset")
    lines = {}
    for line, row in table.iterrows():
        cells = {"runs": str(int(row["runs", ""]))}
        for heading, column, factor, digits in shown:
            cells[heading] = cell(row[column, "mean"] * factor, row[column, "se"] * factor, digits)
        lines[str(line)] = cells
    return markdown(lines)


def rank_table(table: pd.DataFrame, columns: Sequence[str] = RANKED) -> str:
    """Format the ranks in Markdown."""
    lines = {}
    for line, row in table.iterrows():
        cells = {column: f"{row[column]:.2f}" for column in columns}
        lines[str(line)] = cells | {"all": cell(row["mean"], row["se"], 2), "blocks": str(int(row["blocks"]))}
    return markdown(lines)


def cell(mean: float, se: float, digits: int) -> str:
    """Format ``mean ± se``, or the mean alone for a single run."""
    if np.isnan(mean):
        return "-"
    return f"{mean:,.{digits}f}" if np.isnan(se) else f"{mean:,.{digits}f} ± {se:,.{digits}f}"


def markdown(lines: dict[str, dict[str, str]]) -> str:
    """Format a table in Markdown with one line per method."""
    headings = ["method", *next(iter(lines.values()), {})]
    rule = ["---"] * len(headings)
    body = [[name, *cells.values()] for name, cells in lines.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, rule, *body))


def markdown_of_failure(row: dict[str, Any]) -> str:
    """Format a line about a training that failed."""
    return f"**Failed:** {row['dataset']}, {row['line']}, seed {row['seed']}: {row['error']}"


def draw(frame: pd.DataFrame, folder: Path, split: str) -> None:
    """Draw all pictures of one split: reliability, risk-coverage, and NLL against cost."""
    names, lines = frame["dataset"].unique(), frame["line"].unique()
    colors = dict(zip(lines, plt.get_cmap("tab20")(np.linspace(0, 1, max(len(lines), 2))), strict=False))
    predictions = {key: pooled(part, folder) for key, part in frame.groupby(["dataset", "line"])}
    shape: dict[str, Any] = {"squeeze": False, "layout": "constrained"}
    if any(predictions.values()):
        size = (2.8 * len(lines), 2.8 * len(names))
        figure, axes = plt.subplots(len(names), len(lines), figsize=size, sharex=True, sharey=True, **shape)
        risk_figure, risk_axes = plt.subplots(1, len(names), figsize=(4.5 * len(names), 3.8), **shape)
        for i, name in enumerate(names):
            for j, line in enumerate(lines):
                if (prediction := predictions.get((name, line))) is not None:
                    plots.reliability(prediction, ax=axes[i, j]).set_title(f"{name}, {line}", fontsize=8)
                    plots.risk_coverage(prediction, bounds=False, ax=risk_axes[0, i], label=line, color=colors[line])
            risk_axes[0, i].set_title(name)
        save(figure, folder / f"reliability-{split}.png")
        save(risk_figure, folder / f"risk_coverage-{split}.png")
    figure, axes = plt.subplots(2, len(names), figsize=(4.5 * len(names), 7), **shape)
    frame = frame.assign(seconds_in_all=frame["train_seconds"] + frame["predict_seconds"])
    costs = {"seconds_in_all": "seconds to train and predict", "total_parameters": "parameters added"}
    table = summary(frame, ["nll", *costs])
    for (name, line), row in table.iterrows():
        column = list(names).index(name)
        for ax, (cost, label) in zip(axes[:, column], costs.items(), strict=True):
            error = np.nan_to_num(row["nll", "se"])
            ax.errorbar(row[cost, "mean"], row["nll", "mean"], error, fmt="o", color=colors[line], label=line)
            ax.set(xscale="log", xlabel=label, ylabel="NLL (nats)", title=name)
    axes[0, 0].legend(frameon=False, fontsize=7)
    save(figure, folder / f"cost-{split}.png")


def pooled(frame: pd.DataFrame, folder: Path) -> Prediction | None:
    """Concatenate the predictions of all seeds, as if they had other rows; None if no probabilities are stored."""
    if "probs" not in frame:
        return None
    paths = [folder / file for file in frame["probs"].dropna() if (folder / file).exists()]
    if not paths:
        return None
    found = [kept(path) for path in paths]
    target = np.concatenate([p.target for p in found if p.target is not None])
    return Prediction(np.concatenate([p.log_probs for p in found], axis=1), target, found[0].classes)


def save(figure: Any, path: Path) -> None:
    """Write a figure and close it."""
    figure.savefig(path, dpi=130)
    plt.close(figure)
