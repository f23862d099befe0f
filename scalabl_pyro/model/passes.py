"""Forward passes over a data set: the one loop that runs a function on each batch."""

from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import torch
from tqdm.auto import tqdm

from .._errors import check_count
from ..data.batch import Batch, Example, evaluation_batches
from ..lora.adapter import Adapter
from ..lora.hidden_state_cache import Prefix, reuse
from ..lora.train_mode import eval_mode
from ..tasks import Task

Result = TypeVar("Result")


class Passes:
    """The batches of a data set, and the loop that runs the LLM on them.

    Prediction, log likelihoods, their derivatives and the baselines all use :meth:`map`.

    Args:
        adapter: LoRA layers inside the LLM.
        batches: Batches of rows.
        prefixes: Store for the hidden states at the first adapted block, one per batch. None means that nothing is
            kept between passes.

    Example:
        >>> from scalabl_pyro.model.passes import Passes
        >>> passes = Passes.over(examples, posterior.task, posterior.adapter, batch_size=8)
        >>> rows = passes.map(len)  # number of rows per batch
    """

    def __init__(
        self, adapter: Adapter, batches: Sequence[Batch], *, prefixes: Sequence[Prefix | None] | None = None
    ) -> None:
        self.adapter = adapter
        self.batches = batches
        self.prefixes = [None] * len(batches) if prefixes is None else prefixes

    @classmethod
    def over(cls, examples: Sequence[Example], task: Task, adapter: Adapter, *, batch_size: int) -> Self:
        """Split examples into batches, with the longest examples first.

        Args:
            examples: Tokenized rows.
            task: Task that encoded the examples.
            adapter: LoRA layers inside the LLM.
            batch_size: Number of rows per forward pass.

        Returns:
            Passes over all examples, which keep no hidden states.

        Raises:
            ValueError: If ``batch_size`` is not a whole number from 1 on, or if a token has no embedding.
        """
        check_count(batch_size=batch_size)
        task.check_llm(adapter, examples)
        return cls(adapter, list(evaluation_batches(examples, batch_size, task.pad_token_id)))

    @property
    def device(self) -> torch.device:
        """Device on which the adapted layers run."""
        return self.adapter.device

    def map(
        self,
        function: Callable[..., Result],
        *arguments: Sequence[Any],
        progress: bool = False,
        description: str = "predict",
    ) -> list[Result]:
        """Call a function on each batch, with the module in eval mode and with the hidden states that were kept.

        Args:
            function: Function that gets a batch on the device, and one item of each sequence in ``arguments``.
            arguments: Sequences of further arguments, with one item per batch.
            progress: Whether to show a progress bar.
            description: Text to the left of the progress bar.

        Returns:
            Results of the function, in the order of the batches.
        """
        given = list(zip(self.batches, self.prefixes, *arguments, strict=True))
        results = []
        with eval_mode(self.adapter.module), tqdm(given, disable=not progress, desc=description, unit="batch") as bar:
            for batch, prefix, *rest in bar:
                with reuse(self.adapter, prefix):
                    results.append(function(batch.to(self.device), *rest))
        return results
