"""Detection of weights that are split over several processes (FSDP2)."""

from torch import nn


def is_sharded(module: nn.Module) -> bool:
    """Tell whether weights of a module are split over several processes, which must then run it at the same time."""
    return any(is_piece(p) for p in module.parameters())


def is_piece(tensor: object) -> bool:
    """Tell whether a tensor is a DTensor: this process holds one piece of it, and others hold the rest."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "device_mesh")
