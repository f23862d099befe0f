"""One draw as an ordinary LoRA adapter of PEFT: gamma and s go into A, so that any tool computes the same update.

For a layer with factors A, B and latents s, the update is gamma B diag(s) A = B A', where A' = gamma diag(s) A. All
layers get one rank by rows and columns of zeros, and lora_alpha is that rank. Engines that read one rank and one
alpha per adapter then scale every layer right.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .adapter import Adapter
from .factors import Factors
from .module_paths import last_name, lies_in
from .peft_names import quiet_peft
from .targets import is_encoder_decoder, output_head
from .tensors import set_tensor

ADAPTER_NAME = "default"
#: Names under which PEFT saves the head of a classifier without being told to.
PEFT_HEADS = {"score", "classifier"}


@dataclass(frozen=True)
class Extras:
    """What an adapter holds besides LoRA factors, as PEFT can save it.

    Attributes:
        modules: Tensors of modules that are saved in full, by path of the module and name in it.
        biases: Biases of the base model that were trained, by name.
        bias: Which biases PEFT saves: ``"none"``, ``"lora_only"`` or ``"all"``.
    """

    modules: Mapping[str, Mapping[str, Tensor]]
    biases: Mapping[str, Tensor]
    bias: str


def extras_of(adapter: Adapter, heads: Mapping[str, nn.Module]) -> Extras:
    """Sort the trained heads and the saved base tensors of an adapter by the way in which PEFT can save them.

    Args:
        adapter: Adapter inside the model.
        heads: Trained heads by module path.

    Raises:
        ValueError: A tensor cannot be part of a PEFT adapter, such as a base weight that PiSSA changed.
    """
    targets = adapter.subspace.names
    modules: dict[str, dict[str, Tensor]] = {path: dict(head.state_dict()) for path, head in heads.items()}
    biases = {}
    has_biases = any(_split(name) == (target, "bias") for name in adapter.base_tensors for target in targets)
    for name, value in adapter.base_tensors.items():
        owner, key = _split(name)
        if owner in targets and key != "bias":
            raise ValueError(
                f"The posterior holds its own values of {name!r}, which LoRA changes too: the base was changed when "
                "LoRA started (PiSSA, OLoRA), or it is a new head. A PEFT adapter cannot hold both. Use "
                "posterior.merge(draw) instead, which gives a plain model."
            )
        if has_biases and "bias" in key:
            biases[name] = value
        elif not owner or any(lies_in(target, owner) for target in targets):
            raise ValueError(
                f"The posterior holds its own values of {name!r}, which no PEFT adapter can hold beside LoRA on the "
                "same module. Use posterior.merge(draw) instead, which gives a plain model."
            )
        else:
            modules.setdefault(owner, {})[key] = value
    elsewhere = any(_split(name)[0] not in targets for name in biases)
    return Extras(modules, biases, "all" if elsewhere else "lora_only" if biases else "none")


def as_peft_model(adapter: Adapter, base: nn.Module, *, rank: int, extras: Extras | None = None) -> PeftModel:
    """Give a plain base model LoRA layers like those of an adapter; :func:`put_draw` sets their values.

    Args:
        adapter: Adapter to imitate.
        base: Plain copy of its base model. Trained biases are replaced in it.
        rank: Rank of all layers, at least the largest one of the adapter.
        extras: What else the PEFT model holds; None for LoRA alone.
    """
    extras = extras or Extras({}, {}, "none")
    for name, value in extras.biases.items():
        set_tensor(base, name, value)
    model = cast(Any, base)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_target_modules(base, adapter.subspace.names),
        modules_to_save=sorted(extras.modules) or None,
        bias=cast(Any, extras.bias),
        task_type=_task_type(base, extras.modules),
        fan_in_fan_out=isinstance(base.get_submodule(adapter.subspace.names[0]), Conv1D),
        inference_mode=True,
    )
    with quiet_peft():
        peft_model = cast(PeftModel, get_peft_model(model, config, adapter_name=ADAPTER_NAME))
    _check_same_places(peft_model, adapter.subspace.names, extras.modules)
    for path, tensors in extras.modules.items():
        wrapper = cast(ModulesToSaveWrapper, peft_model.get_base_model().get_submodule(path))
        saved = wrapper.modules_to_save[ADAPTER_NAME]
        for key, value in tensors.items():
            set_tensor(saved, key, value)
    return peft_model


@torch.no_grad()
def put_draw(
    model: PeftModel, adapter: Adapter, factors: Factors, s: Tensor, *, dtype: torch.dtype | None = None
) -> None:
    """Set the LoRA layers of :func:`as_peft_model` to one draw.

    Args:
        model: Model that gets the values.
        adapter: Adapter that the draw belongs to.
        factors: A (r, in) and B (out, r) of each layer.
        s: The draw, (D,).
        dtype: Type of the new factors; None for that of ``factors``.
    """
    base = model.get_base_model()
    parts = adapter.subspace.split(s)
    for layer, own, (A, B), part in zip(adapter.subspace, adapter.layers, factors, parts, strict=True):
        gamma = own.scaling[adapter.adapter_name]
        rows = A.double()
        rows = F.normalize(rows, dim=-1) if adapter.gauge == "unit_rows" else rows
        folded = (gamma * part.to(rows)).unsqueeze(1) * rows
        target = cast(LoraLayer, base.get_submodule(layer.name))
        missing = target.r[ADAPTER_NAME] - layer.rank
        like = cast(nn.Linear, target.lora_A[ADAPTER_NAME]).weight
        cast(nn.Linear, target.lora_A[ADAPTER_NAME]).weight.data = F.pad(folded, (0, 0, 0, missing)).to(
            like.device, dtype or A.dtype
        )
        cast(nn.Linear, target.lora_B[ADAPTER_NAME]).weight.data = F.pad(B, (0, missing)).to(
            like.device, dtype or B.dtype
        )


def _split(name: str) -> tuple[str, str]:
    path, _, key = name.rpartition(".")
    return path, key


def _target_modules(base: nn.Module, names: Sequence[str]) -> list[str] | str:
    """Return the shortest description of the adapted layers that PEFT reads: last names, paths, or an expression."""
    short = sorted({last_name(name) for name in names})
    for targets in (short, sorted(names)):
        if _matched(base, targets) == set(names):
            return targets
    return "|".join(map(re.escape, names))


def _matched(base: nn.Module, targets: Collection[str]) -> set[str]:
    return {
        name
        for name, _ in base.named_modules()
        if any(name == target or name.endswith(f".{target}") for target in targets)
    }


def _task_type(base: nn.Module, modules: Collection[str]) -> TaskType | None:
    """Return the task type under which PEFT saves exactly these modules; None if there is no such type."""
    if output_head(base) is not None:
        return TaskType.SEQ_2_SEQ_LM if is_encoder_decoder(base) else TaskType.CAUSAL_LM
    own = {name for name, _ in base.named_children()} & PEFT_HEADS
    is_classifier = "ForSequenceClassification" in type(base).__name__
    return TaskType.SEQ_CLS if is_classifier and own and set(modules) == own else None


def _check_same_places(model: PeftModel, layers: Sequence[str], modules: Collection[str]) -> None:
    """Raise RuntimeError unless PEFT wrapped exactly the adapted layers and the modules that are saved in full."""
    named = dict(model.get_base_model().named_modules())
    found = {name for name, m in named.items() if isinstance(m, LoraLayer)}
    saved = {name for name, m in named.items() if isinstance(m, ModulesToSaveWrapper)}
    if other := (found ^ set(layers)) | (saved ^ set(modules)):
        raise RuntimeError(
            f"PEFT adapts other modules than the posterior, {sorted(other)[0]!r} for instance, so the posterior cannot "
            "become a PEFT adapter. Use posterior.merge(draw) instead, which gives a plain model."
        )
