"""Telling base models apart: a posterior means nothing on other weights than those it was learned on."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .sharding import is_piece, is_sharded

EMBEDDING_PROBES = 64
LAYER_PROBES = 4
ORDINARY = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def fingerprint(adapter: Adapter) -> dict[str, Any]:
    """Class, type, and a few weights of the embeddings and of each adapted layer.

    Weights of quantized layers are left out, so that a posterior learned on a 4-bit base loads on the same base in
    bfloat16, and the other way round. Weights that lie in pieces on several processes are put together the first time,
    by all of them (``fit`` does so); what was found is kept, so that one process can save a posterior.
    """
    base = adapter.module
    if not is_sharded(base):
        return _fingerprint(adapter)
    if adapter.kept_fingerprint is None:
        adapter.keep_fingerprint(_fingerprint(adapter))
    return copy.deepcopy(dict(adapter.kept_fingerprint or {}))


def _fingerprint(adapter: Adapter) -> dict[str, Any]:
    base = adapter.module
    embeddings = getattr(base, "get_input_embeddings", lambda: None)()
    weight = getattr(embeddings, "weight", None)
    if weight is None:
        own = {id(p) for pair in adapter.factors() for p in pair}
        weight = next(p for p in base.parameters() if id(p) not in own and p.is_floating_point())
    layers = zip(adapter.subspace.names, adapter.layers, strict=True)
    return {
        "class": _class_name(base),
        "model_type": getattr(getattr(base, "config", None), "model_type", None),
        "embedding_shape": list(weight.shape),
        "probes": _probe(weight, EMBEDDING_PROBES),
        "layer_probes": {
            n: _probe(getattr(layer.get_base_layer(), "weight", None), LAYER_PROBES) for n, layer in layers
        },
    }


def describe_layers(adapter: Adapter) -> list[dict[str, Any]]:
    """Names, ranks, shapes and scaling of the adapted layers, for JSON."""
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
    """Compare a saved fingerprint with that of the present base model.

    Raises:
        ValueError: another base model, or a saved fingerprint that is none; the message says what differs.
    """
    for key in ("class", "model_type", "embedding_shape"):
        if saved.get(key) != found[key]:
            raise ValueError(
                f"Another base model: {key} is {found[key]!r}, but the posterior was learned on {saved.get(key)!r}."
            )
    layers = saved.get("layer_probes")
    if not isinstance(layers, dict) or set(layers) != set(found["layer_probes"]):
        raise ValueError("The saved fingerprint is damaged: 'layer_probes' does not name the adapted layers.")
    pairs = {"the embeddings": (saved.get("probes"), found["probes"])}
    pairs |= {f"layer {name!r}": (layers[name], found["layer_probes"][name]) for name in layers}
    for where, (a, b) in pairs.items():
        if not isinstance(a, list) or not all(isinstance(x, int | float) for x in a):
            raise ValueError(f"The saved fingerprint is damaged: the probes of {where} are no list of numbers.")
        if (where != "the embeddings" and not (a and b)) or _close(a, b):
            continue
        raise ValueError(
            f"Another base model: the shapes are right, but the weights of {where} are not those that the posterior "
            "was learned on (another checkpoint, or a randomly initialized model)."
        )


def _class_name(base: nn.Module) -> str:
    """Class of the model, also if fully_shard has put a class of its own in front of it."""
    return next(c.__name__ for c in type(base).__mro__ if "FSDPModule" not in (parent.__name__ for parent in c.__mro__))


def _probe(weight: Tensor | None, count: int) -> list[float]:
    if weight is None or weight.is_meta or weight.dtype not in ORDINARY:
        return []
    whole: Any = weight.detach()
    flat = (whole.full_tensor() if is_piece(whole) else whole).reshape(-1)
    where = torch.linspace(0, flat.numel() - 1, count, device=flat.device, dtype=torch.float64).round().long()
    return flat[where.clamp_max(flat.numel() - 1)].float().cpu().tolist()


def _close(a: list[float], b: list[float]) -> bool:
    """Equal up to the rounding of half precision."""
    if len(a) != len(b):
        return False
    x, y = (torch.tensor([float(min(v, 1e300)) for v in values], dtype=torch.float64) for values in (a, b))
    return bool(((x - y).abs() <= 0.01 * y.abs() + 1e-3 * y.abs().max()).all())
