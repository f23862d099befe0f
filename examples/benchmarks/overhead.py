"""Measures what scalabl_pyro costs on top of plain PyTorch: a step of ``fit`` beside PEFT's, draws beside passes.

    python examples/benchmarks/overhead.py                 # SmolLM2-135M, 8 x 64 tokens, CPU
    python examples/benchmarks/overhead.py --tiny          # a random model with two blocks: seconds

Both train the same layers of the same model on the same batches with AdamW. Ten draws with the upper half of the blocks
adapted are compared with ten forward passes of the base model. The two sides of a comparison alternate in one process,
so that a busy machine slows both. The figures are ratios of medians.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import scalabl_pyro as sp
from scalabl_pyro.data import Batch
from scalabl_pyro.lora.forward import AdaptedLLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from _support.models import smollm2, upper_blocks
from _support.random_llms import random_llm
from _support.timing import TARGETS, AnswerTokens, fit_step, peft_step, random_batch

LABELS = (330, 389, 340, 422)  # tokens of the four answers


def build(tiny: bool):
    """Load a fresh base model."""
    return random_llm("tiny", "cpu", torch.float32) if tiny else smollm2()[0].eval()


def scalabl_step(base, batch: Batch):
    """Make a step of ``fit``."""
    blora = sp.bayesian_lora(base, target_modules=TARGETS)
    base.eval()
    return fit_step(blora, batch, task=AnswerTokens(LABELS, use_mask=True), lr=1e-3)


def ten_passes(base, batch: Batch):
    """Make ten forward passes of the base model that compute the logits of the last token."""

    @torch.no_grad()
    def passes() -> None:
        for _ in range(10):
            base(**batch.inputs, use_cache=False, logits_to_keep=1)

    return passes


def ten_draws(base, batch: Batch):
    """Make the answers under ten draws, as ``predict`` computes them, with the upper half of the blocks adapted."""
    half = base.config.num_hidden_layers // 2
    upper = upper_blocks(base, base.config.num_hidden_layers - half)
    blora = sp.bayesian_lora(base, target_modules=TARGETS, layers_to_transform=upper)
    base.eval()
    task = AnswerTokens(LABELS, use_mask=True)
    llm = AdaptedLLM(blora.adapter, factors=blora.adapter.factors())
    s = torch.randn(10, 1, blora.subspace.dim)

    @torch.no_grad()
    def draws() -> None:
        task.outputs(llm, batch, s)

    return draws


def compare(pair: dict[str, Callable[[], None]], steps: int) -> dict:
    """Time two functions in turn; the ratio is that of the second median to the first."""
    times: dict[str, list[float]] = {name: [] for name in pair}
    for i in range(steps + 2):
        for name, run in pair.items():
            start = time.perf_counter()
            run()
            if i >= 2:  # the first two calls warm up
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(t) for name, t in times.items()}
    theirs, ours = medians.values()
    for name, seconds in medians.items():
        print(f"{name:>24}: {1000 * seconds:8.1f} ms (median of {steps})")
    print(f"{'ratio':>24}: {ours / theirs:8.3f}", flush=True)
    return {"seconds": medians, "ratio": ours / theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="use a random model with two blocks")
    parser.add_argument("--rows", type=int, default=8, help="rows per batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per row")
    parser.add_argument("--steps", type=int, default=15, help="number of timed calls of each side")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()

    plain, peft_base, our_base, base_of_draws = (build(args.tiny) for _ in range(4))
    torch.manual_seed(0)
    batch = random_batch(args.rows, args.tokens, vocabulary=(3, plain.config.vocab_size))
    by_hand, _ = peft_step(peft_base, batch, labels=LABELS, lr=1e-3)
    pairs = {
        "step": {"PEFT": by_hand, "scalabl_pyro": scalabl_step(our_base, batch)},
        "draws": {
            "ten passes of the base": ten_passes(plain, batch),
            "ten draws, upper half": ten_draws(base_of_draws, batch),
        },
    }
    found = {what: compare(pair, args.steps) for what, pair in pairs.items()}
    if args.out:
        setting = {k: str(v) for k, v in vars(args).items()}
        args.out.write_text(json.dumps(found | {"setting": setting}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
