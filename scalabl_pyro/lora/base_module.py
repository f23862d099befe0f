"""Finds the module to adapt inside its wrappers, and checks that its weights are where they can be used."""

import logging
from typing import Any, cast

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .peft_names import method_of

logger = logging.getLogger(__name__)

#: Classes of PEFT that put a model inside another one.
PEFT_WRAPPERS = (PeftModel, PeftMixedModel, BaseTuner)


def base_module(module: nn.Module) -> nn.Module:
    """Return the module whose layers are adapted: without a PEFT model or ``torch.compile`` around it.

    A compiled module runs without ``torch.compile`` from then on. Its paths are those of the plain module, so that a
    posterior fits both.

    Args:
        module: Module that the user gave.

    Raises:
        ValueError: Parts of the module are compiled by themselves.
        TypeError: The module carries an adapter of another PEFT method than LoRA.
    """
    while not _is_plain(module):
        if isinstance(module, PEFT_WRAPPERS):
            _check_method(module)
            inner = module.model if isinstance(module, BaseTuner) else module.base_model
            module = cast(nn.Module, inner)
        else:
            module = cast(nn.Module, module._orig_mod)
            logger.warning("The adapted %s runs without torch.compile.", type(module).__name__)
    if compiled := [name for name, part in module.named_modules() if _is_compiled(part)]:
        raise ValueError(
            f"{compiled[0]!r} is compiled by itself, which changes the paths of the layers inside, and a posterior "
            "would not fit the plain model. Give the model before torch.compile, or compile its parts in place: "
            "block.compile()."
        )
    return module


def _check_method(module: nn.Module) -> None:
    """Raise TypeError if PEFT's active adapter computes something that is not in the layers, as prompt tuning does."""
    configs: Any = getattr(module, "peft_config", {})
    active: Any = getattr(module, "active_adapter", [])
    for name in [active] if isinstance(active, str) else active:
        if (kind := method_of(configs.get(name))) != "LORA":
            raise TypeError(
                f"The model carries an adapter of another PEFT method ({kind}); only LoRA can become Bayesian. Pass "
                "the model without that adapter."
            )


def _is_plain(module: nn.Module) -> bool:
    return not isinstance(module, PEFT_WRAPPERS) and not _is_compiled(module)


def _is_compiled(module: nn.Module) -> bool:
    """Tell whether a module is what ``torch.compile(module)`` returns."""
    return isinstance(getattr(module, "_orig_mod", None), nn.Module)


def check_placement(module: nn.Module) -> None:
    """Raise ValueError if weights are offloaded, or if some of them are on the meta device.

    A module with all weights on the meta device passes: its layers can be counted.
    """
    offloaded = [name for name, part in module.named_modules() if _is_offloaded(part)]
    on_meta = [name for name, p in module.named_parameters() if p.is_meta]
    if offloaded or 0 < len(on_meta) < sum(1 for _ in module.parameters()):
        where = "offloaded by accelerate" if offloaded else "on the meta device"
        raise ValueError(
            f"Weights are {where}, for instance those of {(offloaded or on_meta)[0]!r}, and training needs them in "
            "memory: load the model without offloading, for instance with device_map={'': 0}, on several GPUs with "
            "device_map='auto', or quantized."
        )


def check_has_values(module: nn.Module) -> None:
    """Raise ValueError if weights are on the meta device, where they have a shape but no values."""
    if any(p.is_meta for p in module.parameters()):
        raise ValueError(
            "The model is on the meta device: its weights have no values. Load it with from_pretrained(), or call "
            ".to_empty(device) and load a state dict."
        )


def _is_offloaded(module: nn.Module) -> bool:
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(h, "offload", False) for h in getattr(hook, "hooks", (hook,)))
