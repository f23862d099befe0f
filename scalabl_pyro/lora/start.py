"""The values that an adapter starts from, so that a training can be undone."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .base_tensors import plain_tensors
from .factors import Factors, local_part


class Start:
    """A copy of latents and factors on the CPU. New heads need no copy: the module still holds their start.

    Args:
        loc: Latents, (D,).
        factors: (A, B) of each layer.
    """

    def __init__(self, loc: Tensor, factors: Factors) -> None:
        self.loc = loc
        parts = [p.detach() for p in _parts(factors)]
        self.factors = [p if p.is_meta else p.to("cpu", copy=True) for p in parts]

    @torch.no_grad()
    def differs(self, loc: Tensor, factors: Factors, heads: Mapping[str, nn.Module], module: nn.Module) -> bool:
        """Whether present values differ from the start.

        Args:
            loc: Latents, (D,).
            factors: (A, B) of each layer.
            heads: Trained heads by path.
            module: The module that holds the original heads.
        """
        if loc.shape != self.loc.shape or not _equal(loc, self.loc):
            return True
        pairs = [*zip(_parts(factors), self.factors, strict=True), *_heads(heads, module)]
        return not all(_equal(present, first) for present, first in pairs)

    @torch.no_grad()
    def restore(self, factors: Factors, heads: Mapping[str, nn.Module], module: nn.Module) -> None:
        """Overwrite factors and heads with the start, see :meth:`differs`."""
        for present, first in [*zip(_parts(factors), self.factors, strict=True), *_heads(heads, module)]:
            if not first.is_meta:
                present.copy_(first)


def _parts(factors: Factors) -> list[Tensor]:
    return [local_part(p) for pair in factors for p in pair]


def _equal(present: Tensor, first: Tensor) -> bool:
    """Whether a tensor has its first values, up to a cast. A tensor on the meta device has no values."""
    return present.is_meta or first.is_meta or torch.equal(present.cpu(), first.to("cpu", present.dtype))


def _heads(heads: Mapping[str, nn.Module], module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Each trained parameter of a head, with the original one."""
    for name, head in heads.items():
        original = {tensor.name: tensor.base for tensor in plain_tensors(module.get_submodule(name))}
        yield from ((parameter, original[key]) for key, parameter in head.named_parameters())
