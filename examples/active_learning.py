"""Pool-based active learning: chooses the rows that are worth a label.

    python examples/active_learning.py                     # SmolLM2-135M on Reuters news; no network
    python examples/active_learning.py --data-dir DATA     # TREC, DATA/trec_train.jsonl and trec_test.jsonl
    python examples/active_learning.py --data train.jsonl --test-data test.jsonl    # your own data

The script starts with a few labeled rows. Each round fits ScalaBL from scratch on all labels so far, scores the pool,
and labels the rows with the highest scores. The score is BALD (mutual information of answer and draw), the entropy, or
random. For one seed, all strategies share the pool, the first labels and the first fit. Tables and a picture go to
runs/active_learning/. Seeds whose results are already there are not run again.
"""

import argparse
import logging
import time
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pandas as pd
from _support.acquisition import STRATEGIES, Pool, scores
from _support.datasets import NEWS, TREC, distinct, pick, reuters_r8, trec, word_task
from _support.models import demo_llm
from _support.run_settings import earlier_lines, save_settings
from _support.upper_block_fits import fit_upper_blocks, predict_rows
from matplotlib import pyplot as plt

import scalabl_pyro as sp
from scalabl_pyro.data import read_rows

METRICS = {"accuracy": "test accuracy", "nll": "test NLL (nats)"}
COLORS = dict(zip(STRATEGIES, (sp.plots.MARK, sp.plots.WARM, sp.plots.QUIET), strict=True))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with trec_train.jsonl and trec_test.jsonl")
    parser.add_argument("--data", help="rows of the pool: a JSONL file, or hf://owner/name of the hub")
    parser.add_argument("--test-data", help="test rows (default: the test split of --data)")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES, help="scores to compare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run per seed")
    parser.add_argument("--pool-rows", type=int, default=200, help="rows of the pool")
    parser.add_argument("--test-rows", type=int, default=150, help="test rows")
    parser.add_argument("--start", type=int, default=20, help="rows labeled at random at the start")
    parser.add_argument("--acquire", type=int, default=30, help="rows labeled per round")
    parser.add_argument("--rounds", type=int, default=2, help="number of rounds")
    parser.add_argument("--steps", type=int, default=60, help="training steps per fit")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per step")
    parser.add_argument("--lr", type=float, default=2e-2, help="learning rate")
    parser.add_argument("--draws", type=int, default=8, help="draws per prediction")
    parser.add_argument("--blocks", type=int, default=1, help="number of upper blocks to adapt")
    parser.add_argument("--max-length", type=int, default=48, help="tokens per prompt; longer texts are cut")
    parser.add_argument("--out", type=Path, default=Path("runs/active_learning"), help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="use a random model and few rows, to test the script")
    args = parser.parse_args()
    if args.tiny:
        args.pool_rows, args.test_rows, args.start, args.acquire, args.rounds = 14, 8, 4, 4, 3
        args.steps, args.blocks, args.seeds = 2, 1, args.seeds[:2]
    return args


def load_data(args: argparse.Namespace) -> tuple[list, list]:
    """Read the rows that pools are drawn from, without rows that are also in test, and the test rows."""
    if args.data is not None:
        train, test = read_rows(args.data), read_rows(args.test_data or args.data, split="test")
    elif args.data_dir is not None:
        train, test = trec(args.data_dir, "train"), trec(args.data_dir, "test")
    else:  # Classes keep their natural frequencies: finding the rare ones is half the task.
        train, test = (reuters_r8(s, count=10**6, seed=0, balanced=False) for s in ("train", "test"))
    test = [dict(row) for row in test]
    return distinct([dict(row) for row in train], but=test), pick(test, args.test_rows, 0)


def make_task(args: argparse.Namespace, tokenizer, rows: list) -> sp.MultipleChoice:
    """Make the task: TREC and news are answered with the word of a class, other data with the letter of a choice."""
    if args.data is not None:
        return sp.MultipleChoice(tokenizer, max_length=args.max_length)
    template = NEWS if args.data_dir is None else TREC
    return word_task(tokenizer, rows, template, args.max_length)


def run(llm, task: sp.Task, pool_rows: list, test_rows: list, args: argparse.Namespace, seed: int) -> list[dict]:
    """Run every strategy from the same start.

    Returns:
        One line of scores per strategy and number of labels.
    """
    lines = []

    def visit(labeled: list[int], *, ask_pool: bool) -> tuple[dict, sp.Prediction | None]:
        """Fit on the labeled rows; return scores on test, and the prediction of the pool if asked for."""
        posterior = fit_upper_blocks(llm, task, [pool_rows[i] for i in labeled], args, seed)
        tested = predict_rows(posterior, test_rows, num_draws=args.draws, seed=seed).metrics().loc["value"]
        pool = predict_rows(posterior, pool_rows, num_draws=args.draws, seed=seed) if ask_pool else None
        posterior.blora().unload()
        return tested[["accuracy", "nll", "ece"]].to_dict(), pool

    start = list(range(args.start))  # the order of the pool is random
    first = visit(start, ask_pool=True)
    for strategy in args.strategies:
        pool, (row, prediction) = Pool(len(pool_rows), start), first
        rng = np.random.default_rng([seed, STRATEGIES.index(strategy)])
        for step in range(args.rounds + 1):
            lines.append({"seed": seed, "strategy": strategy, "labels": len(pool.labeled), **row})
            print(" ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in lines[-1].items()))
            if step == args.rounds or len(pool.unlabeled) == 0:
                break
            wanted = np.zeros(pool.size) if prediction is None else scores(strategy, prediction)
            pool.acquire(wanted, args.acquire, rng)
            row, prediction = visit(pool.labeled, ask_pool=strategy != "random" and step + 1 < args.rounds)
    return lines


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Compute mean and standard error over seeds, for each strategy and number of labels."""
    return runs.groupby(["strategy", "labels"])[list(METRICS)].agg(["mean", "sem"])


def against_random(runs: pd.DataFrame) -> pd.DataFrame:
    """Compare each strategy with random labels: mean over the rounds after the start, minus that of random labels.

    Returns:
        Mean and standard error over seeds of this difference, per strategy.
    """
    later = runs[runs["labels"] > runs["labels"].min()]
    means = later.groupby(["strategy", "seed"])[list(METRICS)].mean()
    others = [name for name in means.index.unique("strategy") if name != "random"]
    return pd.concat(
        {name: (means.loc[name] - means.loc["random"]).agg(["mean", "sem"]).T.stack() for name in others}
    ).unstack([-2, -1])


def picture(table: pd.DataFrame, path: Path) -> None:
    """Draw the scores against the number of labels, with bars of one standard error."""
    _, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for ax, (name, title) in zip(axes, METRICS.items(), strict=True):
        for shift, (strategy, part) in zip((-0.004, 0, 0.004), table.groupby(level="strategy"), strict=False):
            labels, values = part.index.get_level_values("labels"), part[name]
            bars = {"yerr": values["sem"].fillna(0), "capsize": 2, "marker": "o", "markersize": 3}
            x = labels + shift * labels.max()  # puts bars side by side
            ax.errorbar(x, values["mean"], **bars, color=COLORS[strategy], label=strategy.replace("bald", "BALD"))
        ax.set(xlabel="labeled rows", ylabel=title, xticks=sorted(table.index.unique("labels")))
    axes[0].legend(frameon=False)
    plt.gcf().savefig(path, dpi=150)
    plt.close("all")


def main() -> None:
    """Run all seeds, and write the tables after each."""
    args, start = arguments(), time.perf_counter()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)  # no warning about articles that are cut
    args.out.mkdir(parents=True, exist_ok=True)
    lines = earlier_lines(args, args.out / "runs.csv", args.out / "settings.json")
    if todo := [seed for seed in args.seeds if seed not in {line["seed"] for line in lines}]:
        llm, tokenizer = demo_llm(tiny=args.tiny)
        train, test_rows = load_data(args)
        task = make_task(args, tokenizer, test_rows)
    for seed in todo:
        lines += run(llm, task, pick(train, args.pool_rows, seed), test_rows, args, seed)
        pd.DataFrame(lines).to_csv(args.out / "runs.csv", index=False)
        save_settings(args, args.out / "settings.json")
    runs = pd.DataFrame(lines)
    table = summary(runs)
    table.to_csv(args.out / "summary.csv")
    picture(table, args.out / "curves.png")
    print(f"\n{table.round(3).to_string()}")
    if "random" in args.strategies and len(args.strategies) > 1:
        print("\nDifference from random labels, over all rounds after the start:")
        print(against_random(runs).round(3).to_string())
    print(f"\nTables and curves.png are in {args.out}/. {time.perf_counter() - start:.0f} seconds in total.")


if __name__ == "__main__":
    main()
