"""Initial values of s and of the factors of a layer: those of the paper, or those of a trained LoRA.

Factorizations run on the CPU. The signs of singular vectors differ between libraries, and a seed must give the same
start on every device of a machine.
"""

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from .factors import factors_of


def initialize(layer: LoraLayer, adapter_name: str) -> Tensor:
    """Set the factors of a layer to the initial values of the paper, and return the initial s.

    Let Z (r, in) be the default initial weight of ``nn.Linear``, and ``_, s0, Vh = svd(Z)``. A becomes Vh, and B
    becomes 0.

    Args:
        layer: PEFT LoRA layer whose A still has its default initial value Z.
        adapter_name: Name of the adapter in PEFT.

    Returns:
        Initial s of the layer: s0, (r,).

    References:
        Samplawski et al., UAI 2025.
    """
    A, B = _master_factors(layer, adapter_name)
    if A.is_meta:  # a tensor on the meta device has a shape, but no values
        return torch.full((A.shape[0],), 3**-0.5)
    with torch.no_grad():
        _, s0, Vh = torch.linalg.svd(A.cpu(), full_matrices=False)
        A.copy_(Vh)
        B.zero_()
    return s0


def factorize(layer: LoraLayer, adapter_name: str, *, spectrum: bool = False) -> Tensor:
    """Rewrite trained factors as gamma B' diag(s) A' = gamma B A with orthonormal rows of A', and return s.

    A trained rank can be larger than the smaller side of the weight. The layer then keeps only as many rows of A' and
    columns of B' as that side, which hold the same product.

    Args:
        layer: PEFT LoRA layer with trained factors.
        adapter_name: Name of the adapter in PEFT.
        spectrum: Where the singular values of gamma B A go. False puts them into B'. All entries of s are then close to
            those of a new adapter, so that a prior scale means the same for both. True puts them into s, and the
            columns of gamma B' have unit norm.

    Returns:
        Initial s of the layer, (rank,).
    """
    A, B = _master_factors(layer, adapter_name)
    gamma = layer.scaling[adapter_name]
    with torch.no_grad():
        Q_b, R_b = torch.linalg.qr(B.cpu().double())
        Q_a, R_a = torch.linalg.qr(A.cpu().double().T)
        U, S, Vh = torch.linalg.svd(R_b @ R_a.T, full_matrices=False)
        s = gamma * S if spectrum else torch.full_like(S, 3**-0.5)
        _set(A, Vh @ Q_a.T)
        _set(B, Q_b @ U / gamma if spectrum else Q_b @ U * (S / s))
    layer.r[adapter_name] = len(s)
    return s.to(A.dtype)


def _set(factor: Tensor, value: Tensor) -> None:
    """Give a factor a new value, which may have a smaller rank."""
    factor.data = value.to(factor)


def _master_factors(layer: LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Convert A and B to float32 or higher, and return them: half precision would round small updates away."""
    pair = factors_of(layer, adapter_name)
    for factor in pair:
        factor.data = factor.data.to(torch.promote_types(factor.dtype, torch.float32))
    return pair
