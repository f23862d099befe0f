"""Measures step time, prediction time and memory of a large model, beside PEFT's LoRA and what the hardware allows.

    python examples/benchmarks/speed.py --shape qwen2.5-7b --tokens 128 300 --out speed.json      # one GPU
    python examples/benchmarks/speed.py --shape tiny --device cpu --steps 3                       # runs anywhere
    python examples/benchmarks/speed.py --shape qwen2.5-7b --tokens 300 --base-precision float8   # and in bfloat16

Weights are random, because time and memory depend on shapes only. The line "floor" is the arithmetic of a step at the
matrix rate measured in the same run: 2 FLOP per weight and token in the forward pass, and 2 more for the gradients of
the activations. The frozen weights need no gradients. The rate is always that of the model's own precision (bfloat16 on
a GPU), so figures in 8-bit floats are compared with the floor of bfloat16, and can lie below it.
"""

import argparse
import functools
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyro
import torch

import scalabl_pyro as sp
from scalabl_pyro.data import Batch, Example
from scalabl_pyro.lora.float8 import float8_layers
from scalabl_pyro.lora.forward import AdaptedLLM
from scalabl_pyro.model.derivatives import gauss_newton
from scalabl_pyro.model.log_likelihood import LogLikelihood

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from _support.random_llms import SHAPES, fuse_elementwise, random_llm
from _support.timing import (
    TARGETS,
    AnswerTokens,
    fit_step,
    kernels,
    matmul_rate,
    measure,
    objective_of,
    peft_step,
    random_batch,
)


class Constant(AnswerTokens):
    """Task that does not call the LLM: its logits are latents."""

    def outputs(self, llm, batch, s):
        return s[:, :4]


def pyro_only(blora, batch: Batch):
    """Make a step of the Pyro programs without the LLM: sampling, plates, ELBO, and their gradients."""
    objective = objective_of(blora, Constant())

    def step() -> None:
        with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False):
            objective.zero_grad(set_to_none=True)
            objective.accumulate(batch, 1.0, share=1.0)

    return step


def curvature(blora, batch: Batch):
    """Make the exact Gauss-Newton matrix of the D latents on a batch, which ``laplace`` sums over the data."""
    examples = [
        Example({"input_ids": ids}, int(y))
        for ids, y in zip(batch.inputs["input_ids"].tolist(), batch.target, strict=True)
    ]
    llm = AdaptedLLM(blora.adapter, factors=blora.adapter.factors())
    likelihood = LogLikelihood(llm, AnswerTokens(), examples, batch_size=len(batch))
    return lambda: gauss_newton(likelihood, blora.adapter.loc)


def plain_figures(llm, batch: Batch, many: Batch, timed: Callable) -> dict[str, dict]:
    """Time the model without our adapter: forward passes, and a step of PEFT's LoRA.

    Args:
        llm: Base model.
        batch: Rows of a step.
        many: As many rows as all draws have together.
        timed: Measures a function.
    """
    figures = {}
    with torch.no_grad():
        figures["frozen forward"] = timed(lambda: llm(**batch.inputs, use_cache=False, logits_to_keep=1))
        figures["frozen draws"] = timed(lambda: llm(**many.inputs, use_cache=False, logits_to_keep=1))
    step, model = peft_step(llm, batch)
    figures["PEFT LoRA step"] = timed(step)
    model.unload()
    del step, model
    gc.collect()
    return figures


def our_figures(llm, batch: Batch, args: argparse.Namespace, timed: Callable, precision: str) -> dict[str, dict]:
    """Time the adapted model: a step in eager mode, a step as ``fit`` runs it, parts of it, and draws.

    Args:
        llm: Base model.
        batch: Rows of a step.
        args: Command line.
        timed: Measures a function, given the bytes that the weights take more than the base model.
        precision: ``base_precision`` of the adapted model.

    Returns:
        Figures by name. Names of figures in 8-bit floats end with the precision.
    """
    figures = {}
    blora = sp.bayesian_lora(llm, target_modules=TARGETS, base_precision=precision)
    timed = functools.partial(timed, more=added_bytes(llm))
    figures["scalabl_pyro step, eager"] = timed(fit_step(blora, batch))
    if args.device == "cuda":
        figures["scalabl_pyro step, eager"] |= {
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "estimated_gib": blora.estimate_memory(batch).total / 2**30,
        }
    step = fit_step(blora, batch, graph=args.device == "cuda")
    figures["scalabl_pyro step"] = timed(step)
    if args.kernels:
        figures["scalabl_pyro step"]["kernels"] = kernels(step)
    del step
    if precision == "original":
        figures["of it Pyro alone"] = timed(pyro_only(blora, batch))
        figures["Laplace curvature"] = timed(curvature(blora, batch), 3)
    s = torch.randn(args.draws, 1, blora.subspace.dim, device=args.device)
    task, adapted = AnswerTokens().to(args.device), AdaptedLLM(blora.adapter, factors=blora.adapter.factors())
    with torch.no_grad():
        figures["scalabl_pyro draws"] = timed(lambda: task.outputs(adapted, batch, s))
    blora.unload()
    gc.collect()
    return figures if precision == "original" else {f"{name}, {precision}": f for name, f in figures.items()}


def added_bytes(llm) -> int:
    """Return how many bytes more than before a model takes on its device since layers are in 8-bit floats."""
    layers = float8_layers(llm)
    device = next(llm.parameters()).device
    freed = [layer.original.weight for layer in layers if layer.original.weight.device != device]
    return sum(t.nbytes for layer in layers for t in layer.buffers()) - sum(t.nbytes for t in freed)


def run(args: argparse.Namespace) -> dict:
    """Measure all lengths of rows; print the figures and write them after each length."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    llm = random_llm(args.shape, args.device, dtype)
    if args.liger:
        fuse_elementwise(llm)
    weights = sum(p.numel() for p in llm.parameters())
    occupied = torch.cuda.memory_allocated() if args.device == "cuda" else 0
    embedding = llm.get_input_embeddings().weight.numel()
    rate = matmul_rate(args.device, dtype)
    out = {"shape": args.shape, "rows": args.rows, "draws": args.draws, "weights": weights, "tflops": rate / 1e12}
    out["device"] = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    out["liger"], out["torch"] = args.liger, torch.__version__

    def timed(fn: Callable[[], object], steps: int = args.steps, *, more: int = 0) -> dict[str, float]:
        return measure(fn, args.device, steps, occupied + more)

    for tokens in args.tokens:
        batch = random_batch(args.rows, tokens, args.device)
        many = random_batch(args.draws * args.rows, tokens, args.device)
        flop = 2 * (weights - 2 * embedding) * args.rows * tokens  # one forward pass through the blocks
        figures = {"floor step": {"ms": 2 * flop / rate * 1000}, "floor draws": {"ms": args.draws * flop / rate * 1000}}
        figures |= plain_figures(llm, batch, many, timed)
        for precision in dict.fromkeys(["original", *args.base_precision]):
            figures |= our_figures(llm, batch, args, timed, precision)
            out[f"T={tokens}"] = figures = with_ratios(figures)
            if args.out:
                args.out.write_text(json.dumps(out, indent=1))
        print(f"\n{args.shape}, {args.rows} x {tokens} tokens, {out['device']}, {rate / 1e12:.0f} TFLOP/s")
        for name, figure in figures.items():
            memory = figure.get("above_weights_gib", float("nan"))
            ratio = f", {figure['of_floor']:.2f} x the floor" if "of_floor" in figure else ""
            print(f"{name:>40}: {figure['ms']:9.1f} ms {memory:8.2f} GiB above the weights{ratio}", flush=True)
    return out


def with_ratios(figures: dict[str, dict]) -> dict[str, dict]:
    """Add ``of_floor`` to each time of a step or of draws: how many times the floor it is."""
    out = {}
    for name, figure in figures.items():
        kind = next((kind for kind in ("step", "draws") if kind in name.partition(",")[0].split()), None)
        floor = figures[f"floor {kind}"]["ms"] if kind and not name.startswith("floor") else None
        out[name] = figure if floor is None else figure | {"of_floor": figure["ms"] / floor}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="shape of the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=4, help="rows per batch")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128], help="tokens per row")
    parser.add_argument("--draws", type=int, default=10, help="draws of a prediction")
    parser.add_argument("--steps", type=int, default=10, help="number of timed calls")
    parser.add_argument(
        "--base-precision",
        nargs="+",
        default=[],
        choices=("float8", "float8-compact"),
        help="also measure with frozen weights in these precisions",
    )
    parser.add_argument("--kernels", action="store_true", help="list the GPU kernels of a step in the JSON file")
    parser.add_argument("--liger", action="store_true", help="use the fused kernels of liger-kernel")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
