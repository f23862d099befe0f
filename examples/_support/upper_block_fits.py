"""Fits of the upper blocks, and predictions of them: the lower blocks run once per set of rows, whatever is fitted."""

import argparse
from collections.abc import Sequence

import scalabl_pyro as sp

from .models import upper_blocks


def fit_upper_blocks(llm, task: sp.Task, rows: Sequence[dict], args: argparse.Namespace, seed: int) -> sp.Posterior:
    """Fit ScalaBL in the uppermost ``args.blocks`` blocks and the head. Unload the result before the next fit."""
    blora = sp.bayesian_lora(llm, layers_to_transform=upper_blocks(llm, args.blocks), seed=seed)
    return sp.fit(
        blora,
        task,
        rows,
        num_steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        lr_A=args.lr,  # The stored results were made with this rate, not with the default.
        optimizer={"lr_scale": 5e-2},
        init_scale=0.3,
        seed=seed,
        hardware={"cache_prefix": True},
        progress=False,
    ).posterior


def predict_rows(posterior: sp.Posterior, rows: Sequence[dict], *, num_draws: int, seed: int) -> sp.Prediction:
    """Predict rows under fixed draws. The lower blocks run only in the first prediction of the same rows."""
    return posterior.predict(rows, num_draws=num_draws, seed=seed, batch_size=32, cache_prefix=True)
