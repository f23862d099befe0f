"""Estimators of scikit-learn: a text classifier and a text regressor with a posterior."""

try:
    import sklearn as _sklearn  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "sklearn":
        raise
    raise ImportError(
        "scalabl_pyro.integrations.sklearn needs scikit-learn, which is not installed: pip install "
        "'scalabl-pyro[sklearn]'."
    ) from error

from .estimators import ScalaBLClassifier, ScalaBLRegressor

__all__ = ["ScalaBLClassifier", "ScalaBLRegressor"]
