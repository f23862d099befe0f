"""Measures which shapes train on this GPU, the time per step, and how close ``estimate_memory`` is to the truth.

    python examples/benchmarks/large_models.py --runs qwen2.5-32b:checkpointing qwen2.5-72b:4bit:checkpointing
    python examples/benchmarks/large_models.py --runs tiny tiny:4bit:checkpointing tiny:float8-compact --device cpu
    python examples/benchmarks/large_models.py --estimate --runs qwen2.5-72b qwen2.5-72b:float8-compact:checkpointing

A run is a shape and its options: ``4bit`` (weights in NF4 by bitsandbytes), ``float8`` or ``float8-compact`` (8-bit
floats, as with ``base_precision``), and ``checkpointing`` (blocks run again in the backward pass to save memory).
Weights are random. ``estimated`` is the result of ``blora.estimate_memory``, and ``measured`` the peak of torch's
allocator over the steps of ``fit``. Both are in GiB and include the weights.

With ``--estimate`` nothing is trained, and ``estimated`` is extrapolated from models with few blocks, so that a shape
may be larger than this GPU. ``fits`` names the cards of ``--cards`` that hold both amounts. A card of 24 GB is counted
as 24e9 bytes, which leaves room for the driver.
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
from _support.random_llms import SHAPES, STORAGES, random_llm
from _support.timing import TARGETS, AnswerTokens, random_batch

STEPS = 8
#: Numbers of blocks of the models from which an estimate is extrapolated.
FEW_BLOCKS = (2, 4)


def adapted(run: str, device: str, blocks: int | None = None):
    """Build the model of a run, and adapt it.

    Args:
        run: Shape and options, such as ``"tiny:4bit"``.
        device: ``"cuda"`` or ``"cpu"``.
        blocks: Number of blocks; None means that of the shape.
    """
    shape, *options = run.split(":")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    storage = next((option for option in options if option in STORAGES), None)
    return sp.bayesian_lora(random_llm(shape, device, dtype, storage=storage, blocks=blocks), target_modules=TARGETS)


def estimated(run: str, rows: int, tokens: int, device: str) -> dict:
    """Estimate the memory of a run from models with few blocks.

    Returns:
        A line of the table, without measurements.
    """
    shape, *options = run.split(":")
    found = []
    for blocks in FEW_BLOCKS:
        blora = adapted(run, device, blocks)
        checkpointing = "checkpointing" in options
        found.append(blora.estimate_memory(random_batch(rows, tokens, device), gradient_checkpointing=checkpointing))
        latents = blora.subspace.dim
        del blora
        free(device)
    low, high = FEW_BLOCKS
    depth = SHAPES[shape]["num_hidden_layers"]

    def at_depth(name: str) -> float:
        few, more = (getattr(estimate, name) for estimate in found)
        return (few + (more - few) * (depth - low) / (high - low)) / 2**30

    line = {"run": run, "rows": rows, "tokens": tokens, "latents_with_few_blocks": latents, "extrapolated": True}
    return line | {"weights": at_depth("weights"), "estimated": at_depth("total"), "measured": None}


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
    cuda = device == "cuda"
    start = time.perf_counter()
    blora = adapted(run, device)
    built = time.perf_counter() - start
    checkpointing = "checkpointing" in run.split(":")
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


def describe(line: dict) -> str:
    """Format a line of the table for people."""
    if "error" in line:
        return f"{line['run']}: {line['error']}"
    text = f"{line['run']}: estimated {line['estimated']:.2f} GiB"
    if line["measured"] is not None:
        ratio = line["estimated"] / line["measured"]
        text += f", measured {line['measured']:.2f} GiB, ratio {ratio:.3f}, step {line['seconds_a_step']:.3f} s"
    return text + f", fits into {', '.join(map(str, line['fits'])) or 'none'} GB"


def fits(line: dict, cards: list[int]) -> list[int]:
    """List the cards, in GB, that hold what was measured, or estimated where nothing was measured."""
    needed = line["estimated"] if line["measured"] is None else max(line["estimated"], line["measured"])
    return [card for card in cards if needed * 2**30 <= card * 1e9]


def free(device: str) -> None:
    """Return the memory of deleted models to the device."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = f"SHAPE[:{'|'.join(STORAGES)}][:checkpointing] of {', '.join(SHAPES)}"
    parser.add_argument("--runs", nargs="+", required=True, help=options)
    parser.add_argument("--rows", type=int, default=4, help="rows per batch")
    parser.add_argument("--tokens", type=int, default=300, help="tokens per row")
    parser.add_argument("--estimate", action="store_true", help="only estimate, from models with few blocks")
    parser.add_argument("--cards", type=int, nargs="+", default=[24, 48, 80, 141], help="memory of cards in GB")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("large_models.json"), help="JSON file of the results")
    args = parser.parse_args()
    for run in args.runs:
        shape, *chosen = run.split(":")
        if shape not in SHAPES or set(chosen) - {*STORAGES, "checkpointing"} or len(set(chosen) & set(STORAGES)) > 1:
            parser.error(f"--runs {run}: expected {options}")
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    table = {"device": device, "torch": torch.__version__, "cards": args.cards, "lines": []}
    for run in args.runs:
        try:
            line = (estimated if args.estimate else one)(run, args.rows, args.tokens, args.device)
            line["fits"] = fits(line, args.cards)
        except torch.cuda.OutOfMemoryError as error:
            line = {"run": run, "rows": args.rows, "tokens": args.tokens, "error": str(error).splitlines()[0]}
        print(describe(line), flush=True)
        table["lines"].append(line)
        args.out.write_text(json.dumps(table, indent=1), encoding="utf-8")
        free(args.device)


if __name__ == "__main__":
    main()
