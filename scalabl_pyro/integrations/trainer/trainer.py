"""A Hugging Face Trainer for rows of a task."""

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader
from transformers import Trainer

from ..._arguments import check_role
from ...data.encoding import encode_data
from ...model.bayesian_lora import BayesianLoRA
from ...tasks import Task
from .inputs import FIELDS, Collator, EncodedRows
from .mixin import ScalaBLMixin


class ScalaBLTrainer(ScalaBLMixin, Trainer):
    """A ``transformers.Trainer`` that maximizes the ELBO, for rows of a task.

    Args:
        blora: The LLM, as :func:`scalabl_pyro.bayesian_lora` returns it.
        task: The likelihood.
        train_dataset: Rows in any form that :func:`scalabl_pyro.fit` takes.
        eval_dataset: Rows, or a dict of several data sets.
        options: Options of :class:`ScalaBLMixin`, and arguments of the Trainer: ``args`` (required), ``callbacks`` and
            so on. Batches are made by the task, so there is no ``data_collator``.

    Raises:
        TypeError: ``args`` is missing, or an argument is another kind of object.
        ValueError: Rows do not fit the task, or an option of the Trainer cannot be used.

    Example:
        >>> from transformers import TrainingArguments
        >>> args = TrainingArguments("out", num_train_epochs=3, per_device_train_batch_size=8)
        >>> trainer = ScalaBLTrainer(blora, task, args=args, train_dataset=rows, eval_dataset=more_rows)
        >>> trainer.train()
        >>> posterior = trainer.posterior()
    """

    def __init__(
        self, blora: BayesianLoRA, task: Task, *, train_dataset: Any = None, eval_dataset: Any = None, **options: Any
    ) -> None:
        call = "ScalaBLTrainer(blora, task, args=..., train_dataset=...)"
        check_role("blora", blora, "blora", call=call)
        check_role("task", task, "task", call=call)
        if options.get("data_collator") is not None:
            raise ValueError("data_collator= cannot be used here: the task makes the batches.")
        self.task = task
        self._adapter = blora.adapter
        if isinstance(eval_dataset, Mapping):
            evaluated: Any = {name: self._encoded(rows) for name, rows in eval_dataset.items()}
        else:
            evaluated = None if eval_dataset is None else self._encoded(eval_dataset)
        trained = None if train_dataset is None else self._encoded(train_dataset)
        options |= {"train_dataset": trained, "eval_dataset": evaluated, "data_collator": Collator(task.pad_token_id)}
        super().__init__(blora, task=task, **options)
        self._signature_columns: Any = FIELDS

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Build the loader of an evaluation.

        Args:
            eval_dataset: Rows, the name of one of several data sets, or None for the own one.
        """
        is_name = isinstance(eval_dataset, str) and isinstance(self.eval_dataset, dict)
        given = eval_dataset is not None and not is_name
        return super().get_eval_dataloader(self._encoded(eval_dataset) if given else eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Build the loader of a prediction.

        Args:
            test_dataset: Rows. If a row has no answer, all are predicted as if they had none.
        """
        return super().get_test_dataloader(self._encoded(test_dataset, need_target=self.task.scores_only))

    def _encoded(self, rows: Any, *, need_target: bool = True) -> EncodedRows:
        if isinstance(rows, EncodedRows):
            return rows
        examples = encode_data(rows, self.task.encode, need_target=need_target)
        self.task.check_llm(self._adapter, examples)
        return EncodedRows(examples)
