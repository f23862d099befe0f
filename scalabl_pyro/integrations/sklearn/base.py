"""What the classifier and the regressor share: arguments, fit, draws, copies."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from ..._arguments import known_arguments
from ..._errors import check_count, check_flag
from ..._values import integer
from ...model.bayesian_lora import bayesian_lora
from ...posterior.posterior import Posterior
from ...tasks import Task
from ...tasks.windows import Rule
from ...training.fit import fit
from .base_model import load_base, separate_trained
from .inputs import FIELDS, Texts, check_lengths, read_texts
from .saved_files import SavedFiles, from_files, to_files


class TextEstimator(BaseEstimator):
    """Base class of the estimators. A constructor argument is stored as it is, and read by ``fit``."""

    posterior_: Posterior

    @known_arguments
    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        text_columns: Any = None,
        max_length: int | None = None,
        windows: Rule | None = None,
        overlap: int = 0,
        r: int | None = None,
        lora_alpha: float | None = None,
        target_modules: Any = None,
        prior: Any = 1.0,
        guide: Any = "normal",
        num_steps: int = 1000,
        batch_size: int = 16,
        lr: float = 8e-3,
        lr_A: float = 2.5e-4,
        num_draws: int = 10,
        random_state: Any = 0,
        device: Any = None,
        progress: bool = False,
        model_options: Mapping[str, Any] | None = None,
        lora_options: Mapping[str, Any] | None = None,
        fit_options: Mapping[str, Any] | None = None,
        predict_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.text_columns = text_columns
        self.max_length = max_length
        self.windows = windows
        self.overlap = overlap
        self.r = r
        self.lora_alpha = lora_alpha
        self.target_modules = target_modules
        self.prior = prior
        self.guide = guide
        self.num_steps = num_steps
        self.batch_size = batch_size
        self.lr = lr
        self.lr_A = lr_A
        self.num_draws = num_draws
        self.random_state = random_state
        self.device = device
        self.progress = progress
        self.model_options = model_options
        self.lora_options = lora_options
        self.fit_options = fit_options
        self.predict_options = predict_options

    def _read_training_texts(self, X: Any) -> Texts:
        check_count(num_draws=self.num_draws, least=0)  # before the training, not after it
        check_flag(progress=self.progress)
        return read_texts(X, self.text_columns)

    def _seed(self) -> int:
        """Seed of this fit."""
        given = integer(self.random_state)
        return int(check_random_state(self.random_state).randint(2**31 - 1)) if given is None else given

    def _base(self, *, num_labels: int, pad_token_id: int, seed: int) -> Any:
        """Base model of a fit."""
        options = {"device": self.device, "options": self.model_options}
        return load_base(self.model, num_labels=num_labels, pad_token_id=pad_token_id, seed=seed, **options)

    def _learn(self, base: Any, task: Task, texts: Texts, answers: Sequence[Any], *, seed: int) -> None:
        """Train, and set the attributes that all estimators have."""
        lora = {"r": self.r, "lora_alpha": self.lora_alpha, "target_modules": self.target_modules}
        blora = bayesian_lora(
            base, **_merged("lora_options", self.lora_options, **lora, prior=copy.deepcopy(self.prior), seed=seed)
        )
        separate_trained(base, self.model)
        steps = {"num_steps": self.num_steps, "batch_size": self.batch_size, "lr": self.lr, "lr_A": self.lr_A}
        options = _merged(
            "fit_options", self.fit_options, **steps, guide=copy.deepcopy(self.guide), seed=seed, progress=self.progress
        )
        # A search of scikit-learn would go on with the next candidate.
        result = fit(blora, task, texts.rows(answers), **options).complete("fit()")
        self.posterior_, self.history_ = result.posterior, result.history
        self.seed_ = seed
        if texts.names is not None:
            self.text_columns_ = list(texts.names)
        elif hasattr(self, "text_columns_"):  # of an earlier fit
            del self.text_columns_

    def _task_options(self, texts: Texts) -> dict[str, Any]:
        pair = FIELDS[1] if len(texts.columns) == 2 else None
        own = {"max_length": self.max_length, "windows": self.windows, "overlap": self.overlap}
        return {**own, "text_pair": pair}

    def _draws(self, X: Any, answers: Sequence[Any] | None = None, *, keep_draws: bool) -> Any:
        """Predict under the draws of this estimator."""
        check_is_fitted(self, "posterior_")
        texts = read_texts(X, getattr(self, "text_columns_", self.text_columns))
        if (given := len(texts.columns)) != (trained := 1 + (self.posterior_.task.text_pair is not None)):
            raise ValueError(f"X has {given} column(s) of texts, but fit() had {trained}.")
        if answers is not None:
            check_lengths(texts, answers)
        own = {"num_draws": self.num_draws, "seed": self.seed_, "keep_draws": keep_draws}
        options = _merged("predict_options", self.predict_options, **own)
        return self.posterior_.predict(texts.rows(answers), **options)

    def _num_outputs(self) -> int:
        """Number of outputs of the model of a fitted estimator."""
        raise NotImplementedError

    def __sklearn_clone__(self) -> Self:
        """Clone without a copy of the loaded model or tokenizer, which no fit changes."""
        given = self.get_params(deep=False)
        shared = {name: given[name] for name in ("model", "tokenizer")}
        bare = type(self)(**{**given, **dict.fromkeys(shared)})
        for name in ("_metadata_request", "_skl_callbacks"):
            if hasattr(self, name):
                setattr(bare, name, getattr(self, name))
        return super(TextEstimator, bare).__sklearn_clone__().set_params(**shared)

    def __sklearn_tags__(self) -> Any:
        """Say that X holds texts."""
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.one_d_array = True
        tags.input_tags.string = True
        return tags

    def __getstate__(self) -> dict[str, Any]:
        """State with the posterior as the bytes of its files."""
        state = dict(super().__getstate__())
        if "posterior_" in state:
            state["posterior_"] = to_files(state["posterior_"])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load the base model again, and the posterior on it."""
        files = state.get("posterior_")
        super().__setstate__({name: value for name, value in state.items() if name != "posterior_"})
        if isinstance(files, SavedFiles):
            base = self._base(num_labels=self._num_outputs(), pad_token_id=self._pad_token_id, seed=self.seed_)
            self.posterior_ = from_files(files, base)


def _merged(name: str, options: Mapping[str, Any] | None, **own: Any) -> dict[str, Any]:
    """Options of a call: those of the estimator, and further ones.

    Raises:
        TypeError: An option is an argument of the estimator, too.
    """
    if twice := [key for key in options or {} if key in own]:
        argument = {"seed": "random_state"}.get(twice[0], twice[0])
        advice = f"pass {argument}= to the estimator" if argument != "keep_draws" else "predict_draws() keeps the draws"
        raise TypeError(f"{name}={dict(options or {})!r} must not hold {twice[0]!r}: {advice}.")
    return {**own, **(options or {})}


def reordered(values: NDArray[Any], order: Sequence[int]) -> NDArray[Any]:
    """Put the last axis, which has the model's order of the classes, into the order of ``classes_``.

    Args:
        values: (..., K) in the order of the model's outputs.
        order: For each output of the model, the index of its class in ``classes_``.
    """
    columns = [0] * len(order)
    for output, place in enumerate(order):
        columns[place] = output
    return values[..., columns]
