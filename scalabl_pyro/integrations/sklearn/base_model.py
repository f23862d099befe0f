"""The base model of one fit: loaded by its name, or a copy of a loaded module that shares its frozen weights."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..._arguments import check_role, kind_of
from ..._errors import describe
from ..._process.random_state import scoped_seed
from ...data.model_names import model_order
from ...lora.attach import find_adapter
from ...lora.targets import text_config

#: Options of ``from_pretrained`` that the estimators set themselves, and what to do in place of setting them.
RESERVED = {
    "num_labels": "The number of outputs follows from y.",
    "trust_remote_code": "Load the model yourself, and pass it as model=.",
}


def load_tokenizer(tokenizer: Any, model: Any) -> Any:
    """Return the tokenizer: the given one, or the one with the given name, or that of the model's name.

    Raises:
        TypeError: The model is a module, and no tokenizer is given.
    """
    name = model if tokenizer is None else tokenizer
    if kind_of(name) != "name":
        if tokenizer is None:
            raise TypeError("model is a loaded module, so pass its tokenizer too: tokenizer=AutoTokenizer(...).")
        return tokenizer
    loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if loaded.pad_token_id is None:
        loaded.pad_token = loaded.eos_token
    return loaded


def load_base(
    model: Any, *, num_labels: int, pad_token_id: int, seed: int, device: Any, options: Mapping[str, Any] | None
) -> nn.Module:
    """Return a classification model that a fit may change.

    Args:
        model: Name or path of a Hugging Face model, or a loaded one.
        num_labels: Number of outputs.
        pad_token_id: Padding token of the tokenizer. The model gets it if it has none.
        seed: Seed of a new head.
        device: Device of a model that is loaded by its name; None means the first GPU, or the CPU if there is none.
        options: Further options of ``from_pretrained``.

    Raises:
        TypeError: ``model`` is neither a name nor a module.
        ValueError: A module has another number of outputs or carries Bayesian LoRA, or an option is reserved.
    """
    options = dict(options or {})
    if wrong := [name for name in options if name in RESERVED]:
        raise ValueError(f"model_options={options!r}: {wrong[0]!r} cannot be set. {RESERVED[wrong[0]]}")
    if model is not None and kind_of(model) == "name":
        with scoped_seed(seed):
            base = AutoModelForSequenceClassification.from_pretrained(
                model, num_labels=num_labels, trust_remote_code=False, **options
            )
        base.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    else:
        check_role("model", model, "llm")
        _check_module(model, num_labels, options)
        base = shared_copy(model)
    config = text_config(base)
    if config is not None and getattr(config, "pad_token_id", pad_token_id) is None:
        config.pad_token_id = pad_token_id
    return base


def shared_copy(module: nn.Module) -> nn.Module:
    """Copy the structure of a module. The copy has parameters of its own that use the memory of the original ones.

    Quantized weights are shared as they are. Buffers are copied.
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        is_plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = nn.Parameter(parameter.data, parameter.requires_grad) if is_plain else parameter
    return copy.deepcopy(module, memo)


def separate_trained(base: nn.Module, original: Any) -> None:
    """Give each trained parameter of a copy memory of its own, if it uses that of the original.

    Args:
        base: Module that :func:`shared_copy` made, with LoRA layers.
        original: Module that it was made from, or a name.
    """
    if not isinstance(original, nn.Module):
        return
    used = {parameter.data_ptr() for parameter in original.parameters()}
    for parameter in base.parameters():
        if parameter.requires_grad and parameter.data_ptr() in used:
            parameter.data = parameter.data.clone()


def in_model_order(names: Sequence[Any], base: nn.Module) -> list[int]:
    """Return the order of the classes in which the model has its outputs.

    A checkpoint with a trained head names its outputs in ``config.id2label``. If these names are those of the classes,
    their order counts.

    Args:
        names: Names of the K classes.
        base: Classification model.

    Returns:
        For each output of the model, the index of its class in ``names``.
    """
    order = model_order(names, getattr(getattr(base, "config", None), "id2label", None))
    return list(range(len(names))) if order is None else order


def _check_module(model: nn.Module, num_labels: int, options: Mapping[str, Any]) -> None:
    if options:
        raise ValueError(f"model_options={dict(options)!r} load a model by its name, but model is {describe(model)}.")
    if find_adapter(model) is not None:
        raise ValueError("The model carries Bayesian LoRA already: pass the plain model, blora.unload().")
    found = getattr(getattr(model, "config", None), "num_labels", num_labels)
    if found != num_labels:
        raise ValueError(
            f"The model has {found} outputs, but y needs {num_labels}. Load it with num_labels={num_labels}, or pass "
            "its name as model=. In cross-validation, each fold must hold all classes."
        )
