"""The two estimators: a classifier of texts and a regressor of texts, each with a posterior."""

from dataclasses import replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted

from ...data.labels import as_classes
from ...prediction.result import NumericPrediction, Prediction
from ...tasks import Regression, SequenceClassification
from .base import TextEstimator, reordered
from .base_model import in_model_order, load_tokenizer
from .inputs import check_lengths, read_classes, read_codes, read_numbers, without_weights


class ScalaBLClassifier(ClassifierMixin, TextEstimator):
    """Classifier of texts for scikit-learn: an LLM with Bayesian LoRA, fine-tuned by ``fit``.

    ``X`` is a list, array or Series of texts, or a DataFrame. ``y`` holds labels of any type that NumPy can sort. Each
    ``fit`` starts from the base model. A loaded ``model`` is never changed: each fit, also that of a clone, has a copy
    of its structure, which uses the memory of the frozen weights.

    Args:
        model: Name or path of a Hugging Face model, which each fit loads with a new head for the classes of y. Or a
            loaded ``AutoModelForSequenceClassification``; then ``tokenizer`` is needed, and the head must have one
            output per class.
        tokenizer: Tokenizer, or its name. None means the name of the model.
        text_columns: Column of a DataFrame that holds the text, or a list of the two columns of a pair of texts. None
            means the only column.
        max_length: Number of tokens of the longest text. A longer text loses its end. None: texts are not cut.
        windows: ``"logits"`` or ``"probs"`` read a longer text in windows, see
            :class:`~scalabl_pyro.SequenceClassification`. The regressor has ``"logits"`` only.
        overlap: Number of tokens that a window shares with the one before it.
        r: Rank, see :func:`scalabl_pyro.bayesian_lora`. So are ``lora_alpha``, ``target_modules`` and ``prior``.
        lora_alpha: Numerator of the scale of the LoRA update.
        target_modules: Layers to adapt.
        prior: Prior of the latents.
        guide: Family of the posterior, see :func:`scalabl_pyro.fit`. So are ``num_steps``, ``batch_size``, ``lr`` and
            ``lr_A``.
        num_steps: Number of optimizer steps.
        batch_size: Rows per step.
        lr: Learning rate of the factors B and of the latents.
        lr_A: Learning rate of the factors A and of the new head.
        num_draws: Number of posterior draws that a prediction averages over; 0 means the posterior mean.
        random_state: Seed of head, training and draws: an int, a ``numpy.random.RandomState``, or None for another seed
            in each fit.
        device: Device of a model that is loaded by its name. None means the first GPU, or the CPU if there is none.
        progress: Whether to show a progress bar.
        model_options: Further options of ``from_pretrained``, such as ``{"dtype": "bfloat16"}``.
        lora_options: Further options of :func:`scalabl_pyro.bayesian_lora`.
        fit_options: Further options of :func:`scalabl_pyro.fit`.
        predict_options: Further options of ``posterior.predict``, such as ``{"batch_size": 64}``.

    Attributes:
        classes_: (K,) sorted labels.
        posterior_: The :class:`~scalabl_pyro.Posterior`. Its classes are in the order of the model's outputs.
        history_: One row per training step, see :class:`~scalabl_pyro.FitResult`.
        seed_: Seed that this fit used.
        text_columns_: Names of the text columns; only there if X was a DataFrame.

    Raises:
        TypeError: X does not hold texts, or ``fit`` is given ``sample_weight``.
        ValueError: y holds one class, numbers that are not classes, or gaps; or an option is out of its range.

    Example:
        >>> from scalabl_pyro.integrations import ScalaBLClassifier
        >>> classifier = ScalaBLClassifier(model, tokenizer=tokenizer, num_steps=3, num_draws=4)
        >>> classifier.fit(["the sky", "grass", "a sky", "the grass"], ["blue", "green", "blue", "green"]).classes_
        array(['blue', 'green'], dtype='<U5')
        >>> classifier.predict_proba(["sky ?", "grass ?"]).shape
        (2, 2)
    """

    classes_: NDArray[Any]

    @without_weights
    def fit(self, X: Any, y: Any) -> Self:
        """Fine-tune on texts and labels.

        Args:
            X: N texts.
            y: (N,) labels of at least two classes.

        Returns:
            The estimator itself.
        """
        texts = self._read_training_texts(X)
        classes, codes = read_classes(y)
        check_lengths(texts, codes)
        seed, names = self._seed(), class_names(classes)
        tokenizer = load_tokenizer(self.tokenizer, self.model)
        base = self._base(num_labels=len(names), pad_token_id=tokenizer.pad_token_id, seed=seed)
        order = in_model_order(names, base)
        task = SequenceClassification(tokenizer, classes=[names[i] for i in order], **self._task_options(texts))
        self._learn(base, task, texts, [names[code] for code in codes], seed=seed)
        self.classes_, self._order, self._pad_token_id = classes, order, tokenizer.pad_token_id
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Compute the probabilities of the classes, averaged over the draws.

        Args:
            X: N texts.

        Returns:
            (N, K), in the order of ``classes_``.
        """
        probs = reordered(self._draws(X, keep_draws=False).probs, self._order)
        return probs / probs.sum(1, keepdims=True)  # single draws have the precision of the LLM

    def predict_log_proba(self, X: Any) -> NDArray[np.float64]:
        """Compute the logarithm of :meth:`predict_proba`, nats."""
        return np.log(np.maximum(self.predict_proba(X), np.finfo(np.float64).tiny))

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the most probable class of each text."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def predict_draws(self, X: Any, y: Any = None) -> Prediction:
        """Predict under each draw, with total, aleatoric and epistemic uncertainty.

        Args:
            X: N texts.
            y: (N,) labels, for metrics, plots and :mod:`scalabl_pyro.conformal`.

        Returns:
            A prediction whose classes are in the order of ``classes_``.
        """
        check_is_fitted(self, "posterior_")
        target = None if y is None else read_codes(y, self.classes_)
        names = class_names(self.classes_)
        answers = None if target is None else [names[code] for code in target]
        prediction = self._draws(X, answers, keep_draws=True)
        log_probs = reordered(prediction.log_probs, self._order)
        return replace(prediction, log_probs=log_probs, target=target, classes=names)

    def _num_outputs(self) -> int:
        return len(self.classes_)


class ScalaBLRegressor(RegressorMixin, TextEstimator):
    """Regressor of texts for scikit-learn: an LLM with Bayesian LoRA, fine-tuned by ``fit``.

    ``X`` is a list, array or Series of texts, or a DataFrame; ``y`` holds numbers. All outputs have the units of y.

    Args:
        model: Name or path of a Hugging Face model, which each fit loads with a new head of one output. Or a loaded
            ``AutoModelForSequenceClassification`` with one output; then ``tokenizer`` is needed. All other arguments
            are those of :class:`ScalaBLClassifier`.

    Attributes:
        posterior_: The :class:`~scalabl_pyro.Posterior`.
        history_: One row per training step, see :class:`~scalabl_pyro.FitResult`.
        seed_: Seed that this fit used.
        text_columns_: Names of the text columns; only there if X was a DataFrame.

    Raises:
        TypeError: X does not hold texts, or ``fit`` is given ``sample_weight``.
        ValueError: y holds something else than finite numbers, or an option is out of its range.

    Example:
        >>> from scalabl_pyro.integrations import ScalaBLRegressor
        >>> regressor = ScalaBLRegressor(model_of_numbers, tokenizer=tokenizer, num_steps=3, num_draws=4)
        >>> mean, sd = regressor.fit(["the sky", "grass"], [1.0, 2.0]).predict(["sky ?"], return_std=True)
        >>> mean.shape, sd.shape
        ((1,), (1,))
    """

    @without_weights
    def fit(self, X: Any, y: Any) -> Self:
        """Fine-tune on texts and numbers.

        Args:
            X: N texts.
            y: (N,) numbers.

        Returns:
            The estimator itself.
        """
        texts = self._read_training_texts(X)
        numbers = read_numbers(y)
        check_lengths(texts, numbers)
        seed = self._seed()
        tokenizer = load_tokenizer(self.tokenizer, self.model)
        base = self._base(num_labels=1, pad_token_id=tokenizer.pad_token_id, seed=seed)
        task = Regression(tokenizer, **self._task_options(texts))
        self._learn(base, task, texts, numbers.tolist(), seed=seed)
        self._pad_token_id = tokenizer.pad_token_id
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Predict the mean of each answer, and its standard deviation if wanted.

        Args:
            X: N texts.
            return_std: Whether to return the predictive standard deviation too, which holds noise and posterior.

        Returns:
            (N,) means, or a pair of (N,) means and (N,) standard deviations, in units of y.
        """
        prediction = self._draws(X, keep_draws=False)
        return (prediction.mean, np.sqrt(prediction.total)) if return_std else prediction.mean

    def predict_std(self, X: Any) -> NDArray[np.float64]:
        """Compute the (N,) predictive standard deviations, in units of y."""
        return self.predict(X, return_std=True)[1]

    def predict_draws(self, X: Any, y: Any = None) -> NumericPrediction:
        """Predict under each draw, with total, aleatoric and epistemic variance and intervals.

        Args:
            X: N texts.
            y: (N,) numbers, for metrics, plots and :mod:`scalabl_pyro.conformal`.

        Returns:
            The prediction.
        """
        check_is_fitted(self, "posterior_")
        return self._draws(X, None if y is None else read_numbers(y).tolist(), keep_draws=True)

    def _num_outputs(self) -> int:
        return 1


def class_names(classes: NDArray[Any]) -> tuple[Any, ...]:
    """Names of the classes for a task: the labels themselves if a task can have them, otherwise their texts."""
    labels = classes.tolist()
    try:
        return as_classes(labels)
    except ValueError:
        return as_classes([str(label) for label in labels])
