"""Scores the present parameters on held-out rows under fixed draws, while a training runs."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._process.random_state import derive_seed, scoped_seed
from ..data.batch import Batch, Example
from ..data.held_out import HeldOutRows
from ..distributed.processes import Processes
from ..guides import Guide
from ..lora.forward import AdaptedLLM
from ..model.bayesian_lora import BayesianLoRA
from ..model.log_likelihood import LogLikelihood
from ..model.passes import Passes
from ..prediction.collect import predict_batches
from ..prediction.draws import sample
from ..prediction.label_sets import LabelSetPrediction
from ..prediction.mixture import log_mean_exp
from ..prediction.predict import predict
from ..prediction.result import NumericPrediction, Prediction
from ..tasks import Task
from .option_groups import EvaluationOptions

logger = logging.getLogger(__name__)

#: Columns of the history that hold scores begin so.
EVAL = "eval_"
#: Scores of classes, of numbers, of texts, and of rows with several labels. The first one decides which parameters are
#: the best.
OF_CLASSES, OF_NUMBERS, OF_TEXTS = ("nll", "accuracy", "ece"), ("nll", "rmse"), ("nll", "nll_per_token")
OF_LABEL_SETS = ("nll", "accuracy")
#: Column that decides.
NLL = f"{EVAL}nll"


class HeldOutScores:
    """Scores held-out rows with the parameters that a model has now.

    The draws have the seed of the training, so they are those of ``posterior.predict(rows, num_draws=..., seed=...)``.
    The global random states, the stream of the training and the modes of the modules stay as they are.

    Args:
        rows: The held-out rows.
        blora: The LLM.
        task: The task, ready to predict.
        guide: The guide.
        options: Number of draws and rows per pass.
        seed: Seed of the draws.
        processes: Processes that train together. All of them get the scores of the first one.
        cache_prefix: Whether to keep the hidden states below the first adapted block from one call to the next.

    Attributes:
        columns: Names of the scores. They depend on the likelihood, which one row tells.

    Raises:
        ValueError: A row does not fit the LLM.
    """

    def __init__(
        self,
        rows: HeldOutRows,
        blora: BayesianLoRA,
        task: Task,
        guide: Guide,
        *,
        options: EvaluationOptions,
        seed: int,
        processes: Processes,
        cache_prefix: bool = False,
    ) -> None:
        self.rows = rows
        self.blora = blora
        self.task = task
        self.guide = guide
        self.options = options
        self.seed = seed
        self.processes = processes
        self.cache_prefix = cache_prefix
        task.check_llm(blora.adapter, rows.examples)
        self.columns = tuple(EVAL + name for name in self._names())

    @property
    def num_draws(self) -> int:
        """Number of draws of each evaluation: 1 where all draws are the same, 0 for the posterior mean."""
        is_point = self.guide.is_point and not self.blora.adds_noise
        return min(self.options.num_draws, 1) if is_point else self.options.num_draws

    def __call__(self) -> dict[str, float]:
        """Compute the scores, by column.

        If an output of the LLM is NaN, the NLL is infinite, the others are NaN, and a warning is logged.
        """
        try:
            found = self._scores(self.rows.examples)
        except FloatingPointError as error:
            logger.warning("the held-out rows have no finite NLL: %s", error)
            found = {}
        if not math.isfinite(found.get("nll", math.nan)):
            found["nll"] = math.inf
        return self.processes.from_rank_zero(
            lambda: {name: found.get(name.removeprefix(EVAL), math.nan) for name in self.columns}
        )

    def _names(self) -> Sequence[str]:
        if self.task.scores_only:
            return OF_TEXTS
        try:
            found = self._predict(self.rows.examples[:1])
        except FloatingPointError:  # as the first step will say
            return OF_CLASSES if self.task.classes is not None else OF_NUMBERS
        if isinstance(found, LabelSetPrediction):
            return OF_LABEL_SETS
        return OF_CLASSES if isinstance(found, Prediction) else OF_NUMBERS

    def _scores(self, examples: Sequence[Example]) -> dict[str, float]:
        if self.task.scores_only:
            return self._score_texts(examples)
        table: dict[Any, Any] = self._predict(examples).metrics().loc["value"].to_dict()
        return {name: float(table[name]) for name in (*OF_CLASSES, *OF_NUMBERS) if name in table}

    def _sample(self) -> Tensor:
        return sample(self.guide.snapshot(), self.num_draws, seed=self.seed).s

    def _predict(self, examples: Sequence[Example]) -> Prediction | NumericPrediction | LabelSetPrediction:
        s, options = self._sample(), dict[str, Any](seed=self.seed, is_mean=self.num_draws == 0)
        adapter, size = self.blora.adapter, self.options.batch_size
        if not self.blora.adds_noise:
            options |= {"batch_size": size, "cache_prefix": self.cache_prefix}
            return predict(AdaptedLLM(adapter), self.task, s, examples, **options)
        passes = Passes.over(examples, self.task, adapter, batch_size=size)
        draws = s.to(passes.device).unsqueeze(1)

        def outputs_of(batch: Batch) -> Tensor:
            return torch.stack([self.task.outputs(self.blora, batch, one) for one in draws])

        with torch.no_grad(), scoped_seed(derive_seed(self.seed, "held-out noise")):
            return predict_batches(passes, outputs_of, self.task, examples, **options)

    def _score_texts(self, examples: Sequence[Example]) -> dict[str, float]:
        """NLL per row and per token, nats, of texts under the mixture of all draws."""
        llm: Any = self.blora if self.blora.adds_noise else AdaptedLLM(self.blora.adapter)
        likelihood = LogLikelihood(llm, self.task, examples, batch_size=self.options.batch_size)
        with scoped_seed(derive_seed(self.seed, "held-out noise")):
            values = likelihood.by_row(self._sample(), draws_per_pass=1)  # a pass over texts is large enough
        total = -float(log_mean_exp(values.double().numpy()).sum())
        tokens = sum(self.task.num_tokens(batch) or 0 for batch in likelihood.passes.batches)
        return {"nll": total / len(examples), "nll_per_token": total / tokens if tokens else math.nan}
