"""Which latent belongs to which layer: names, offsets, ranks.

All D latents of a model live in one vector s = concat_l s_l, because one stacked Pyro site costs a
few microseconds a step where one site a layer costs hundreds. Layer names are coordinates of that
vector, never names of sites.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """One adapted layer: its module path, its rank r, and the shape (out, in) of its frozen weight."""

    name: str
    rank: int
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Subspace:
    """The D = sum_l r_l latents of a model, in the order of its layers."""

    layers: tuple[Layer, ...]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @cached_property
    def names(self) -> list[str]:
        """Module path of each layer."""
        return [layer.name for layer in self.layers]

    @cached_property
    def ranks(self) -> list[int]:
        """Rank of each layer; they sum to :attr:`dim`."""
        return [layer.rank for layer in self.layers]

    @property
    def dim(self) -> int:
        """D, the number of latents."""
        return sum(self.ranks)

    @property
    def is_rectangular(self) -> bool:
        """Whether all ranks are equal, so that s can be shown as (layer, rank)."""
        return len(set(self.ranks)) == 1

    def split(self, s: Tensor) -> tuple[Tensor, ...]:
        """Views of ``s`` (..., D), one (..., r_l) for each layer.

        Raises:
            ValueError: the last dimension is not D.
        """
        if s.shape[-1] != self.dim:
            raise ValueError(
                f"s has shape {tuple(s.shape)}, but this model has {self.dim} latents "
                f"({len(self)} layers): the last dimension must be {self.dim}."
            )
        return torch.split(s, self.ranks, dim=-1)

    def labels(self) -> list[str]:
        """A name for each of the D latents, such as ``model.layers.0.self_attn.q_proj[3]``."""
        return [f"{layer.name}[{i}]" for layer in self.layers for i in range(layer.rank)]
