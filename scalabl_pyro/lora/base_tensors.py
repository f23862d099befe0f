"""The tensors of a base model, by the names of the plain model; and those that its checkpoint does not hold.

A posterior is loaded into a base model that was made anew from its checkpoint. Some tensors are then not what they were
in training: new heads, modules and biases that PEFT trained, embeddings with LoRA. They are saved with the posterior.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from .._errors import ScalaBLWarning, stacklevel_outside
from .float8 import Float8Linear
from .module_paths import lies_in
from .peft_names import and_more
from .sharding import is_piece, is_sharded
from .targets import backbone_name

logger = logging.getLogger(__name__)

#: Types of tensors that hold plain numbers. Quantized weights have other types.
ORDINARY = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
#: Types of tensors that are saved and compared. Others are quantized weights, whose numbers depend on the library.
COMPARED = (*ORDINARY, torch.int64, torch.bool)
#: Names of ``init_lora_weights`` that leave the base weight as it is. Others, such as ``"pissa"``, subtract from it.
KEEP_BASE = ("gaussian", "eva", "mica", "orthogonal")


@dataclass(frozen=True)
class PlainTensor:
    """A parameter or buffer of a base model.

    Attributes:
        name: Name in the plain base model, without the wrappers of PEFT.
        base: The tensor itself.
        is_saved: Whether a checkpoint of the base model could hold it; False for buffers that are computed.
        in_lora: Whether it lies in the base layer of a LoRA layer.
        is_trained: Whether it lies in a module that PEFT trained in full.
        tuner: PEFT layer that changes a weight of embeddings; None for all other tensors.
    """

    name: str
    base: Tensor
    is_saved: bool = True
    in_lora: bool = False
    is_trained: bool = False
    tuner: nn.Module | None = None

    def value(self) -> Tensor:
        """Return the values that the module computes with."""
        whole: Any = self.base.detach()
        whole = whole.full_tensor() if is_piece(whole) else whole
        tuner: Any = self.tuner
        if isinstance(tuner, LoraEmbedding):
            with torch.no_grad():
                active = [name for name in tuner.active_adapters if name in tuner.lora_embedding_A]
                return (whole + sum(tuner.get_delta_weight(name).to(whole) for name in active)).cpu()
        if tuner is not None:
            return tuner.get_merged_weights(tuner.active_adapters).detach().cpu()
        return whole


def plain_tensors(module: nn.Module, path: str = "", *, is_trained: bool = False) -> Iterator[PlainTensor]:
    """Iterate over the tensors that a module computes with, except LoRA factors.

    Layers in 8-bit floats give their weights in the original precision.

    Args:
        module: Base model, with or without layers and wrappers of PEFT.
        path: Path of the module in the base model.
        is_trained: Whether PEFT trained the module in full.

    Raises:
        TypeError: PEFT wrapped a module in a way that is not known here.
    """
    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from _of_wrapper(module, path)
    elif isinstance(module, Float8Linear) and module.original is not None:
        yield from plain_tensors(module.original, path, is_trained=is_trained)
    elif isinstance(module, BaseTunerLayer):
        tuner = module if isinstance(module, LoraEmbedding) and _is_active(module) else None
        for tensor in plain_tensors(module.get_base_layer(), path, is_trained=is_trained):
            is_weight = tensor.name == _join(path, "weight")
            yield replace(tensor, in_lora=True, tuner=tuner if is_weight else None)
    else:
        computed = module._non_persistent_buffers_set
        for key, own in [*module._parameters.items(), *module._buffers.items()]:
            if own is not None:
                yield PlainTensor(_join(path, key), own, is_saved=key not in computed, is_trained=is_trained)
        for key, child in module._modules.items():
            if child is not None:
                yield from plain_tensors(child, _join(path, key), is_trained=is_trained)


def active_module(module: nn.Module) -> nn.Module:
    """Return the module that computes: inside PEFT's wrapper for ``modules_to_save`` the one of the active adapter."""
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    active = module.active_adapters
    if module.disable_adapters or not active or active[0] not in module.modules_to_save:
        return module.original_module
    return module.modules_to_save[active[0]]


def unwrap_active(module: nn.Module) -> nn.Module:
    """Replace PEFT's wrappers for ``modules_to_save`` by the modules that compute, and return the module."""
    for name, child in list(module.named_children()):
        setattr(module, name, unwrap_active(active_module(child)))
    return active_module(module)


def unsaved_tensors(
    module: nn.Module, *, heads: Sequence[str], configs: Sequence[Any] = (), warn: bool = False
) -> dict[str, Tensor]:
    """Return the tensors that neither the checkpoint of the base model nor the trained heads hold, by name.

    These are what PEFT trained besides LoRA factors of linear layers, the new head of a classifier, and parameters that
    ``from_pretrained`` did not find in its checkpoint.

    Args:
        module: Base model, with or without layers of PEFT.
        heads: Paths of modules that are trained in full, and saved anyway.
        configs: Configurations of the PEFT adapters that the module carries.
        warn: Whether to warn of new parameters that nothing trains.

    Raises:
        ValueError: Such a tensor is quantized, so that it cannot be saved.
        TypeError: As for :func:`plain_tensors`.
    """
    found = [t for t in plain_tensors(module) if t.is_saved and not any(lies_in(t.name, head) for head in heads)]
    new = _new_parameters(module, found)
    if warn and new:
        warnings.warn(
            f"The checkpoint of the base model did not hold {new[0].name!r}{and_more(new)}. It has random values, "
            "is not trained, and is saved with the posterior. To train it, name its module in modules_to_save.",
            ScalaBLWarning,
            stacklevel=stacklevel_outside(),
        )
    biases = any(getattr(config, "bias", "none") != "none" for config in configs)
    residual = any(_changes_base(getattr(config, "init_lora_weights", True)) for config in configs)
    backbone = backbone_name(module)
    names = {t.name for t in new}
    unsaved = [
        t
        for t in found
        if t.name in names
        or t.is_trained
        or t.tuner is not None
        or (biases and "bias" in t.name)
        or (residual and t.in_lora)
        or (backbone is not None and not lies_in(t.name, backbone))
    ]
    for tensor in unsaved:
        if not tensor.base.is_meta and not is_ordinary(tensor.base):
            raise ValueError(
                f"{tensor.name!r} is not in the checkpoint of the base model, and it is quantized ({tensor.base.dtype})"
                ", so the posterior cannot save it. Load the model with this module in bfloat16."
            )
    if unsaved:
        logger.info("The posterior will save %d tensors that the base checkpoint does not hold.", len(unsaved))
    return {t.name: t.value() for t in unsaved}


def _of_wrapper(wrapper: AuxiliaryTrainingWrapper, path: str) -> Iterator[PlainTensor]:
    if isinstance(wrapper, ModulesToSaveWrapper):
        active = active_module(wrapper)
        yield from plain_tensors(active, path, is_trained=active is not wrapper.original_module)
    elif isinstance(wrapper, TrainableTokensWrapper):
        layer = wrapper.token_adapter
        tuner = layer if _is_active(layer) else None
        for tensor in plain_tensors(layer.get_base_layer(), path):
            is_weight = tensor.name == _join(path, "weight")
            yield replace(tensor, tuner=tuner if is_weight else None)
    else:
        raise TypeError(
            f"{path!r} is a {type(wrapper).__name__} of PEFT, which the posterior could not save. Known are "
            "modules_to_save and trainable_token_indices."
        )


def _is_active(layer: BaseTunerLayer) -> bool:
    """Tell whether the active adapter has weights in a layer that adapts embeddings."""
    parts: Mapping[str, object] = getattr(layer, "lora_embedding_A", getattr(layer, "trainable_tokens_delta", {}))
    return not layer.disable_adapters and any(name in parts for name in layer.active_adapters)


def _new_parameters(module: nn.Module, found: Sequence[PlainTensor]) -> list[PlainTensor]:
    """Return the parameters that ``from_pretrained`` did not find in its checkpoint; transformers marks all others.

    Nothing is known of models that were not loaded this way, of copies, and of weights that were split afterwards.
    """
    plain = [t for t in found if type(t.base) is nn.Parameter and is_ordinary(t.base) and not t.is_trained]
    if is_sharded(module) or not any(_is_marked(t.base) for t in plain):
        return []
    return [t for t in plain if not _is_marked(t.base)]


def _is_marked(parameter: Tensor) -> bool:
    return bool(getattr(parameter, "_is_hf_initialized", False))


def is_ordinary(tensor: Tensor) -> bool:
    """Tell whether a tensor holds plain numbers; the tensors of quantization libraries are subclasses or integers."""
    return (is_piece(tensor) or type(tensor.data) is Tensor) and tensor.dtype in COMPARED


def _changes_base(init_lora_weights: object) -> bool:
    return isinstance(init_lora_weights, str) and init_lora_weights.lower() not in KEEP_BASE


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
