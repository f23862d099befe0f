"""What the demo prints and draws: tables and pictures of its methods, with earlier runs of other seeds behind it."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

import scalabl_pyro as sp
from scalabl_pyro import metrics, plots

#: Folder of the stored runs, one file per seed. ``--store`` writes them.
STORED = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "demo"
#: Options that a stored run must share with this one.
SHARED = ("model", "data", "train_rows", "test_rows", "other_rows", "steps", "batch_size", "draws", "blocks",
          "max_length", "tiny")  # fmt: skip
#: An answer with a larger probability is a confident one.
CONFIDENT = 0.9


@dataclass(frozen=True)
class Run:
    """One method with one seed.

    Attributes:
        predictions: Predictions by the name of their source; the first source is that of the training rows.
        fit_s: Seconds of the training.
    """

    predictions: dict[str, sp.Prediction]
    fit_s: float

    def scores(self) -> dict[str, pd.Series]:
        """Compute the metrics of each source."""
        (first, inside), *others = self.predictions.items()
        found = {first: quality(inside)}
        for name, outside in others:
            line = quality(outside) if outside.is_answered.all() else pd.Series(dtype=float)
            line["AUROC of the entropy"] = metrics.ood_auroc(inside.total, outside.total)
            found[f"{name} (not like the training rows)"] = line
        seconds = {"fit": self.fit_s, "predict": sum(p.seconds for p in self.predictions.values())}
        return found | {"seconds": pd.Series(seconds)}


def quality(prediction: sp.Prediction) -> pd.Series:
    """Compute the metrics of rows with answers, and count the confident answers and the wrong ones among them."""
    names = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE", "brier": "Brier"}
    line = prediction.metrics().loc["value", list(names)].rename(names).rename(None)
    found = metrics.confident_mistakes(prediction.probs, prediction.target, threshold=CONFIDENT)
    line[f"p > {CONFIDENT:g}"], line["of these wrong"] = found.confident, found.mistakes
    return line


def compare(runs: dict[str, Run], earlier: list[dict[str, Run]]) -> dict[str, pd.DataFrame]:
    """Make a table per source, one line per method; with earlier runs, the means ± standard errors over all seeds too.

    Args:
        runs: This run, by method.
        earlier: Runs of other seeds.

    Returns:
        Tables by title.
    """
    scores = {name: run.scores() for name, run in runs.items()}
    before = [{name: run.scores() for name, run in one.items()} for one in earlier]
    tables = {}
    for source in next(iter(scores.values())):
        tables[source] = pd.DataFrame({name: found[source] for name, found in scores.items()}).T.round(3)
        if before and source != "seconds":
            lines = {name: _mean([one[name][source] for one in (scores, *before)]) for name in scores}
            tables[f"{source}, mean of {len(before) + 1} seeds ± standard error"] = pd.DataFrame(lines).T
    return tables


def _mean(lines: list[pd.Series]) -> pd.Series:
    found = pd.DataFrame(lines)
    return pd.Series(
        {name: f"{column.mean():.3g} ± {column.sem():.1g}" for name, column in found.items()}, index=found.columns
    )


def draw(runs: dict[str, Run], earlier: list[dict[str, Run]], path: Path) -> None:
    """Draw reliability, selective prediction, confident mistakes and NLL into one picture.

    Args:
        runs: This run, by method. The posterior mean is left out.
        earlier: Runs of other seeds. They stand behind the confident mistakes and the NLL.
        path: File of the picture.
    """
    names = [name for name in runs if not name.endswith("mean")]
    source = next(iter(runs[names[0]].predictions))
    live = {name: runs[name].predictions[source] for name in names}
    every = {name: [one[name] for one in (runs, *earlier)] for name in names}
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.6), layout="constrained")
    plots.reliability(live, num_bins=8, bins="mass", ax=axes[0, 0])
    plots.risk_coverage(live, ax=axes[0, 1])
    several = {name: [run.predictions[source] for run in found] for name, found in every.items()}
    plots.confident_mistakes(several, threshold=CONFIDENT, ax=axes[1, 0])
    draw_nll(every, axes[1, 1])
    seeds = f"; below: this run and {len(earlier)} stored seeds" if earlier else ""
    figure.suptitle(f"{source}, {len(live[names[0]].labels)} test rows{seeds}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_nll(runs: dict[str, list[Run]], ax: plt.Axes) -> None:
    """Draw the NLL of each labeled source: a bar for the mean over seeds, and a dot per seed."""
    first = next(iter(runs.values()))[0]
    sources = [name for name, found in first.predictions.items() if found.is_answered.all()]
    width, offsets = 0.8 / len(runs), np.arange(len(sources))
    for k, (name, found) in enumerate(runs.items()):
        values = np.array(
            [[run.predictions[source].metrics().loc["value", "nll"] for run in found] for source in sources]
        )
        x = offsets + (k - (len(runs) - 1) / 2) * width
        color, hatch = (plots.MARK, "///") if k == 0 else (plots.WARM, None)
        ax.bar(
            x,
            values.mean(1),
            0.9 * width,
            label=name,
            facecolor="none" if hatch else color,
            edgecolor=color,
            hatch=hatch,
        )
        for place, row in zip(x, values, strict=True):
            ax.annotate(
                f"{row.mean():.3f}", (place, row.max()), (0, 4), textcoords="offset points", ha="center", fontsize=8
            )
            dots = place + np.linspace(-0.2, 0.2, len(row)) * width
            ax.plot(dots, row, linestyle="", marker="o", markersize=3.5, color="white", markeredgecolor="#222222")
    ax.set_xticks(offsets, sources)
    ax.set(ylabel="NLL (nats per row), lower is better", title="Negative log-likelihood; a dot per seed")
    ax.set_ylim(0, 1.25 * ax.get_ylim()[1])  # room for the legend
    ax.legend(frameon=False, loc="upper left", fontsize="small")


def store(args: argparse.Namespace, runs: dict[str, Run]) -> None:
    """Write the averaged probabilities of a run, to four digits, into the folder of stored runs."""
    methods = {
        name: {"fit_s": round(run.fit_s, 1), "predictions": {s: _plain(p) for s, p in run.predictions.items()}}
        for name, run in runs.items()
    }
    STORED.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"settings": _settings(args), "version": sp.__version__, "methods": methods})
    (STORED / f"seed-{args.seed}.json").write_text(text + "\n", encoding="utf-8")


def stored_runs(args: argparse.Namespace) -> list[dict[str, Run]]:
    """Read the stored runs with the settings of this one and with other seeds."""
    found = []
    for path in sorted(STORED.glob("seed-*.json")):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["settings"] == _settings(args) and path.stem != f"seed-{args.seed}":
            methods = kept["methods"].items()
            found.append({name: Run(_predictions(run["predictions"]), run["fit_s"]) for name, run in methods})
    return found


def _settings(args: argparse.Namespace) -> dict:
    return {name: getattr(args, name) for name in SHARED}


def _plain(prediction: sp.Prediction) -> dict:
    target = None if prediction.target is None else [int(label) for label in prediction.target]
    probs = [[float(f"{p:.4g}") for p in row] for row in prediction.probs]
    return {"classes": list(prediction.classes), "probs": probs, "target": target}


def _predictions(kept: dict) -> dict[str, sp.Prediction]:
    found = {}
    for name, one in kept.items():
        target = None if one["target"] is None else np.array(one["target"])
        found[name] = sp.Prediction(np.log([one["probs"]]), target, tuple(one["classes"]))
    return found
