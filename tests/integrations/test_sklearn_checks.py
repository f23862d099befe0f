"""scikit-learn's own checks of estimators.

They pass arrays of numbers, so a subclass writes each row as a text of digits, and leaves the rest as it is. What
scikit-learn validates of arrays of numbers (number of features, NaN, sparse matrices) is then its own code, and the
tests of texts are in ``test_sklearn.py``.
"""

import numpy as np
import pytest
import tiny

pytest.importorskip("sklearn")

from sklearn.utils import estimator_checks
from sklearn.utils.validation import check_is_fitted, validate_data

from scalabl_pyro.integrations import ScalaBLClassifier, ScalaBLRegressor

FAST = {"num_steps": 2, "num_draws": 2, "r": 2, "batch_size": 8}


def digits(X: np.ndarray) -> list[str]:
    """Each row as a text, whose words are the digits 0 to 9."""
    words = np.clip(np.round(2 * np.asarray(X, dtype=np.float64)) + 5, 0, 9).astype(int)
    return [" ".join(map(str, row[:20])) for row in words]


class _Digits:
    """Estimator of arrays of numbers."""

    def _validated(self, X, **options):
        return digits(validate_data(self, X, **options))

    def fit(self, X, y=None):
        if y is not None and hasattr(y, "__len__") and len(y) != np.shape(X)[0]:
            raise ValueError("X and y have different lengths.")
        return super().fit(self._validated(X), y)

    def predict_draws(self, X, y=None):
        check_is_fitted(self)
        return super().predict_draws(self._validated(X, reset=False), y)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.one_d_array = True, False
        tags.input_tags.string = False
        if tags.classifier_tags is not None:
            tags.classifier_tags.poor_score = True  # two steps of a random model
        if tags.regressor_tags is not None:
            tags.regressor_tags.poor_score = True
        return tags


class DigitsClassifier(_Digits, ScalaBLClassifier):
    def predict_proba(self, X):
        check_is_fitted(self)
        return super().predict_proba(self._validated(X, reset=False))


class DigitsRegressor(_Digits, ScalaBLRegressor):
    def predict(self, X, return_std=False):
        check_is_fitted(self)
        return super().predict(self._validated(X, reset=False), return_std)


@pytest.fixture(autouse=True)
def toy_models(monkeypatch):
    """The name "tiny" gives a tiny model and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    def load(name, num_labels=2, **options):
        assert name == "tiny"
        return tiny.classifier(num_labels=num_labels)

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", load)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **options: tiny.tokenizer())


@pytest.mark.slow  # a minute; test_sklearn.py runs those checks that need no data
@pytest.mark.filterwarnings("ignore")
@estimator_checks.parametrize_with_checks(
    [DigitsClassifier("tiny", **FAST), DigitsRegressor("tiny", **FAST)],
)
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)
