"""Make the PEFT LoRA layers that a module already carries Bayesian, without changing the function they compute."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .adapter import Adapter
from .base_tensors import unsaved_tensors
from .factors import factors_of
from .hooks import activate
from .initialization import factorize
from .layer_checks import check_layers
from .module_changes import ModuleChanges
from .same_function import check_same_output, probe_output


def adopt(
    module: nn.Module,
    found: Mapping[str, BaseTunerLayer],
    *,
    gauge: str,
    heads: Sequence[str],
    spectrum: bool = False,
    original: nn.Module | None = None,
) -> Adapter:
    """Rewrite each update B A as B' diag(s) A' with orthonormal rows of A'.

    Args:
        module: Module that carries the layers.
        found: PEFT layers of the module, by path.
        gauge: See :class:`~scalabl_pyro.lora.adapter.Adapter`.
        heads: Paths of modules to train in full.
        spectrum: Whether s starts at the singular values of the update; see
            :func:`~scalabl_pyro.lora.initialization.factorize`.
        original: What ``unload`` returns; None means ``module``.

    Raises:
        TypeError: A layer of another PEFT method, or of a kind that ignores the latents.
        ValueError: Several active adapters, merged layers, or a LoRA variant such as DoRA.
    """
    adapter_name, layers = _plain_lora(found)
    configs = list(getattr(module, "peft_config", {}).values())
    _check_configs(configs)
    base_tensors = unsaved_tensors(module, heads=heads, configs=configs)
    given = module if original is None else original
    before = probe_output(given, module)
    changes = ModuleChanges(module)
    changes.record_weights(weight for layer in layers.values() for weight in factors_of(layer, adapter_name))
    for layer in layers.values():
        changes.record_rank(layer, adapter_name)
    locs = [factorize(layer, adapter_name, spectrum=spectrum) for layer in layers.values()]
    adapter = activate(
        module,
        layers,
        adapter_name=adapter_name,
        loc=torch.cat(locs),
        changes=changes,
        gauge=gauge,
        heads=heads,
        base_tensors=base_tensors,
        original=original,
    )
    check_same_output(before, probe_output(given, module, strict=before is not None))
    return adapter


def _check_configs(configs: Sequence[Any]) -> None:
    if any(getattr(config, "layer_replication", None) for config in configs):
        raise ValueError(
            "The PEFT adapter repeats blocks of the base model (layer_replication), so its layers are not those of the "
            "base checkpoint. Merge it into a model of its own, and adapt that."
        )


def _plain_lora(found: Mapping[str, BaseTunerLayer]) -> tuple[str, dict[str, LoraLayer]]:
    """The name of the active adapter and its layers by path, checked."""
    found = {name: m for name, m in found.items() if not isinstance(m, TrainableTokensLayer)}
    layers = {name: m for name, m in found.items() if isinstance(m, LoraLayer)}
    if len(layers) < len(found):
        name, other = next((n, m) for n, m in found.items() if n not in layers)
        raise TypeError(
            f"{name!r} is a {type(other).__name__} of another PEFT method; only LoRA can become Bayesian. Pass the "
            "model without it."
        )
    if any(layer.disable_adapters for layer in layers.values()):
        raise ValueError("The LoRA adapters are disabled: call enable_adapter_layers() first, or unload them.")
    active = {tuple(layer.active_adapters) for layer in layers.values()}
    if len(active) != 1 or len(next(iter(active))) != 1:
        raise ValueError(f"Exactly one LoRA adapter must be active, found {sorted(active)}: call set_adapter(name).")
    (adapter_name,) = next(iter(active))
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name!r} is merged into its base layer: call unmerge_adapter() first.")
        if adapter_name in layer.lora_embedding_A and layer.lora_variant.get(adapter_name) is not None:
            raise ValueError(
                f"{name!r} uses a LoRA variant (DoRA, ...) on embeddings; only plain LoRA can be saved. Merge the "
                "adapter, or train it as plain LoRA."
            )
    layers = {name: m for name, m in layers.items() if adapter_name in m.lora_A}
    if not layers:
        raise ValueError(
            f"The LoRA adapter {adapter_name!r} has no linear layer, and only those can become Bayesian. Use an "
            "adapter that has them, or pass the plain base model."
        )
    check_layers(layers.keys(), layers.values())
    for name, layer in layers.items():
        if layer.lora_variant.get(adapter_name) is not None or layer.lora_bias.get(adapter_name):
            raise ValueError(
                f"{name!r} uses a LoRA variant (DoRA, ...) or lora_bias; only plain LoRA can become Bayesian. Merge "
                "the adapter into the model, or train it as plain LoRA."
            )
    return adapter_name, layers
