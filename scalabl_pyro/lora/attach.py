"""Put a Bayesian LoRA adapter into a module, or make a LoRA adapter that is already there Bayesian."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .._errors import check_choice, nearest
from .._process.random_state import scoped_seed
from .adapter import Adapter, Undo
from .factors import factors_of
from .hooks import activate
from .initialization import factorize, initialize
from .layers import SubspaceVariant
from .subspace import Layer, Subspace
from .targets import TargetModules, is_linear, new_heads, resolve_targets

#: PEFT's layers that ask a LoRA variant for their update; the others would ignore the latents silently.
SUPPORTED_LAYERS = (
    "Linear",  # nn.Linear and GPT-2's Conv1D
    "Linear8bitLt",
    "Linear4bit",
    "GPTQLoraLinear",
    "HqqLoraLinear",
    "TorchaoLoraLinear",
)
GAUGES = ("unit_rows", "free")
ADAPTER_NAME = "scalabl"
DEFAULT_RANK = 8
DEFAULT_ALPHA = 16


def attach(
    module: nn.Module,
    *,
    r: int | None = None,
    lora_alpha: float | None = None,
    target_modules: TargetModules = None,
    layers_to_transform: int | Iterable[int] | None = None,
    lora_dropout: float = 0.0,
    gauge: str = "unit_rows",
    modules_to_save: Sequence[str] | None = None,
    seed: int = 0,
) -> Adapter:
    """Inject LoRA layers with latents into ``module``; see :func:`scalabl_pyro.bayesian_lora`.

    Nothing is changed when an error is raised.
    """
    check_choice("gauge", gauge, GAUGES)
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"Expected a torch.nn.Module such as AutoModelForCausalLM.from_pretrained(...), got {module!r}."
        )
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise ValueError(
            f"The model is wrapped in {type(module).__name__}: give bayesian_lora() the model itself, which is its "
            ".module. fit() shares each batch over processes, and adds up their gradients, by itself."
        )
    if isinstance(modules_to_save, str):
        raise TypeError(f"modules_to_save={modules_to_save!r}: give a list of names, [{modules_to_save!r}].")
    if lora_alpha is not None and not (isinstance(lora_alpha, int | float) and 0 < lora_alpha < float("inf")):
        raise ValueError(f"lora_alpha={lora_alpha!r}: must be a positive number.")
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout={lora_dropout!r}: must be at least 0 and below 1.")
    if find_adapter(getattr(module, "llm", module)) is not None:
        raise ValueError(
            "This module already carries a Bayesian LoRA adapter. Use the object that bayesian_lora() returned before, "
            "or call its .unload() first."
        )
    inner = module.get_base_model() if isinstance(module, PeftModel) else module
    heads = new_heads(inner) if modules_to_save is None else list(modules_to_save)
    _check_heads(inner, heads)
    found = {name: m for name, m in inner.named_modules() if isinstance(m, BaseTunerLayer)}
    if found:
        given = {
            "r": r,
            "lora_alpha": lora_alpha,
            "target_modules": target_modules,
            "layers_to_transform": layers_to_transform,
        }
        if extra := [name for name, value in given.items() if value is not None]:
            raise ValueError(
                f"This module already carries PEFT LoRA layers, which decide {', '.join(extra)}. Leave that out to "
                "make those layers Bayesian, or unload them first."
            )
        adapter = _adopt(inner, found, gauge=gauge, heads=heads)
        adapter.original = module
        return adapter
    r = DEFAULT_RANK if r is None else r
    names = resolve_targets(inner, target_modules, layers_to_transform=layers_to_transform)
    if both := [n for n in names if any(n == h or n.startswith(h + ".") for h in heads)]:
        raise ValueError(
            f"modules_to_save trains {both[0]!r} in full, so it cannot be adapted too: leave it out of "
            "modules_to_save or of target_modules."
        )
    _check_rank(inner, names, r)
    config = LoraConfig(
        r=r,
        lora_alpha=DEFAULT_ALPHA if lora_alpha is None else lora_alpha,  # type: ignore[arg-type]
        lora_dropout=lora_dropout,
    )
    return _inject(inner, names, config, gauge=gauge, heads=heads, seed=seed)


def reattach(module: nn.Module, layers: Sequence[Mapping[str, Any]], *, gauge: str, heads: Sequence[str]) -> Adapter:
    """Give a module the layers that a saved posterior describes (name, rank, in_features, out_features, scaling)."""
    check_choice("gauge", gauge, GAUGES)
    if any(isinstance(m, BaseTunerLayer) for m in module.modules()):
        raise ValueError("The module already carries PEFT layers: load the posterior into the plain base model.")
    linear = {name for name, m in module.named_modules() if is_linear(m)}
    for layer in layers:
        if layer["name"] not in linear:
            raise ValueError(
                f"Another base model: it has no linear layer {layer['name']!r}. {nearest(layer['name'], linear)}"
            )
        shape = _shape(module.get_submodule(layer["name"]))
        if shape != (layer["out_features"], layer["in_features"]):
            raise ValueError(
                f"Another base model: {layer['name']!r} is {shape[0]} x {shape[1]} (out x in), but the posterior was "
                f"learned on {layer['out_features']} x {layer['in_features']}."
            )
        _check_rank(module, [layer["name"]], layer["rank"])
    _check_heads(module, heads)
    config = LoraConfig(rank_pattern={re.escape(layer["name"]): layer["rank"] for layer in layers})
    adapter = _inject(module, [layer["name"] for layer in layers], config, gauge=gauge, heads=heads, seed=0)
    for saved, own in zip(layers, adapter.layers, strict=True):
        own.scaling[adapter.adapter_name] = saved["scaling"]
    return adapter


def find_adapter(module: nn.Module) -> Adapter | None:
    """The Bayesian LoRA adapter that a module carries, if any."""
    for m in module.modules():
        for variant in getattr(m, "lora_variant", {}).values():
            if isinstance(variant, SubspaceVariant):
                return variant.adapter
    return None


def _inject(
    module: nn.Module, names: list[str], config: LoraConfig, *, gauge: str, heads: Sequence[str], seed: int
) -> Adapter:
    """New LoRA layers, started as in the paper."""
    originals = {name: module.get_submodule(name) for name in names}
    undo = Undo(
        flags=[(p, p.requires_grad) for p in module.parameters()],
        replaced=originals,
        attributes=[] if hasattr(module, "peft_config") else ["peft_config"],
    )
    config.target_modules = "|".join(map(re.escape, names))  # whole paths: a list would match suffixes
    config.fan_in_fan_out = isinstance(originals[names[0]], Conv1D)
    with scoped_seed(seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # one config for Conv1D and Linear targets
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # matters for merging only
        inject_adapter_in_model(config, module, ADAPTER_NAME)
    layers = [cast(LoraLayer, module.get_submodule(name)) for name in names]
    locs = [initialize(layer, ADAPTER_NAME) for layer in layers]
    for layer, original in zip(layers, originals.values(), strict=True):
        cast(nn.Module, layer).train(original.training)
    adapter = _assemble(module, names, layers, ADAPTER_NAME, torch.cat(locs), gauge=gauge, undo=undo)
    try:
        _check_layers(names, layers)
    except TypeError:
        adapter.unload()
        raise
    activate(adapter, heads)
    return adapter


def _adopt(module: nn.Module, found: Mapping[str, BaseTunerLayer], *, gauge: str, heads: Sequence[str]) -> Adapter:
    """Turn existing LoRA layers Bayesian without changing the function they compute."""
    layers = {name: m for name, m in found.items() if isinstance(m, LoraLayer)}
    if len(layers) < len(found):
        name, other = next((n, m) for n, m in found.items() if n not in layers)
        raise TypeError(f"{name!r} is a {type(other).__name__} of another PEFT method; only LoRA can become Bayesian.")
    active = {tuple(layer.active_adapters) for layer in layers.values()}
    if len(active) != 1 or len(next(iter(active))) != 1:
        raise ValueError(f"Exactly one LoRA adapter must be active, found {sorted(active)}: call set_adapter(name).")
    (adapter_name,) = next(iter(active))
    layers = {name: m for name, m in layers.items() if adapter_name in m.lora_A}
    _check_layers(layers.keys(), layers.values())
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name!r} is merged into its base layer: call unmerge_adapter() first.")
        if layer.lora_variant.get(adapter_name) is not None or layer.lora_bias.get(adapter_name):
            raise ValueError(
                f"{name!r} uses a LoRA variant (DoRA, ...) or lora_bias; only plain LoRA can become Bayesian."
            )
    weights = [weight for layer in layers.values() for weight in factors_of(layer, adapter_name)]
    undo = Undo(
        flags=[(p, p.requires_grad) for p in module.parameters()],
        weights=[(weight, weight.detach().clone()) for weight in weights],
        casts=[(layer, layer.cast_input_dtype_enabled) for layer in layers.values()],
    )
    locs = [factorize(layer, adapter_name) for layer in layers.values()]
    adapter = _assemble(
        module, list(layers), list(layers.values()), adapter_name, torch.cat(locs), gauge=gauge, undo=undo
    )
    activate(adapter, heads)
    return adapter


def _assemble(
    module: nn.Module,
    names: list[str],
    layers: Sequence[LoraLayer],
    adapter_name: str,
    loc: Tensor,
    *,
    gauge: str,
    undo: Undo,
) -> Adapter:
    subspace = Subspace(
        tuple(
            Layer(name, layer.r[adapter_name], cast(int, layer.in_features), cast(int, layer.out_features))
            for name, layer in zip(names, layers, strict=True)
        )
    )
    adapter = Adapter(module, layers, subspace, adapter_name=adapter_name, loc=loc, gauge=gauge)
    adapter.undo = undo
    return adapter


def _shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features  # type: ignore[return-value]


def _check_rank(module: nn.Module, names: Sequence[str], r: int) -> None:
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"r={r!r}: the rank must be a positive integer.")
    for name in names:
        shape = _shape(module.get_submodule(name))
        if r > min(shape):
            raise ValueError(
                f"r={r} is larger than layer {name!r} with weight {shape[0]} x {shape[1]} (out x in) allows: use "
                f"r <= {min(shape)}, or leave the layer out of target_modules."
            )


def _check_layers(names: Iterable[str], layers: Iterable[object]) -> None:
    for name, layer in zip(names, layers, strict=True):
        kind = type(layer).__name__
        if kind not in SUPPORTED_LAYERS or not isinstance(layer, LoraLayer):
            raise TypeError(
                f"{name!r} is a PEFT {kind}, which would ignore the latents silently. Supported: "
                f"{', '.join(SUPPORTED_LAYERS)}. Leave the layer out of target_modules."
            )


def _check_heads(module: nn.Module, heads: Sequence[str]) -> None:
    names = dict(module.named_modules())
    for name in heads:
        if name not in names:
            raise ValueError(f"modules_to_save: the module has no {name!r}. {nearest(name, [n for n in names if n])}")
        if next(names[name].parameters(), None) is None:
            raise ValueError(f"modules_to_save: {name!r} has no parameters to train.")
