"""Times a step of a Pyro model of your own: ``scalabl_pyro.infer.SVI`` beside ``fit`` and Pyro's own SVI.

    python examples/benchmarks/own_model_step.py --shape qwen2.5-7b --tokens 128 300 --out own_model.json    # one GPU
    python examples/benchmarks/own_model_step.py --shape tiny --device cpu --steps 3                         # anywhere

The model is that of the README, with its loop: rows are picked from data on the device, and ``step`` returns a float.
``fit`` is its captured step on as many rows as the model has rows times draws: every side sends as many rows through
the LLM, with a padding mask. Weights are random, because time and memory depend on shapes only.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI as StockSVI
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import scalabl_pyro as sp
from scalabl_pyro.infer import SVI

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from _support.random_llms import SHAPES, fuse_elementwise, random_llm
from _support.timing import LABELS, NUM_DATA, TARGETS, AnswerTokens, fit_step, measure, random_batch

#: Rows of the data that the loop picks its batches from.
POOL = 64


def own_step(kind: type, blora, tokens: int, args: argparse.Namespace) -> tuple[Callable[[], float], object]:
    """Make a step of the loop of the README, and its SVI."""
    pyro.clear_param_store()
    label_ids = torch.tensor(LABELS, device=blora.device)

    def model(ids, mask, labels=None):
        last = mask.sum(1) - 1  # the last token of each prompt
        outputs = blora(input_ids=ids, attention_mask=mask, positions=last)
        logits = outputs.logits[..., 0, label_ids].float()
        with pyro.plate("data", NUM_DATA, subsample_size=len(ids)):
            pyro.sample("label", dist.Categorical(logits=logits), obs=labels)

    guide = AutoNormal(model, init_loc_fn=blora.init_loc, init_scale=0.05)
    elbo = Trace_ELBO(num_particles=args.particles, vectorize_particles=True)
    svi = kind(model, guide, pyro.optim.Adam({"lr": 1e-4}), elbo)
    data = random_batch(POOL, tokens, args.device)
    ids, mask, labels = data.inputs["input_ids"], data.inputs["attention_mask"], data.target

    def step() -> float:
        rows = torch.randint(POOL, (args.rows,), device=args.device)
        return svi.step(ids[rows], mask[rows], labels[rows])

    return step, svi


def sides(llm, tokens: int, args: argparse.Namespace, timed: Callable) -> dict[str, dict[str, float]]:
    """Time each side with an adapter of its own."""
    figures = {}

    def on_adapter(function: Callable) -> dict[str, float]:
        blora = sp.bayesian_lora(llm, target_modules=TARGETS)
        found = function(blora)
        blora.unload()
        pyro.clear_param_store()
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
        return found

    def fit(blora) -> dict[str, float]:
        batch = random_batch(args.rows * args.particles, tokens, args.device)
        return timed(fit_step(blora, batch, task=AnswerTokens(use_mask=True), graph=args.device == "cuda"))

    def ours(blora) -> dict[str, float]:
        step, svi = own_step(SVI, blora, tokens, args)
        return timed(step) | {"captured_shapes": svi.num_captured}

    figures["fit"] = on_adapter(fit)
    figures["infer.SVI"] = on_adapter(ours)
    figures["stock SVI"] = on_adapter(lambda blora: timed(own_step(StockSVI, blora, tokens, args)[0]))
    figures["fit, again"] = on_adapter(fit)  # how much the time of one side moves within the run
    return figures


def run(args: argparse.Namespace) -> dict:
    """Measure all lengths of rows; print the figures and write them after each length."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    llm = random_llm(args.shape, args.device, dtype)
    if args.liger:
        fuse_elementwise(llm)
    occupied = torch.cuda.memory_allocated() if args.device == "cuda" else 0
    out = {
        "shape": args.shape,
        "rows": args.rows,
        "particles": args.particles,
        "steps": args.steps,
        "liger": args.liger,
    }
    out["device"] = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    out["versions"] = {module.__name__: module.__version__ for module in (sp, torch, pyro)}
    out |= {"lines": {}, "ratios": {}}
    for tokens in args.tokens:
        figures = sides(llm, tokens, args, lambda step: measure(step, args.device, args.steps, occupied))
        out["lines"][f"T={tokens}"] = figures
        ratios = {name: figures[name]["ms"] / figures["fit"]["ms"] for name in figures if name != "fit"}
        out["ratios"][f"T={tokens}"] = ratios
        print(f"\n{args.shape}, {args.rows} x {tokens} tokens, {out['device']}")
        for name, figure in figures.items():
            print(f"{name:>12}: {figure['ms']:9.1f} ms {figure['above_weights_gib']:8.2f} GiB above the weights")
        for name, ratio in ratios.items():
            print(f"{name} / fit: {ratio:.3f}", flush=True)
        if args.out:
            args.out.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="shape of the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=4, help="rows per batch")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128], help="tokens per row")
    parser.add_argument("--particles", type=int, default=1, help="draws per step of the own model")
    parser.add_argument("--steps", type=int, default=20, help="number of timed steps")
    parser.add_argument("--liger", action="store_true", help="use the fused kernels of liger-kernel")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
