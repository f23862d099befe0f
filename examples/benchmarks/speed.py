"""Step time, prediction time and memory of a large model, next to PEFT's LoRA and to what the hardware allows.

    python examples/benchmarks/speed.py --shape qwen2.5-7b --tokens 128 300 --out speed.json      # one GPU
    python examples/benchmarks/speed.py --shape tiny --device cpu --steps 3                       # runs anywhere

Weights are random: only shapes matter for time and memory. The floor is the arithmetic of a step at the matrix rate
measured in the same run: 2 FLOP a weight and token forward, 2 more for the gradients of the activations; the frozen
weights have none.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from peft import LoraConfig, get_peft_model
from random_llms import SHAPES, fuse_elementwise, random_llm
from torch.nn.functional import cross_entropy

import scalabl_pyro as sp
from scalabl_pyro.data import Batch, Example
from scalabl_pyro.guides import as_guide
from scalabl_pyro.lora.forward import AdaptedLLM
from scalabl_pyro.model.derivatives import gauss_newton
from scalabl_pyro.model.joint import TaskModel
from scalabl_pyro.model.log_likelihood import LogLikelihood
from scalabl_pyro.training.cuda_graphs import GraphedStep
from scalabl_pyro.training.objective import Objective, ScopedGuide, default_elbo
from scalabl_pyro.training.optimizer import build_optimizer
from scalabl_pyro.training.step import EagerStep

TARGETS = ["q_proj", "v_proj", "lm_head"]
NUM_DATA = 1000


class AnswerTokens(sp.Task):
    """Categorical over four tokens at the last position."""

    def __init__(self):
        super().__init__()
        self.register_buffer("labels", torch.arange(11, 15), persistent=False)

    def outputs(self, llm, batch, s):
        logits = llm(input_ids=batch.inputs["input_ids"], s=s, positions=batch.last).logits[..., 0, :]
        return logits[..., self.labels.to(logits.device)].float()

    def likelihood(self, outputs, batch):
        return pyro.distributions.Categorical(logits=outputs)


def random_batch(rows: int, tokens: int, device: str) -> Batch:
    ids = torch.randint(20, 400, (rows, tokens), device=device)
    return Batch(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        torch.arange(rows, device=device) % 4,
        torch.arange(rows, device=device),
        torch.full((rows,), tokens - 1, device=device),
    )


def measure(fn: Callable[[], object], device: str, steps: int, weights: int = 0) -> dict[str, float]:
    """Median milliseconds after three calls of warm-up, and peak memory above the bytes of the frozen weights."""
    cuda = device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        fn()
    times = []
    for _ in range(steps):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        if cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    peak = (torch.cuda.max_memory_allocated() - weights) / 2**30 if cuda else float("nan")
    return {"ms": statistics.median(times), "above_weights_gib": peak}


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP per second of a large matrix product on random data."""
    n = 8192 if device == "cuda" else 1024
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    ms = measure(lambda: a @ b, device, 10)["ms"]
    return 2 * n**3 / (ms / 1000)


def mle_step(llm, batch: Batch):
    """A hand-written maximum-likelihood step of PEFT's LoRA, and the model to unload."""
    model = get_peft_model(llm, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    labels = torch.arange(11, 15, device=batch.index.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = model(**batch.inputs, use_cache=False, logits_to_keep=1).logits[:, 0]
        loss = cross_entropy(logits[:, labels].float(), batch.target)
        loss.backward()
        loss.item()
        optimizer.step()

    return step, model


def fit_step(blora, batch: Batch, *, graph: bool):
    """A step of ``fit``: its objective, its optimizer, its checks; captured in a CUDA graph or not."""
    guide = as_guide("normal", blora).to(blora.device)
    model = TaskModel(blora, AnswerTokens().to(blora.device), num_data=NUM_DATA, draws="per_example")
    objective = Objective(default_elbo(guide, blora.prior), model, ScopedGuide(guide, draws="per_example"))
    rates = {"lr": 1e-4, "lr_A": 1e-4, "lr_loc": 1e-4, "lr_scale": 1e-3}
    optimizer = build_optimizer(model, guide, **rates, weight_decay=0.0, capturable=graph)
    execute = (GraphedStep if graph else EagerStep)(objective, optimizer, device=blora.device)

    def step() -> None:
        with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False):
            execute(batch, 1.0)

    return step


def pyro_only(blora, batch: Batch):
    """The Pyro programs of a step without the LLM: sampling, plates, ELBO, and their gradients."""

    class Constant(AnswerTokens):
        def outputs(self, llm, batch, s):
            return s[:, :4]

    guide = as_guide("normal", blora).to(blora.device)
    model = TaskModel(blora, Constant(), num_data=NUM_DATA, draws="per_example")
    objective = Objective(default_elbo(guide, blora.prior), model, ScopedGuide(guide, draws="per_example"))

    def step() -> None:
        with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False):
            objective.zero_grad(set_to_none=True)
            objective.accumulate(batch, 1.0, share=1.0)

    return step


def curvature(blora, batch: Batch):
    """The exact Gauss-Newton matrix of the D latents on a batch, as ``laplace`` sums it over the data."""
    examples = [
        Example({"input_ids": ids}, int(y))
        for ids, y in zip(batch.inputs["input_ids"].tolist(), batch.target, strict=True)
    ]
    llm = AdaptedLLM(blora.adapter, factors=blora.adapter.factors())
    likelihood = LogLikelihood(llm, AnswerTokens(), examples, batch_size=len(batch))
    return lambda: gauss_newton(likelihood, blora.adapter.loc)


def run(args: argparse.Namespace) -> dict:
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
    out["liger"] = args.liger

    def timed(fn: Callable[[], object], steps: int = args.steps) -> dict[str, float]:
        return measure(fn, args.device, steps, occupied)

    for tokens in args.tokens:
        batch = random_batch(args.rows, tokens, args.device)
        flop = 2 * (weights - 2 * embedding) * args.rows * tokens  # of a forward pass through the blocks
        figures = {"floor step": {"ms": 2 * flop / rate * 1000}, "floor draws": {"ms": args.draws * flop / rate * 1000}}
        with torch.no_grad():
            figures["frozen forward"] = timed(lambda b=batch: llm(**b.inputs, use_cache=False, logits_to_keep=1))
            many = random_batch(args.draws * args.rows, tokens, args.device)  # what ten draws cost without an adapter
            figures["frozen draws"] = timed(lambda b=many: llm(**b.inputs, use_cache=False, logits_to_keep=1))
        step, model = mle_step(llm, batch)
        figures["PEFT LoRA step"] = timed(step)
        model.unload()
        del step, model
        gc.collect()
        blora = sp.bayesian_lora(llm, target_modules=TARGETS)
        figures["scalabl_pyro step, eager"] = timed(fit_step(blora, batch, graph=False))
        if args.device == "cuda":
            figures["scalabl_pyro step, eager"] |= {
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
                "estimated_gib": blora.estimate_memory(batch).total / 2**30,
            }
        figures["scalabl_pyro step"] = timed(fit_step(blora, batch, graph=args.device == "cuda"))
        figures["of it Pyro alone"] = timed(pyro_only(blora, batch))
        figures["Laplace curvature"] = timed(curvature(blora, batch), 3)
        s = torch.randn(args.draws, 1, blora.subspace.dim, device=args.device)
        task, adapted = AnswerTokens().to(args.device), AdaptedLLM(blora.adapter, factors=blora.adapter.factors())
        with torch.no_grad():
            figures["scalabl_pyro draws"] = timed(lambda b=batch, t=task, a=adapted, s=s: t.outputs(a, b, s))
        blora.unload()
        gc.collect()
        out[f"T={tokens}"] = figures
        print(f"\n{args.shape}, {args.rows} x {tokens} tokens, {out['device']}, {rate / 1e12:.0f} TFLOP/s")
        for name, figure in figures.items():
            memory = figure.get("above_weights_gib", float("nan"))
            print(f"{name:>25}: {figure['ms']:9.1f} ms {memory:8.2f} GiB above the weights", flush=True)
        if args.out:
            args.out.write_text(json.dumps(out, indent=1))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128])
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10, help="timed repetitions")
    parser.add_argument("--liger", action="store_true", help="fused norms, rotations and gates (liger-kernel)")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
