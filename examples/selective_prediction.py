"""Selective prediction: answer the rows that the model is sure of, and leave the others to a person.

    python examples/selective_prediction.py                   # SmolLM2-135M on Reuters news; needs no network
    python examples/selective_prediction.py --targets 0.9 0.95 --delta 0.05

The script fits ScalaBL once per seed. On test rows it compares three scores of doubt: 1 - maximum probability, entropy,
and mutual information of answer and draw. It reports the area under the risk-coverage curve of each score, and the
AUROC of telling 20 Newsgroups posts from test rows. Then it chooses a threshold on validation rows for a target
accuracy, and measures coverage and accuracy on test rows. Tables and a picture go to runs/selective_prediction/.
"""

import argparse
import logging
import time
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import pandas as pd
from _support.datasets import NEWS, distinct, newsgroups, pick, reuters_r8, word_task
from _support.models import demo_llm
from _support.run_settings import save_settings
from _support.selection import SCORES, doubt, threshold
from _support.upper_block_fits import fit_upper_blocks, predict_rows
from matplotlib import pyplot as plt

import scalabl_pyro as sp
from scalabl_pyro import metrics, plots

COLORS = dict(zip(SCORES, (plots.MARK, plots.WARM, plots.QUIET), strict=True))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.9, 0.95], help="target accuracies")
    parser.add_argument("--delta", type=float, default=0.05, help="probability that a guaranteed threshold fails")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one fit per seed")
    parser.add_argument("--train-rows", type=int, default=200, help="training rows")
    parser.add_argument("--val-rows", type=int, default=200, help="validation rows")
    parser.add_argument("--test-rows", type=int, default=300, help="test rows")
    parser.add_argument("--ood-rows", type=int, default=200, help="rows of 20 Newsgroups")
    parser.add_argument("--steps", type=int, default=100, help="training steps")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per step")
    parser.add_argument("--lr", type=float, default=5e-3, help="learning rate")
    parser.add_argument("--draws", type=int, default=10, help="draws per prediction")
    parser.add_argument("--blocks", type=int, default=2, help="number of upper blocks to adapt")
    parser.add_argument("--max-length", type=int, default=48, help="tokens per prompt; longer texts are cut")
    parser.add_argument("--out", type=Path, default=Path("runs/selective_prediction"), help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="use a random model and few rows, to test the script")
    args = parser.parse_args()
    if args.tiny:
        args.train_rows, args.val_rows, args.test_rows, args.ood_rows = 16, 12, 12, 8
        args.steps, args.blocks, args.seeds = 2, 1, args.seeds[:2]
    return args


def load_data(args: argparse.Namespace) -> tuple[list, list, list, list]:
    """Read training, validation and test rows with their natural class frequencies, and 20 Newsgroups posts."""
    rows = {part: reuters_r8(part, count=10**6, seed=0, balanced=False) for part in ("train", "test")}
    pool = pick(distinct(rows["train"], but=rows["test"]), args.train_rows + args.val_rows, 0)
    test = pick(rows["test"], args.test_rows, 0)
    return pool[: args.train_rows], pool[args.train_rows :], test, newsgroups(count=args.ood_rows, seed=0)


def compare_scores(test: sp.Prediction, ood: sp.Prediction) -> dict[str, dict[str, float]]:
    """Compute the area under the risk-coverage curve and the AUROCs of each score.

    Args:
        test: Prediction of test rows.
        ood: Prediction of 20 Newsgroups posts.
    """
    return {
        score: {
            "aurc": metrics.aurc(test.probs, test.target, uncertainty=doubt(test, score)),
            "error_auroc": metrics.auroc(doubt(test, score), test.labels != test.target),
            "ood_auroc": metrics.ood_auroc(doubt(test, score), doubt(ood, score)),
        }
        for score in SCORES
    }


def apply_rules(val: sp.Prediction, test: sp.Prediction, args: argparse.Namespace) -> dict[tuple, dict[str, float]]:
    """Choose thresholds on the predicted risk 1 - max_c p_c on validation, and measure them on test.

    The rule "seen" reaches the target accuracy on validation; "guaranteed" reaches it on new rows with probability
    1 - delta.
    """
    found = {}
    for target in args.targets:
        for rule, delta in {"seen": None, "guaranteed": args.delta}.items():
            limit = threshold(doubt(val, "max_prob"), val.labels != val.target, 1 - target, delta=delta)
            answered = doubt(test, "max_prob") <= limit
            right = (test.labels == test.target)[answered]
            found[target, rule] = {
                "threshold": limit if answered.any() else float("nan"),
                "val_coverage": float((doubt(val, "max_prob") <= limit).mean()),
                "coverage": float(answered.mean()),
                "accuracy": float(right.mean()) if len(right) else float("nan"),
            }
    return found


def picture(test: sp.Prediction, ood: sp.Prediction, args: argparse.Namespace) -> None:
    """Draw risk against coverage of each score, and histograms of the entropy, for one seed."""
    _, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for score in SCORES:
        name = score.replace("_", " ")
        plots.risk_coverage(test, uncertainty=doubt(test, score), ax=axes[0], label=name, color=COLORS[score])
    plots.uncertainty_histogram(test, ood, ax=axes[1])
    axes[1].set_title(f"Entropy: {axes[1].get_title()}")
    axes[1].set_ylim(top=1.3 * axes[1].get_ylim()[1])  # makes room for the legend
    plt.gcf().savefig(args.out / "selective.png", dpi=150)
    plt.close("all")


def mean_and_error(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Compute mean and standard error over seeds."""
    return frame.drop(columns="seed").groupby(by, sort=False).agg(["mean", "sem"])


def main() -> None:
    """Fit, compare the scores and apply the rules, once per seed."""
    args, start = arguments(), time.perf_counter()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)  # no warning about articles that are cut
    args.out.mkdir(parents=True, exist_ok=True)
    llm, tokenizer = demo_llm(tiny=args.tiny)
    train, *parts = load_data(args)
    task = word_task(tokenizer, train, NEWS, args.max_length)
    plain, scored, ruled = [], [], []
    for seed in args.seeds:
        posterior = fit_upper_blocks(llm, task, train, args, seed)
        val, test, ood = (predict_rows(posterior, rows, num_draws=args.draws, seed=seed) for rows in parts)
        posterior.blora().unload()
        plain.append({"seed": seed, **test.metrics().loc["value", ["accuracy", "nll", "ece"]]})
        print(" ".join(f"{k} {v:.3g}" for k, v in plain[-1].items()), flush=True)
        scored += [{"seed": seed, "score": k, **row} for k, row in compare_scores(test, ood).items()]
        ruled += [{"seed": seed, "target": t, "rule": r, **x} for (t, r), x in apply_rules(val, test, args).items()]
        if seed == args.seeds[0]:
            picture(test, ood, args)
        tables = {"plain": pd.DataFrame(plain), "scores": pd.DataFrame(scored), "rules": pd.DataFrame(ruled)}
        for name, table in tables.items():
            table.to_csv(args.out / f"{name}.csv", index=False)
        save_settings(args, args.out / "settings.json")
    print("\nScores when all test rows are answered:")
    print(tables["plain"].drop(columns="seed").agg(["mean", "sem"]).round(3))
    print(f"\n{mean_and_error(tables['scores'], ['score']).round(3).to_string()}")
    print(f"\n{mean_and_error(tables['rules'], ['target', 'rule']).round(3).to_string()}")
    print(f"\nTables and selective.png are in {args.out}/. {time.perf_counter() - start:.0f} seconds in total.")


if __name__ == "__main__":
    main()
