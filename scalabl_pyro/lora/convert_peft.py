"""Turn an adapter of another PEFT method, such as LoHa, LoKr or VeRA, into a LoRA adapter, and tell the error."""

import copy
import logging
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from peft import PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .._errors import ScalaBLWarning, stacklevel_outside
from .base_tensors import ORDINARY
from .peft_names import method_of

logger = logging.getLogger(__name__)

#: Share of the squared singular values of an update that the converted one keeps by default: an error of 1 %.
ENERGY = 0.9999
#: Relative errors of an update up to this one are rounding.
ROUNDING = 1e-3
#: The way out for adapters that cannot be converted.
MERGE_IT = "Merge the adapter into the model, model.merge_and_unload(), and adapt the result."


def needs_conversion(model: PeftModel) -> bool:
    """Tell whether a PEFT model carries layers of another method than plain LoRA, or LoRA variants such as DoRA."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, TrainableTokensLayer)]
    return any(not _is_lora(m) or getattr(m, "lora_variant", None) for m in layers)


def _is_lora(layer: BaseTunerLayer) -> bool:
    """Tell whether a layer is one of LoRA itself, and not of a method built on it, such as AdaLoRA."""
    return isinstance(layer, LoraLayer) and type(layer).__module__.startswith(LoraLayer.__module__.rpartition(".")[0])


def convert_peft(model: PeftModel, *, rank: int | float | None = None) -> PeftModel:
    """Replace the active adapter of a PEFT model by a LoRA adapter that is as close to it as the rank allows.

    PEFT computes the singular value decomposition of each update, and keeps the largest singular values.

    Args:
        model: Model whose base is taken over.
        rank: Rank of all layers; or the share of squared singular values to keep per layer, between 0 and 1. None means
            0.9999, which is a relative error of 1 %.

    Returns:
        Model with plain LoRA layers on the same base.

    Raises:
        TypeError: PEFT cannot convert the method, or the converted update would not be the one that the layers compute
            (DoRA with trained magnitudes).
        ValueError: The rank is larger than a layer allows.
    """
    name = model.active_adapter
    _check_convertible(model, name)
    method = method_of(model.peft_config[name])
    true = {path: _update(path, layer, name, method) for path, layer in _layers(model).items()}
    try:
        config, state = convert_to_lora(model, ENERGY if rank is None else rank, adapter_name=name)
    except TypeError as error:
        raise TypeError(
            f"PEFT cannot turn an adapter of the method {method} into LoRA, so it cannot become Bayesian LoRA. "
            f"{MERGE_IT} PEFT says: {error}"
        ) from error
    ranks = [value.shape[0] for key, value in state.items() if key.endswith(".lora_A.weight")]
    _tell(_errors(true, state), (min(ranks), max(ranks)), method)
    config.task_type = model.peft_config[name].task_type
    state = {key: value for key, value in state.items() if ".lora_" in key} | _modules_to_save(model, name)
    base = cast(nn.Module, model.unload())
    converted = cast(PeftModel, get_peft_model(cast(Any, base), config, adapter_name=name))
    set_peft_model_state_dict(converted, state, adapter_name=name)
    return converted.eval()


def _check_convertible(model: PeftModel, name: str) -> None:
    """Raise for states of a model in which PEFT would convert something else than what the model computes."""
    config: Any = model.peft_config[name]
    if getattr(config, "alora_invocation_tokens", None):
        raise TypeError(
            "The adapter is an activated LoRA (alora_invocation_tokens): it changes only the tokens after the "
            "invocation. Bayesian LoRA changes all tokens, so it would be another function. Train it as plain LoRA."
        )
    layers = _layers(model).values()
    if len(model.peft_config) > 1 or any(list(layer.active_adapters) != [name] for layer in layers):
        raise ValueError(
            f"The model carries the adapters {sorted(model.peft_config)}, and one is to be converted. Delete the "
            "others first: model.delete_adapter(name)."
        )
    if any(layer.disable_adapters for layer in layers):
        raise ValueError("The adapter is disabled: call enable_adapter_layers() first.")
    if any(layer.merged for layer in layers):
        raise ValueError("The adapter is merged into its base layers: call unmerge_adapter() first.")
    if (bias := getattr(config, "bias", "none")) != "none":
        raise ValueError(f"The adapter trained biases too (bias={bias!r}), and PEFT cannot convert these. {MERGE_IT}")
    if any(isinstance(layer, TrainableTokensLayer) for layer in layers):
        raise TypeError(
            "The adapter also trained single tokens (trainable_token_indices), and PEFT cannot convert these. "
            + MERGE_IT
        )
    if whole := [n for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper) and _has_parts(m)]:
        raise TypeError(
            f"The adapter trained {whole[0].removeprefix('base_model.model.')!r} in full, a module with parts, and "
            f"PEFT cannot convert these. {MERGE_IT}"
        )


def _has_parts(wrapper: ModulesToSaveWrapper) -> bool:
    return next(wrapper.original_module.children(), None) is not None


def _layers(model: PeftModel) -> dict[str, BaseTunerLayer]:
    return {path: m for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def _modules_to_save(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """Return the tensors of modules that PEFT trained in full, by the names that PEFT gives them in a file."""
    wrappers = {path: m for path, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    return {
        f"{path}.{key}": value
        for path, wrapper in wrappers.items()
        for key, value in wrapper.modules_to_save[adapter_name].state_dict().items()
    }


def _update(path: str, layer: BaseTunerLayer, adapter_name: str, method: str) -> Tensor | None:
    """Return what a layer adds to the weight of its base layer, (out, in), in float32 or higher; None if quantized.

    It is the output for the unit vectors minus that of the base layer, and must be what PEFT is going to convert.
    """
    base = layer.get_base_layer()
    weight: Any = getattr(base, "weight", None)
    if weight is None or weight.dtype not in ORDINARY or not hasattr(layer, "get_delta_weight"):
        return None
    alone = cast(nn.Module, copy.deepcopy(layer)).to(torch.promote_types(weight.dtype, torch.float32)).eval()
    inner: Any = cast(BaseTunerLayer, alone).get_base_layer()
    size = inner.nx if isinstance(inner, Conv1D) else getattr(inner, "in_features", None)
    if size is None or not layer.supports_lora_conversion(adapter_name):
        return None
    with torch.no_grad():
        unit = torch.eye(size, dtype=inner.weight.dtype, device=inner.weight.device)
        update = (cast(Any, alone)(unit) - inner(unit)).T
        try:
            of_peft = cast(Any, alone).get_delta_weight(adapter_name).to(update)
        except TypeError:  # MiSS, whose update PEFT converts by a formula of its own
            return update
    of_peft = of_peft.T if isinstance(inner, Conv1D) and of_peft.shape != update.shape else of_peft
    if _relative(update - of_peft, update) > ROUNDING:
        raise TypeError(
            f"{path.removeprefix('base_model.model.')!r} computes something else than the update that PEFT would "
            f"convert (method {method}). DoRA with trained magnitudes does this, because it also rescales the weight "
            f"of the base model. {MERGE_IT} Or train it as plain LoRA."
        )
    return update


def _errors(true: Mapping[str, Tensor | None], state: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the relative error of each converted update (Frobenius norm), by path."""
    errors = {}
    for path, update in true.items():
        if update is not None and f"{path}.lora_A.weight" in state:
            A, B = (state[f"{path}.lora_{x}.weight"].to(update) for x in "AB")
            errors[path.removeprefix("base_model.model.")] = _relative(update - B @ A, update)
    return errors


def _relative(difference: Tensor, of: Tensor) -> float:
    return float(difference.norm() / of.norm().clamp_min(torch.finfo(of.dtype).tiny))


def _tell(errors: Mapping[str, float], ranks: tuple[int, int], method: str) -> None:
    """Warn of the error of the conversion, or log that there is none."""
    low, high = ranks
    rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
    worst = max(errors, key=lambda path: errors[path], default=None)
    if worst is None or errors[worst] <= ROUNDING:
        logger.info("The adapter of the method %s became LoRA of %s without an error.", method, rank)
        return
    warnings.warn(
        f"The adapter of the method {method} became LoRA of {rank}. The relative error of its updates is at most "
        f"{errors[worst]:.2%} (layer {worst!r}). For a smaller error, pass a larger rank to from_peft(rank=...).",
        ScalaBLWarning,
        stacklevel=stacklevel_outside(),
    )
