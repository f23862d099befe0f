"""The values that an adapter starts from, so that a training can be undone."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .factors import Factors, local_part


class Start:
    """A copy of latents and factors on the CPU. New heads need no copy: the module still holds their start.

    Args:
        loc: Latents, (D,).
        factors: (A, B) of each layer.
    """

    def __init__(self, loc: Tensor, factors: Factors) -> None:
        self.loc = loc
        self.factors = [local_part(p).detach().to("cpu", copy=True) for pair in factors for p in pair]

    @torch.no_grad()
    def differs(self, loc: Tensor, factors: Factors, heads: Mapping[str, nn.Module], module: nn.Module) -> bool:
        """Whether present values differ from the start.

        Args:
            loc: Latents, (D,).
            factors: (A, B) of each layer.
            heads: Trained heads by path.
            module: The module that holds the original heads.
        """
        if loc.shape != self.loc.shape or not torch.equal(loc.cpu(), self.loc.cpu()):
            return True
        present = (local_part(p) for pair in factors for p in pair)
        if not all(torch.equal(p.cpu(), value) for p, value in zip(present, self.factors, strict=True)):
            return True
        return not all(torch.equal(own, first.to(own)) for own, first in _heads(heads, module))

    @torch.no_grad()
    def restore(self, factors: Factors, heads: Mapping[str, nn.Module], module: nn.Module) -> None:
        """Overwrite factors and heads with the start, see :meth:`differs`."""
        present = (local_part(p) for pair in factors for p in pair)
        for p, value in zip(present, self.factors, strict=True):
            p.copy_(value)
        for own, first in _heads(heads, module):
            own.copy_(first)


def _heads(heads: Mapping[str, nn.Module], module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Each trained parameter of a head, with the original one."""
    for name, head in heads.items():
        yield from zip(head.parameters(), module.get_submodule(name).parameters(), strict=True)
