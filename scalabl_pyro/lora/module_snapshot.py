"""Puts a module back as it was after an exception, wherever the exception came from."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .._process.global_state import GlobalState
from .._process.stop_signals import StopSignals

_CONTAINERS = (dict, OrderedDict, list, set)


class ModuleSnapshot:
    """State of a module and its submodules: attributes, submodules, hooks, flags, and the weights of LoRA layers.

    :class:`~scalabl_pyro.lora.module_changes.ModuleChanges` reverts the changes that were completed. A snapshot also
    reverts those that an exception cut in half: PEFT may have replaced some layers and not the others. Weights of the
    base model are copied only on demand, see :meth:`keep_values`. The state of the process is restored too.

    Args:
        module: Module that is about to be changed. Other objects have no state to restore.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> snapshot = ModuleSnapshot(net)
        >>> net[0] = nn.Identity()
        >>> snapshot.restore()
        >>> net
        Sequential(
          (0): Linear(in_features=2, out_features=2, bias=True)
        )
    """

    def __init__(self, module: object) -> None:
        self._global_state = GlobalState()
        modules = list(module.modules()) if isinstance(module, nn.Module) else []
        self._attributes = [(m.__dict__, dict(m.__dict__)) for m in modules]
        found = {id(v): v for _, saved in self._attributes for v in saved.values() if type(v) in _CONTAINERS}
        self._containers = [(container, container.copy()) for container in found.values()]
        self._parameters = [(p, p.requires_grad, p.device) for m in modules for p in m.parameters(recurse=False)]
        self._weights = [(p, p.data, p.detach().clone()) for m in modules for p in _tuner_weights(m)]

    def keep_values(self, tensors: Iterable[Tensor]) -> None:
        """Copy the values of weights of the base model that are about to be overwritten, so that they are restored."""
        self._weights += [(tensor, tensor.data, tensor.detach().clone()) for tensor in tensors]

    def restore(self) -> None:
        """Make the module what it was. Ctrl-C waits until this is done."""
        with StopSignals(terminate=False) as signals:
            self._global_state.restore()
            for attributes, saved in self._attributes:
                _refill(attributes, saved)
            for container, content in self._containers:
                _refill(container, content)
            for parameter, flag, device in self._parameters:
                parameter.requires_grad_(flag)
                if parameter.device != device:  # weights of layers in 8-bit floats wait in host memory
                    parameter.data = parameter.data.to(device)
            with torch.no_grad():
                for weight, data, value in self._weights:
                    weight.data = data
                    weight.copy_(value)
        signals.deliver()


def _tuner_weights(module: nn.Module) -> list[Tensor]:
    """Return the weights that a PEFT layer adds to its base layer."""
    if not isinstance(module, BaseTunerLayer):
        return []
    own = {id(p) for p in module.get_base_layer().parameters()}
    return [p for p in module.parameters() if id(p) not in own]


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)
