"""Prediction over fixed draws: draw 3 is the same function of the input on every batch."""

import hashlib
import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from .._errors import check_count
from ..data.batch import Batch, Example
from ..distributed.processes import Processes, collective, current_processes
from ..lora.forward import AdaptedLLM
from ..lora.sharding import is_sharded
from ..model.passes import Passes
from ..tasks import Task
from .collect import predict_batches, predict_from_outputs
from .prefix_cache import kept_prefixes
from .result import NumericPrediction, Prediction

logger = logging.getLogger(__name__)

#: Largest number of draws per forward pass on a CPU, where a pass that is too large ends the process, not with an
#: error that could be caught. It is also the number of draws in memory at once if only averages are kept.
MANY_DRAWS = 64


@collective
@torch.no_grad()
def predict(
    llm: AdaptedLLM,
    task: Task,
    s: Tensor,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    draws_per_pass: int | None = None,
    is_mean: bool = False,
    seed: int = 0,
    cache_prefix: bool = False,
    progress: bool = False,
) -> Prediction | NumericPrediction:
    """Predict every example under every draw.

    All draws of a batch share one pass through the LLM. When a pass runs out of memory, the number of draws per pass is
    halved and the batch repeated. The result does not depend on either number.

    Args:
        llm: LLM with the factors of a posterior.
        task: Task that defines the likelihood.
        s: (S, D) draws.
        examples: Tokenized rows.
        batch_size: Number of rows per forward pass.
        draws_per_pass: Largest number of draws per forward pass; None for all on a GPU, and for 64 on a CPU.
        is_mean: Whether the only draw is the posterior mean.
        seed: Seed of the simulated answers of a likelihood over numbers.
        cache_prefix: Whether to keep the hidden states at the first adapted block for later predictions of the same
            rows.
        progress: Whether to show a progress bar.

    Returns:
        Prediction of N rows under S draws.

    Raises:
        ValueError: If a number is not a whole number from 1 on, if a token has no embedding, or if ``cache_prefix`` is
            asked for where nothing can be kept.
        FloatingPointError: If an output of the LLM is NaN.

    Example:
        >>> prediction = predict(posterior.llm(), posterior.task, s, examples)
    """
    start = time.perf_counter()
    check_draws_per_pass(draws_per_pass)
    passes = passes_over(examples, task, llm, batch_size=batch_size, cache_prefix=cache_prefix)
    s = s.to(passes.device)
    default = MANY_DRAWS if passes.device.type == "cpu" else len(s)
    outputs_of = DrawOutputs(llm, task, size=int(min(draws_per_pass or default, len(s))))
    joint = current_processes()
    if joint.are_several:
        on_device = shared_outputs(joint, passes, outputs_of, s, progress=progress)
        seconds = time.perf_counter() - start
        return predict_from_outputs(task, examples, on_device, seed=seed, is_mean=is_mean, seconds=seconds)
    return predict_batches(
        passes, lambda batch: outputs_of(batch, s), task, examples, seed=seed, is_mean=is_mean, progress=progress
    )


def check_draws_per_pass(draws_per_pass: int | None) -> None:
    """Raise ValueError unless the number is None, or a whole number from 1 on."""
    if draws_per_pass is not None:
        check_count(draws_per_pass=draws_per_pass)


def passes_over(
    examples: Sequence[Example], task: Task, llm: AdaptedLLM, *, batch_size: int, cache_prefix: bool
) -> Passes:
    """Return the passes over rows; see :func:`predict` for the arguments."""
    passes = Passes.over(examples, task, llm.adapter, batch_size=batch_size)
    if not cache_prefix:
        return passes
    return Passes(llm.adapter, passes.batches, prefixes=kept_prefixes(llm.adapter, passes.batches))


class DrawOutputs:
    """Computes the outputs of a batch under draws, as many draws at a time as memory allows.

    Args:
        llm: LLM with the factors of a posterior.
        task: Task that reads its outputs.
        size: Number of draws per forward pass; halved each time memory runs out.
    """

    def __init__(self, llm: AdaptedLLM, task: Task, *, size: int) -> None:
        self.llm = llm
        self.task = task
        self.size = size

    def __call__(self, batch: Batch, s: Tensor) -> Tensor:
        """Outputs (S, B, K) of B rows under draws (S, D)."""
        while True:
            try:
                return torch.cat([_outputs(self.llm, self.task, part, batch) for part in s.split(self.size)])
            except torch.OutOfMemoryError:
                if self.size == 1 or is_sharded(self.llm.llm):  # the other processes of a sharded base keep their size
                    raise
                self.size = -(-self.size // 2)
                torch.cuda.empty_cache()
                logger.warning("Out of memory: going on with %d draws per pass.", self.size)


def _outputs(llm: AdaptedLLM, task: Task, s: Tensor, batch: Batch) -> Tensor:
    """Outputs (P, B, K) of B rows under P draws in one forward pass."""
    return task.outputs(llm, batch, s.unsqueeze(1))


def shared_outputs(
    joint: Processes, passes: Passes, outputs_of: DrawOutputs, s: Tensor, *, progress: bool
) -> list[tuple[Batch, Tensor]]:
    """Return each batch with its outputs (S, B, K), on the CPU: each process runs its share, and all get all.

    Where there are fewer batches than processes, draws are shared out too. The processes of a sharded base run it
    equally often, some of them once more than they need.
    """
    groups = min(len(s), -(-joint.size // len(passes.batches)))
    work = [(i, part) for i in range(len(passes.batches)) for part in s.tensor_split(groups)]
    rounds = -(-len(work) // joint.size)
    own = [work[i % len(work)] for i in range(joint.rank, rounds * joint.size, joint.size)]
    if not is_sharded(passes.adapter.module):
        own = work[joint.rank :: joint.size]
    asked = [s.cpu().tolist(), [batch.index.tolist() for batch in passes.batches], outputs_of.size]

    def run() -> tuple[str, list[Tensor]]:
        share = Passes(
            passes.adapter, [passes.batches[i] for i, _ in own], prefixes=[passes.prefixes[i] for i, _ in own]
        )
        draws = [part for _, part in own]
        outputs = share.map(lambda batch, part: outputs_of(batch, part).cpu(), draws, progress=progress)
        return hashlib.sha256(repr(asked).encode()).hexdigest(), outputs

    found = joint.all_gather(run)
    if len({digest for digest, _ in found}) > 1:
        raise ValueError(
            "The processes were asked for different predictions. Pass the same rows, draws and options in all of them."
        )
    pieces = [found[i % joint.size][1][i // joint.size] for i in range(len(work))]
    joined = [torch.cat(pieces[i : i + groups]) for i in range(0, len(work), groups)]
    return [(batch.to(passes.device), outputs) for batch, outputs in zip(passes.batches, joined, strict=True)]
