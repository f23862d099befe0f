"""Where s and the factors of a layer start: as in the paper, or at what a trained LoRA computes.

Factorizations run on the CPU: the signs of singular vectors differ between libraries, and a seed is to start alike on
every device of a machine.
"""

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from .factors import factors_of


def initialize(layer: LoraLayer, adapter_name: str) -> Tensor:
    """The paper's start: Z = the default nn.Linear init, ``_, s0, Vh = svd(Z)``, A = Vh, B = 0; returns s0 (r,)."""
    A, B = _master_factors(layer, adapter_name)
    if A.is_meta:  # shapes only
        return torch.full((A.shape[0],), 3**-0.5)
    with torch.no_grad():
        _, s0, Vh = torch.linalg.svd(A.cpu(), full_matrices=False)
        A.copy_(Vh)
        B.zero_()
    return s0


def factorize(layer: LoraLayer, adapter_name: str) -> Tensor:
    """Rewrite trained factors as B' diag(s) A' = B A with orthonormal rows of A'; returns s (r,).

    The singular values of the update go into B', and s starts near where a fresh adapter's does, so that one prior
    scale means the same for both.
    """
    A, B = _master_factors(layer, adapter_name)
    with torch.no_grad():
        Q_b, R_b = torch.linalg.qr(B.cpu().double())
        Q_a, R_a = torch.linalg.qr(A.cpu().double().T)
        U, S, Vh = torch.linalg.svd(R_b @ R_a.T)
        s = torch.full_like(S, 3**-0.5)
        A.copy_(Vh @ Q_a.T)
        B.copy_(Q_b @ U * (S / s))
    return s.to(A.dtype)


def _master_factors(layer: LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """A and B in at least float32: updates of half-precision factors would be rounded away."""
    pair = factors_of(layer, adapter_name)
    for factor in pair:
        factor.data = factor.data.to(torch.promote_types(factor.dtype, torch.float32))
    return pair
