"""The ELBO inside the Trainer of Hugging Face, and inside trainers that are built on it, such as those of TRL."""

from .mixin import ScalaBLMixin
from .trainer import ScalaBLTrainer

__all__ = ["ScalaBLMixin", "ScalaBLTrainer"]
