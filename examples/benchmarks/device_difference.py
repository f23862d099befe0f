"""Finds the first tensor in which two devices differ, in a model whose weights are float64, and bounds the difference.

    python examples/benchmarks/device_difference.py --devices cpu cuda --out difference.json
    python examples/benchmarks/device_difference.py --devices cpu cpu    # runs anywhere, and finds no difference

The same tiny model trains for a few steps on both devices, with the same noise. After each step the script compares, in
the order of the computation, the output of every module, the gradient and the new value of every parameter. It does so
twice: with the model as transformers computes it, and with its norms and rotations in float64. The first one computes
some operations in float32, which the script lists. It also prints how far the two end from each other on the first
device: so much does rounding to float32 change the parameters, whatever the device.

The bound of a sum of products over n numbers is that of its rounding (Higham, Accuracy and Stability of Numerical
Algorithms, 2002, section 3.1): both devices are within n u / (1 - n u) sum |a| |b| of the exact value, with u half of
eps, so they differ by twice that at most. Other tensors get the largest difference in units of eps of their float type.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

import scalabl_pyro as sp
from scalabl_pyro.guides import NormalGuide
from scalabl_pyro.model.joint import TaskModel
from scalabl_pyro.training.objective import Objective, ScopedGuide, default_elbo
from scalabl_pyro.training.optimizer import build_optimizer
from scalabl_pyro.training.step import EagerStep

ANSWERS = (11, 12, 13, 14)
RATES = {"lr": 1e-2, "lr_A": 1e-2, "lr_loc": 1e-2, "lr_scale": 1e-2, "weight_decay": 0.0}


class Answers(sp.Task):
    """A categorical distribution over four tokens after the last one, in the dtype of the model."""

    def outputs(self, llm: Any, batch: Any, s: Tensor) -> Tensor:
        return llm(input_ids=batch.inputs["input_ids"], s=s, positions=batch.last).logits[..., 0, list(ANSWERS)]

    def likelihood(self, outputs: Tensor, batch: Any) -> Any:
        return pyro.distributions.Categorical(logits=outputs)


class NoiseOfTheHost(pyro.distributions.Normal):
    """A normal distribution whose noise is drawn on the host, so that it is the same on every device."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        noise = torch.randn(self._extended_shape(sample_shape), dtype=self.loc.dtype)
        return self.loc + self.scale * noise.to(self.loc.device)


class GuideWithNoiseOfTheHost(NormalGuide):
    """The normal guide, on such noise."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return pyro.sample("s", NoiseOfTheHost(self.loc, self.scale).to_event(1))


class Float32Operations(TorchDispatchMode):
    """Counts the operations that give float32 inside the context, by their name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if any(torch.is_tensor(leaf) and leaf.dtype == torch.float32 and leaf.numel() > 1 for leaf in
               tree_leaves(output)):  # fmt: skip
            name = func.overloadpacket.__name__
            self.counts[name] = self.counts.get(name, 0) + 1
        return output


class Norm(nn.Module):
    """The RMS norm of a Llama in the dtype of its input."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)


class Rotation(nn.Module):
    """The rotary positions of a Llama in the dtype of its input."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.register_buffer("inverse", rotary.inv_freq.double(), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].to(x.dtype) * self.inverse.to(x.dtype)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def make_llm(*, exact: bool) -> nn.Module:
    """A tiny random Llama in float64; ``exact`` for norms and rotations in float64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    llm = AutoModelForCausalLM.from_config(config).double().eval()
    if exact:
        llm.model.norm, llm.model.rotary_emb = Norm(llm.model.norm), Rotation(llm.model.rotary_emb)
        for block in llm.model.layers:
            block.input_layernorm = Norm(block.input_layernorm)
            block.post_attention_layernorm = Norm(block.post_attention_layernorm)
    return llm


@contextmanager
def recorded(llm: nn.Module, found: dict[str, Tensor]) -> Iterator[None]:
    """Keep the output of every module inside the context, and the sum of |a| |b| of every matrix product."""

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if torch.is_tensor(first) and first.is_floating_point():
            found[f"output of {name}"] = first.detach().double().cpu()
        if isinstance(module, nn.Linear):
            size = args[0].detach().abs().double().cpu() @ module.weight.detach().abs().double().cpu().T
            terms = args[0].shape[-1]
            unit = terms * torch.finfo(args[0].dtype).eps / 2
            found[f"bound of {name}"] = 2 * unit / (1 - unit) * size

    hooks = [
        module.register_forward_hook(lambda m, a, o, name=name: keep(name, m, a, o))
        for name, module in llm.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def train(device: str, *, exact: bool, steps: int) -> tuple[list[dict[str, Tensor]], dict[str, int]]:
    """Train on a device; all tensors of each step by name, and the float32 operations of the first step."""
    llm = make_llm(exact=exact)
    blora = sp.bayesian_lora(llm, target_modules=["q_proj", "v_proj"], r=4)
    loc = blora.adapter.loc
    guide = GuideWithNoiseOfTheHost(loc, torch.full_like(loc, 0.3))
    for module in (llm, blora, guide):
        module.to(device)
    model = TaskModel(blora, Answers(), num_data=100, draws="per_example")
    objective = Objective(default_elbo(guide, blora.prior), model, ScopedGuide(guide, draws="per_example"))
    step = EagerStep(objective, build_optimizer(model, guide, **RATES), device=torch.device(device))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(20, 400, (steps, 4, 12), generator=generator)
    torch.manual_seed(2)
    history: list[dict[str, Tensor]] = []
    counted = Float32Operations()
    for number in range(steps):
        rows = torch.arange(4)
        batch = sp.data.Batch({"input_ids": ids[number]}, rows, rows, torch.full((4,), 11))
        found: dict[str, Tensor] = {}
        with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False), recorded(llm, found):
            if number == 0:
                with counted:
                    step(batch, 1.0)
            else:
                step(batch, 1.0)
        named = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
        found |= {f"gradient of {n}": p.grad.detach().double().cpu() for n, p in named if p.grad is not None}
        found |= {f"new {n}": p.detach().double().cpu() for n, p in named}
        history.append(found)
    return history, counted.counts


def compare(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> dict[str, Any]:
    """The first tensor that differs, the first one beyond its bound, and the largest difference at the end."""
    first: dict[str, Any] | None = None
    for number, (left, right) in enumerate(zip(one, other, strict=True)):
        for name, a in left.items():
            difference = (a - right[name]).abs()
            if name.startswith("bound of ") or not difference.max() > 0 or first is not None:
                continue
            largest = float(difference.max())
            first = {"step": number, "tensor": name, "difference": largest}
            first["in eps of float64"] = largest / (torch.finfo(torch.float64).eps * float(a.abs().max()))
            first["in eps of float32"] = largest / (torch.finfo(torch.float32).eps * float(a.abs().max()))
            bound = left.get(name.replace("output of", "bound of"))
            if bound is not None:
                first["bound of a product of these numbers"] = float(bound.max())
                first["is within the bound"] = bool((difference <= bound).all())
    last = {name: float((a - other[-1][name]).abs().max()) for name, a in one[-1].items() if name.startswith("new ")}
    return {"first difference": first, "largest difference of a parameter after the last step": max(last.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs=2, default=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, help="write the findings to this JSON file")
    args = parser.parse_args()
    out: dict[str, Any] = {"devices": args.devices, "steps": args.steps, "torch": torch.__version__}
    on_first = []
    for name, exact in (("as it is", False), ("norms and rotations in float64", True)):
        (one, counts), (other, _) = (train(device, exact=exact, steps=args.steps) for device in args.devices)
        out[name] = {"float32 operations": counts, **compare(one, other)}
        on_first.append(one)
        print(name, json.dumps(out[name], indent=1), flush=True)
    name = f"what float32 in the model does to a parameter on {args.devices[0]} alone"
    out[name] = compare(*on_first)["largest difference of a parameter after the last step"]
    print(name, out[name])
    if args.out:
        args.out.write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
