"""What a posterior says about texts: the score of given completions."""

from typing import Any

from .._errors import check_count, check_flag
from ..data.encoding import encode_data
from ..prediction.score import score
from ..prediction.scored_texts import ScoredTexts
from ..tasks import Completion
from .exportable import ExportablePosterior


class TextPosterior(ExportablePosterior):
    """A posterior that scores texts, if its task is :class:`~scalabl_pyro.Completion`."""

    def score(
        self,
        data: Any,
        *,
        num_draws: int = 10,
        seed: int = 0,
        batch_size: int = 4,
        top: int = 0,
        progress: bool = False,
    ) -> ScoredTexts:
        """Compute the log probability of given completions, and how uncertain the posterior is about each token.

        The texts may come from anywhere: the training data, another model, or a person.

        Args:
            data: Rows with prompt and completion, as for training.
            num_draws: Number S of draws. 0 means the posterior mean alone.
            seed: Seed of the draws.
            batch_size: Rows per forward pass. All draws of a row run in one pass, so it holds
                ``num_draws * batch_size`` rows.
            top: Number of most probable tokens to keep at each place.
            progress: Whether to show a progress bar.

        Returns:
            Log probabilities by draw and token, and total, aleatoric and epistemic uncertainty of each token and text.

        Raises:
            TypeError: The task is not :class:`~scalabl_pyro.Completion`.
            ValueError: A row has no completion, or a number is outside its range.
            FloatingPointError: A log probability is NaN.

        Example:
            >>> scored = posterior.score([{"prompt": "the sky is", "completion": " blue"}], num_draws=10)
            >>> scored.log_prob  # nats, one per row

        References:
            Malinin and Gales, Uncertainty Estimation in Autoregressive Structured Prediction, ICLR 2021, section 3.
        """
        check_count(num_draws=num_draws, least=0)
        check_count(batch_size=batch_size)
        check_count(top=top, least=0)
        check_flag(progress=progress)
        task = self._completion_task("score")
        examples = encode_data(data, task.encode, need_target=True, split="test")
        draws = self.sample(num_draws, seed=seed)
        options = {"batch_size": batch_size, "top": top, "progress": progress}
        return score(self.llm(), task, draws.s, examples, is_mean=draws.is_mean, **options)  # type: ignore[arg-type]

    def _completion_task(self, call: str) -> Completion:
        task = self.task
        if not isinstance(task, Completion):
            raise TypeError(
                f"{call}() needs a posterior of the task Completion, and this one has {type(task).__name__}: use "
                "predict(), or give the posterior another task, dataclasses.replace(posterior, task=Completion(...))."
            )
        return task
