"""The whole optimizer step as a CUDA graph, captured once per batch shape and replayed.

A step of a 7B model launches about 5,000 kernels, which takes the host about 100 ms. A replay is one launch.
"""

import contextlib
import gc
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..lora.causal_masks import decided_as_in_eager_passes
from .objective import TrainingObjective
from .step import EagerStep, Objective, StepResult

logger = logging.getLogger(__name__)

#: If steps are captured, lengths are rounded up to multiples of this number, and long ones to its doublings.
GRAPH_TOKENS = 4


class Captured(NamedTuple):
    """A graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    kl_weight: Tensor
    statistics: Tensor


class GraphReplay:
    """Run a function of a batch as a CUDA graph where it was captured.

    The first batch of a shape runs eagerly (lazily created state must exist before a capture), the second is captured,
    later ones are copied into the captured batch. All of it runs on a stream of its own, as captures demand. Noise is
    drawn inside the graph, from the generator that the run has seeded. If a capture fails, the reason is logged, and
    all later batches run eagerly.

    Args:
        function: What is captured: batch, KL weight -> statistics on the device.
        device: Device of the batches.
        clear_gradients: Called before a capture, so that gradients come to lie in the memory of the graph.
    """

    def __init__(
        self,
        function: Callable[[Batch, float | Tensor], Tensor],
        *,
        device: torch.device,
        clear_gradients: Callable[[], None] = lambda: None,
    ) -> None:
        self.function = function
        self.device = device
        self.clear_gradients = clear_gradients
        # Graphs of earlier passes tie the parameters' gradients to another stream, which a capture must not touch.
        gc.collect()
        self.stream = torch.cuda.Stream(self.device)
        self.pool = torch.cuda.graph_pool_handle()  # one for all graphs: they never run at the same time
        self.seen: set[tuple[Any, ...]] = set()
        self.captured: dict[tuple[Any, ...], Captured] = {}
        self.gives_up = False

    def __call__(self, batch: Batch, kl_weight: float | Tensor) -> Tensor:
        """Statistics of a batch, as the function gives them."""
        batch = batch.pin_memory().to(self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            statistics = self._run(batch, float(kl_weight))
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return statistics

    def _run(self, batch: Batch, kl_weight: float) -> Tensor:
        key = (*batch.shapes(), kl_weight == 0)  # at 0 the KL is left out of the program
        if self.gives_up or key not in self.seen:
            self.seen.add(key)
            return self.function(batch, kl_weight)
        if key not in self.captured:
            try:
                self.captured[key] = self._capture(batch, kl_weight)
            except (RuntimeError, NotImplementedError) as error:
                reason = str(error).splitlines()[0]
                logger.warning("steps run without CUDA graphs, which this model does not allow: %s", reason)
                self.gives_up = True
                self._recover()
                return self.function(batch, kl_weight)
        captured = self.captured[key]
        captured.batch.copy_(batch)
        captured.kl_weight.fill_(kl_weight)
        captured.graph.replay()
        return captured.statistics.clone()

    def _capture(self, batch: Batch, kl_weight: float) -> Captured:
        """Record the step of a batch; nothing is computed yet."""
        static = batch.map(torch.clone)
        weight = torch.tensor(kl_weight, device=self.device)
        self.clear_gradients()
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        with decided_as_in_eager_passes(batch.inputs), capture:
            statistics = self.function(static, weight if kl_weight else 0.0)
        return Captured(graph, static, weight, statistics)

    def _recover(self) -> None:
        """Undo what a failed capture leaves behind in torch.

        Memory is still routed to the pool of the graph, and the random generator waits for the end of the capture: it
        refuses to draw until one ends in order.
        """
        with contextlib.suppress(RuntimeError):  # where the program failed, not the capture, it ended in order
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream, capture_error_mode="thread_local"):
            torch.empty(1, device=self.device).normal_()


class GraphedStep(EagerStep[Objective]):
    """An :class:`~scalabl_pyro.training.step.EagerStep` that is replayed where it was captured."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        eager = super().__call__
        self.replay = GraphReplay(
            lambda batch, kl_weight: eager(batch, kl_weight).statistics,
            device=self.device,
            clear_gradients=lambda: self.objective.zero_grad(set_to_none=True),
        )

    def __call__(self, batch: Batch, kl_weight: float | Tensor) -> StepResult:
        """Take one step, as the eager step does."""
        return StepResult(self.replay(batch, kl_weight))


def uses_graph(
    wanted: bool | Literal["auto"],
    objective: TrainingObjective,
    *,
    keeps_prefix: bool,
    are_several: bool,
) -> bool:
    """Decide whether steps are captured.

    Args:
        wanted: ``cuda_graph`` of :class:`scalabl_pyro.HardwareOptions`.
        objective: What is minimized.
        keeps_prefix: Whether hidden states are cached.
        are_several: Whether several processes share each batch.

    Raises:
        ValueError: ``wanted`` is True, but the step cannot be captured.
    """
    devices = devices_of(objective.model)
    reason = why_not(
        devices, stays_on_device=objective.stays_on_device, keeps_prefix=keeps_prefix, are_several=are_several
    )
    if wanted is True and reason:
        raise ValueError(f"cuda_graph=True, but {reason}. Use cuda_graph='auto', the default, or False.")
    if wanted and reason and any(device.type == "cuda" for device in devices):
        logger.info("steps run without CUDA graphs: %s", reason)
    return bool(wanted) and reason is None


def devices_of(module: nn.Module) -> set[torch.device]:
    """Devices of all parameters of a module, the frozen ones included."""
    return {parameter.device for parameter in module.parameters()}


def why_not(
    devices: set[torch.device], *, stays_on_device: bool, keeps_prefix: bool, are_several: bool = False
) -> str | None:
    """Say what speaks against graphs; None if nothing does.

    Args:
        devices: Devices of all parameters of the model.
        stays_on_device: Whether a step computes all its numbers on the device.
        keeps_prefix: Whether hidden states are cached.
        are_several: Whether several processes share each batch.
    """
    if all(device.type != "cuda" for device in devices):
        return "the model is not on a CUDA device"
    if len(devices) > 1:
        return f"the model lies on {len(devices)} devices, and a graph belongs to one"
    if are_several:
        return "several processes add up their gradients in each step"
    if not stays_on_device:
        return "this ELBO or guide reads its loss on the host"
    if keeps_prefix:
        return "cache_prefix decides on the host what to compute"
    return None
