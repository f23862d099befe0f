"""What scalabl_pyro costs on top of plain PyTorch: a `fit` step against one of PEFT, ten draws against ten passes.

    python examples/benchmarks/overhead.py                 # SmolLM2-135M, 8 x 64 tokens, CPU
    python examples/benchmarks/overhead.py --tiny          # a random model of two blocks: runs in seconds

Both train the same layers of the same model on the same batches with AdamW. Ten draws with the upper half of the blocks
adapted stand against ten forward passes of the base model. What is compared alternates in one process, so that a busy
machine slows both; the figures are ratios of medians.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import pyro
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig

import scalabl_pyro as sp
from scalabl_pyro.data import Batch
from scalabl_pyro.guides import as_guide
from scalabl_pyro.lora.forward import AdaptedLLM
from scalabl_pyro.model.joint import TaskModel
from scalabl_pyro.training.objective import Objective, ScopedGuide, default_elbo

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sources

TARGETS = ["q_proj", "v_proj", "lm_head"]
LABELS = torch.tensor([330, 389, 340, 422])  # tokens of four answers
NUM_DATA = 300


def build(tiny: bool):
    """A fresh base model."""
    if not tiny:
        return sources.smollm2()[0]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config)


class AnswerTokens(sp.Task):
    """Categorical over four tokens at the last position."""

    def outputs(self, llm, batch, s):
        return llm(**batch.inputs, s=s, positions=batch.last).logits[..., 0, :][..., LABELS]

    def likelihood(self, outputs, batch):
        return pyro.distributions.Categorical(logits=outputs)


def peft_step(base, batch: Batch):
    """One maximum-likelihood step of PEFT's LoRA, written as one would by hand."""
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        # Rows of one length: the last token is the answer's, and only its logits are computed, as in ours.
        logits = model(**batch.inputs, use_cache=False, logits_to_keep=1).logits[:, 0]
        loss = cross_entropy(logits[:, LABELS].float(), batch.target)
        loss.backward()
        if not torch.isfinite(loss):
            raise FloatingPointError
        optimizer.step()

    return step


def scalabl_step(base, batch: Batch):
    """One step of ``fit``: its objective, its optimizer, its checks."""
    from scalabl_pyro.training.optimizer import build_optimizer
    from scalabl_pyro.training.step import EagerStep

    blora = sp.bayesian_lora(base, target_modules=TARGETS)
    base.eval()
    guide = as_guide("normal", blora)
    model = TaskModel(blora, AnswerTokens(), num_data=NUM_DATA, draws="per_example")
    objective = Objective(default_elbo(guide, blora.prior), model, ScopedGuide(guide, draws="per_example"))
    optimizer = build_optimizer(model, guide, lr=1e-3, lr_A=1e-3, lr_loc=1e-3, lr_scale=1e-3, weight_decay=0.0)
    execute = EagerStep(objective, optimizer, device=blora.device)

    def step() -> None:
        with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False):
            execute(batch, 1.0)

    return step


def ten_passes(base, batch: Batch):
    """Ten forward passes of the base model, logits of the last token."""

    @torch.no_grad()
    def passes() -> None:
        for _ in range(10):
            base(**batch.inputs, use_cache=False, logits_to_keep=1)

    return passes


def ten_draws(base, batch: Batch):
    """The answers under ten draws, as ``predict`` computes them, with the upper half of the blocks adapted."""
    depth = base.config.num_hidden_layers
    blora = sp.bayesian_lora(base, target_modules=TARGETS, layers_to_transform=range(depth // 2, depth))
    base.eval()
    task, llm = AnswerTokens(), AdaptedLLM(blora.adapter, factors=blora.adapter.factors())
    s = torch.randn(10, 1, blora.subspace.dim)

    @torch.no_grad()
    def draws() -> None:
        task.outputs(llm, batch, s)

    return draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a random model of two blocks")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()

    bases = [build(args.tiny) for _ in range(3)]
    vocabulary = bases[0].config.vocab_size
    torch.manual_seed(0)
    ids = torch.randint(3, vocabulary, (args.rows, args.tokens))
    batch = Batch(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        torch.arange(args.rows) % 4,
        torch.arange(args.rows),
        torch.full((args.rows,), args.tokens - 1),
    )
    plain = ten_passes(build(args.tiny).eval(), batch)
    pairs = {
        "step": {"PEFT": peft_step(bases[0], batch), "scalabl_pyro": scalabl_step(bases[1], batch)},
        "draws": {"ten passes of the base": plain, "ten draws, upper half": ten_draws(bases[2], batch)},
    }
    found: dict[str, dict] = {}
    for what, pair in pairs.items():
        times: dict[str, list[float]] = {name: [] for name in pair}
        for i in range(args.steps + 2):
            for name, run in pair.items():
                start = time.perf_counter()
                run()
                if i >= 2:  # the first two warm up
                    times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(t) for name, t in times.items()}
        theirs, ours = medians.values()
        found[what] = {"seconds": medians, "ratio": ours / theirs}
        for name, seconds in medians.items():
            print(f"{name:>24}: {1000 * seconds:8.1f} ms (median of {args.steps})")
        print(f"{'ratio':>24}: {ours / theirs:8.3f}", flush=True)
    if args.out:
        setting = {k: str(v) for k, v in vars(args).items()}
        args.out.write_text(json.dumps(found | {"setting": setting}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
