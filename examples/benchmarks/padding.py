"""Measures how many tokens padding adds to the batches of training and prediction, and how many shapes are left.

    python examples/benchmarks/padding.py --data-dir DATA --out padding.json     # seconds, one core

Lengths are those of SmolLM2's tokenizer, cut at 512 tokens: all of Reuters R8, and BoolQ where DATA has
``boolq_train.jsonl``, itself or one folder below. The local BoolQ has questions without passages. The ratio is tokens
computed per real token; a captured step of ``fit`` rounds lengths up, so that shapes repeat, and each shape is captured
once per training.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import scalabl_pyro as sp
from scalabl_pyro.data import Example, TrainingBatches, evaluation_batches, read_rows
from scalabl_pyro.training.cuda_graphs import GRAPH_TOKENS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from _support.datasets import NEWS, reuters_r8
from _support.models import smollm2_tokenizer

#: Longest prompt in tokens.
MAX_TOKENS = 512


def examples_of(prompts: Sequence[str]) -> list[Example]:
    """Encode prompts."""
    encoded = smollm2_tokenizer()(list(prompts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return [Example({"input_ids": ids}, target=0) for ids in encoded]


def data_sets(folder: Path | None, count: int) -> dict[str, list[Example]]:
    """Read the data sets, at most ``count`` rows of each."""
    news = reuters_r8("train", count=count, seed=0, balanced=False)
    found = {"r8": [NEWS.format(question=row["question"]) for row in news]}
    name = "boolq_train.jsonl"
    files = [] if folder is None else [*folder.glob(name), *folder.glob(f"*/{name}")]
    if files:
        found["boolq"] = [f"{row['question']}\nAnswer:" for row in read_rows(files[0])][:count]
    return {name: examples_of(prompts) for name, prompts in found.items()}


def measured(batches, examples: Sequence[Example]) -> dict[str, float]:
    """Count tokens and shapes of batches that contain each example once."""
    shapes = [tuple(batch.inputs["input_ids"].shape) for batch in batches]
    tokens = sum(rows * width for rows, width in shapes)
    return {"ratio": round(tokens / sum(map(len, examples)), 4), "shapes": len(set(shapes)), "batches": len(shapes)}


def run(args: argparse.Namespace) -> dict:
    """Measure each data set and batch size; average the ratio of training over epochs with other orders."""
    out = {"max_tokens": MAX_TOKENS, "window": TrainingBatches.WINDOW, "smallest_step": GRAPH_TOKENS, "lines": []}
    for name, examples in data_sets(args.data_dir, args.count).items():
        for batch_size in args.batch_sizes:
            line = {"data": name, "rows": len(examples), "batch_size": batch_size}
            for kind, multiple in (("captured", GRAPH_TOKENS), ("eager", 1)):
                source = TrainingBatches(examples, batch_size, 0, seed=args.seed, multiple=multiple)
                per_epoch = source.per_epoch
                parts = [
                    measured((source(epoch * per_epoch + i) for i in range(per_epoch)), examples)
                    for epoch in range(args.epochs)
                ]
                line[kind] = parts[0] | {"ratio": round(sum(p["ratio"] for p in parts) / len(parts), 4)}
                line[kind]["largest_ratio"] = max(p["ratio"] for p in parts)
            line["predict"] = measured(evaluation_batches(examples, batch_size, 0), examples)
            out["lines"].append(line)
            print(line, flush=True)
    out["versions"] = {"scalabl_pyro": sp.__version__}
    if args.out:
        args.out.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with boolq_train.jsonl")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--count", type=int, default=10**6, help="largest number of rows of a data set")
    parser.add_argument("--epochs", type=int, default=3, help="number of epochs, each with another order")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
