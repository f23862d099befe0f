"""Tell base models apart: a posterior is valid only for the weights on which it was learned."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .sharding import is_piece, is_sharded
from .targets import input_embeddings

EMBEDDING_PROBES = 64
LAYER_PROBES = 4
ORDINARY = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def fingerprint(adapter: Adapter) -> dict[str, Any]:
    """Describe a base model: its class, its type, and a few weights of its embeddings and adapted layers.

    Weights of quantized layers are left out. So a posterior learned on a 4-bit base loads on the same base in bfloat16,
    and the other way round.

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
    embeddings = input_embeddings(base)
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
        if not isinstance(a, list) or not all(isinstance(x, int | float) for x in a):
            raise ValueError(f"The saved fingerprint is damaged: the probes of {where} are not a list of numbers.")
        if (where != "the embeddings" and not (a and b)) or _close(a, b):
            continue
        raise ValueError(
            f"Another base model: the shapes are right, but the weights of {where} differ from those on which the "
            "posterior was learned. Load the checkpoint used in training, not another one or random weights."
        )


def _class_name(base: nn.Module) -> str:
    """Return the name of the model's class, without the class that ``fully_shard`` adds."""
    return next(c.__name__ for c in type(base).__mro__ if "FSDPModule" not in (parent.__name__ for parent in c.__mro__))


def _probe(weight: Tensor | None, count: int) -> list[float]:
    if weight is None or weight.is_meta or weight.dtype not in ORDINARY:
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
