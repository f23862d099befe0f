"""Times a step of ``fit`` beside PEFT with transformers' Trainer at its best settings, in one run, for several sizes.

    python examples/benchmarks/rivals.py --out rivals.json                      # one GPU, about 4 minutes
    python examples/benchmarks/rivals.py --shapes tiny --device cpu --steps 2 --tokens 8     # anywhere

Both sides train LoRA of rank 8 on the query and value projections of the same model with random weights, on the same
completions (half of the tokens of a row), with AdamW. The model is in bfloat16 on a GPU. Trainer has the fused AdamW,
SDPA, no gradient checkpointing, no logging, and Liger's kernels where liger-kernel is installed; it also runs without
them. ``fit`` runs as it comes, with captured steps. Its times include reading the statistics of each step.

A side that does not fit into memory, or that time or a missing package leaves out, stands in the file with the reason.
Other rivals are only looked for: the file says what is missing for each.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from packaging.requirements import Requirement

import scalabl_pyro as sp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from _support.completion_steps import ends_of_fit, ends_of_trainer
from _support.random_llms import SHAPES, fuse_elementwise, num_weights, random_llm
from _support.random_texts import random_texts

TARGETS = ["q_proj", "v_proj"]
#: Steps that warm up before the timed ones.
WARM = 3
#: Share of the memory of a GPU that the weights may fill.
ROOM = 0.95
#: What Unsloth 2026.10.9 asks for on Linux with an NVIDIA GPU, from the metadata of its wheel.
UNSLOTH = (
    "unsloth unsloth_zoo>=2026.10.9 torch<2.15.0,>=2.4.0 torchvision tyro xformers>=0.0.27.post2 "
    "bitsandbytes!=0.46.0,!=0.48.0,>=0.45.5 triton>=3.0.0 sentencepiece>=0.2.0 peft!=0.11.0,>=0.18.0 "
    "datasets!=4.0.*,!=4.1.0,!=4.4.*,!=4.5.0,<5.0.0,>=3.4.1 accelerate>=0.34.1 hf_transfer diffusers "
    "transformers!=5.0.0,!=5.1.0,<=5.17.0,>=4.52.4 trl!=0.19.0,<=1.15.0,>=0.18.2 json5>=0.9.25 structlog>=24.1.0"
).split()


def missing(requirements: list[str]) -> list[str]:
    """List requirements that this environment does not meet, with the version that is installed."""
    found = []
    for text in requirements:
        wanted = Requirement(text)
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(text)
            continue
        if not wanted.specifier.contains(version.partition("+")[0], prereleases=True):
            found.append(f"{text} (here: {version})")
    return found


def unsloth_line() -> dict[str, Any]:
    """Say why Unsloth is not timed."""
    lacks = missing(UNSLOTH)
    reason = f"missing: {', '.join(lacks)}" if lacks else "installed, but this script has no side for it"
    return {"side": "Unsloth", "left_out": reason}


def fit_side(llm, rows: list[dict], args: argparse.Namespace) -> list[float]:
    """Return the times at which steps of ``fit`` end; the model is as before afterwards."""
    return ends_of_fit(llm, rows, args.steps + WARM + 1, TARGETS)


def peft_side(llm, rows: list[dict], args: argparse.Namespace, *, liger: bool) -> list[float]:
    """Return the times at which steps of Trainer end; the model is as before afterwards."""
    return ends_of_trainer(
        llm,
        rows,
        args.steps + WARM + 1,
        TARGETS,
        optim="adamw_torch_fused",
        bf16=args.device == "cuda",
        gradient_checkpointing=False,
        dataloader_num_workers=0,
        use_liger_kernel=liger,
        use_cpu=args.device == "cpu",
    )


def sides(shape: str) -> dict[str, Callable[..., list[float]]]:
    """Give the sides of a shape. Liger's kernels come last: they change the model's modules for good."""
    found = {"fit": fit_side, "PEFT and Trainer": lambda *given: peft_side(*given, liger=False)}
    if importlib.util.find_spec("liger_kernel") is not None and torch.cuda.is_available():
        found["fit, Liger"] = lambda llm, *given: fit_side(fuse_elementwise(llm), *given)
        found["PEFT and Trainer, Liger"] = lambda *given: peft_side(*given, liger=True)
    return found


def measured(side: Callable, llm, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time one side, or say why it cannot be timed."""
    cuda = args.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    reason = None
    try:
        torch.manual_seed(0)
        ends = side(llm, random_texts(args.rows, tokens), args)
    except torch.OutOfMemoryError:
        reason = "out of memory"
    gc.collect()
    if cuda:
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.empty_cache()
    if reason is not None:
        return {"left_out": reason}
    ms = 1000 * statistics.median(after - before for before, after in itertools.pairwise(ends[WARM:]))
    line = {"ms": ms, "tokens_per_second": 1000 * args.rows * tokens / ms, "steps": len(ends) - WARM - 1}
    return line | ({"peak_gib": peak} if cuda else {})


def record(out: dict, line: dict, args: argparse.Namespace) -> None:
    """Add a line to the figures, and write all of them."""
    out["lines"].append(line)
    print(line, flush=True)
    if args.out:
        args.out.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


def run(args: argparse.Namespace) -> dict:
    """Measure all shapes, lengths and sides."""
    begin, cuda = time.perf_counter(), args.device == "cuda"
    out: dict[str, Any] = {"device": torch.cuda.get_device_name() if cuda else "cpu", "rows": args.rows, "lines": []}
    out["versions"] = {m.__name__: m.__version__ for m in (sp, torch, transformers, peft)}
    liger = importlib.util.find_spec("liger_kernel") is not None
    out["liger"] = importlib.metadata.version("liger-kernel") if liger else "missing: liger-kernel"
    record(out, unsloth_line(), args)
    for shape in args.shapes:
        weights = num_weights(shape, embeddings=True) * (2 if cuda else 4)
        llm = None
        if cuda and weights > ROOM * torch.cuda.get_device_properties(0).total_memory:
            record(out, {"shape": shape, "left_out": f"weights of {weights / 2**30:.0f} GiB do not fit"}, args)
            continue
        for name, side in sides(shape).items():
            for tokens in args.tokens:
                line = {"shape": shape, "tokens": tokens, "side": name}
                seconds = time.perf_counter() - begin
                if seconds > args.seconds:
                    record(out, line | {"left_out": f"{args.seconds} seconds were over"}, args)
                    continue
                try:
                    if llm is None:
                        llm = random_llm(shape, args.device, torch.bfloat16 if cuda else torch.float32)
                    found = measured(side, llm, tokens, args)
                except torch.OutOfMemoryError:
                    found = {"left_out": "out of memory, for the weights alone"}
                record(out, line | found, args)
        del llm
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    return out


def main() -> None:
    """Read the command line, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = ["smollm2-135m", "qwen2.5-1.5b", "qwen2.5-7b", "qwen2.5-32b"]
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", default=sizes, help="shapes of the models")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=4, help="rows per step")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 300, 2048], help="tokens per row")
    parser.add_argument("--steps", type=int, default=10, help="number of timed steps")
    parser.add_argument("--seconds", type=int, default=230, help="no side starts later than this")
    parser.add_argument("--out", type=Path, help="JSON file of the figures, written after each side")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
