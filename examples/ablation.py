"""Priors x guides on one task: what each costs, how well it predicts, and how far its numbers can be trusted.

    python examples/ablation.py                                   # SmolLM2-135M on Reuters news, 3 x 3 pairs
    python examples/ablation.py --priors all --guides all         # every built-in; a GPU helps
    python examples/ablation.py --data train.jsonl --test-data test.jsonl

Each pair is trained from the same start on the same batches. Only the upper blocks are adapted, and what lies below
them runs once a row, which is what makes this fast. The table, a forest plot and a pair plot go to runs/ablation/.
ablation.ipynb does the same, with pictures and what they mean.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import sources
import torch
import xarray as xr
from matplotlib import pyplot as plt

with warnings.catch_warnings(action="ignore"):  # ArviZ 0.x announces ArviZ 1.x
    import arviz as az

import scalabl_pyro as sp
from scalabl_pyro.analysis.arviz_data import arviz_version
from scalabl_pyro.data import read_rows
from scalabl_pyro.priors import DISTRIBUTIONS, FAMILIES

PRIORS = [*DISTRIBUTIONS, *FAMILIES]
GUIDES = list(sp.guides.NAMES)


@dataclass(frozen=True)
class Outcome:
    """What one pair of prior and guide gave: the fit, the prediction of the test rows, its line of the table."""

    result: sp.FitResult
    prediction: sp.Prediction
    row: dict[str, float]

    @property
    def posterior(self) -> sp.Posterior:
        return self.result.posterior


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, or these words in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--priors", nargs="+", default=["normal", "laplace", "horseshoe"], choices=["all", *PRIORS])
    parser.add_argument("--guides", nargs="+", default=["normal", "lowrank", "full_covariance"])
    parser.add_argument("--data", help="training rows: a data set of the hub, or a JSONL file")
    parser.add_argument("--test-data", help="test rows, if not the test split of --data")
    parser.add_argument("--train-rows", type=int, default=200)
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--loo-rows", type=int, default=50, help="training rows behind LOO and k-hat")
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=4, help="adapt this many of the upper blocks")
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--tiny", action="store_true", help="a random model and few rows, to try that it runs")
    args = parser.parse_args(words)
    if args.tiny:
        args.train_rows, args.test_rows, args.loo_rows, args.steps, args.draws, args.blocks = 16, 8, 8, 3, 25, 1
    args.priors = PRIORS if "all" in args.priors else args.priors
    args.guides = GUIDES if "all" in args.guides else args.guides
    return args


def load(args: argparse.Namespace):
    """Model, task, training rows and test rows."""
    llm, tokenizer = sources.tiny_llm() if args.tiny else sources.smollm2()
    llm.to("cuda" if torch.cuda.is_available() else "cpu")
    if args.data is None:
        train = sources.reuters_r8("train", count=args.train_rows, seed=args.seed)
        test = sources.reuters_r8("test", count=args.test_rows, seed=args.seed)
        task = sources.word_task(tokenizer, train, sources.NEWS, args.max_length)
    else:
        train = sources.pick(read_rows(args.data), args.train_rows, args.seed)
        test = sources.pick(read_rows(args.test_data or args.data, split="test"), args.test_rows, args.seed)
        task = sp.MultipleChoice(tokenizer, max_length=args.max_length)
    return llm, task, train, test


def run(llm, task, train: list, test: list, prior: str, guide: str, args: argparse.Namespace) -> Outcome:
    """Train one pair from the common start."""
    depth = llm.config.get_text_config().num_hidden_layers
    blora = sp.bayesian_lora(llm, prior=prior, layers_to_transform=range(depth - args.blocks, depth), seed=args.seed)
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
            lr_A=5e-3,  # as the results kept were made
            lr_scale=5e-2,
            init_scale=0.3,
            seed=args.seed,
            cache_prefix=True,
            progress=False,
        )
        seconds = time.perf_counter() - start
        posterior = result.posterior
        prediction = posterior.predict(test, num_draws=20, seed=0, batch_size=50)
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
    """Every pair by name as soon as it is there; those that do not go together, or fail, are named and left out."""
    for prior in args.priors:
        for guide in args.guides:
            name = f"{prior} / {guide}"
            try:
                yield name, run(llm, task, train, test, prior, guide, args)
            except ValueError as refused:  # masks need their own guide, positive latents a positive one
                print(f"{name}: left out. {refused}")
            except sp.TrainingError as failed:
                print(f"{name}: failed. {failed}")


def draws_of(posterior: sp.Posterior, layer: str, num_draws: int = 500) -> xr.Dataset:
    """Draws of one layer for ArviZ, without its long name."""
    group = posterior.to_arviz(num_draws=num_draws)["posterior"]
    draws = group.to_dataset() if isinstance(group, xr.DataTree) else group
    return draws[["s"]].sel(layer=layer, drop=True)


def forest(draws: dict[str, xr.Dataset]) -> plt.Figure:
    """The same latents under every pair: medians, 50 % and 94 % of the draws."""
    if arviz_version() >= (1, 0):
        az.plot_forest(draws, var_names=["s"], combined=True)
        return plt.gcf()
    size = (7, 1 + 0.16 * sum(part["s"].sizes["rank"] for part in draws.values()))
    options = {"model_names": list(draws), "var_names": ["s"], "combined": True, "figsize": size, "textsize": 10}
    axes = az.plot_forest(list(draws.values()), **options)
    if legend := axes[0].get_legend():  # beside the intervals instead of on them
        legend.set_loc("upper left")
        legend.set_bbox_to_anchor((1.01, 1), transform=axes[0].transAxes)
    return plt.gcf()


def pair(draws: xr.Dataset, title: str, ranks: Sequence[int] = (0, 1, 2)) -> plt.Figure:
    """Latents of one layer against each other."""
    options = {} if arviz_version() >= (1, 0) else {"figsize": (6, 5), "textsize": 10}
    az.plot_pair(draws, var_names=["s"], coords={"rank": list(ranks)}, **options)
    plt.gcf().suptitle(title, x=0.75, y=0.75)  # where no panel is
    return plt.gcf()


def main() -> None:
    """Run the grid, print the table as it grows."""
    plt.switch_backend("Agg")
    args = arguments()
    logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)  # that long articles are cut is known here
    args.out.mkdir(parents=True, exist_ok=True)
    rows, draws = {}, {}
    for name, outcome in grid(*load(args), args):
        rows[name] = outcome.row
        if not name.endswith(("delta", "svgd")) and len(draws) < 6:  # a forest of more is no longer read
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
    """The table for a page of the docs."""
    header = ["prior / guide", *table.columns]
    lines = [
        header,
        ["---"] * len(header),
        *([name, *(f"{v:.3g}" for v in row)] for name, row in zip(table.index, table.to_numpy(), strict=True)),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
