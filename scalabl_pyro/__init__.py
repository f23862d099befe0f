"""Make any Hugging Face LLM with LoRA adapters Bayesian, as a Pyro program (ScalaBL, UAI 2025)."""

from . import baselines, conformal, distributed, guides, metrics, plots, priors
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
    "laplace",
    "mcmc",
    "metrics",
    "plots",
    "posthoc",
    "priors",
    "refit",
]
