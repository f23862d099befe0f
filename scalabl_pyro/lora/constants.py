"""Copies of frozen factors and heads that torch.jit can keep as constants of a traced program."""

import copy
from collections.abc import Callable, Mapping

from torch import nn

from .factors import Factors


def jit_constants(
    own_factors: Factors,
    own_heads: Mapping[str, nn.Module],
    prepare: Callable[[Factors], Factors],
    *,
    factors: Factors | None,
    heads: Mapping[str, nn.Module] | None,
) -> tuple[Factors | None, Mapping[str, nn.Module] | None]:
    """Return the factors and heads of a pass; frozen ones of the adapter are copied.

    Pyro freezes all params while it traces the potential of ``NUTS(jit_compile=True)``, and then frees them again. A
    traced program fails if one of its constants gets a gradient later.

    Args:
        own_factors: (A, B) of each layer of the adapter.
        own_heads: Trained heads of the adapter by path.
        prepare: Function that applies the gauge to factors.
        factors: Prepared factors that the pass was given; None means those of the adapter.
        heads: Heads that the pass was given; None means those of the adapter.
    """
    if factors is None and not any(factor.requires_grad for pair in own_factors for factor in pair):
        factors = prepare(tuple((A.data, B.data) for A, B in own_factors))
    if heads is None and not any(p.requires_grad for head in own_heads.values() for p in head.parameters()):
        heads = {name: copy.deepcopy(head) for name, head in own_heads.items()}
    return factors, heads
