"""Compares priors and guides on one task: cost, quality of predictions, and reliability of the diagnostics.

    python examples/ablation.py                                   # SmolLM2-135M on Reuters news, 3 x 3 pairs
    python examples/ablation.py --priors all --guides all         # every built-in; a GPU helps
    python examples/ablation.py --data train.jsonl --test-data test.jsonl

Each pair of a prior and a guide is trained from the same start on the same batches. To save time, only upper blocks
are adapted, and the blocks below them run once per row. The table, a forest plot and a pair plot go to runs/ablation/.
ablation.ipynb explains such a comparison, with pictures.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import xarray as xr
from _support.datasets import NEWS, pick, reuters_r8, word_task
from _support.models import demo_llm, upper_blocks
from matplotlib import pyplot as plt

with warnings.catch_warnings(action="ignore"):  # ArviZ 0.x warns about ArviZ 1.x
    import arviz as az

import scalabl_pyro as sp
from scalabl_pyro.analysis.arviz_data import arviz_version
from scalabl_pyro.data import read_rows
from scalabl_pyro.priors import DISTRIBUTIONS, FAMILIES

PRIORS = [*DISTRIBUTIONS, *FAMILIES]
GUIDES = list(sp.guides.NAMES)


@dataclass(frozen=True)
class Outcome:
    """Outcome of one pair of prior and guide.

    Attributes:
        result: The fit.
        prediction: Prediction of the test rows.
        row: Line of the table.
    """

    result: sp.FitResult
    prediction: sp.Prediction
    row: dict[str, float]

    @property
    def posterior(self) -> sp.Posterior:
        return self.result.posterior


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, or the given words instead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--priors",
        nargs="+",
        default=["normal", "laplace", "horseshoe"],
        choices=["all", *PRIORS],
        help="names of priors",
    )
    parser.add_argument("--guides", nargs="+", default=["normal", "lowrank", "full_covariance"], help="names of guides")
    parser.add_argument("--data", help="training rows: a JSONL file, or hf://owner/name of the hub")
    parser.add_argument("--test-data", help="test rows (default: the test split of --data)")
    parser.add_argument("--train-rows", type=int, default=200, help="number of training rows")
    parser.add_argument("--test-rows", type=int, default=200, help="number of test rows")
    parser.add_argument("--loo-rows", type=int, default=50, help="training rows for LOO and Pareto k")
    parser.add_argument("--draws", type=int, default=100, help="draws for LOO and Pareto k")
    parser.add_argument("--steps", type=int, default=150, help="training steps")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per step")
    parser.add_argument("--blocks", type=int, default=4, help="number of upper blocks to adapt")
    parser.add_argument("--max-length", type=int, default=48, help="tokens per prompt; longer texts are cut")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="use a random model and few rows, to test the script")
    args = parser.parse_args(words)
    if args.tiny:
        args.train_rows, args.test_rows, args.loo_rows, args.steps, args.draws, args.blocks = 16, 8, 8, 3, 25, 1
    args.priors = PRIORS if "all" in args.priors else args.priors
    args.guides = GUIDES if "all" in args.guides else args.guides
    return args


def load(args: argparse.Namespace):
    """Load model, task, training rows and test rows."""
    llm, tokenizer = demo_llm(tiny=args.tiny)
    if args.data is None:
        train = reuters_r8("train", count=args.train_rows, seed=args.seed)
        test = reuters_r8("test", count=args.test_rows, seed=args.seed)
        task = word_task(tokenizer, train, NEWS, args.max_length)
    else:
        train = pick(read_rows(args.data), args.train_rows, args.seed)
        test = pick(read_rows(args.test_data or args.data, split="test"), args.test_rows, args.seed)
        task = sp.MultipleChoice(tokenizer, max_length=args.max_length)
    return llm, task, train, test


def run(llm, task, train: list, test: list, prior: str, guide: str, args: argparse.Namespace) -> Outcome:
    """Train one pair of a prior and a guide, predict, and unload."""
    upper = upper_blocks(llm, args.blocks)
    blora = sp.bayesian_lora(llm, prior=prior, layers_to_transform=upper, seed=args.seed)
    try:
        start = time.perf_counter()
        result = sp.fit(
            blora,
            task,
            train,
            guide=guide,
            num_steps=args.steps,
            batch_size=args.batch_size,
            lr=5e-3,
            lr_A=5e-3,  # The stored results were made with this rate, not with the default.
            optimizer={"lr_scale": 5e-2},
            init_scale=0.3,
            seed=args.seed,
            hardware={"cache_prefix": True},
            progress=False,
        )
        seconds = time.perf_counter() - start
        posterior = result.posterior
        prediction = posterior.predict(test, num_draws=20, seed=0, batch_size=50, cache_prefix=True)
        scores = prediction.metrics().loc["value"]
        row = {name: scores[name] for name in ("accuracy", "nll", "ece")}
        table = sp.compare(
            {"": posterior}, train[: args.loo_rows], num_draws=args.draws, num_data=len(train), batch_size=50
        )
        row |= table.loc["", ["elbo", "elpd_loo", "se", "pareto_k", "good_k", "bad_rows"]]
        row["parameters"] = sum(p.numel() for p in posterior.guide.parameters())
        row["seconds"] = seconds
        return Outcome(result, prediction, row)
    finally:
        blora.unload()


def grid(llm, task, train: list, test: list, args: argparse.Namespace) -> Iterator[tuple[str, Outcome]]:
    """Run every pair, and yield its name and outcome; pairs that are refused or fail are printed and skipped."""
    for prior in args.priors:
        for guide in args.guides:
            name = f"{prior} / {guide}"
            try:
                yield name, run(llm, task, train, test, prior, guide, args)
            except ValueError as refused:  # Masks and positive latents need guides of their own.
                print(f"{name}: left out. {refused}")
            except sp.TrainingError as failed:
                print(f"{name}: failed. {failed}")


def draws_of(posterior: sp.Posterior, layer: str, num_draws: int = 500) -> xr.Dataset:
    """Draw the latents of one layer for ArviZ, without the long name of the layer."""
    group = posterior.to_arviz(num_draws=num_draws)["posterior"]
    draws = group.to_dataset() if isinstance(group, xr.DataTree) else group
    return draws[["s"]].sel(layer=layer, drop=True)


def forest(draws: dict[str, xr.Dataset]) -> plt.Figure:
    """Draw a forest plot of the same latents under every pair: medians, 50 % and 94 % intervals."""
    if arviz_version() >= (1, 0):
        az.plot_forest(draws, var_names=["s"], combined=True).add_legend("model")
        return plt.gcf()
    size = (7, 1 + 0.16 * sum(part["s"].sizes["rank"] for part in draws.values()))
    options = {"model_names": list(draws), "var_names": ["s"], "combined": True, "figsize": size, "textsize": 10}
    axes = az.plot_forest(list(draws.values()), **options)
    if legend := axes[0].get_legend():  # puts the legend beside the intervals
        legend.set_loc("upper left")
        legend.set_bbox_to_anchor((1.01, 1), transform=axes[0].transAxes)
    return plt.gcf()


def pair(draws: xr.Dataset, title: str, ranks: Sequence[int] = (0, 1, 2)) -> plt.Figure:
    """Draw some latents of one layer against each other."""
    options = {} if arviz_version() >= (1, 0) else {"figsize": (6, 5), "textsize": 10}
    az.plot_pair(draws, var_names=["s"], coords={"rank": list(ranks)}, **options)
    plt.gcf().suptitle(title, x=0.75, y=0.75)  # an empty corner
    return plt.gcf()


def main() -> None:
    """Run all pairs, and print the table as it grows."""
    plt.switch_backend("Agg")
    args = arguments()
    logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)  # no warning about articles that are cut
    args.out.mkdir(parents=True, exist_ok=True)
    rows, draws = {}, {}
    for name, outcome in grid(*load(args), args):
        rows[name] = outcome.row
        if not name.endswith(("delta", "svgd")) and len(draws) < 6:  # a forest plot with more pairs is hard to read
            draws[name] = draws_of(outcome.posterior, outcome.posterior.subspace.names[0])
        table = pd.DataFrame.from_dict(rows, orient="index").sort_values("nll")
        table.to_csv(args.out / "table.csv")
        print(table.loc[[name]].round(3).to_string(header=len(rows) == 1))
    print(f"\n{table.round(3).to_string()}\n")
    (args.out / "table.md").write_text(_markdown(table), encoding="utf-8")
    if draws:
        first, some = next(iter(draws.items()))
        pictures = {"forest.png": forest(draws), "pair.png": pair(some, first)}
        for file, figure in pictures.items():
            figure.savefig(args.out / file, dpi=120, bbox_inches="tight")
        plt.close("all")
    print(f"The table and pictures are in {args.out}/.")


def _markdown(table: pd.DataFrame) -> str:
    """Format the table in Markdown."""
    header = ["prior / guide", *table.columns]
    lines = [
        header,
        ["---"] * len(header),
        *([name, *(f"{v:.3g}" for v in row)] for name, row in zip(table.index, table.to_numpy(), strict=True)),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
