"""Replaces one parameter or buffer of a module."""

from typing import Any

from torch import Tensor, nn


def set_tensor(module: nn.Module, name: str, value: Tensor) -> tuple[nn.Module, str, Tensor]:
    """Replace a parameter or buffer by a frozen copy of a tensor, with the device and dtype of the old one.

    Other parameters that were tied to the old one keep it.

    Args:
        module: Module that holds the tensor.
        name: Path of the tensor in the module.
        value: New value.

    Returns:
        The part of the module that owns the tensor, the tensor's name there, and the old tensor.

    Raises:
        KeyError: The tensor does not exist.
    """
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    kept: dict[str, Any] = owner._parameters if key in owner._parameters else owner._buffers
    old = kept[key]
    if old is None:
        raise KeyError(name)
    new = value.detach().to(device=old.device, dtype=old.dtype, copy=True)
    kept[key] = nn.Parameter(new, requires_grad=False) if kept is owner._parameters else new
    return owner, key, old
