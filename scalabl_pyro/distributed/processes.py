"""Several processes that work as one: ``fit`` and ``predict`` under an initialized ``torch.distributed``.

Every process holds the whole program: the model, the data, and random generators with the same seed. So each process
knows the joint batch of a step, and draws the noise of all its rows. It runs the LLM on its own rows only.

A process with b of the B rows computes the ELBO of its rows, scaled to the N rows of the data set, and weights it by
b / B, as for a micro-batch. The shares add up to 1, so the KL is counted once. The sum of the gradients over processes
is the gradient that one process would compute on the joint batch.
"""

import builtins
import functools
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ..data.batch import Batch
from .gloo_group import CONTROL, LostProcess, is_gloo, reaching

__all__ = ["LostProcess", "single_process"]

logger = logging.getLogger(__name__)

P = ParamSpec("P")
Result = TypeVar("Result")

_SINGLE: ContextVar[bool] = ContextVar("scalabl_pyro_single_process", default=False)


class Processes:
    """The processes that run a call together, and their collective operations; by default this process alone.

    Args:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def is_first(self) -> bool:
        """Tell whether this is process 0, which writes the files."""
        return self.rank == 0

    @property
    def control(self) -> Any:
        """The gloo group of these processes.

        It is stored in one place only: an error that holds a reference to it would keep its connections open.
        """
        return CONTROL.get()

    @property
    def have_same_hardware(self) -> bool:
        """Tell whether all processes run on the same kind of hardware, so that they round in the same way."""
        return CONTROL.same_hardware

    @property
    def are_several(self) -> bool:
        """Tell whether there are other processes."""
        return self.size > 1

    def shard(self, batch: Batch) -> tuple[Batch, float]:
        """Return the rows of this process, and their share of the joint batch.

        If there are fewer rows than processes, some processes run one row with share 0. All processes then still draw
        the same noise, and all of them run a base model that is sharded over processes.
        """
        if not self.are_several:
            return batch, 1.0
        rows = len(batch)
        start, stop = (rows * rank // self.size for rank in (self.rank, self.rank + 1))
        share = (stop - start) / rows
        start = min(start, rows - 1)
        own = batch.map(lambda t: t[start : max(stop, start + 1)])
        return replace(own, start=start, joint=rows), share

    def synchronize(self, batch: Batch, signal: int, told: Sequence[int] = ()) -> tuple[int, list[int]]:
        """Wait until all processes have reached this step, and exchange their signals.

        It is called before each sum over GPUs, because such a sum never returns if a process is missing. Only the hosts
        wait: the GPUs compute meanwhile.

        Args:
            batch: The joint batch, which must be the same in all processes.
            signal: Signal that this process has received; 0 for none.
            told: Other numbers to exchange, as many in each process.

        Returns:
            The largest signal that any process has received, or 0 for none; and the largest of each of the numbers.

        Raises:
            ValueError: The processes hold different batches.
            LostProcess: A process cannot be reached.
        """
        if not self.are_several:
            return signal, list(told)
        digest = zlib.crc32(batch.index.cpu().numpy().tobytes())
        for tensor in (batch.inputs["input_ids"], batch.target):
            digest = digest if tensor is None else zlib.crc32(tensor.cpu().numpy().tobytes(), digest)
        message = torch.tensor([signal, digest, -digest, *told])
        with reaching():
            dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self.control)
        signal, largest, smallest, *found = message.tolist()
        if largest != -smallest:
            raise ValueError(
                "The processes hold different batches. Give each process the same batches, with batch_size rows for "
                "all processes together; fit takes the part of each process itself. So pass rows, or a loader "
                "without a DistributedSampler that accelerate has not prepared."
            )
        return signal, found

    @torch.no_grad()
    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Give the tensors, in place, the values that they have in process 0."""
        if not self.are_several or not tensors:
            return
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            own = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.detach().flatten().cpu() for t in own])
            with reaching():
                dist.broadcast(
                    flat.view(torch.uint8), src=0, group=self.control
                )  # bytes: gloo does not know every dtype
            for tensor, values in zip(own, flat.split([t.numel() for t in own]), strict=True):
                tensor.copy_(values.view_as(tensor))

    def broadcast_random_state(self, device: torch.device) -> None:
        """Give all processes the random states of process 0: that of the CPU, and that of ``device``."""
        if not self.are_several:
            return
        own = [torch.default_generator]
        if device.type == "cuda":
            own.append(torch.cuda.default_generators[device.index or 0])
        states = self.from_rank_zero(lambda: [generator.get_state() for generator in own])
        for generator, state in zip(own, states, strict=True):
            generator.set_state(state)

    def all_gather(self, function: Callable[[], Result]) -> list[Result]:
        """Call a function in every process, and return the results of all, ordered by rank.

        Raises:
            Exception: If the function raises in one process, all processes raise that error.
        """
        if not self.are_several:
            return [function()]
        value, error = _outcome(function)
        found: list[Any] = [None] * self.size
        with reaching():
            dist.all_gather_object(found, (value, _described(error)), group=self.control)
        if error is not None:
            raise error
        for rank, (_, told) in enumerate(found):
            _raise_described(rank, told)
        return [value for value, _ in found]

    def from_rank_zero(self, function: Callable[[], Result]) -> Result:
        """Call a function in process 0 only; all processes wait for it, and return its result or raise its error."""
        if not self.are_several:
            return function()
        value, error = _outcome(function) if self.is_first else (None, None)
        told = [(value, _described(error))]
        with reaching():
            dist.broadcast_object_list(told, src=0, group=self.control)
        if error is not None:
            raise error
        ((value, failure),) = told
        _raise_described(0, failure)
        return value  # type: ignore[return-value]

    def group_of(self, tensor: Tensor) -> Any:
        """The group that sums tensors on this device: NCCL for CUDA tensors, if the caller initialized NCCL."""
        on_control = tensor.device.type == "cpu" or is_gloo(tensor.device)
        return self.control if on_control else dist.group.WORLD


@contextmanager
def single_process() -> Iterator[None]:
    """Let this process work by itself inside the context, as if there were no other processes.

    Inside it, ``fit`` and ``predict`` may be called by one process only, for example by rank 0 to evaluate.

    Example:
        >>> import torch, scalabl_pyro
        >>> blora = scalabl_pyro.bayesian_lora(torch.nn.Sequential(torch.nn.Linear(4, 3)), r=2)
        >>> with scalabl_pyro.distributed.single_process():
        ...     tuple(blora(torch.ones(5, 4)).shape)
        (5, 3)
    """
    token = _SINGLE.set(True)
    try:
        yield
    finally:
        _SINGLE.reset(token)


def current_processes() -> Processes:
    """Return the processes that work together now: those of torch.distributed, if it is initialized."""
    if _SINGLE.get() or not dist.is_available():
        return Processes()
    if not dist.is_initialized():
        _warn_not_initialized(os.environ.get("WORLD_SIZE", ""))
        return Processes()
    if dist.get_world_size() == 1:
        return Processes()
    CONTROL.get()  # created here, because all processes pass here
    return Processes(dist.get_rank(), dist.get_world_size())


@functools.cache  # one warning is enough
def _warn_not_initialized(world_size: str) -> None:
    if world_size.isdecimal() and int(world_size) > 1:
        logger.warning(
            "WORLD_SIZE is %s, but torch.distributed is not initialized, so every process works by itself. To train in "
            "all of them together, call torch.distributed.init_process_group() first.",
            world_size,
        )


def collective(function: Callable[P, Result]) -> Callable[P, Result]:
    """Decorate a function that all processes call together.

    A process in which it fails closes its connections, so that no other process waits for it.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Result:
        if not current_processes().are_several:
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except BaseException:
            CONTROL.close()
            raise

    return call


def _outcome(function: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error


def _described(error: Exception | None) -> tuple[str, str] | None:
    return None if error is None else (type(error).__name__, str(error))


def _raise_described(rank: int, told: tuple[str, str] | None) -> None:
    if told is None:
        return
    name, message = told
    kind = getattr(builtins, name, RuntimeError)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        kind = RuntimeError
    raise kind(f"In process {rank}: {message}")
