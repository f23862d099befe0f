"""Repeats the main table of the ScalaBL paper: Qwen2.5-7B, six data sets, and the published figures beside ours.

    python examples/benchmarks/paper.py --out runs/paper                         # days on one H100; can be stopped
    python examples/benchmarks/paper.py --shard 0/8 --out runs/paper             # one of eight processes
    python examples/benchmarks/paper.py --report --out runs/paper                # only the table
    python examples/benchmarks/paper.py --tiny --data-dir FOLDER --out runs/toy  # a random model: a minute

The protocol is that of the paper (Samplawski et al., UAI 2025, section 5 and Table 2): all training rows, 5,000 steps
of 4 rows, rank 8, ten draws, eight seeds. Its test rows are the validation splits of the hub, except for OpenBookQA.
All methods but `scalabl_released` have the learning rates of this library, so their figures may differ from those of
the paper. The prompts are those of this library too. Each run is a line of `table.jsonl`, as in the benchmark
`quality`, and the same command continues where it stopped.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from benchmarks.quality import sources
from benchmarks.quality.methods import METHODS
from benchmarks.quality.options import PAPER, arguments
from benchmarks.quality.report import cell, frame_of, markdown, summary
from benchmarks.quality.runner import run_command
from benchmarks.quality.table import Table

#: Data sets whose test rows in the paper are the validation split of the hub.
ON_VALIDATION = ("winogrande_s", "winogrande_m", "arc_c", "arc_e", "boolq")
#: Metrics of the table: heading, column, factor, digits.
METRICS = (("accuracy %", "accuracy", 100, 2), ("ECE %", "ece", 100, 2), ("NLL", "nll", 1, 3))
#: Means over 8 seeds that the paper's Table 2 prints for Qwen2.5-7B, in the order of ``PAPER``, by metric.
PUBLISHED = {
    "mle": {
        "accuracy": (78.86, 82.30, 89.53, 95.60, 92.25, 89.06),
        "ece": (20.14, 16.10, 10.11, 4.17, 6.40, 3.79),
        "nll": (1.94, 1.20, 1.05, 0.44, 0.38, 0.25),
    },
    "map": {
        "accuracy": (78.94, 82.09, 88.98, 95.73, 91.72, 89.04),
        "ece": (19.99, 16.42, 10.54, 4.08, 6.61, 3.81),
        "nll": (1.88, 1.27, 1.05, 0.43, 0.39, 0.25),
    },
    "mc_dropout": {
        "accuracy": (78.57, 82.72, 89.44, 95.77, 91.80, 88.99),
        "ece": (20.15, 15.46, 10.06, 4.01, 6.60, 3.88),
        "nll": (1.90, 1.07, 1.02, 0.42, 0.36, 0.25),
    },
    "ensemble": {
        "accuracy": (79.09, 83.23, 89.44, 95.73, 92.70, 89.13),
        "ece": (19.06, 13.65, 10.13, 3.75, 4.96, 2.61),
        "nll": (1.33, 0.74, 0.75, 0.25, 0.27, 0.24),
    },
    "laplace_lora": {
        "accuracy": (77.28, 81.99, 85.25, 95.34, 91.68, 87.77),
        "ece": (13.32, 4.81, 37.90, 33.80, 1.90, 1.18),
        "nll": (0.55, 0.44, 0.80, 0.51, 0.23, 0.29),
    },
    "blob": {
        "accuracy": (78.66, 82.30, 89.53, 96.54, 91.72, 89.05),
        "ece": (7.88, 5.08, 4.03, 1.60, 2.16, 1.40),
        "nll": (0.51, 0.39, 0.30, 0.10, 0.21, 0.23),
    },
    "scalabl": {
        "accuracy": (78.64, 81.42, 90.16, 96.26, 90.90, 88.48),
        "ece": (8.88, 3.64, 5.03, 1.78, 2.43, 1.96),
        "nll": (0.51, 0.40, 0.31, 0.11, 0.23, 0.24),
    },
}
PUBLISHED["scalabl_released"] = PUBLISHED["scalabl"]


def options() -> argparse.Namespace:
    """Read the command line: that of the benchmark of quality, with the settings of the paper where none are given."""
    given = sys.argv[1:]
    settings = {"--model": "Qwen/Qwen2.5-7B", "--steps": "5000", "--batch-size": "4", "--train-rows": "0"}
    settings |= {"--val-rows": "0", "--out": "runs/paper"}
    words = [word for name, value in settings.items() if name not in given for word in (name, value)]
    words += [] if "--seeds" in given else ["--seeds", *map(str, range(8))]
    words += [] if "--methods" in given else ["--methods", *(name for name in METHODS if name != "tfb")]
    return arguments(__doc__, [*words, *given])


def table(folder: Path) -> str:
    """Make a table per metric in Markdown: ours, mean ± standard error over seeds, and the published mean behind it."""
    rows = [row for row in Table(folder).rows() if "error" not in row]
    if not rows:
        return f"{folder} does not contain any runs."
    frame = frame_of(rows)
    parts = []
    for heading, column, factor, digits in METRICS:
        found, lines = summary(frame, [column]), {}
        for method in dict.fromkeys(frame["line"]):
            cells = {}
            for place, name in enumerate(PAPER):
                published = PUBLISHED.get(method, {}).get(column)
                theirs = "" if published is None else f" (paper {published[place]:g})"
                own = found.loc[(name, method)] if (name, method) in found.index else None
                mean, se = (float("nan"),) * 2 if own is None else (own[column, "mean"], own[column, "se"])
                cells[name] = cell(mean * factor, se * factor, digits) + theirs
            lines[method] = cells
        parts += [f"## {heading}", markdown(lines)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Do the runs that are missing, and write the table."""
    args = options()
    for name in ON_VALIDATION:
        sources.SOURCES[name] = replace(sources.SOURCES[name], test="validation")
    sources.SOURCES["openbookqa"] = replace(sources.SOURCES["openbookqa"], ood=())
    failed = run_command(args)
    text = table(args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "paper.md").write_text(text, encoding="utf-8")
    print(text)
    sys.exit(f"{failed} runs failed; see above." if failed else 0)


if __name__ == "__main__":
    main()
