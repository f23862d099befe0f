"""Put new LoRA layers into a module: with the paper's initialization, or as a saved posterior describes them."""

import re
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .._errors import check_choice, nearest
from .._process.random_state import scoped_seed
from .adapter import GAUGES, Adapter
from .hooks import activate
from .initialization import initialize
from .layer_checks import check_heads, check_layers, ranks_of, shape_of
from .module_changes import ModuleChanges
from .peft_names import quiet_peft
from .targets import is_linear

ADAPTER_NAME = "scalabl"
#: Regular expression that matches no path.
_NOTHING = "(?!)"


def inject(
    module: nn.Module,
    ranks: Mapping[str, int],
    config: LoraConfig,
    *,
    gauge: str,
    heads: Sequence[str],
    seed: int,
    base_tensors: Mapping[str, Tensor] | None = None,
    replace_base: bool = False,
    original: nn.Module | None = None,
) -> Adapter:
    """Replace the linear layers with these paths by LoRA layers, initialized as in the paper.

    Args:
        module: Module that gets the layers.
        ranks: Rank of each linear layer to replace, by path.
        config: Alpha and dropout; its targets and ranks are set here.
        gauge: See :class:`~scalabl_pyro.lora.adapter.Adapter`.
        heads: Paths of modules to train in full.
        seed: Seed of the initial factors.
        base_tensors: Tensors of the module that its checkpoint does not hold, by name.
        replace_base: Whether to put ``base_tensors`` into the module, because it has others.
        original: What ``unload`` returns; None means ``module``.
    """
    names = list(ranks)
    replaced = {name: module.get_submodule(name) for name in names}
    changes = ModuleChanges(module)
    for key, value in (base_tensors or {}).items() if replace_base else ():
        changes.replace_tensor(key, value)
    changes.record_layers(replaced)
    changes.record_new_attribute("peft_config")
    config.fan_in_fan_out = isinstance(replaced[names[0]], Conv1D)
    with scoped_seed(seed), quiet_peft():
        _inject_peft_layers(module, ranks, config)
    layers = [cast(LoraLayer, module.get_submodule(name)) for name in names]
    check_layers(names, layers)
    locs = [initialize(layer, ADAPTER_NAME) for layer in layers]
    for layer, before in zip(layers, replaced.values(), strict=True):
        cast(nn.Module, layer).train(before.training)
    return activate(
        module,
        dict(zip(names, layers, strict=True)),
        adapter_name=ADAPTER_NAME,
        loc=torch.cat(locs),
        changes=changes,
        gauge=gauge,
        heads=heads,
        base_tensors=base_tensors,
        original=original,
    )


def _inject_peft_layers(module: nn.Module, ranks: Mapping[str, int], config: LoraConfig) -> None:
    """Let PEFT replace exactly the layers with these paths.

    PEFT rewrites ``target_modules`` for mixtures of experts: the dense ``gate_proj`` of DeepSeek-V3 would be taken for
    an expert and left out. Names in a state dict are taken as they are.
    """
    config.target_modules = _NOTHING
    config.r = statistics.mode(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != config.r}
    config.rank_pattern = {f"^{re.escape(name)}": rank for name, rank in others.items()}  # "^": whole paths only
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*an inconsistency was discovered.*")  # with target_modules
        names = {f"{name}.lora_A.weight": torch.empty(0) for name in ranks}
        inject_adapter_in_model(config, module, ADAPTER_NAME, state_dict=names)
    config.target_modules = "|".join(map(re.escape, ranks))  # for readers of ``module.peft_config``


def reattach(
    module: nn.Module,
    layers: Sequence[Mapping[str, Any]],
    *,
    gauge: str,
    heads: Sequence[str],
    base_tensors: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Give a module the LoRA layers that a saved posterior describes.

    Args:
        module: Plain base model.
        layers: ``name``, ``rank``, ``in_features``, ``out_features`` and ``scaling`` of each layer.
        gauge: See :class:`~scalabl_pyro.lora.adapter.Adapter`.
        heads: Paths of the modules that were trained in full.
        base_tensors: Saved tensors of the base model that its checkpoint does not hold, by name.

    Raises:
        ValueError: The module carries PEFT layers already, or is not the base model that the posterior was learned on.
    """
    check_choice("gauge", gauge, GAUGES)
    if isinstance(module, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in module.modules()):
        raise ValueError("The module already carries PEFT layers: load the posterior into the plain base model.")
    linear = {name for name, m in module.named_modules() if is_linear(m)}
    for layer in layers:
        if layer["name"] not in linear:
            raise ValueError(
                f"Another base model: it has no linear layer {layer['name']!r}. {nearest(layer['name'], linear)}"
            )
        shape = shape_of(module.get_submodule(layer["name"]))
        if shape != (layer["out_features"], layer["in_features"]):
            raise ValueError(
                f"Another base model: {layer['name']!r} is {shape[0]} x {shape[1]} (out x in), but the posterior was "
                f"learned on {layer['out_features']} x {layer['in_features']}."
            )
        ranks_of(module, [layer["name"]], layer["rank"])
    check_heads(module, heads)
    ranks = {layer["name"]: layer["rank"] for layer in layers}
    adapter = inject(
        module,
        ranks,
        LoraConfig(),
        gauge=gauge,
        heads=heads,
        base_tensors=base_tensors,
        replace_base=True,
        seed=0,
    )
    for saved, own in zip(layers, adapter.layers, strict=True):
        own.scaling[adapter.adapter_name] = saved["scaling"]
    return adapter
