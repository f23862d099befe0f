"""Tell base models apart: a posterior is valid only for the weights on which it was learned."""

import copy
from collections.abc import Collection, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .base_tensors import ORDINARY, PlainTensor, is_ordinary, plain_tensors
from .float8 import original_weight
from .module_paths import lies_in
from .settings import settings, warn_of_other_settings
from .sharding import is_piece, is_sharded
from .targets import input_embeddings

EMBEDDING_PROBES = 64
LAYER_PROBES = 4
TENSOR_PROBES = 4


def fingerprint(adapter: Adapter) -> dict[str, Any]:
    """Describe a base model: its class, its type, and a few entries of each parameter and buffer.

    The original weights of trained heads are left out, because the saved heads replace them.

    Weights of quantized layers are left out. So a posterior learned on a 4-bit base loads on the same base in bfloat16,
    and the other way round. Of layers that this library converted to 8-bit floats, the original weights are described.

    Weights may be sharded over several processes. Then the first call gathers them, and all processes must make it
    together (``fit`` does so). The result is kept, so that one process alone can save a posterior later.

    Args:
        adapter: Adapter of the base model.

    Returns:
        The fingerprint, ready for JSON.
    """
    base = adapter.module
    if not is_sharded(base):
        return _fingerprint(adapter)
    if adapter.kept_fingerprint is None:
        adapter.keep_fingerprint(_fingerprint(adapter))
    return copy.deepcopy(dict(adapter.kept_fingerprint or {}))


def _fingerprint(adapter: Adapter) -> dict[str, Any]:
    base = adapter.module
    tensors = {t.name: t for t in plain_tensors(base)}
    name, weight = _embeddings(adapter)
    layers = zip(adapter.subspace.names, adapter.layers, strict=True)
    return {
        "class": _class_name(base),
        "model_type": getattr(getattr(base, "config", None), "model_type", None),
        "embedding_shape": list(weight.shape),
        "probes": _probe(adapter.base_tensors.get(name, weight), EMBEDDING_PROBES),
        "layer_probes": {n: _probe(original_weight(layer.get_base_layer()), LAYER_PROBES) for n, layer in layers},
        "tensor_probes": _probe_all(_compared(adapter, tensors.values())),
        "settings": settings(base),
        "quantized": sorted({_owner(t.name) for t in tensors.values() if not _is_compared(t.base)}),
    }


def _embeddings(adapter: Adapter) -> tuple[str, Tensor]:
    """Return the name and the weight of the token embeddings, or of the first parameter of a module without them."""
    base = adapter.module
    embeddings = input_embeddings(base)
    weight = getattr(embeddings, "weight", None)
    if weight is not None:
        name = next((name for name, m in base.named_modules() if m is embeddings), "")
        return f"{name}.weight", weight
    plain = ((t.name, t.base) for t in plain_tensors(base) if isinstance(t.base, nn.Parameter))
    return next((name, p) for name, p in plain if p.is_floating_point())


def _compared(adapter: Adapter, tensors: Collection[PlainTensor]) -> dict[str, Tensor]:
    """Return the tensors to compare, by name: all that are not replaced by a saved head, and that no pass changes."""
    names = {t.name for t in tensors}
    return {
        t.name: adapter.base_tensors.get(t.name, t.base)
        for t in tensors
        if _is_compared(t.base)
        and not (t.is_saved and any(lies_in(t.name, head) for head in adapter.heads))
        and _original(t.name) not in names  # rotary frequencies that follow the length of the input
    }


def _is_compared(tensor: Tensor) -> bool:
    return not tensor.is_meta and is_ordinary(tensor) and tensor.numel() > 0


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _original(name: str) -> str:
    path, dot, key = name.rpartition(".")
    return f"{path}{dot}original_{key}"


def _probe_all(tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Return a few entries of each tensor, with one copy per device, rounded to six digits."""
    parts = {name: _spread(tensor.detach()) for name, tensor in tensors.items()}
    values: dict[str, list[float]] = {}
    for device in {part.device for part in parts.values()}:
        here = {name: part for name, part in parts.items() if part.device == device}
        flat = torch.cat(list(here.values())).nan_to_num(nan=0.0).cpu()
        for name, numbers in zip(here, flat.split([len(part) for part in here.values()]), strict=True):
            values[name] = [float(f"{x:.6g}") for x in numbers.tolist()]
    return {name: values[name] for name in tensors}


def _spread(tensor: Any) -> Tensor:
    """Return up to ``TENSOR_PROBES`` entries, evenly spread over the tensor, in float32."""
    flat = (tensor.full_tensor() if is_piece(tensor) else tensor).reshape(-1)
    return flat[:: max(1, (flat.numel() - 1) // (TENSOR_PROBES - 1))][:TENSOR_PROBES].to(torch.float32, copy=True)


def describe_layers(adapter: Adapter) -> list[dict[str, Any]]:
    """Return the name, rank, shape and scaling of each adapted layer, ready for JSON."""
    return [
        {
            "name": layer.name,
            "rank": layer.rank,
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "scaling": float(module.scaling[adapter.adapter_name]),
        }
        for layer, module in zip(adapter.subspace, adapter.layers, strict=True)
    ]


def check_fingerprint(saved: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Compare a saved fingerprint with the fingerprint of the present base model.

    Args:
        saved: Fingerprint stored with the posterior.
        found: Fingerprint of the present base model.

    Raises:
        ValueError: If the base models differ, or the saved fingerprint is damaged. The message says what differs.
    """
    for key in ("class", "model_type", "embedding_shape"):
        if saved.get(key) != found[key]:
            raise ValueError(
                f"Another base model: its {key} is {found[key]!r}, but the posterior was learned on a model with "
                f"{saved.get(key)!r}. Load the posterior on that model."
            )
    layers = saved.get("layer_probes")
    if not isinstance(layers, dict) or set(layers) != set(found["layer_probes"]):
        raise ValueError("The saved fingerprint is damaged: 'layer_probes' does not name the adapted layers.")
    pairs = {"the embeddings": (saved.get("probes"), found["probes"])}
    pairs |= {f"layer {name!r}": (layers[name], found["layer_probes"][name]) for name in layers}
    for where, (a, b) in pairs.items():
        if not _is_numbers(a):
            raise ValueError(f"The saved fingerprint is damaged: the probes of {where} are not a list of numbers.")
        if (where != "the embeddings" and not (a and b)) or _close(a, b):
            continue
        raise ValueError(
            f"Another base model: the shapes are right, but the weights of {where} differ from those on which the "
            "posterior was learned. Load the checkpoint used in training, not another one or random weights."
        )
    _check_tensors(saved, found)
    if "settings" in saved:  # not in the file of an older version
        warn_of_other_settings(saved["settings"], found["settings"])


def _check_tensors(saved: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Compare the probes of all tensors; those of quantized layers may be missing in one of the two models."""
    if "tensor_probes" not in saved:  # the file of an older version
        return
    probes, quantized = saved["tensor_probes"], saved.get("quantized")
    if not isinstance(probes, dict) or not isinstance(quantized, list):
        raise ValueError("The saved fingerprint is damaged: 'tensor_probes' or 'quantized' has a wrong type.")
    free = {*map(str, quantized), *found["quantized"]}
    own = found["tensor_probes"]
    for name in sorted(probes.keys() ^ own.keys()):
        if _owner(name) not in free:
            raise ValueError(
                f"Another base model: {name!r} is in only one of the two models, this one and the one of the training. "
                "Build the base model with the same configuration as in training."
            )
    for name in sorted(probes.keys() & own.keys()):
        if not _is_numbers(probes[name]):
            raise ValueError(f"The saved fingerprint is damaged: the probes of {name!r} are not a list of numbers.")
        if _owner(name) not in free and not _close(probes[name], own[name]):
            raise ValueError(
                f"Another base model: {name!r} differs from the tensor with which the posterior was learned, and the "
                "posterior does not hold it. Load the same checkpoint. If its checkpoint does not hold it either, save "
                "the base model itself, or train the posterior again with this module in modules_to_save."
            )


def _is_numbers(values: object) -> TypeGuard[list[float]]:
    return isinstance(values, list) and all(isinstance(x, int | float) for x in values)


def _class_name(base: nn.Module) -> str:
    """Return the name of the model's class, without the class that ``fully_shard`` adds."""
    return next(c.__name__ for c in type(base).__mro__ if "FSDPModule" not in (parent.__name__ for parent in c.__mro__))


def _probe(weight: Tensor | None, count: int) -> list[float]:
    if weight is None or weight.is_meta or not is_ordinary(weight) or weight.dtype not in ORDINARY:
        return []
    whole: Any = weight.detach()
    flat = (whole.full_tensor() if is_piece(whole) else whole).reshape(-1)
    where = torch.linspace(0, flat.numel() - 1, count, device=flat.device, dtype=torch.float64).round().long()
    return flat[where.clamp_max(flat.numel() - 1)].float().cpu().tolist()


def _close(a: list[float], b: list[float]) -> bool:
    """Tell whether two lists of weights are equal up to the rounding of half precision."""
    if len(a) != len(b):
        return False
    x, y = (torch.tensor([float(min(v, 1e300)) for v in values], dtype=torch.float64) for values in (a, b))
    return bool(((x - y).abs() <= 0.01 * y.abs() + 1e-3 * y.abs().max()).all())
