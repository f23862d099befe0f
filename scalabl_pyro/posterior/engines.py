"""Limits of the engines that serve LoRA adapters, checked before an adapter is written for one of them."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from ..lora.adapter import Adapter
from ..lora.plain_adapter import Extras
from ..lora.targets import input_embeddings

Engine = Literal["vllm", "sglang", "llama.cpp"]


@dataclass(frozen=True)
class Limits:
    """What an engine takes.

    Attributes:
        ranks: Ranks that an adapter may have; empty for any.
        adapters: Largest number of adapters in a batch by default; None for any.
    """

    ranks: tuple[int, ...] = ()
    adapters: int | None = None


#: Limits of vLLM 0.33, SGLang 0.5.23 and llama.cpp of November 2026.
LIMITS: dict[str, Limits] = {
    "vllm": Limits(ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512)),
    "sglang": Limits(adapters=8),
    "llama.cpp": Limits(),
}


def check_engine(engine: str, adapter: Adapter, extras: Extras) -> None:
    """Raise ValueError if an engine cannot serve an adapter, and name the way out.

    Args:
        engine: Name of the engine, a key of :data:`LIMITS`.
        adapter: Adapter to export.
        extras: What it holds besides LoRA factors.
    """
    held = [*extras.modules, *extras.biases]
    if held:
        raise ValueError(
            f"{engine} reads LoRA factors only, and this posterior also holds {_some(held)}. Use "
            "posterior.merge(draw).save_pretrained(path), one plain model per draw; or train without modules_to_save "
            "and without trained biases."
        )
    if tied := tied_targets(adapter):
        raise ValueError(
            f"{engine} cannot serve LoRA on {tied[0]!r}: this model ties the weight of that layer to its embeddings. "
            "Train with target_modules that leave the head out, such as bayesian_lora(llm, target_modules=['q_proj', "
            "'v_proj']); or use posterior.merge(draw).save_pretrained(path), one plain model per draw."
        )


def rank_for(engine: str | None, ranks: Collection[int]) -> int:
    """Return the one rank of all layers: the largest one, or the next that the engine takes.

    Raises:
        ValueError: The engine takes no rank that large.
    """
    largest = max(ranks)
    allowed = LIMITS[engine].ranks if engine is not None else ()
    fitting = [rank for rank in allowed or (largest,) if rank >= largest]
    if not fitting:
        raise ValueError(
            f"{engine} takes adapters of rank {max(allowed)} at most, and a layer has rank {largest}. Use "
            "posterior.merge(draw).save_pretrained(path), one plain model per draw."
        )
    return fitting[0]


def tied_targets(adapter: Adapter) -> list[str]:
    """Return the paths of adapted layers whose weight is also that of the token embeddings."""
    weight = getattr(input_embeddings(adapter.module), "weight", None)
    layers = zip(adapter.subspace.names, adapter.layers, strict=True)
    return [n for n, layer in layers if weight is not None and layer.get_base_layer().weight is weight]


def _some(names: Collection[str]) -> str:
    first = sorted(names)[0]
    return f"{first!r}" if len(names) == 1 else f"{first!r} and {len(names) - 1} more"
