"""Tells whether the weights of a module lie in pieces on several processes (FSDP2)."""

from torch import nn


def is_sharded(module: nn.Module) -> bool:
    """Whether weights of a module lie in pieces on several processes, which then must run it in step."""
    return any(is_piece(p) for p in module.parameters())


def is_piece(tensor: object) -> bool:
    """Whether a tensor is a piece of one that several processes hold (a DTensor)."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "device_mesh")
