"""Several processes that work as one: ``fit`` and ``predict`` under an initialized ``torch.distributed``.

Every process holds the whole program: model, data, and the generators of noise, seeded alike. So each knows the joint
batch of a step and draws the noise of all its rows, but runs the LLM on rows of its own only. With b of the B rows a
process computes the ELBO of its rows scaled to N, and counts b / B of it, as a micro-batch does: the shares add up to
1, the KL is counted once, and one sum of gradients over processes is the gradient of one process on the joint batch.
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

_ALONE: ContextVar[bool] = ContextVar("scalabl_pyro_alone", default=False)


class Processes:
    """The processes of a call, and what they do together; by default this one alone.

    Args:
        rank: number of this process.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which writes files."""
        return self.rank == 0

    @property
    def control(self) -> Any:
        """Their gloo group; kept nowhere else, as an error that is kept would keep its connections open."""
        return CONTROL.get()

    @property
    def are_several(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    def shard(self, batch: Batch) -> tuple[Batch, float]:
        """The rows of this process, and their share of the batch.

        Where there are fewer rows than processes, some run a row at share 0: all draw the same noise then, and a base
        that is sharded over processes is run by all of them.
        """
        if not self.are_several:
            return batch, 1.0
        rows = len(batch)
        start, stop = (rows * rank // self.size for rank in (self.rank, self.rank + 1))
        share = (stop - start) / rows
        start = min(start, rows - 1)
        own = batch.map(lambda t: t[start : max(stop, start + 1)])
        return replace(own, start=start, joint=rows), share

    def synchronize(self, batch: Batch, signal: int) -> int:
        """Wait until all processes have come as far, and tell each other of signals.

        It comes before each sum over GPUs, which would not return where a process is missing.

        Returns:
            The largest signal that one of them has received, 0 for none.

        Raises:
            ValueError: the processes hold different batches.
            LostProcess: one is gone.
        """
        if not self.are_several:
            return signal
        digest = zlib.crc32(batch.index.cpu().numpy().tobytes())
        for tensor in (batch.inputs["input_ids"], batch.target):
            digest = digest if tensor is None else zlib.crc32(tensor.cpu().numpy().tobytes(), digest)
        told = torch.tensor([signal, digest, -digest])
        with reaching():
            dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.control)
        signal, largest, smallest = told.tolist()
        if largest != -smallest:
            raise ValueError(
                "The processes hold different batches. Each must be given the same ones, of batch_size rows for all "
                "processes together, of which fit takes its part: pass rows, or a loader that was not prepared by "
                "accelerate and has no DistributedSampler."
            )
        return signal

    @torch.no_grad()
    def all_reduce_gradients(self, parameters: Sequence[Tensor], terms: Tensor) -> Tensor:
        """Sum gradients (in place) and ``terms`` over processes, in one all_reduce.

        A parameter without a gradient in some processes gets the sum of the others, without one in all it has none.
        """
        if not self.are_several:
            return terms
        missing = [i for i, p in enumerate(parameters) if p.grad is None]
        present = terms.new_ones(len(parameters))
        if missing:
            present[missing] = 0
        pieces = [terms, present, *(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)]
        dtype = functools.reduce(torch.promote_types, {piece.dtype for piece in pieces})
        joint = torch.cat([piece.detach().flatten().to(terms.device, dtype) for piece in pieces])
        with reaching():
            dist.all_reduce(joint, group=self._group_of(joint))
        terms_sum, present, *sums = joint.split([piece.numel() for piece in pieces])
        own = [(p.grad, total.view_as(p)) for p, total in zip(parameters, sums, strict=True) if p.grad is not None]
        if own:
            torch._foreach_copy_([grad for grad, _ in own], [total for _, total in own])
        for i in missing:  # asked only here: a GPU would have to be waited for
            if present[i] > 0:
                parameters[i].grad = sums[i].view_as(parameters[i]).to(parameters[i], copy=True)
        return terms_sum.to(terms.dtype)

    @torch.no_grad()
    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Give tensors of equal shapes the values that they have in process 0."""
        if not self.are_several or not tensors:
            return
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            own = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.detach().flatten().cpu() for t in own])
            with reaching():
                dist.broadcast(flat.view(torch.uint8), src=0, group=self.control)  # whatever gloo can count with
            for tensor, values in zip(own, flat.split([t.numel() for t in own]), strict=True):
                tensor.copy_(values.view_as(tensor))

    def broadcast_random_state(self, device: torch.device) -> None:
        """Go on with the random states of process 0: that of the CPU, and that of ``device``."""
        if not self.are_several:
            return
        own = [torch.default_generator]
        if device.type == "cuda":
            own.append(torch.cuda.default_generators[device.index or 0])
        states = self.from_rank_zero(lambda: [generator.get_state() for generator in own])
        for generator, state in zip(own, states, strict=True):
            generator.set_state(state)

    def all_gather(self, function: Callable[[], Result]) -> list[Result]:
        """Call a function in every process; what each gave, by number of the process.

        Raises:
            Exception: what it raised in one of them, in all of them.
        """
        if not self.are_several:
            return [function()]
        value, error = _outcome(function)
        found: list[Any] = [None] * self.size
        with reaching():
            dist.all_gather_object(found, (value, _told(error)), group=self.control)
        if error is not None:
            raise error
        for rank, (_, told) in enumerate(found):
            _raise_as_told(rank, told)
        return [value for value, _ in found]

    def from_rank_zero(self, function: Callable[[], Result]) -> Result:
        """Call a function in process 0 alone; all get what it gave, or raise what it raised. All wait for it."""
        if not self.are_several:
            return function()
        value, error = _outcome(function) if self.is_first else (None, None)
        told = [(value, _told(error))]
        with reaching():
            dist.broadcast_object_list(told, src=0, group=self.control)
        if error is not None:
            raise error
        ((value, failure),) = told
        _raise_as_told(0, failure)
        return value  # type: ignore[return-value]

    def _group_of(self, tensor: Tensor) -> Any:
        """The group that adds up where a tensor lies: NCCL for CUDA, if it was initialized."""
        on_control = tensor.device.type == "cpu" or is_gloo(tensor.device)
        return self.control if on_control else dist.group.WORLD


@contextmanager
def single_process() -> Iterator[None]:
    """Inside the context this process works by itself, as if there were no others."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def current_processes() -> Processes:
    """The processes that work together now: those of torch.distributed, if it is initialized."""
    if _ALONE.get() or not dist.is_available():
        return Processes()
    if not dist.is_initialized():
        _point_out(os.environ.get("WORLD_SIZE", ""))
        return Processes()
    if dist.get_world_size() == 1:
        return Processes()
    CONTROL.get()  # made here, where all processes pass
    return Processes(dist.get_rank(), dist.get_world_size())


@functools.cache  # once is enough
def _point_out(world_size: str) -> None:
    if world_size.isdecimal() and int(world_size) > 1:
        logger.warning(
            "WORLD_SIZE is %s, but torch.distributed is not initialized: every process works by itself. For one "
            "training in all of them call torch.distributed.init_process_group() first.",
            world_size,
        )


def collective(function: Callable[P, Result]) -> Callable[P, Result]:
    """A function that all processes call; one that fails in it closes its connections, so that none waits for it."""

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


def _told(error: Exception | None) -> tuple[str, str] | None:
    return None if error is None else (type(error).__name__, str(error))


def _raise_as_told(rank: int, told: tuple[str, str] | None) -> None:
    if told is None:
        return
    name, message = told
    kind = getattr(builtins, name, RuntimeError)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        kind = RuntimeError
    raise kind(f"In process {rank}: {message}")
