"""What completions cost: a step of ``fit`` beside PEFT with Trainer, and 8 draws that write beside one.

    python examples/benchmarks/completions.py --shape smollm2-135m --out completions.json
    python examples/benchmarks/completions.py --shape qwen2.5-7b --dtype bfloat16 --out completions.json
    python examples/benchmarks/completions.py --shape qwen2.5-7b --dtype bfloat16 --rows 1 --tokens 8192 --sides fit \
        --gradient-checkpointing --steps 4 --out long.json      # what a long row costs

All sides train LoRA of rank 8 on the same layers of a model with random weights, on the same rows, with the same batch
size. Half of the tokens of a row belong to its completion. Each side runs in a process of its own, which gives its peak
memory: that of the GPU if there is one, else that of the process. One process writes with 1 and 8 draws in turn. The
estimate of the peak of ``fit`` is that of ``estimate_memory``: logits are computed in parts, and again in the backward
pass, so their share does not grow with the tokens of a row.
"""

import argparse
import itertools
import json
import multiprocessing
import resource
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

import scalabl_pyro as sp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from _support.completion_steps import ends_of_fit, ends_of_trainer, now
from _support.random_llms import SHAPES, random_llm
from _support.random_texts import random_texts, word_tokenizer
from _support.timing import TARGETS

#: Seconds of each run, by the name of the work.
Seconds = dict[str, list[float]]
#: Steps that warm up before the timed ones.
WARM = 3


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="shape of the model")
    parser.add_argument("--dtype", default="float32", help="type of the weights")
    parser.add_argument("--rows", type=int, default=8, help="rows per step")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per row")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--steps", type=int, default=10, help="number of timed steps")
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=list(SIDES), help="what to measure")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="run blocks again in the backward pass")
    parser.add_argument("--out", type=Path, default=Path("completions.json"), help="JSON file of the figures")
    return parser.parse_args()


def main() -> None:
    """Run each side in a process of its own, and write the ratios."""
    args = arguments()
    context = multiprocessing.get_context("spawn")
    found: dict[str, dict[str, float]] = {}
    for name in args.sides:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found |= pool.submit(measure, name, vars(args)).result()
        print(found, flush=True)
    compared = {
        "step": ("fit", "PEFT and Trainer", "seconds"),
        "memory": ("fit", "PEFT and Trainer", "peak_bytes"),
        "8 draws": ("generate, 8 draws", "generate, 1 draw", "seconds"),
    }
    ratios = {
        name: found[ours][key] / found[other][key]
        for name, (ours, other, key) in compared.items()
        if {ours, other} <= set(found)
    }
    print(ratios)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = {module.__name__: module.__version__ for module in (sp, torch, transformers)}
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    figures = {"sides": found, "ratios": ratios, "settings": settings, "device": device, "versions": versions}
    args.out.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def measure(name: str, given: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Run one side; return the median seconds of each of its works and the peak memory in bytes."""
    args = argparse.Namespace(**given)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    llm = random_llm(args.shape, device, getattr(torch, args.dtype))
    seconds = SIDES[name](llm, args)
    of_process = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else of_process
    figures = {}
    for work, s in seconds.items():
        figures[work] = {"seconds": statistics.median(s[WARM:]), "peak_bytes": float(peak)}
        if work == "fit":
            figures[work]["estimated_bytes"] = float(estimated(llm, args))
    return figures


def estimated(llm, args: argparse.Namespace) -> int:
    """Return the estimate of the peak of a step of ``fit``, which runs after the training has been measured."""
    task, blora = sp.Completion(word_tokenizer()), sp.bayesian_lora(llm, target_modules=TARGETS)
    own = {"gradient_checkpointing": args.gradient_checkpointing}
    return blora.estimate_memory(random_texts(args.rows, args.tokens), task=task, **own).total


def train_ours(llm, args: argparse.Namespace) -> Seconds:
    """Return the seconds of each step of ``fit``."""
    hardware = {"gradient_checkpointing": args.gradient_checkpointing}
    ends = ends_of_fit(llm, random_texts(args.rows, args.tokens), args.steps + WARM, TARGETS, hardware=hardware)
    return {"fit": [after - before for before, after in itertools.pairwise(ends)]}


def train_peft(llm, args: argparse.Namespace) -> Seconds:
    """Return the seconds of each step of Trainer, with the loss on the completion only."""
    own = {"gradient_checkpointing": args.gradient_checkpointing}
    ends = ends_of_trainer(llm, random_texts(args.rows, args.tokens), args.steps + WARM, TARGETS, **own)
    return {"PEFT and Trainer": [after - before for before, after in itertools.pairwise(ends)]}


def write(llm, args: argparse.Namespace) -> Seconds:
    """Return the seconds of each text that 1 draw and 8 draws write, in turn."""
    task = sp.Completion(word_tokenizer())
    blora = sp.bayesian_lora(llm, target_modules=TARGETS)
    posterior = sp.fit(
        blora, task, random_texts(args.rows, args.tokens), num_steps=1, batch_size=1, progress=False
    ).posterior
    prompts = [random_texts(args.rows, args.tokens)[0]["prompt"]]
    seconds: Seconds = {"generate, 1 draw": [], "generate, 8 draws": []}
    options = {"do_sample": True, "max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
    for seed in range(args.steps + WARM):
        for work, num_draws in zip(seconds, (1, 8), strict=True):
            start = now()
            posterior.generate(prompts, num_draws=num_draws, seed=seed, **options)
            seconds[work].append(now() - start)
    return seconds


SIDES: dict[str, Callable[..., Seconds]] = {"PEFT and Trainer": train_peft, "fit": train_ours, "generate": write}

if __name__ == "__main__":
    main()
