"""Make any Hugging Face LLM with LoRA adapters Bayesian, as a Pyro program (ScalaBL, UAI 2025)."""

import importlib
from typing import TYPE_CHECKING, Any

from . import distributed, guides, metrics, priors
from ._errors import ScalaBLWarning
from ._version import __version__
from .inference.ensemble import ensemble
from .inference.laplace import laplace
from .inference.mcmc import mcmc
from .inference.posthoc import posthoc
from .inference.refit import refit
from .model.bayesian_lora import BayesianLoRA, bayesian_lora
from .model.from_peft import from_peft
from .posterior.comparison import compare
from .posterior.posterior import Posterior
from .prediction.draws import Draws
from .prediction.result import NumericPrediction, Prediction
from .tasks import Completion, MultipleChoice, Regression, SequenceClassification, Task
from .training.fit import fit
from .training.option_groups import CheckpointOptions, EvaluationOptions, HardwareOptions, OptimizerOptions
from .training.result import FitResult, TrainingError
from .training.tune import tune

if TYPE_CHECKING:
    from . import baselines, conformal, infer, plots

__all__ = [
    "BayesianLoRA",
    "CheckpointOptions",
    "Completion",
    "Draws",
    "EvaluationOptions",
    "FitResult",
    "HardwareOptions",
    "MultipleChoice",
    "NumericPrediction",
    "OptimizerOptions",
    "Posterior",
    "Prediction",
    "Regression",
    "ScalaBLWarning",
    "SequenceClassification",
    "Task",
    "TrainingError",
    "__version__",
    "baselines",
    "bayesian_lora",
    "compare",
    "conformal",
    "distributed",
    "ensemble",
    "fit",
    "from_peft",
    "guides",
    "infer",
    "laplace",
    "mcmc",
    "metrics",
    "plots",
    "posthoc",
    "priors",
    "refit",
    "tune",
]

#: Namespaces that are imported when they are asked for first, because they bring libraries that few programs need.
_LATER = ("baselines", "conformal", "infer", "plots")


def __getattr__(name: str) -> Any:
    """Import a namespace that was not needed until now."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f".{name}", __name__)


def __dir__() -> list[str]:
    """All names, also those of namespaces that are not imported yet."""
    return sorted({*globals(), *_LATER})
