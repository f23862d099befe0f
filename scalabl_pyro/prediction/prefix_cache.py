"""Hidden states at the first adapted block, kept between predictions of the same rows.

The blocks below the first adapted one depend neither on s nor on anything that is trained. What they give for a row is
the same under every draw, every posterior and every later fit of the same upper blocks.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .._process.lock import LOCK
from ..data.batch import Batch
from ..lora.adapter import Adapter
from ..lora.hidden_state_cache import Prefix
from ..lora.sharding import is_sharded
from ..lora.shared_prefix import split_blocks
from ..lora.targets import input_embeddings, output_head

#: Number of most recently used row sets whose hidden states are kept per LLM.
MAX_ROW_SETS = 8

_KEPT: WeakKeyDictionary[nn.Module, OrderedDict[Any, list[Prefix]]] = WeakKeyDictionary()


def kept_prefixes(adapter: Adapter, batches: Sequence[Batch]) -> list[Prefix]:
    """Find the hidden states of these batches, or make room for them.

    They belong to the LLM, not to one posterior: posteriors that adapt the same upper blocks share them. They are
    dropped when a weight below the first adapted block was changed in place, and with the LLM.

    Args:
        adapter: LoRA layers inside the LLM.
        batches: Batches of the rows.

    Returns:
        One entry per batch, empty before its first pass.

    Raises:
        ValueError: If no fixed blocks lie below the first adapted one, or if the weights are sharded.
    """
    if not adapter.has_fixed_prefix:
        raise ValueError(
            "cache_prefix=True: no fixed blocks lie below the first adapted one, so there is nothing to keep. "
            "Adapt the upper blocks alone, with bayesian_lora(..., layers_to_transform=range(16, 32)) of a causal LM, "
            "or leave cache_prefix out."
        )
    if is_sharded(adapter.module):
        raise ValueError(
            "cache_prefix=True: the weights of this LLM lie in pieces on several processes, which must run every block "
            "in step. Leave cache_prefix out."
        )
    key = _digest(batches), _state_below(adapter)
    with LOCK:
        sets = _KEPT.setdefault(adapter.module, OrderedDict())
        found = sets.pop(key, None)
        sets[key] = [Prefix() for _ in batches] if found is None else found
        while len(sets) > MAX_ROW_SETS:
            sets.popitem(last=False)
        return sets[key]


def clear_prefix_cache(llm: nn.Module) -> None:
    """Free the hidden states that predictions with ``cache_prefix=True`` kept for an LLM.

    Args:
        llm: The Hugging Face model that was adapted.

    Example:
        >>> from torch import nn
        >>> clear_prefix_cache(nn.Linear(2, 2))  # nothing was kept: nothing happens
    """
    with LOCK:
        _KEPT.pop(llm, None)


def _digest(batches: Sequence[Batch]) -> str:
    """Hash of all inputs of all batches, and of how the rows are split into batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.inputs.items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _state_below(adapter: Adapter) -> tuple[Any, ...]:
    """Number of blocks below the first adapted one, and identity and version of each tensor they may read."""
    module = adapter.module
    lower, upper = split_blocks(module, adapter.subspace.names)
    head = output_head(module)
    above = {id(t) for part in (*upper, *([] if head is None else [head])) for t in _tensors(part)}
    embeddings = input_embeddings(module)
    above -= set() if embeddings is None else {id(t) for t in _tensors(embeddings)}  # tied to the head
    states = [(id(t), t.data_ptr(), t.dtype, t.device, _version(t)) for t in _tensors(module) if id(t) not in above]
    kind = adapter.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return (len(lower), autocast, *states)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 for inference tensors, which do not count it."""
    return 0 if tensor.is_inference() else tensor._version
