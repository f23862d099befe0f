"""What holds while training runs, and no longer."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .._process.pyro_modes import local_params
from .._process.random_state import scoped_seed
from ..lora.gradient_checkpointing import recompute
from ..lora.train_mode import sole_use
from ..model.bayesian_lora import BayesianLoRA


@contextmanager
def training_scope(blora: BayesianLoRA, seed: int, *, gradient_checkpointing: bool = False) -> Iterator[None]:
    """Seeded noise, Pyro's local parameters, no dropout of the base, blocks that run again; all as before afterwards.

    Raises:
        ValueError: there are no blocks to run again.
    """
    again = _blocks(blora) if gradient_checkpointing else ()
    dropouts = [dropout for layer in blora.adapter.layers for dropout in layer.lora_dropout.values()]
    with (
        sole_use(blora.llm),  # dropout of the base model would be a second, unmodeled source of noise
        recompute(again, has_dropout=any(isinstance(dropout, nn.Dropout) for dropout in dropouts)),
        scoped_seed(seed),
        local_params(),
        warnings.catch_warnings(),
        torch.enable_grad(),
    ):
        warnings.filterwarnings("ignore", message="Encountered NaN")  # becomes an error that says where
        for dropout in dropouts:
            dropout.train()
        yield


def _blocks(blora: BayesianLoRA) -> tuple[nn.Module, ...]:
    if not blora.adapter.blocks:
        raise ValueError(
            "gradient_checkpointing=True: the adapted layers do not lie in one stack of blocks (a ModuleList), so "
            "there is nothing to run again. Use micro_batch_size to bound memory."
        )
    return blora.adapter.blocks
