"""Prediction over fixed draws: draw 3 is the same function of the input on every batch."""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._process.lock import LOCK
from .._process.random_state import Stream
from ..data.batch import Batch, Example, evaluation_batches
from ..data.encoding import check_tokens
from ..distributed.processes import Processes, collective, current_processes
from ..lora.forward import AdaptedLLM
from ..lora.sharding import is_sharded
from ..lora.train_mode import eval_mode
from ..tasks import Task, at_least_float32
from .result import NumericPrediction, Prediction

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


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
    progress: bool = False,
) -> Prediction | NumericPrediction:
    """Predict every example under every draw.

    All draws of a batch share one pass through the LLM; when that runs out of memory, the number of draws a pass is
    halved and the batch repeated. The result does not depend on either.

    Args:
        llm: the LLM with the factors of a posterior.
        task: the likelihood.
        s: (S, D) draws.
        examples: tokenized rows.
        batch_size: rows of data a pass.
        draws_per_pass: draws a pass at most; default all.
        is_mean: marks the only draw as the posterior mean.
        seed: of the simulated answers of a likelihood over numbers.
        progress: show a progress bar.
    """
    start = time.perf_counter()
    check_tokens(examples, llm.llm, task.pad_token_id)
    device = llm.adapter.device
    chunk = min(draws_per_pass or len(s), len(s))
    s = s.to(device)
    parts: list[tuple[Tensor, dict[str, Tensor]]] = []
    batches = list(evaluation_batches(examples, batch_size, task.pad_token_id))
    if any(batch.target is None for batch in batches):  # one row without answer: nothing is scored
        batches = [batch.without_target() for batch in batches]
    noise = Stream(seed)
    joint = current_processes()
    if joint.are_several:
        outputs = _shared_outputs(joint, llm, task, s, batches, chunk=chunk, progress=progress)
        parts = [
            (b.index, _keep(task, o.to(device), b.to(device), noise)) for b, o in zip(batches, outputs, strict=True)
        ]
        return _as_prediction(parts, task, examples, is_mean=is_mean, seconds=time.perf_counter() - start)
    bar = tqdm(batches, disable=not progress, desc="predict", unit="batch")
    with eval_mode(llm.llm), bar:
        for batch in bar:
            moments, chunk = _in_chunks(_moments, llm, task, s, batch.to(device), noise, size=chunk)
            parts.append((batch.index, {k: torch.cat([m[k] for m in moments]) for k in moments[0]}))
    return _as_prediction(parts, task, examples, is_mean=is_mean, seconds=time.perf_counter() - start)


def predict_from_outputs(
    task: Task, examples: Sequence[Example], outputs: Sequence[tuple[Batch, Tensor]], *, seed: int = 0
) -> Prediction | NumericPrediction:
    """A prediction from outputs (S, B, K) that were computed elsewhere, a batch at a time."""
    noise = Stream(seed)
    if any(batch.target is None for batch, _ in outputs):
        outputs = [(batch.without_target(), draws) for batch, draws in outputs]
    parts = [(b.index, _keep(task, o.to(b.index.device), b, noise)) for b, o in outputs]
    return _as_prediction(parts, task, examples, is_mean=False, seconds=float("nan"))


def _in_chunks(
    function: Callable[..., Result], llm: AdaptedLLM, task: Task, s: Tensor, *rest: Any, size: int
) -> tuple[list[Result], int]:
    """A function of ``size`` draws at a time, of fewer when memory runs out; how many it was in the end."""
    while True:
        try:
            return [function(llm, task, part, *rest) for part in s.split(size)], size
        except torch.OutOfMemoryError:
            if size == 1 or is_sharded(llm.llm):  # the other processes of a sharded base go on with as many
                raise
            size = -(-size // 2)
            torch.cuda.empty_cache()
            logger.warning("out of memory: going on with %d draws a pass", size)


def _shared_outputs(
    joint: Processes,
    llm: AdaptedLLM,
    task: Task,
    s: Tensor,
    batches: Sequence[Batch],
    *,
    chunk: int,
    progress: bool,
) -> list[Tensor]:
    """Outputs (S, B, K) of each batch, on the CPU: each process runs its share of the batches, and all get all.

    Where there are fewer batches than processes, draws are shared out too. The processes of a sharded base run it
    equally often, some of them once more than they need.
    """
    device = llm.adapter.device
    groups = min(len(s), -(-joint.size // len(batches)))
    work = [(batch, part) for batch in batches for part in s.tensor_split(groups)]
    rounds = -(-len(work) // joint.size)
    own = [work[i % len(work)] for i in range(joint.rank, rounds * joint.size, joint.size)]
    if not is_sharded(llm.llm):
        own = work[joint.rank :: joint.size]
    asked = [s.cpu().tolist(), [batch.index.tolist() for batch in batches], chunk]

    def run() -> tuple[str, list[Tensor]]:
        outputs, size = [], chunk
        with eval_mode(llm.llm), tqdm(own, disable=not progress, desc="predict", unit="batch") as bar:
            for batch, draws in bar:
                found, size = _in_chunks(_outputs, llm, task, draws, batch.to(device), size=size)
                outputs.append(torch.cat(found).cpu())
        return hashlib.sha256(repr(asked).encode()).hexdigest(), outputs

    found = joint.all_gather(run)
    if len({digest for digest, _ in found}) > 1:
        raise ValueError("The processes were asked for different predictions: all need the same rows and draws.")
    pieces = [found[i % joint.size][1][i // joint.size] for i in range(len(work))]
    return [torch.cat(pieces[i : i + groups]) for i in range(0, len(work), groups)]


def _moments(llm: AdaptedLLM, task: Task, s: Tensor, batch: Batch, noise: Stream) -> dict[str, Tensor]:
    """What is kept of the likelihood of a batch under P draws."""
    return _keep(task, _outputs(llm, task, s, batch), batch, noise)


def _outputs(llm: AdaptedLLM, task: Task, s: Tensor, batch: Batch) -> Tensor:
    """What the LLM gives for a batch under P draws, (P, B, K)."""
    outputs = task.outputs(llm, batch, s.unsqueeze(1))
    if torch.isnan(outputs).any():
        bad = torch.isnan(outputs).reshape(*outputs.shape[:2], -1).any(2).any(0)
        raise FloatingPointError(
            f"The LLM's outputs of rows {batch.index[bad].tolist()} are NaN: check these inputs, and use bfloat16 or "
            "float32 instead of float16."
        )
    return outputs


def _keep(task: Task, outputs: Tensor, batch: Batch, noise: Stream) -> dict[str, Tensor]:
    """Log probabilities, or moments, of the likelihood given ``outputs`` (P, B, K), each (P, B, ...), on the CPU."""
    with LOCK:  # a task is a Pyro program
        d: Any = task.likelihood(outputs, batch)
    if isinstance(d, dist.Categorical):
        kept = {"log_probs": at_least_float32(d.logits).log_softmax(-1)}
    else:
        with noise.use():
            replicates = d.sample()
        kept = {"means": d.mean, "variances": d.variance, "replicates": replicates}
        if batch.target is not None:
            kept["log_density"] = d.log_prob(batch.target)
    shape = (len(outputs), len(batch))
    return {k: v.expand(*shape, *v.shape[2:]).cpu() for k, v in kept.items()}


def _as_prediction(
    parts: Sequence[tuple[Tensor, dict[str, Tensor]]],
    task: Task,
    examples: Sequence[Example],
    *,
    is_mean: bool,
    seconds: float,
) -> Prediction | NumericPrediction:
    """Join what was kept of each batch, rows back in the order of the data."""
    order = torch.cat([index.cpu() for index, _ in parts]).argsort()
    kept = {k: torch.cat([part[k] for _, part in parts], dim=1)[:, order].numpy() for k in parts[0][1]}
    targets = [e.target for e in examples]
    target: Any = None if any(t is None for t in targets) else np.asarray(targets)
    arrays: dict[str, Any] = dict(kept)
    if "log_probs" not in arrays:
        arrays.setdefault("log_density", None)
        return NumericPrediction(target=target, is_mean=is_mean, seconds=seconds, **arrays)
    log_probs = arrays["log_probs"]
    classes = task.classes or tuple(str(c) for c in range(log_probs.shape[-1]))
    used = max((e.extras.get("num_choices", len(classes)) for e in examples), default=len(classes))
    return Prediction(log_probs[..., :used], target, tuple(classes[:used]), is_mean=is_mean, seconds=seconds)
