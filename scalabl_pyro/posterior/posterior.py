"""A frozen posterior, and the methods that users call on it."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from torch import nn

from .._arguments import known_arguments_of_methods
from .._deprecated import ScalaBLDeprecationWarning
from .._errors import check_count, check_flag
from ..data.batch import Example
from ..data.encoding import encode_data
from ..lora.module_snapshot import ModuleSnapshot
from ..prediction.averaged import AveragedNumericPrediction, AveragedPrediction
from ..prediction.draws import sample_prior
from ..prediction.linearized import predict_linearized
from ..prediction.predict import MANY_DRAWS, check_draws_per_pass, predict
from ..prediction.predict_averaged import predict_averaged
from ..prediction.quasi_monte_carlo import Design
from ..prediction.result import NumericPrediction, Prediction
from ..prediction.room import FEWER_OR_AVERAGES, check_room, size_of_predictions
from . import serialization
from .text_posterior import TextPosterior


@known_arguments_of_methods
@dataclass(frozen=True, repr=False)
class Posterior(TextPosterior):
    """The posterior of s, and the point estimates that were learned together with it.

    It holds copies of all that was learned. So several posteriors can share one LLM, and further training does not
    change an older posterior. Its fields are those of :class:`~scalabl_pyro.posterior.state.PosteriorState`.

    Example:
        >>> posterior = scalabl_pyro.fit(blora, task, train_data).posterior
        >>> posterior.predict(test_data, num_draws=10).metrics()
    """

    @overload
    def predict(
        self,
        data: Any,
        *,
        num_draws: int = ...,
        seed: int = ...,
        design: Design = ...,
        batch_size: int = ...,
        draws_per_pass: int | None = ...,
        cache_prefix: bool = ...,
        keep_draws: Literal[True] = ...,
        progress: bool = ...,
    ) -> Prediction | NumericPrediction: ...

    @overload
    def predict(
        self,
        data: Any,
        *,
        num_draws: int = ...,
        seed: int = ...,
        design: Design = ...,
        batch_size: int = ...,
        draws_per_pass: int | None = ...,
        cache_prefix: bool = ...,
        keep_draws: Literal[False],
        progress: bool = ...,
    ) -> AveragedPrediction | AveragedNumericPrediction: ...

    def predict(
        self,
        data: Any,
        *,
        num_draws: int = 10,
        seed: int = 0,
        design: Design = "independent",
        batch_size: int = 16,
        draws_per_pass: int | None = None,
        cache_prefix: bool = False,
        keep_draws: bool = True,
        progress: bool = False,
    ) -> Prediction | NumericPrediction | AveragedPrediction | AveragedNumericPrediction:
        """Predict rows under fixed posterior draws.

        Args:
            data: Rows for the task: dicts, a ``datasets.Dataset``, the path of a JSONL file, or
                ``"hf://owner/name"``, whose test split is read. Answers are optional.
            num_draws: Number S of draws; 0 predicts with the posterior mean.
            seed: Seed of the draws. Simulated answers of a likelihood over numbers use a seed derived from it.
            design: Relation between the draws. ``"antithetic"`` draws of a normal guide come in mirrored pairs,
                whose errors cancel where the outputs are nearly linear in s. ``"sobol"`` draws are quasi-random.
            batch_size: Number of rows per forward pass.
            draws_per_pass: Largest number of draws per forward pass; None means all on a GPU, and 64 on a CPU or with
                ``keep_draws=False``. On a GPU it is halved when memory runs out.
            cache_prefix: Whether to keep, on the LLM's device, the hidden states at the first adapted block. Later
                predictions of the same rows with the same ``batch_size`` then skip the blocks below it, also for other
                posteriors that adapt the same upper blocks of this LLM. The most recent 8 row sets are kept; see
                :func:`scalabl_pyro.prediction.prefix_cache.clear_prefix_cache`.
            keep_draws: Whether the result keeps what each draw predicts, which takes memory in proportion to
                ``num_draws``. False keeps averages over draws only, in an amount of memory that does not depend on
                ``num_draws``. The averages are the same.
            progress: Whether to show a progress bar.

        Returns:
            :class:`~scalabl_pyro.prediction.result.Prediction` for classes, else
            :class:`~scalabl_pyro.prediction.result.NumericPrediction`. With ``keep_draws=False``
            :class:`~scalabl_pyro.prediction.averaged.AveragedPrediction` for classes, else
            :class:`~scalabl_pyro.prediction.averaged.AveragedNumericPrediction`.

        Raises:
            ValueError: If a number is not a whole number in its range, if the draws and their predictions do not fit
                into memory, or if ``cache_prefix`` is asked for where no fixed blocks lie below the first adapted one.
            FloatingPointError: If an output of the LLM is NaN.

        Example:
            >>> posterior.predict(test_data, num_draws=10, seed=0).to_frame()
        """
        check_count(batch_size=batch_size)
        check_draws_per_pass(draws_per_pass)
        check_flag(cache_prefix=cache_prefix, progress=progress, keep_draws=keep_draws)
        check_count(num_draws=num_draws, least=0)
        self.task.check_use("predict()")
        size = min(draws_per_pass or MANY_DRAWS, max(num_draws, 1))
        parts = self.sample_in_parts(num_draws, size=size, seed=seed, design=design)
        examples = encode_data(data, self.task.encode, need_target=False, split="test")
        options: dict[str, Any] = {"batch_size": batch_size, "cache_prefix": cache_prefix, "progress": progress}
        if not keep_draws:
            s = (part.s for part in parts)
            options["draws_per_pass"] = size
            return predict_averaged(self.llm(), self.task, s, examples, num_draws=num_draws, **options)
        self._check_room_for_predictions(examples, num_draws)
        draws = self.sample(num_draws, seed=seed, design=design)
        options |= {"draws_per_pass": draws_per_pass, "is_mean": draws.is_mean, "seed": seed}
        return predict(self.llm(), self.task, draws.s, examples, **options)

    def _check_room_for_predictions(self, examples: Sequence[Example], num_draws: int) -> None:
        check_room(
            self.guide,
            num_draws,
            per_draw=size_of_predictions(self.task, examples, self.mean().element_size()),
            kept=f" and their predictions of {len(examples):,} rows",
            advice=FEWER_OR_AVERAGES,
        )

    @contextmanager
    def draw(self, index: int | None = None, *, seed: int = 0) -> Iterator[nn.Module]:
        """Run the plain LLM under one draw inside the context, for code that calls it itself, such as ``generate``.

        Args:
            index: Number of the draw, from 0 on; None for the posterior mean.
            seed: Seed of the draws.

        Yields:
            The Hugging Face model.

        Raises:
            ValueError: If ``index`` is not a whole number from 0 on.

        Example:
            >>> with posterior.draw(3, seed=0) as llm:
            ...     llm.generate(**inputs)
        """
        if index is not None:
            check_count(index=index, least=0)
        self.adapter.check_attached()
        s = self.mean() if index is None else self.sample(index + 1, seed=seed).s[index]
        llm = self.llm()
        with self.adapter.bind(s, factors=llm.factors, heads=llm.heads):
            yield self.adapter.module

    def predict_linearized(
        self, data: Any, *, num_draws: int = 100, seed: int = 0, batch_size: int = 16
    ) -> Prediction | NumericPrediction:
        """Predict with outputs linear in s around the mean.

        Each batch takes one forward pass, and one backward pass per output, for any number of draws.

        Args:
            data: Rows for the task; answers are optional.
            num_draws: Number S of draws, 1 or more; ``predict(num_draws=0)`` is the prediction at the mean.
            seed: Seed of the draws, which are those of :meth:`predict`.
            batch_size: Number of rows per forward pass.

        Raises:
            TypeError: If the guide is not normal, so that the linear outputs would not be normal either.
            ValueError: If a number is not a whole number from 1 on.

        Example:
            >>> posterior.predict_linearized(test_data, num_draws=1000).metrics()
        """
        check_count(num_draws=num_draws, batch_size=batch_size)
        self.task.check_use("predict_linearized()")
        self._in_local_mode(self.guide.covariance)  # families that are not normal refuse
        likelihood = self.log_likelihood(data, batch_size=batch_size, need_target=False)
        self._check_room_for_predictions(likelihood.examples, num_draws)
        draws = self.sample(num_draws, seed=seed)
        return predict_linearized(likelihood, self.mean(), draws.s, seed=seed)

    def predict_linearised(self, data: Any, **options: Any) -> Prediction | NumericPrediction:
        """Call :meth:`predict_linearized`; this is its old, deprecated name."""
        warnings.warn(
            "predict_linearised() is now called predict_linearized().", ScalaBLDeprecationWarning, stacklevel=2
        )
        return self.predict_linearized(data, **options)

    def prior_predictive(
        self, data: Any, *, num_draws: int = 100, seed: int = 0, batch_size: int = 16
    ) -> Prediction | NumericPrediction:
        """Predict under draws of the *prior* of s, with the learned factors, to see which answers the prior expects.

        Args:
            data: Rows for the task; answers are optional.
            num_draws: Number S of draws from the prior.
            seed: Seed of the draws, which are those of :meth:`predict`.
            batch_size: Number of rows per forward pass.

        Raises:
            ValueError: If a number is not a whole number from 1 on.

        Example:
            >>> posterior.prior_predictive(test_data, num_draws=100).probs
        """
        check_count(num_draws=num_draws, batch_size=batch_size)
        self.task.check_use("prior_predictive()")
        examples = encode_data(data, self.task.encode, need_target=False, split="test")
        self._check_room_for_predictions(examples, num_draws)
        s = sample_prior(self.prior, num_draws, seed=seed)
        return predict(self.llm(), self.task, s, examples, batch_size=batch_size, seed=seed)

    def save_pretrained(self, path: str | Path) -> None:
        """Write safetensors and JSON to a directory; see :mod:`scalabl_pyro.posterior.serialization`.

        Args:
            path: Directory, made if it does not exist.

        Example:
            >>> posterior.save_pretrained("my-posterior")
        """
        serialization.save(path, self)

    @classmethod
    def from_pretrained(cls, llm: nn.Module, path: str | Path, **overrides: Any) -> "Posterior":
        """Read a posterior back for the base model it was learned on.

        Args:
            llm: Base model. It gets the LoRA layers, unless it has the same ones already.
            path: Directory that :meth:`save_pretrained` wrote.
            overrides: ``task=``, ``prior=`` or ``guide=``, if the saved one is a class of your own. ``budget=``, a
                :class:`~scalabl_pyro.storage.budget.Budget`, for files that are larger than the default allows.
                ``base_precision=`` replaces the saved one; ``"original"`` is for devices without 8-bit floats.

        Raises:
            ValueError: If the base model is another one, or if tensors are missing, surplus, damaged, too large or of
                wrong shape.

        Example:
            >>> posterior = Posterior.from_pretrained(llm, "my-posterior")
        """
        snapshot = ModuleSnapshot(llm)
        try:
            return cls(**serialization.load(path, llm, **overrides))
        except BaseException:  # Ctrl-C too, at any line
            snapshot.restore()
            raise
