"""A second, small group of processes (gloo, on the CPU), which carries what the host must know.

Whether all are there, with the same batch; signals; results of ``predict``. It is closed when a call fails, so that the
others learn of it at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist


class LostProcess(RuntimeError):
    """The other processes cannot be reached any more."""


@contextmanager
def reaching() -> Iterator[None]:
    """Errors of torch that mean that a process is gone, in other words."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcess(
            f"Process {dist.get_rank()} of {dist.get_world_size()} cannot reach the others any more. One of them was "
            "killed, failed (its own output says how), or went on without calling the same function of scalabl_pyro; "
            "calls in one process alone belong into `with scalabl_pyro.distributed.single_process():`. A run with "
            f"checkpoint_dir= can be resumed. What torch says: {(str(error).splitlines() or [repr(error)])[0]}"
        ) from error


class _Control:
    """The gloo group of the present default group; made when first needed, by all processes together."""

    def __init__(self) -> None:
        self.world: Any = None
        self.group: Any = None

    def get(self) -> Any:
        """The group, for a collective of torch.distributed."""
        world = dist.group.WORLD
        if self.group is None or self.world is not world:
            self.world = world
            with reaching():
                if is_gloo(torch.device("cpu")):  # its connections tell at once who is gone, the store does not
                    dist.all_reduce(torch.zeros(1))
                self.group = dist.new_group(backend="gloo", timeout=_timeout(world))
        return self.group

    def close(self) -> None:
        """Let the others see that this process will not answer."""
        group, self.group = self.group, None
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)


CONTROL = _Control()


def is_gloo(device: torch.device) -> bool:
    """Whether the group that the caller initialized is gloo, for tensors on such a device."""
    return f"{device.type}:gloo" in str(dist.get_backend_config())


def _timeout(world: Any) -> Any:
    """That of the group which the caller initialized, None for torch's default."""
    for device in ("cpu", "cuda"):
        try:
            return world._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
    return None
