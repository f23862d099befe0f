"""Selective prediction: answer where the model is sure, leave the rest to somebody else.

    python examples/selective_prediction.py                   # SmolLM2-135M on Reuters news; needs no network
    python examples/selective_prediction.py --targets 0.9 0.95 --delta 0.05

ScalaBL is fitted once a seed. Three scores of doubt (1 - maximum probability, entropy, mutual information of answer
and draw) are compared on test by the area under the risk-coverage curve, and by the AUROC of telling 20 Newsgroups
posts from test rows. Then a threshold is chosen on validation for a target accuracy, and coverage and accuracy are
measured on test. Tables and a picture go to runs/selective_prediction/.
"""

import argparse
import logging
import time
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import pandas as pd
import sources
import torch
from kept_rows import KeptRows, fit_upper_blocks
from matplotlib import pyplot as plt
from selection import SCORES, doubt, threshold

import scalabl_pyro as sp
from scalabl_pyro import metrics, plots

COLORS = dict(zip(SCORES, (plots.MARK, plots.WARM, plots.QUIET), strict=True))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.9, 0.95], help="accuracy wanted of the answers")
    parser.add_argument("--delta", type=float, default=0.05, help="probability that a guaranteed threshold may fail")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-rows", type=int, default=200)
    parser.add_argument("--val-rows", type=int, default=200)
    parser.add_argument("--test-rows", type=int, default=300)
    parser.add_argument("--ood-rows", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--blocks", type=int, default=2, help="adapt this many of the upper blocks")
    parser.add_argument("--max-length", type=int, default=48, help="tokens of a prompt; longer texts are cut")
    parser.add_argument("--out", type=Path, default=Path("runs/selective_prediction"))
    parser.add_argument("--tiny", action="store_true", help="a random model and few rows, to try that it runs")
    args = parser.parse_args()
    if args.tiny:
        args.train_rows, args.val_rows, args.test_rows, args.ood_rows = 16, 12, 12, 8
        args.steps, args.blocks, args.seeds = 2, 1, args.seeds[:2]
    return args


def load_data(args: argparse.Namespace) -> tuple[list, list, list, list]:
    """Training, validation and test rows, classes as frequent as they are, and rows from elsewhere."""
    rows = {part: sources.reuters_r8(part, count=10**6, seed=0, balanced=False) for part in ("train", "test")}
    pool = sources.pick(sources.distinct(rows["train"], but=rows["test"]), args.train_rows + args.val_rows, 0)
    test = sources.pick(rows["test"], args.test_rows, 0)
    return pool[: args.train_rows], pool[args.train_rows :], test, sources.newsgroups(count=args.ood_rows, seed=0)


def compare_scores(test: sp.Prediction, ood: sp.Prediction) -> dict[str, dict[str, float]]:
    """Area under risk and coverage, and OOD AUROC, of each score."""
    return {
        score: {
            "aurc": metrics.aurc(test.probs, test.target, uncertainty=doubt(test, score)),
            "error_auroc": metrics.auroc(doubt(test, score), test.labels != test.target),
            "ood_auroc": metrics.ood_auroc(doubt(test, score), doubt(ood, score)),
        }
        for score in SCORES
    }


def apply_rules(val: sp.Prediction, test: sp.Prediction, args: argparse.Namespace) -> dict[tuple, dict[str, float]]:
    """Coverage and accuracy on test of thresholds on the predicted risk 1 - max_c p_c, chosen on validation."""
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
    """Risk against coverage under each score, and the entropies inside and outside, of one seed."""
    _, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for score in SCORES:
        name = score.replace("_", " ")
        plots.risk_coverage(test, uncertainty=doubt(test, score), ax=axes[0], label=name, color=COLORS[score])
    plots.uncertainty_histogram(test, ood, ax=axes[1])
    axes[1].set_title(f"Entropy: {axes[1].get_title()}")
    for ax in axes:
        ax.set_ylim(top=1.3 * ax.get_ylim()[1])  # room for the legends
    plt.gcf().savefig(args.out / "selective.png", dpi=150)
    plt.close("all")


def mean_and_error(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Mean and standard error over seeds."""
    return frame.drop(columns="seed").groupby(by, sort=False).agg(["mean", "sem"])


def main() -> None:
    """Fit, compare the scores, apply the rule; once a seed."""
    args, start = arguments(), time.perf_counter()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)  # that long articles are cut is known here
    args.out.mkdir(parents=True, exist_ok=True)
    llm, tokenizer = sources.tiny_llm() if args.tiny else sources.smollm2()
    llm.to("cuda" if torch.cuda.is_available() else "cpu")
    train, *parts = load_data(args)
    task = sources.word_task(tokenizer, train, sources.NEWS, args.max_length)
    kept, plain, scored, ruled = [KeptRows(rows, task) for rows in parts], [], [], []
    for seed in args.seeds:
        posterior = fit_upper_blocks(llm, task, train, args, seed)
        val, test, ood = (rows.predict(posterior, num_draws=args.draws, seed=seed) for rows in kept)
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
        sources.save_settings(args, args.out / "settings.json")
    print(f"\nAll of test is answered:\n{tables['plain'].drop(columns='seed').agg(['mean', 'sem']).round(3)}")
    print(f"\n{mean_and_error(tables['scores'], ['score']).round(3).to_string()}")
    print(f"\n{mean_and_error(tables['rules'], ['target', 'rule']).round(3).to_string()}")
    print(f"\nTables and selective.png are in {args.out}/. {time.perf_counter() - start:.0f} seconds in all.")


if __name__ == "__main__":
    main()
