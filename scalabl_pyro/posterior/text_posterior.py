"""What a posterior says about texts: it scores given completions, and writes others."""

from collections.abc import Mapping, Sequence
from typing import Any

from .._arguments import known_arguments_of_methods
from .._errors import check_choice, check_count, check_flag
from .._process.lock import LOCK
from ..data.encoding import encode_data
from ..data.rows import read_rows
from ..prediction.generate import DECODE, Decode, Writer, generate
from ..prediction.generated import Generation
from ..prediction.score import score
from ..prediction.scored_texts import ScoredTexts
from ..tasks import Completion
from .exportable import ExportablePosterior


@known_arguments_of_methods
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

    def generate(
        self,
        prompts: Any,
        *,
        num_draws: int = 8,
        num_samples: int = 1,
        decode: Decode = "draws",
        seed: int = 0,
        batch_size: int = 4,
        progress: bool = False,
        max_new_tokens: int = 64,
        **options: Any,
    ) -> Generation:
        """Write texts under the draws, and score each of them under all draws.

        - ``decode="draws"``: each draw writes its own texts. All draws run as rows of one batch.
        - ``decode="mixture"``: all draws write each text together. The next token comes from their average, in which
          each draw counts as much as it explains the tokens written so far.
        - ``decode="mean"``: the posterior mean writes, as a plain adapter would.

        Args:
            prompts: Prompts: texts, conversations (lists of messages), or rows as for training. Completions in rows are
                ignored.
            num_draws: Number S of draws, which also score the texts.
            num_samples: Number of texts per prompt; with ``decode="draws"`` per prompt and draw. More than 1 needs
                ``do_sample=True``, or ``num_beams`` of at least this number.
            decode: What writes a text.
            seed: Seed of the draws and of the sampling.
            batch_size: Prompts per batch.
            progress: Whether to show a progress bar.
            max_new_tokens: Largest number of tokens per text.
            options: Other options of ``generate`` of transformers: ``do_sample``, ``num_beams``, ``temperature``,
                ``top_k``, ``top_p``, ``stop_strings`` and so on. Without them, each draw takes its most probable token.
                Sampling options in the model's own generation configuration are not used.

        Returns:
            Texts, their tokens, log probabilities under all draws, and uncertainties.

        Raises:
            TypeError: The task is not :class:`~scalabl_pyro.Completion`, or transformers does not know an option.
            ValueError: A prompt is empty, a number is outside its range, or options contradict each other.

        Example:
            >>> found = posterior.generate(["the sky is"], num_draws=8, do_sample=True, max_new_tokens=5)
            >>> found.to_frame()[["draw", "text", "log_prob"]]

        References:
            Malinin and Gales, Uncertainty Estimation in Autoregressive Structured Prediction, ICLR 2021.
        """
        check_count(num_draws=num_draws, num_samples=num_samples, batch_size=batch_size, max_new_tokens=max_new_tokens)
        check_choice("decode", decode, DECODE)
        check_flag(progress=progress)
        task = self._completion_task("generate")
        _check_options(num_samples, options)
        with LOCK:  # two threads cannot use a fast tokenizer at once
            found = [task.prompt_tokens(row) for row in _prompt_rows(prompts)]
        writer = Writer(
            llm=self.llm(),
            task=task,
            s=self.sample(num_draws, seed=seed).s,
            mean=self.mean(),
            decode=decode,
            num_samples=num_samples,
            seed=seed,
            options={"max_new_tokens": max_new_tokens, **options},
        )
        return generate(writer, found, batch_size=batch_size, progress=progress)

    def _completion_task(self, call: str) -> Completion:
        task = self.task
        if not isinstance(task, Completion):
            raise TypeError(
                f"{call}() needs a posterior of the task Completion, and this one has {type(task).__name__}: use "
                "predict(), or give the posterior another task, dataclasses.replace(posterior, task=Completion(...))."
            )
        return task


def _prompt_rows(prompts: Any) -> list[Any]:
    """Return a row per prompt."""
    if isinstance(prompts, str | Mapping):
        raise ValueError("Give a list of prompts, such as ['What color is the sky?'].")
    rows = list(prompts) if isinstance(prompts, Sequence) else read_rows(prompts, split="test")
    if not rows:
        raise ValueError("prompts is empty: give one prompt or more.")
    return [row if isinstance(row, Mapping) else {"prompt": row} for row in rows]


def _check_options(num_samples: int, options: Mapping[str, Any]) -> None:
    """Check the options that this library must know; transformers checks the others."""
    if given := sorted({"num_return_sequences", "return_dict_in_generate", "output_scores"} & set(options)):
        raise ValueError(f"{given[0]}: use num_samples for the number of texts. The result holds their scores.")
    if num_samples > 1 and not options.get("do_sample") and int(options.get("num_beams", 1)) < num_samples:
        raise ValueError(
            f"num_samples={num_samples} without do_sample=True would give the same text {num_samples} times: pass "
            f"do_sample=True, or num_beams={num_samples} or more."
        )
