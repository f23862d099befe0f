"""Makes a Trainer evaluate and predict under draws from the posterior."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer

from ...lora.forward import AdaptedLLM
from ...lora.train_mode import eval_mode
from ...prediction.draws import sample
from ...prediction.predict import MANY_DRAWS, DrawOutputs
from ...tasks import Task
from .elbo_module import ElboModule
from .evaluation import answers_of
from .inputs import as_batch

if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object


class EvaluatesUnderDraws(Base):
    """Part of :class:`ScalaBLMixin`: evaluations and predictions.

    Attributes:
        task: The likelihood.
        elbo_module: What is trained.
        num_draws: Number of draws; 0 for the posterior mean.
    """

    task: Task
    elbo_module: ElboModule
    num_draws: int
    _eval_draws: Tensor | None = None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the Trainer does, under the same draws for all batches.

        The draws are those of ``trainer.posterior().predict(rows, num_draws=num_draws, seed=args.seed)``.
        """
        with self._fixed_draws():
            return super().evaluation_loop(*args, **kwargs)

    @contextmanager
    def _fixed_draws(self) -> Iterator[None]:
        s = sample(self.elbo_module.guide.snapshot(), self.num_draws, seed=self.args.seed).s
        self._eval_draws = s.to(self.elbo_module.blora.device)
        try:
            yield
        finally:
            self._eval_draws = None

    def prediction_step(
        self, model: Any, inputs: Mapping[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """Predict a batch under the draws.

        Returns:
            NLL of the batch (nats per row), predictions, and answers. Predictions are log probabilities of the classes,
            averaged over draws as probabilities; for completions and numbers see the page *Hugging Face Trainer*.
        """
        if self._eval_draws is None:
            with self._fixed_draws():
                return self.prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        s = self._eval_draws
        batch = as_batch(self._prepare_inputs(dict(inputs)), self.task)
        outputs_of = DrawOutputs(AdaptedLLM(self.elbo_module.blora.adapter), self.task, size=min(MANY_DRAWS, len(s)))
        with torch.no_grad(), eval_mode(self.elbo_module.blora.llm), self.accelerator.autocast():
            answers = answers_of(self.task, outputs_of, batch, s)
        known = answers.log_likelihood
        loss = None if known is None else -known.mean()
        return (loss, None, None) if prediction_loss_only else (loss, answers.predictions, batch.target)
