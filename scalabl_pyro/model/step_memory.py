"""Estimate the memory of a training step of a task, with what the task computes behind the LLM.

The output head runs in parts on long completions, and a part has the same number of tokens for one row as for all rows
only if the largest number of logits follows the number of rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..data.batch import Batch, collate
from ..data.encoding import encode_data
from ..data.rows import Row
from ..lora.adapter import Adapter
from ..lora.forward import AdaptedLLM
from ..lora.memory import MemoryEstimate, estimate_memory, estimate_step
from ..lora.targets import output_head
from ..lora.token_log_probs import parts_behind
from ..lora.train_mode import eval_mode
from ..tasks import Completion, Task, copy_task


def estimate_any(
    adapter: Adapter,
    batch: Batch | Mapping[str, Any] | Sequence[Row],
    task: Task | None,
    *,
    gradient_checkpointing: bool,
) -> MemoryEstimate:
    """Estimate the memory of a training step; see :meth:`scalabl_pyro.BayesianLoRA.estimate_memory`."""
    if task is not None:
        if not isinstance(batch, Batch):
            examples = encode_data(batch, task.encode, need_target=True)
            batch = collate(examples, range(len(examples)), task.pad_token_id)
        return estimate_task_memory(adapter, task, batch, gradient_checkpointing=gradient_checkpointing)
    if not isinstance(batch, Batch | Mapping):
        raise ValueError("Rows need their task: estimate_memory(rows, task=task).")
    if isinstance(batch, Batch) and batch.target is not None and batch.target.dim() > 1:
        raise ValueError("This batch has completions, whose tokens the task reads: pass task=.")
    inputs = batch.inputs if isinstance(batch, Batch) else batch
    positions = batch.last if isinstance(batch, Batch) and output_head(adapter.module) is not None else None
    return estimate_memory(adapter, inputs, positions=positions, gradient_checkpointing=gradient_checkpointing)


def estimate_task_memory(
    adapter: Adapter, task: Task, batch: Batch, *, gradient_checkpointing: bool = False
) -> MemoryEstimate:
    """Estimate the memory of a training step, which gives each row a draw of its own.

    Args:
        adapter: Adapter of the LLM.
        task: Task that encoded the batch.
        batch: Rows with answers.
        gradient_checkpointing: Whether training recomputes blocks in the backward pass.

    Raises:
        ValueError: The rows have no answers.
    """
    if batch.target is None:
        raise ValueError("The rows have no answers, but a training step needs them: add the answer to each row.")
    rows = len(batch)

    def forward(llm: AdaptedLLM, s: Tensor, count: int) -> Any:
        part = batch.map(lambda t: t[:count]).to(adapter.device)
        own = _with_share(task, count, rows)
        outputs = own.outputs(llm, part, s.expand(count, -1))
        return own.distribution(outputs, part).log_prob(cast(Tensor, part.target))

    head = _bytes_of_part(adapter, task, batch) if isinstance(task, Completion) else 0
    # A pass of one row has one draw for all its rows, which takes another path than a draw per row.
    options: Any = {"rows": rows, "gradient_checkpointing": gradient_checkpointing, "head": head, "first": 2}
    return estimate_step(adapter, forward, **options)


def _with_share(task: Task, count: int, rows: int) -> Task:
    """Return a task that divides the tokens of ``count`` rows into the same parts as those of all rows."""
    if not isinstance(task, Completion):
        return task
    own = copy_task(task)
    own.max_logits = task.max_logits * count // rows
    return own


def _bytes_of_part(adapter: Adapter, task: Completion, batch: Batch) -> int:
    """Return the bytes of the logits of one part; 0 if the logits of all tokens are saved."""
    row = batch.map(lambda t: t[:1]).to(adapter.device)
    probe = _LogitsOfOneToken()
    with eval_mode(adapter.module), torch.no_grad():
        task.read(AdaptedLLM(adapter), row, adapter.loc.to(adapter.device).unsqueeze(0), probe)
    logits = probe.logits.expand(len(batch), 1, -1)
    tokens = batch.extras["positions"].shape[1]
    parts = parts_behind(logits, tokens, task.max_logits)
    if len(parts) < 2:
        return 0
    return (parts[0].stop - parts[0].start) * logits.numel() * max(logits.element_size(), 4)


class _LogitsOfOneToken:
    """Readout that keeps the logits of the first token of each row."""

    logits: Tensor

    def __call__(self, head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Return nothing of use, (rows, tokens, 1)."""
        self.logits = head(hidden[:, :1])
        return self.logits.new_zeros(*hidden.shape[:2], 1)

    def repeat(self, batch_shape: torch.Size, rows: int) -> "_LogitsOfOneToken":
        """Return the readout itself."""
        return self
