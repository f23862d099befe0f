"""Fits of the upper blocks, and rows that many such posteriors predict: the lower blocks run once for all of them."""

import argparse
from collections.abc import Sequence

import torch

import scalabl_pyro as sp
from scalabl_pyro.data import check_tokens, encode, evaluation_batches
from scalabl_pyro.lora.hidden_state_cache import Prefix, reuse
from scalabl_pyro.lora.train_mode import eval_mode
from scalabl_pyro.prediction.collect import predict_from_outputs

from .models import upper_blocks


class KeptRows:
    """Rows that keep their hidden states at the first adapted block, so that only the blocks above run again.

    The predictions are those of ``posterior.predict``. All posteriors must adapt the same upper blocks of the same LLM.

    Args:
        rows: Rows for the task. Answers are optional.
        task: Task that encodes the rows.
        batch_size: Rows per forward pass.
    """

    def __init__(self, rows: Sequence[dict], task: sp.Task, *, batch_size: int = 32) -> None:
        self.examples = encode(rows, task.encode, need_target=False)
        self.task = task
        self.batches = list(evaluation_batches(self.examples, batch_size, task.pad_token_id))
        self.prefixes = [Prefix() for _ in self.batches]

    @torch.no_grad()
    def predict(self, posterior: sp.Posterior, *, num_draws: int, seed: int) -> sp.Prediction:
        """Predict all rows under fixed draws.

        Raises:
            ValueError: The first block is adapted, so that there is nothing to keep.
        """
        llm = posterior.llm()
        if not llm.adapter.has_fixed_prefix:
            raise ValueError("The first block is adapted, so no hidden states can be kept: adapt only upper blocks.")
        check_tokens(self.examples, llm.llm, self.task.pad_token_id)
        s = posterior.sample(num_draws, seed=seed).s.to(llm.adapter.device).unsqueeze(1)
        outputs = []
        with eval_mode(llm.llm):
            for batch, prefix in zip(self.batches, self.prefixes, strict=True):
                with reuse(llm.adapter, prefix):
                    outputs.append((batch, self.task.outputs(llm, batch.to(llm.adapter.device), s).cpu()))
        return predict_from_outputs(self.task, self.examples, outputs)


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
