"""What the benchmarks of speed share: a small task, random batches, a stopwatch, and a step of ``fit``."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy

import scalabl_pyro as sp
from scalabl_pyro.data import Batch
from scalabl_pyro.guides import as_guide
from scalabl_pyro.model.joint import TaskModel
from scalabl_pyro.training.graphed_step import GraphedStep
from scalabl_pyro.training.objective import Objective, ScopedGuide, default_elbo
from scalabl_pyro.training.optimizer import build_optimizer
from scalabl_pyro.training.step import EagerStep

TARGETS = ["q_proj", "v_proj", "lm_head"]
LABELS = (11, 12, 13, 14)
#: Size of the data set that a batch stands for.
NUM_DATA = 1000


class AnswerTokens(sp.Task):
    """Categorical distribution over the tokens of the answers, at the last position of each row.

    Args:
        labels: Token of each answer.
        use_mask: Whether the LLM gets the attention mask. Rows of one length need none.
    """

    def __init__(self, labels: tuple[int, ...] = LABELS, *, use_mask: bool = False) -> None:
        super().__init__()
        self.names = ("input_ids", "attention_mask") if use_mask else ("input_ids",)
        self.register_buffer("labels", torch.tensor(labels), persistent=False)

    def outputs(self, llm, batch, s):
        inputs = {name: batch.inputs[name] for name in self.names}
        logits = llm(**inputs, s=s, positions=batch.last).logits[..., 0, :]
        return logits[..., self.labels.to(logits.device)].float()

    def likelihood(self, outputs, batch):
        return pyro.distributions.Categorical(logits=outputs)


def random_batch(rows: int, tokens: int, device: str = "cpu", *, vocabulary: tuple[int, int] = (20, 400)) -> Batch:
    """Make a batch of random tokens.

    Args:
        rows: Number of rows.
        tokens: Tokens per row.
        device: Device of the batch.
        vocabulary: First token, and first token that is too large.
    """
    ids = torch.randint(*vocabulary, (rows, tokens), device=device)
    return Batch(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        torch.arange(rows, device=device) % 4,
        torch.arange(rows, device=device),
        torch.full((rows,), tokens - 1, device=device),
    )


def measure(fn: Callable[[], object], device: str, steps: int, weights: int = 0) -> dict[str, float]:
    """Time a function: median of some calls after three calls of warm-up.

    Args:
        fn: Function without arguments.
        device: ``"cuda"`` or ``"cpu"``.
        steps: Number of timed calls.
        weights: Bytes of the frozen weights.

    Returns:
        ``"ms"``, milliseconds per call, and ``"above_weights_gib"``, peak GPU memory less ``weights``.
    """
    cuda = device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        fn()
    times = []
    for _ in range(steps):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        if cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    peak = (torch.cuda.max_memory_allocated() - weights) / 2**30 if cuda else float("nan")
    return {"ms": statistics.median(times), "above_weights_gib": peak}


def kernels(fn: Callable[[], object], *, calls: int = 3, most: int = 25) -> list[dict[str, Any]]:
    """List the GPU kernels that a function spends most of its time in, after it has run.

    Args:
        fn: Function without arguments, which was called before.
        calls: Number of calls to average over.
        most: Number of kernels.

    Returns:
        ``"kernel"``, ``"ms"`` per call and ``"count"`` per call, the longest first; the last entry is the rest.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            fn()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    table = [
        {"kernel": e.key[:120], "ms": e.self_device_time_total / 1000 / calls, "count": e.count / calls} for e in events
    ]
    rest = table[most:]
    other = {"kernel": "all others", "ms": sum(e["ms"] for e in rest), "count": sum(e["count"] for e in rest)}
    return [*table[:most], other]


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Measure the FLOP per second of a large matrix product on random data."""
    n = 8192 if device == "cuda" else 1024
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    ms = measure(lambda: a @ b, device, 10)["ms"]
    return 2 * n**3 / (ms / 1000)


def peft_step(llm: nn.Module, batch: Batch, *, labels: tuple[int, ...] = LABELS, lr: float = 1e-4):
    """Make a maximum-likelihood step of PEFT's LoRA, as one would write it by hand.

    Returns:
        The step, a function without arguments; and the PEFT model, to unload.
    """
    model = get_peft_model(llm, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)
    answers = torch.tensor(labels, device=batch.index.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        # Rows have one length: the answer follows the last token, and only its logits are computed, as in ours.
        logits = model(**batch.inputs, use_cache=False, logits_to_keep=1).logits[:, 0]
        loss = cross_entropy(logits[:, answers].float(), batch.target)
        loss.backward()
        if not math.isfinite(loss.item()):
            raise FloatingPointError("The loss of PEFT's LoRA is not finite.")
        optimizer.step()

    return step, model


def objective_of(blora: Any, task: sp.Task, *, num_data: int = NUM_DATA) -> Objective:
    """Make the objective of ``fit`` with a normal guide and one draw per example."""
    guide = as_guide("normal", blora).to(blora.device)
    model = TaskModel(blora, task.to(blora.device), num_data=num_data, draws="per_example")
    return Objective(default_elbo(guide, blora.prior), model, ScopedGuide(guide, draws="per_example"))


def fit_step(
    blora: Any,
    batch: Batch,
    *,
    task: sp.Task | None = None,
    graph: bool = False,
    lr: float = 1e-4,
    processes: Any = None,
):
    """Make a step of ``fit``: its objective, its optimizer, its checks.

    Args:
        blora: Model of ``bayesian_lora``.
        batch: Batch that every step uses.
        task: Task of the step (default: ``AnswerTokens()``).
        graph: Whether the step is captured in a CUDA graph.
        lr: Learning rate of all parameters but the scales of the guide, which learn 10 times as fast.
        processes: Processes that share the batch (default: this one alone).
    """
    objective = objective_of(blora, AnswerTokens() if task is None else task)
    rates = {"lr": lr, "lr_A": lr, "lr_loc": lr, "lr_scale": 10 * lr}
    model, guide = objective.model, objective.guide.guide
    optimizer = build_optimizer(model, guide, **rates, weight_decay=0.0, capturable=graph)
    execute = (GraphedStep if graph else EagerStep)(objective, optimizer, device=blora.device, processes=processes)

    def step() -> None:
        with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False):
            execute(batch, 1.0)

    return step
