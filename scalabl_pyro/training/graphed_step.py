"""The optimizer step as CUDA graphs: one graph in a single process, two in each of several processes.

Between the two graphs the processes add up their gradients, outside of any graph. So each process captures at its own
time, and one in which a capture fails goes on eagerly, while the others replay.
"""

from typing import Any

import torch
from torch import Tensor

from ..data.batch import Batch
from . import cuda_graphs
from .cuda_graphs import BatchReplay, Replay
from .optimizer import parameters_of
from .step import EagerStep, Objective, StepResult


class GraphedStep(EagerStep[Objective]):
    """An :class:`~scalabl_pyro.training.step.EagerStep` that is replayed where it was captured.

    A step runs eagerly at the first batch of a shape, is captured at the second one, and replayed from then on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recorder = cuda_graphs.Recorder(self.device)
        dtypes = {parameter.dtype for parameter in parameters_of(self.optimizer)}
        shared = self.shared
        self.replay = BatchReplay(
            self._whole if shared is None else self.first_part,
            recorder=self.recorder,
            clear_gradients=lambda: self.objective.zero_grad(set_to_none=True),
            note=lambda: None if shared is None else shared.present,
            dtype=torch.float64 if torch.float64 in dtypes else torch.float32,
        )
        self.update = Replay(self._second_part, recorder=self.recorder)
        self._terms_dtype = torch.float32

    @property
    def why_eager(self) -> str | None:
        """Why steps are not captured; None if they are."""
        return self.recorder.failure

    def __call__(self, batch: Batch, kl_weight: float | Tensor) -> StepResult:
        """Take one step, as the eager step does."""
        on_device, weight = self.recorder.on_device(batch), float(kl_weight)
        with self.recorder.on_stream():
            if self.shared is None:
                return StepResult(self.replay(on_device, weight))
            terms = self.replay(on_device, weight)
            self.shared.present, self._terms_dtype = self.replay.noted, terms.dtype
            signal = self.sum_over_processes(batch, terms)  # the hosts compare batches without a look at the device
            present = tuple(p.grad is not None for p in self.shared.parameters)
            return StepResult(self.update((present, terms.dtype)), signal)

    def _whole(self, batch: Batch, kl_weight: float | Tensor) -> Tensor:
        return self.second_part(self.first_part(batch, kl_weight))

    def _second_part(self) -> Tensor:
        return self.second_part(torch.empty(0, dtype=self._terms_dtype))
