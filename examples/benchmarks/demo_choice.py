"""Chooses the data, the rows and the steps of the demo on validation rows, with plain LoRA at several learning rates.

    python examples/benchmarks/demo_choice.py --out runs/demo --shard 0 --of 12      # twelve of these beside each other
    python examples/benchmarks/demo_choice.py --out runs/demo --report

Validation rows come from the training split, and so do the out-of-distribution rows; the demo's test split is never
read. Each shard writes one JSON line per run. ``--report`` prints the mean over seeds, LoRA at the learning rate with
the lowest NLL.
"""

import argparse
import json
import logging
import sys
from itertools import product
from pathlib import Path

import pandas as pd
import torch

import scalabl_pyro as sp
from scalabl_pyro import metrics

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from _support.datasets import NEWS, newsgroups, reuters_r8, word_task
from _support.demo_report import CONFIDENT
from _support.models import demo_llm, upper_blocks
from _support.opinions import OPINION, movie_reviews, neutral_sentences, product_reviews

MAX_LENGTH = 40
VALIDATION_ROWS, OOD_ROWS = 600, 400
SETTING = ["data", "rows", "steps", "batch_size", "blocks"]


def jobs(args: argparse.Namespace) -> list[dict]:
    """List the runs; ``lr`` is None for ScalaBL, which runs with the defaults of ``fit``."""
    lines = product(args.data, args.rows, args.steps, args.batch_size, args.blocks, args.seeds, (None, *args.rates))
    return [dict(zip((*SETTING, "seed", "lr"), line, strict=True)) for line in lines]


def load(data: str, rows: int, seed: int, tiny: bool) -> tuple[list, list, dict[str, list]]:
    """Read training rows, validation rows from the same split, and rows of other sources."""
    read = reuters_r8 if data == "news" else movie_reviews
    validation, count = (12, 8) if tiny else (VALIDATION_ROWS, OOD_ROWS)
    pool = read("train", count=rows + validation, seed=seed)
    if data == "news":
        return pool[:rows], pool[rows:], {"ood": newsgroups(count=count, seed=seed, split="train")}
    other = {"ood": neutral_sentences(count=count, seed=seed), "shift": product_reviews(count=count, seed=seed)}
    return pool[:rows], pool[rows:], other


def scores(
    posterior: sp.Posterior, rows: list, other: dict[str, list], num_draws: int, design: str = "independent"
) -> dict:
    """Compute the metrics of a posterior on validation rows, and how well it tells the other rows apart."""
    options = {"num_draws": num_draws, "design": design, "seed": 0, "batch_size": 64}
    inside = posterior.predict(rows, **options)
    found = quality(inside)
    for name, elsewhere in other.items():
        outside = posterior.predict(elsewhere, **options)
        found[f"{name}_auroc"] = float(metrics.ood_auroc(inside.total, outside.total))
        if outside.target is not None and (outside.target >= 0).all():
            found |= {f"{name}_{key}": value for key, value in quality(outside).items()}
    return found


def quality(prediction: sp.Prediction) -> dict:
    """Compute the metrics of labeled rows, and count confident answers and confident mistakes."""
    found = prediction.metrics().loc["value", ["accuracy", "nll", "ece", "brier"]].to_dict()
    mistakes = metrics.confident_mistakes(prediction.probs, prediction.target, threshold=CONFIDENT)
    return found | {"sure": mistakes.confident, "sure_and_wrong": mistakes.mistakes}


def run(llm, tokenizer, job: dict, tiny: bool = False) -> list[dict]:
    """Train once and score; ScalaBL gives three lines: posterior mean, ten draws, four mirrored draws."""
    train, rows, other = load(job["data"], job["rows"], job["seed"], tiny)
    task = word_task(tokenizer, train, NEWS if job["data"] == "news" else OPINION, MAX_LENGTH)
    lora = {"layers_to_transform": upper_blocks(llm, job["blocks"])}
    budget = {"num_steps": job["steps"], "batch_size": job["batch_size"], "seed": job["seed"], "progress": False}
    if job["lr"] is None:
        blora = sp.bayesian_lora(llm, **lora)
        result = sp.fit(blora, task, train, **budget)
        found = [{"method": "mean", **scores(result.posterior, rows, other, 0)}]
        found.append({"method": "draws", **scores(result.posterior, rows, other, 10)})
        found.append({"method": "mirrored", **scores(result.posterior, rows, other, 4, "antithetic")})
    else:
        result = sp.baselines.mle(llm, task, train, lr=job["lr"], lora=lora, **budget)
        found = [{"method": "lora", **scores(result.posterior, rows, other, 0)}]
    seconds = result.history["seconds"].iloc[-1]
    result.posterior.blora().unload()
    return [{**job, **line, "fit_s": seconds} for line in found]


def report(folder: Path) -> pd.DataFrame:
    """Average over seeds; LoRA has the learning rate with the lowest NLL of each setting."""
    lines = pd.concat(
        [
            pd.read_json(path, lines=True)
            for path in sorted([*folder.glob("shard*.jsonl"), *folder.glob("choice.jsonl")])
        ]
    )
    lines["lr"] = lines["lr"].fillna(0.0)
    means = lines.groupby([*SETTING, "method", "lr"]).mean(numeric_only=True).drop(columns="seed").reset_index()
    return means.loc[means.groupby([*SETTING, "method"])["nll"].idxmin()].set_index([*SETTING, "method"])


def main() -> None:
    """Run one shard, or print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument("--of", type=int, default=1, help="number of shards")
    parser.add_argument("--report", action="store_true", help="print the means over seeds, and train nothing")
    parser.add_argument("--tiny", action="store_true", help="use a random model and few rows, to test the script")
    parser.add_argument("--data", nargs="+", choices=("news", "reviews"), default=["reviews"])
    parser.add_argument("--rows", nargs="+", type=int, default=[100, 200, 400], help="numbers of training rows")
    parser.add_argument("--steps", nargs="+", type=int, default=[100, 200, 300])
    parser.add_argument("--batch-size", nargs="+", type=int, default=[8])
    parser.add_argument("--blocks", nargs="+", type=int, default=[10], help="numbers of upper blocks to adapt")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rates", nargs="+", type=float, default=[2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3], help="of LoRA")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.report:
        print(report(args.out).round(3).to_string())
        return
    logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    llm, tokenizer = demo_llm(tiny=args.tiny)
    with (args.out / f"shard{args.shard:02d}.jsonl").open("a", encoding="utf-8") as file:
        for job in jobs(args)[args.shard :: args.of]:
            for line in run(llm, tokenizer, job, args.tiny):
                file.write(json.dumps(line) + "\n")
                file.flush()


if __name__ == "__main__":
    main()
