"""Parts of an optimizer step as CUDA graphs, captured once per batch shape and replayed.

A step of a 7B model launches about 5,000 kernels, which takes the host about 100 ms. A replay is one launch.
"""

import contextlib
import gc
import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.batch import Batch
from ..lora.causal_masks import decided_as_in_eager_passes

logger = logging.getLogger(__name__)

#: If steps are captured, lengths are rounded up to multiples of this number, and long ones to its doublings.
GRAPH_TOKENS = 4


class Recorder:
    """Records functions as CUDA graphs, on a stream of their own, in one memory pool.

    The graphs never run at the same time, and none reads what another one has put into the pool.

    Args:
        device: Device of the functions.

    Attributes:
        failure: Why a function could not be recorded, after which everything runs eagerly; None before that.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.failure: str | None = None
        # Graphs of earlier passes tie the parameters' gradients to another stream, which a capture must not touch.
        gc.collect()
        self.stream = torch.cuda.Stream(self.device)
        self.pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Run the body on the stream of the graphs, as captures demand, after what the present stream has to do."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def on_device(self, batch: Batch) -> Batch:
        """Copy a batch to the device; the host does not wait for it."""
        return batch.pin_memory().to(self.device)

    def record(
        self, function: Callable[[], Tensor], *, within: AbstractContextManager[Any] | None = None
    ) -> tuple[Any, Tensor] | None:
        """Record a function; nothing is computed yet.

        Args:
            function: What to record.
            within: Context of the recording.

        Returns:
            The graph, and the tensor into which its replays write; None if the function cannot be recorded.
        """
        try:
            with within or nullcontext():
                return self._capture(function)
        except (RuntimeError, NotImplementedError) as error:
            self.failure = str(error).splitlines()[0]
            logger.warning("steps run without CUDA graphs, which this model does not allow: %s", self.failure)
            self._recover()
            return None

    def _capture(self, function: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads, such as the watchdog of NCCL, may look at the device meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            output = function()
        return graph, output

    def _recover(self) -> None:
        """Undo what a failed capture leaves behind in torch.

        Memory is still routed to the pool of the graph, and the random generator waits for the end of the capture: it
        refuses to draw until one ends in order.
        """
        with contextlib.suppress(RuntimeError):  # where the program failed, not the capture, it ended in order
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream, capture_error_mode="thread_local"):
            torch.empty(1, device=self.device).normal_()


class Captured(NamedTuple):
    """A graph, the tensors that it reads and writes, and what the host noted when it was recorded."""

    graph: Any
    batch: Batch
    kl_weight: Tensor
    output: Tensor
    note: Any


class BatchReplay:
    """Run a function of a batch as a CUDA graph where it was captured.

    The first batch of a shape runs eagerly (lazily created state must exist before a capture), the second is captured,
    later ones are copied into the captured batch. Noise is drawn inside the graph, from the generator that the run has
    seeded. If a capture fails, the reason is logged, and all later batches run eagerly.

    Args:
        function: What is captured: batch, KL weight -> numbers on the device.
        recorder: Records it.
        clear_gradients: Called before a capture, so that gradients come to lie in the memory of the graph.
        note: Called after the function ran on the host, and gives what else the function found out there.
        dtype: Type of the KL weight that the graph reads.

    Attributes:
        noted: What ``note`` gave for the last batch, or for the one with which its graph was captured.
    """

    def __init__(
        self,
        function: Callable[[Batch, float | Tensor], Tensor],
        *,
        recorder: Recorder,
        clear_gradients: Callable[[], None] = lambda: None,
        note: Callable[[], Any] = lambda: None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.function = function
        self.recorder = recorder
        self.clear_gradients = clear_gradients
        self.note = note
        self.dtype = dtype
        self.noted: Any = None
        self.seen: set[tuple[Any, ...]] = set()
        self.captured: dict[tuple[Any, ...], Captured] = {}

    def __call__(self, batch: Batch, kl_weight: float) -> Tensor:
        """What the function gives for a batch on the device."""
        key = (*batch.shapes(), kl_weight == 0)  # at 0 the KL is left out of the program
        if self.recorder.failure is None and key in self.seen and key not in self.captured:
            self._capture(key, batch, kl_weight)
        self.seen.add(key)
        captured = self.captured.get(key) if self.recorder.failure is None else None
        if captured is None:
            output = self.function(batch, kl_weight)
            self.noted = self.note()
            return output
        captured.batch.copy_(batch)
        captured.kl_weight.fill_(kl_weight)
        captured.graph.replay()
        self.noted = captured.note
        return captured.output.clone()

    def _capture(self, key: tuple[Any, ...], batch: Batch, kl_weight: float) -> None:
        static = batch.map(torch.clone)
        weight = torch.tensor(kl_weight, device=self.recorder.device, dtype=self.dtype)
        self.clear_gradients()
        recorded = self.recorder.record(
            lambda: self.function(static, weight if kl_weight else 0.0),
            within=decided_as_in_eager_passes(batch.inputs),
        )
        if recorded is not None:
            self.captured[key] = Captured(recorded[0], static, weight, recorded[1], self.note())


class Replay:
    """Run a function of tensors that keep their places as a CUDA graph: eagerly first, captured at the second call.

    Args:
        function: What is captured.
        recorder: Records it.
    """

    def __init__(self, function: Callable[[], Tensor], *, recorder: Recorder) -> None:
        self.function = function
        self.recorder = recorder
        self.seen: set[Hashable] = set()
        self.captured: dict[Hashable, tuple[Any, Tensor]] = {}

    def __call__(self, key: Hashable) -> Tensor:
        """What the function gives.

        Args:
            key: Names the set of tensors. There is a graph for each set.
        """
        if self.recorder.failure is None and key in self.seen and key not in self.captured:
            recorded = self.recorder.record(self.function)
            if recorded is not None:
                self.captured[key] = recorded
        self.seen.add(key)
        if self.recorder.failure is not None or key not in self.captured:
            return self.function()
        graph, output = self.captured[key]
        graph.replay()
        return output.clone()
