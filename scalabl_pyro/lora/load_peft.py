"""Put a saved PEFT adapter onto its base model, and refuse a file that does not fit completely.

PEFT itself loads what fits and warns of the rest: the adapter would then be another function than the one that was
trained.
"""

import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn

from .._errors import ScalaBLWarning, stacklevel_outside
from .module_snapshot import ModuleSnapshot
from .peft_names import and_more, method_of

ADAPTER_NAME = "default"


def load_peft(base: nn.Module, path: str, *, snapshot: ModuleSnapshot, **hub: Any) -> PeftModel:
    """Load a saved PEFT adapter onto its base model, with every tensor in its place.

    After an error, ``snapshot.restore()`` makes the base what it was.

    Args:
        base: Plain base model, which is changed in place.
        path: Folder of the adapter, or its name on the Hugging Face Hub.
        snapshot: Snapshot of the base. It gets the values of biases that the adapter overwrites.
        hub: Options of the download, such as ``revision``, ``token`` and ``subfolder``.

    Raises:
        FileNotFoundError: ``path`` is a folder without a PEFT adapter.
        ValueError: The base carries an adapter already, or the adapter is one for another base: it has no layer to
            change, other shapes, missing or surplus tensors, or other values of frozen weights.
        TypeError: The adapter does not change weights, as prompt tuning.
    """
    if any(isinstance(m, BaseTunerLayer) for m in base.modules()):
        raise ValueError(
            "The model already carries an adapter of PEFT. Pass it alone, from_peft(model), to make that adapter "
            "Bayesian, or pass the plain base model with the path."
        )
    config, weights = _read(path, hub)
    _warn_of_another_name(base, config, path)
    with _as_value_error(path):
        model = cast(PeftModel, get_peft_model(base, config, adapter_name=ADAPTER_NAME))
    snapshot.keep_values(_overwritten(model, weights, path).values())
    with _as_value_error(path):
        mapping = getattr(base, "_checkpoint_conversion_mapping", None) or None
        result = model.load_adapter(path, ADAPTER_NAME, key_mapping=mapping, **hub)
    _check_complete(model, weights, result.missing_keys, result.unexpected_keys, path)
    return model


def _read(path: str, hub: Mapping[str, Any]) -> tuple[PeftConfig, dict[str, Tensor]]:
    folder = os.path.join(path, hub["subfolder"]) if hub.get("subfolder") else path
    if os.path.isdir(path) and not os.path.isfile(os.path.join(folder, "adapter_config.json")):
        inside = sorted(name for name in os.listdir(folder)) if os.path.isdir(folder) else []
        deeper = [n for n in inside if os.path.isfile(os.path.join(folder, n, "adapter_config.json"))]
        hint = f" Did you mean {os.path.join(folder, deeper[0])!r}?" if deeper else ""
        raise FileNotFoundError(
            f"{folder} holds no adapter_config.json: it is not a folder that save_pretrained() of PEFT wrote.{hint}"
        )
    try:
        config = PeftConfig.from_pretrained(path, **hub)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no adapter of PEFT can be read there ({error}).") from error
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise TypeError(
            f"{path} is an adapter of the method {method_of(config)}, which adds tokens instead of changing weights. "
            "Only methods that change weights can become Bayesian LoRA."
        )
    try:
        return config, load_peft_weights(path, device="cpu", **hub)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path}: the weights of the adapter cannot be read ({error}).") from error


def _warn_of_another_name(base: nn.Module, config: PeftConfig, path: str) -> None:
    """Warn if the adapter names another base: one with other values but the same shapes cannot be told apart."""
    trained_on = config.base_model_name_or_path or ""
    own = getattr(getattr(base, "config", None), "_name_or_path", "") or ""
    if trained_on and own and os.path.basename(trained_on.rstrip("/")) != os.path.basename(own.rstrip("/")):
        warnings.warn(
            f"The adapter in {path} names the base model {trained_on!r}, and this model is {own!r}. If these are two "
            "models, load the first one: the shapes fit, but the function would be another.",
            ScalaBLWarning,
            stacklevel=stacklevel_outside(),
        )


def _overwritten(model: PeftModel, weights: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Return the trained biases of the base model that the file is going to replace, by name.

    Raises:
        ValueError: The file holds other values of a weight that the adapter does not train, such as embeddings of a
            resized vocabulary.
    """
    config: Any = model.peft_config[ADAPTER_NAME]
    state = model.state_dict()
    found = {}
    for name in weights.keys() & state.keys():
        trains_biases = getattr(config, "bias", "none") != "none" and "bias" in name
        if trains_biases:
            found[name] = state[name]
        elif state[name].shape != weights[name].shape or not torch.equal(
            state[name].cpu(), weights[name].to(state[name].dtype)
        ):
            plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            raise ValueError(
                f"{path} holds its own values of {plain!r}, which is a weight of the base model: the vocabulary was "
                "resized, or the embeddings were trained. Save the base model with these values first (in PEFT: "
                f"train them with modules_to_save=[{plain.rpartition('.')[0]!r}]), and give that base."
            )
    return found


def _check_complete(
    model: PeftModel, weights: Mapping[str, Tensor], missing: Collection[str], unexpected: Collection[str], path: str
) -> None:
    """Raise ValueError unless each tensor of the adapter came from the file, and each tensor of the file was used."""
    expected = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    lost = sorted({*missing, *(name for name in expected if "bias" in name and name not in weights)})
    if lost:
        raise ValueError(
            f"{path} is not complete, or belongs to another base model: {lost[0]!r} is missing"
            f"{and_more(lost)}. The model is as it was."
        )
    if unexpected:
        raise ValueError(
            f"{path} belongs to another base model: this one has no place for {sorted(unexpected)[0]!r}"
            f"{and_more(unexpected)}. The model is as it was."
        )


@contextmanager
def _as_value_error(path: str) -> Iterator[None]:
    """Turn the errors with which PEFT refuses an adapter for another base into ValueErrors that say so."""
    try:
        yield
    except (ValueError, RuntimeError, KeyError) as error:
        text = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"The adapter in {path} does not fit this model, so it belongs to another base model or is not complete. "
            f"The model is as it was. PEFT says: {' '.join(text.split())[:500]}"
        ) from error
