"""What holds while a training runs, and what holds only inside each of its steps."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch
from torch import nn

from .._process.pyro_modes import local_params
from .._process.random_state import Stream
from ..lora.gradient_checkpointing import dropouts_of, recompute
from ..lora.train_mode import sole_use
from ..model.bayesian_lora import BayesianLoRA


@contextmanager
def training_scope(blora: BayesianLoRA, *, gradient_checkpointing: bool = False) -> Iterator[None]:
    """Prepare the modules of one model for training. Afterwards they are as before.

    The base model has no dropout inside the context, which would be a second source of noise that no term of the ELBO
    knows. Other threads may use other models meanwhile: what all models share is taken per step, see
    :func:`step_scope`.

    Args:
        blora: The LLM.
        gradient_checkpointing: Whether blocks run again in the backward pass.

    Raises:
        ValueError: The model has no blocks to run again.
    """
    blocks = _blocks(blora) if gradient_checkpointing else ()
    dropouts = dropouts_of(blora.adapter)
    with (
        sole_use(blora.llm),
        recompute(blocks, has_dropout=bool(dropouts)),
        torch.enable_grad(),
    ):
        for dropout in dropouts:
            dropout.train()
        yield


@contextmanager
def step_scope(noise: Stream, *, validate: bool = False) -> Iterator[None]:
    """Use what the whole process shares for one step: the random generators and Pyro's settings.

    The lock of the process is held inside the context only. Between two steps other threads may train or predict. CUDA
    graphs read the state of the generator at each replay, so they follow the switch.

    Args:
        noise: Random stream of the training.
        validate: Whether Pyro checks the arguments of distributions.
    """
    with noise.use(), local_params(), pyro.validation_enabled(validate):
        yield


@contextmanager
def without_nan_warnings() -> Iterator[None]:
    """Ignore Pyro's warning "Encountered NaN" inside the context: training raises an error that says where."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered NaN")
        yield


def _blocks(blora: BayesianLoRA) -> tuple[nn.Module, ...]:
    if not blora.adapter.blocks:
        raise ValueError(
            "gradient_checkpointing=True: the adapted layers do not lie in one stack of blocks (a ModuleList), so "
            "no block can run again. Use micro_batch_size to limit memory."
        )
    return blora.adapter.blocks
