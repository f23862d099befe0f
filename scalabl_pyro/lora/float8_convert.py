"""Converts the frozen linear layers of an adapted model to 8-bit floats: which layers, and what is refused."""

import logging
from collections import Counter
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .._errors import check_choice
from .adapter import Adapter
from .base_tensors import ORDINARY, is_ordinary
from .default_targets import is_in_mixer, summary
from .float8 import BASE_PRECISIONS, BasePrecision, Float8Linear
from .float8_device import check_device
from .module_paths import block_of, lies_in
from .sharding import is_sharded
from .targets import is_linear, output_head

logger = logging.getLogger(__name__)

#: Sides of a weight are multiples of this number, because tensor cores read as many 8-bit floats at one time.
MULTIPLE = 16
#: Modules of PEFT that hold others. What lies inside is a factor, or was trained in full.
PEFT_MODULES = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def check_precision(base_precision: object) -> None:
    """Raise ValueError unless a word is a :data:`~scalabl_pyro.lora.float8.BasePrecision`."""
    check_choice("base_precision", base_precision, BASE_PRECISIONS)


def convert(adapter: Adapter, base_precision: BasePrecision) -> None:
    """Let the frozen linear layers of a model's blocks compute in 8-bit floats, adapted or not.

    The output head, embeddings, trained heads, and layers outside of numbered blocks stay as they are. So do layers
    with a side that is not a multiple of 16, layers with hooks, layers that share their weight with another module,
    and layers of Mamba mixers, whose weights are read without a call. Original weights move to host memory, until
    ``adapter.unload()`` moves them back.

    Args:
        adapter: Adapter of the model.
        base_precision: ``"original"`` changes nothing.

    Raises:
        ValueError: Weights of the blocks are quantized already, are float64, or are split over processes; no layer can
            be converted; or the device has no 8-bit floats.
    """
    check_precision(base_precision)
    if base_precision == "original":
        return
    linear = dict(_in_blocks(adapter))
    _check_weights(adapter.module, linear)
    shared = _shared_weights(adapter.module)
    chosen = {
        name: m
        for name, m in linear.items()
        if isinstance(m, nn.Linear) and _is_suitable(adapter.module, name, m, shared)
    }
    if not chosen:
        raise ValueError(
            f"base_precision={base_precision!r}: no layer can be converted. Layers are converted if they are nn.Linear "
            f"in numbered blocks, with both sides multiples of {MULTIPLE}. Leave base_precision out."
        )
    for device in {m.weight.device for m in chosen.values()}:
        check_device(device)
    for name, layer in chosen.items():
        parent, key = _place_of(adapter.module, name)
        adapter.changes.convert_layer(parent, key, Float8Linear(layer, keep_transposed=base_precision == "float8"))
    left = [name for name in linear if name not in chosen]
    logger.info(
        "base_precision=%r: %d linear layers of the blocks compute in 8-bit floats, %d stay as they are%s",
        base_precision,
        len(chosen),
        len(left),
        f": {summary(left)}" if left else "",
    )


def _in_blocks(adapter: Adapter) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear layers of numbered blocks, without PEFT's layers around them, by path in the plain model."""
    head = output_head(adapter.module)
    for name, module in adapter.module.named_modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        is_inside = any(isinstance(adapter.module.get_submodule(above), PEFT_MODULES) for above in _above(name))
        if not is_linear(base) or is_inside or module is head or block_of(name) is None:
            continue
        if not any(lies_in(name, trained) for trained in adapter.heads):
            yield name, base


def _above(name: str) -> Iterator[str]:
    """Yield the paths of the modules that a module lies in."""
    while name := name.rpartition(".")[0]:
        yield name


def _check_weights(module: nn.Module, linear: dict[str, nn.Module]) -> None:
    """Raise ValueError if weights cannot be converted."""
    advice = "leave base_precision out."
    if is_sharded(module):
        raise ValueError(f"base_precision='float8': the weights are split over several processes. Use one, or {advice}")
    if done := [name for name, m in linear.items() if isinstance(m, Float8Linear)]:
        raise ValueError(f"base_precision='float8': {done[0]!r} computes in 8-bit floats already: {advice}")
    for name, m in linear.items():
        weight = getattr(m, "weight", None)
        if weight is None or not (is_ordinary(weight) and weight.dtype in ORDINARY):
            raise ValueError(
                f"base_precision='float8': the weight of {name!r} is quantized already, as {_kind_of(weight, m)}. Load "
                f"the model in bfloat16, or {advice}"
            )
        if weight.dtype == torch.float64:
            raise ValueError(
                f"base_precision='float8': the weight of {name!r} is float64, of which 8 bits would keep little. Load "
                f"the model in bfloat16, or {advice}"
            )


def _kind_of(weight: object, module: nn.Module) -> str:
    if isinstance(weight, torch.Tensor) and type(weight.data) is torch.Tensor:
        return str(weight.dtype)
    return type(module if weight is None else weight).__name__


def _is_suitable(module: nn.Module, name: str, layer: nn.Linear, shared: set[int]) -> bool:
    if type(layer) is not nn.Linear or layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
        return False
    has_hooks = bool(layer._forward_hooks or layer._forward_pre_hooks) or "forward" in vars(layer)
    return not has_hooks and id(layer.weight) not in shared and not is_in_mixer(module, name)


def _shared_weights(module: nn.Module) -> set[int]:
    """Return the ids of the parameters that stand in several places of a module."""
    counts = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    return {i for i, count in counts.items() if count > 1}


def _place_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a layer, and the layer's name there: a layer of PEFT, or the module above."""
    found = module.get_submodule(name)
    if isinstance(found, BaseTunerLayer):
        return found, "base_layer"
    above, _, key = name.rpartition(".")
    return module.get_submodule(above), key
