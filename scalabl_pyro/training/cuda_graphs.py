"""The whole optimizer step as a CUDA graph, captured once a batch shape and replayed.

A step of a 7B model launches some 5,000 kernels, and the host needs about 100 ms for that whatever the model's size. A
replay is one launch.
"""

import contextlib
import gc
import logging
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO
from torch import Tensor

from ..data.batch import Batch
from ..lora.causal_masks import decided_as_in_eager_passes
from .device_elbo import stays_on_device
from .objective import Objective
from .step import EagerStep
from .svgd import SteinObjective

logger = logging.getLogger(__name__)

#: Batches are padded to multiples of so many tokens where steps are captured.
GRAPH_TOKENS = 16


class Captured(NamedTuple):
    """A graph, and the tensors it reads and writes."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    kl_weight: Tensor
    figures: Tensor


class GraphedStep(EagerStep):
    """An :class:`~scalabl_pyro.training.step.EagerStep` that is replayed where it was captured.

    The first batch of a shape runs eagerly (lazily created state must exist before a capture), the second is captured,
    later ones are copied into the captured batch. All of it runs on one stream of its own, as captures demand. Noise
    is drawn inside the graph, from the generator that the run has seeded. A capture that fails is logged with its
    reason, and all steps run eagerly from then on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Graphs of earlier passes tie the parameters' gradients to another stream, which a capture must not touch.
        gc.collect()
        self.stream = torch.cuda.Stream(self.device)
        self.pool = torch.cuda.graph_pool_handle()  # one for all graphs: they never run at the same time
        self.seen: set[tuple[Any, ...]] = set()
        self.captured: dict[tuple[Any, ...], Captured] = {}
        self.gives_up = False

    def __call__(self, batch: Batch, kl_weight: float | Tensor) -> Tensor:
        """As the eager step."""
        batch = batch.pin_memory().to(self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            figures = self._run(batch, float(kl_weight))
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return figures

    def _run(self, batch: Batch, kl_weight: float) -> Tensor:
        key = (*batch.shapes(), kl_weight == 0)  # at 0 the KL is left out of the program
        if self.gives_up or key not in self.seen:
            self.seen.add(key)
            return super().__call__(batch, kl_weight)
        if key not in self.captured:
            try:
                self.captured[key] = self._capture(batch, kl_weight)
            except (RuntimeError, NotImplementedError) as error:
                reason = str(error).splitlines()[0]
                logger.warning("steps run without CUDA graphs, which this model does not allow: %s", reason)
                self.gives_up = True
                self._recover()
                return super().__call__(batch, kl_weight)
        captured = self.captured[key]
        captured.batch.copy_(batch)
        captured.kl_weight.fill_(kl_weight)
        captured.graph.replay()
        return captured.figures.clone()

    def _capture(self, batch: Batch, kl_weight: float) -> Captured:
        """Record the step of a batch; nothing is computed yet."""
        static = batch.map(torch.clone)
        weight = torch.tensor(kl_weight, device=self.device)
        self.objective.zero_grad(set_to_none=True)  # gradients come to lie in the memory of the graph
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        with decided_as_in_eager_passes(batch.inputs), capture:
            figures = super().__call__(static, weight if kl_weight else 0.0)
        return Captured(graph, static, weight, figures)

    def _recover(self) -> None:
        """Undo what a failed capture leaves behind in torch.

        Memory is still routed to the pool of the graph, and the random generator waits for the end of the capture: it
        refuses to draw until one ends in order.
        """
        with contextlib.suppress(RuntimeError):  # where the program failed, not the capture, it ended in order
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream, capture_error_mode="thread_local"):
            torch.empty(1, device=self.device).normal_()


def uses_graph(
    wanted: bool | str,
    objective: Objective | SteinObjective,
    elbo: ELBO,
    device: torch.device,
    keeps_prefix: bool,
    are_several: bool,
) -> bool:
    """Whether steps are captured; see ``cuda_graph`` of :func:`scalabl_pyro.fit`."""
    if wanted not in (True, False, "auto"):
        raise ValueError(f"cuda_graph={wanted!r}: expected True, False or 'auto'.")
    on_device = isinstance(objective, Objective) and stays_on_device(elbo)
    reason = why_not(device, stays_on_device=on_device, keeps_prefix=keeps_prefix, are_several=are_several)
    if wanted is True and reason:
        raise ValueError(f"cuda_graph=True, but {reason}: leave it out, or use 'auto'.")
    if wanted and reason and device.type == "cuda":
        logger.info("steps run without CUDA graphs: %s", reason)
    return bool(wanted) and reason is None


def why_not(
    device: torch.device, *, stays_on_device: bool, keeps_prefix: bool, are_several: bool = False
) -> str | None:
    """What speaks against graphs, in words; None if nothing does."""
    if device.type != "cuda":
        return "it runs on the CPU"
    if are_several:
        return "several processes add up their gradients in each step"
    if not stays_on_device:
        return "this ELBO or guide reads its loss on the host"
    if keeps_prefix:
        return "cache_prefix decides on the host what to compute"
    return None
