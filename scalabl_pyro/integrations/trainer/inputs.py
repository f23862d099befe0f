"""Rows of a task as a data set for a Trainer, and batches of a Trainer as batches of this library."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...data.batch import Batch, Example, collate
from ...lora.token_log_probs import NO_TOKEN
from ...storage.tensor_files import below
from ...tasks import Completion, Task

#: Names beside those of the LLM's inputs in a batch of rows.
LABELS, INDEX, LAST, EXTRAS = "labels", "row_index", "last_token", "extras."
#: Position of the first row of a batch in all rows of an optimizer step.
START = "first_row"
#: Fields of a row of :class:`EncodedRows`.
FIELDS = ["input_ids", "row"]
#: Inputs that a batch with labels may have; others would be ignored.
WITH_LABELS = {"input_ids", "attention_mask", LABELS, START}


class EncodedRows(Dataset[dict[str, Any]]):
    """Tokenized rows of a task.

    Args:
        examples: The rows.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples
        self.has_targets = all(example.target is not None for example in examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the tokens of a row, which samplers measure, and the row with its position."""
        example = self.examples[index]
        if not self.has_targets and example.target is not None:  # a Trainer joins the labels of all rows or of none
            example = Example(example.inputs, None, example.extras)
        return {"input_ids": example.inputs["input_ids"], "row": (index, example)}


class Collator:
    """Builds batches of :class:`EncodedRows`, as a dict of tensors.

    Args:
        pad_token_id: Token that fills shorter rows.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Build a right-padded batch."""
        index, examples = zip(*(item["row"] for item in items), strict=True)
        batch = collate(examples, index, self.pad_token_id)
        named = {**batch.inputs, INDEX: batch.index, LAST: batch.last}
        named |= {EXTRAS + name: value for name, value in batch.extras.items()}
        return named if batch.target is None else named | {LABELS: batch.target}


def as_batch(inputs: Mapping[str, Any], task: Task) -> Batch:
    """Turn the inputs of a Trainer into a batch.

    Args:
        inputs: Output of a :class:`Collator`, or tokens with labels, where -100 marks tokens that do not count.
        task: The task.

    Returns:
        Batch on the same device.

    Raises:
        ValueError: The inputs have neither form, are padded on the left, or have fields that would be ignored.
    """
    if INDEX in inputs:
        own = {INDEX, LAST, LABELS, START}
        return Batch(
            inputs={k: v for k, v in inputs.items() if k not in own and not k.startswith(EXTRAS)},
            target=inputs.get(LABELS),
            index=inputs[INDEX],
            last=inputs[LAST],
            extras=below(inputs, EXTRAS),
        )
    if not isinstance(task, Completion):
        raise ValueError(
            f"The batch has the fields {sorted(inputs)}, which do not come from rows of {type(task).__name__}: use "
            "ScalaBLTrainer, and pass rows as train_dataset and eval_dataset."
        )
    if unknown := sorted(set(inputs) - WITH_LABELS):
        raise ValueError(f"The batch has the fields {unknown}, which the ELBO would ignore: leave them out.")
    if LABELS not in inputs:
        raise ValueError("The batch has no labels: give each row input_ids and labels, with -100 where none counts.")
    return _completions(inputs["input_ids"], inputs[LABELS], inputs.get("attention_mask"))


def _completions(input_ids: Tensor, labels: Tensor, mask: Tensor | None) -> Batch:
    """Build a batch of completions, which are the tokens that have a label, from (B, tokens)."""
    mask = torch.ones_like(input_ids) if mask is None else mask
    if (mask[:, 1:] > mask[:, :-1]).any():
        raise ValueError("The batch is padded on the left: set tokenizer.padding_side='right'.")
    following = labels[:, 1:]  # the token at position t + 1 is predicted at position t
    counted = following != NO_TOKEN
    width = max(int(counted.sum(1).max()), 1)
    positions = (~counted).int().argsort(dim=1, stable=True)[:, :width]
    is_token = counted.gather(1, positions)
    return Batch(
        inputs={"input_ids": input_ids, "attention_mask": mask},
        target=following.gather(1, positions).masked_fill(~is_token, NO_TOKEN),
        index=torch.arange(len(input_ids), device=input_ids.device),
        last=mask.sum(1) - 1,
        extras={"positions": positions.masked_fill(~is_token, 0)},
    )
