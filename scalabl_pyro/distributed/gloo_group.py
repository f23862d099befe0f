"""A second group of the same processes (gloo, on the CPU), for messages between the hosts.

It carries checks that all processes are present and hold the same batch, signals, and results of ``predict``. It is
closed when a call fails, so that the other processes notice at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist

from .._process.versions import versions
from .same_installation import check_versions, hardware


class LostProcess(RuntimeError):
    """Error of a process that can no longer reach the others.

    Example:
        >>> from scalabl_pyro.distributed import LostProcess
        >>> try:
        ...     raise LostProcess("Process 0 of 2 cannot reach the others.")  # fit() and predict() raise it
        ... except LostProcess as error:
        ...     str(error)
        'Process 0 of 2 cannot reach the others.'
    """


@contextmanager
def reaching() -> Iterator[None]:
    """Turn errors of torch.distributed into :class:`LostProcess`."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcess(
            f"Process {dist.get_rank()} of {dist.get_world_size()} cannot reach the others any more. One of them was "
            "killed, interrupted twice, or failed (see its own output), or did not call the same function of "
            "scalabl_pyro. To call a "
            "function in one process only, use `with scalabl_pyro.distributed.single_process():`. A run with "
            f"checkpoint_dir= can be resumed. Error of torch: {(str(error).splitlines() or [repr(error)])[0]}"
        ) from error


class _Control:
    """The gloo group that belongs to the present default group; all processes create it together, when first needed.

    Attributes:
        same_hardware: Whether all processes run on the same kind of hardware, so that they round in the same way.
    """

    def __init__(self) -> None:
        self.world: Any = None
        self.group: Any = None
        self.same_hardware = True

    def get(self) -> Any:
        """The group, for a collective of torch.distributed.

        Raises:
            ValueError: The processes run different versions of the libraries.
        """
        world = dist.group.WORLD
        if self.group is None or self.world is not world:
            self.world = world
            with reaching():
                if is_gloo(
                    torch.device("cpu")
                ):  # its connections show at once that a process is gone; the store does not
                    dist.all_reduce(torch.zeros(1))
                self.group = dist.new_group(backend="gloo", timeout=_timeout(world))
            self._compare()
        return self.group

    def _compare(self) -> None:
        """Compare the libraries and the hardware of all processes."""
        found: list[Any] = [None] * dist.get_world_size()
        with reaching():
            dist.all_gather_object(found, {"versions": versions(), "hardware": hardware()}, group=self.group)
        try:
            check_versions([told.get("versions", {}) if isinstance(told, dict) else {} for told in found])
        except ValueError:
            self.close()
            raise
        self.same_hardware = len({told["hardware"] for told in found}) == 1

    def close(self) -> None:
        """Close the connections, so that the other processes see that this one will not answer."""
        group, self.group = self.group, None
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)


CONTROL = _Control()


def is_gloo(device: torch.device) -> bool:
    """Tell whether the group that the caller initialized uses gloo for tensors on this device."""
    return f"{device.type}:gloo" in str(dist.get_backend_config())


def _timeout(world: Any) -> Any:
    """Timeout of the group that the caller initialized; None means torch's default."""
    for device in ("cpu", "cuda"):
        try:
            return world._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
    return None
