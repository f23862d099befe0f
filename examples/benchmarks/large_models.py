"""Measures which shapes train on this GPU, the time per step, and how close ``estimate_memory`` is to the truth.

    python examples/benchmarks/large_models.py --runs qwen2.5-32b:checkpointing qwen2.5-72b:4bit:checkpointing
    python examples/benchmarks/large_models.py --runs tiny tiny:4bit:checkpointing --device cpu

A run is a shape and its options: ``4bit`` (weights in NF4 by bitsandbytes) and ``checkpointing`` (blocks run again in
the backward pass to save memory). Weights are random. ``estimated`` is the result of ``blora.estimate_memory``, and
``measured`` the peak of torch's allocator over the steps of ``fit``. Both are in GiB and include the weights.
"""

import argparse
import gc
import json
import sys
import time
from pathlib import Path

import torch

import scalabl_pyro as sp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from _support.random_llms import SHAPES, random_llm
from _support.timing import TARGETS, AnswerTokens, random_batch

STEPS = 8


def one(run: str, rows: int, tokens: int, device: str) -> dict:
    """Build a model, estimate its memory, and train a few steps.

    Args:
        run: Shape and options, such as ``"tiny:4bit"``.
        rows: Rows per batch.
        tokens: Tokens per row.
        device: ``"cuda"`` or ``"cpu"``.

    Returns:
        A line of the table.
    """
    shape, *options = run.split(":")
    cuda = device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    start = time.perf_counter()
    llm = random_llm(shape, device, dtype, four_bit="4bit" in options)
    built = time.perf_counter() - start
    blora = sp.bayesian_lora(llm, target_modules=TARGETS)
    checkpointing = "checkpointing" in options
    batch = random_batch(rows, tokens, device)
    estimate = blora.estimate_memory(batch, gradient_checkpointing=checkpointing)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    hardware = {"gradient_checkpointing": checkpointing, "cuda_graph": False}
    result = sp.fit(
        blora, AnswerTokens(), [batch], num_data=1000, num_steps=STEPS, hardware=hardware,
        callbacks=[lambda row: False], progress=False,
    )  # fmt: skip
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    seconds = result.history["seconds"].diff().iloc[3:].median()
    line = {"run": run, "rows": rows, "tokens": tokens, "seconds_a_step": seconds, "latents": blora.subspace.dim}
    line |= {"weights": estimate.weights / 2**30, "estimated": estimate.total / 2**30, "measured": peak}
    line |= {"built_in_seconds": built, "final_loss": float(result.history["loss"].iloc[-1])}
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, help=f"SHAPE[:4bit][:checkpointing] of {', '.join(SHAPES)}")
    parser.add_argument("--rows", type=int, default=4, help="rows per batch")
    parser.add_argument("--tokens", type=int, default=300, help="tokens per row")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("large_models.json"), help="JSON file of the results")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    table = {"device": device, "lines": []}
    for run in args.runs:
        try:
            line = one(run, args.rows, args.tokens, args.device)
            ratio = line["estimated"] / line["measured"]
            print(f"{run}: step {line['seconds_a_step']:.3f} s, estimated {line['estimated']:.2f} GiB, ", end="")
            print(f"measured {line['measured']:.2f} GiB, ratio {ratio:.3f}", flush=True)
        except torch.cuda.OutOfMemoryError as error:
            line = {"run": run, "rows": args.rows, "tokens": args.tokens, "error": str(error).splitlines()[0]}
            print(f"{run}: {line['error']}", flush=True)
        table["lines"].append(line)
        args.out.write_text(json.dumps(table, indent=1), encoding="utf-8")
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
