"""``adapter_model.safetensors`` of a saved posterior: factors A and B, trained heads and saved base tensors.

Base tensors are those of the base model that its checkpoint does not hold.
"""

import copy
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ..lora.adapter import Adapter
from ..lora.attach import find_adapter
from ..lora.base_tensors import plain_tensors
from ..lora.factors import Factors
from ..storage.tensor_files import below, check_keys, check_like, check_state, load_strict
from .config import CONFIG_FILE, SavedConfig
from .state import PosteriorState

ADAPTER = "adapter_model.safetensors"


def adapter_tensors(posterior: PosteriorState) -> dict[str, Tensor]:
    """Return the factors, heads and saved base tensors of a posterior, by their names in the file."""
    tensors = {}
    for layer, (A, B) in zip(posterior.subspace, posterior.factors, strict=True):
        tensors[_factor_name(layer.name, "A")] = A
        tensors[_factor_name(layer.name, "B")] = B
    tensors |= {_base_name(name): value for name, value in posterior.adapter.base_tensors.items()}
    for name, head in posterior.heads.items():
        tensors |= {_head_prefix(name) + k: v for k, v in head.state_dict().items()}
    return tensors


def check_adapter_keys(config: SavedConfig, tensors: Collection[str]) -> None:
    """Raise ValueError unless the file holds the base tensors, A and B of each layer and nothing else, except heads.

    :func:`check_heads` checks the tensors of heads.
    """
    of_heads = {name for head in config.heads for name in tensors if name.startswith(_head_prefix(head))}
    expected = {_factor_name(layer["name"], x) for layer in config.layers for x in "AB"}
    expected |= set(map(_base_name, config.base_tensors))
    check_keys(ADAPTER, set(tensors) - of_heads, expected)


def check_heads(names: list[str], tensors: Mapping[str, Tensor], llm: nn.Module) -> None:
    """Raise ValueError unless the trained heads fit the modules of ``llm`` that they replace.

    The check comes before any of those modules is copied. Where ``llm`` carries an adapter already, its own heads are
    the ones to fit, because PEFT may have wrapped the modules.
    """
    carried = find_adapter(llm)
    modules = dict(llm.named_modules()) | ({} if carried is None else carried.heads)
    for name in names:
        if name in modules:
            check_state(f"{ADAPTER}: head {name!r}", below(tensors, _head_prefix(name)), modules[name])


def saved_base_tensors(config: SavedConfig, tensors: Mapping[str, Tensor], llm: nn.Module) -> dict[str, Tensor]:
    """Return the saved tensors that the checkpoint of the base model does not hold, by their names in ``llm``.

    Raises:
        ValueError: The model has no such tensor, or one of another shape or type.
    """
    own = {tensor.name: tensor.base for tensor in plain_tensors(llm)}
    if unknown := sorted(set(config.base_tensors) - set(own)):
        raise ValueError(f"Another base model: it has no parameter or buffer {unknown[0]!r}. Load the one of training.")
    saved = {name: tensors[_base_name(name)] for name in config.base_tensors}
    for name, tensor in saved.items():
        check_like(f"{ADAPTER}: {name!r}", tensor, own[name])
    return saved


def other_base_tensors(adapter: Adapter, config: SavedConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of saved base tensors that an adapter does not have, or has with other values."""
    own = adapter.base_tensors
    names = sorted(set(own) | set(config.base_tensors))
    both = set(own) & set(config.base_tensors)
    return [n for n in names if n not in both or not torch.equal(own[n].cpu(), tensors[_base_name(n)])]


def saved_factors(adapter: Adapter, tensors: Mapping[str, Tensor]) -> Factors:
    """Return A and B of each layer, on the device of the layer.

    Raises:
        ValueError: A factor has another shape than its layer needs.
    """
    factors = []
    for layer, live in zip(adapter.subspace, adapter.factors(), strict=True):
        pair = [tensors[_factor_name(layer.name, x)] for x in "AB"]
        for x, saved, own in zip("AB", pair, live, strict=True):
            check_like(f"{ADAPTER}: lora_{x} of {layer.name!r}", saved, own)
        factors.append((pair[0].to(live[0].device), pair[1].to(live[1].device)))
    return tuple(factors)


def check_head_names(adapter: Adapter, names: list[str]) -> None:
    """Raise ValueError unless the adapter trains the heads with these paths and no others."""
    if set(names) != set(adapter.heads):
        raise ValueError(f"{CONFIG_FILE}: trained heads are {names}, the module trains {sorted(adapter.heads)}.")


def saved_heads(adapter: Adapter, names: list[str], tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Return the trained heads as frozen modules.

    Raises:
        ValueError: The adapter trains other heads, or a head has other tensors.
    """
    check_head_names(adapter, names)
    heads = {}
    for name in names:
        head = copy.deepcopy(adapter.heads[name])
        load_strict(f"{ADAPTER}: head {name!r}", head, below(tensors, _head_prefix(name)))
        heads[name] = head.to(next(adapter.heads[name].parameters()).device).requires_grad_(False)
    return heads


def _factor_name(layer: str, factor: str) -> str:
    return f"{layer}.lora_{factor}.weight"


def _base_name(name: str) -> str:
    return f"base.{name}"


def _head_prefix(head: str) -> str:
    return f"heads.{head}."
