"""Fits of the upper blocks alone, and rows that many such posteriors predict: what lies below runs once for all."""

import argparse
from collections.abc import Sequence

import torch

import scalabl_pyro as sp
from scalabl_pyro.data import check_tokens, encode, evaluation_batches
from scalabl_pyro.lora.hidden_state_cache import Prefix, reuse
from scalabl_pyro.lora.train_mode import eval_mode
from scalabl_pyro.prediction.collect import predict_from_outputs


class KeptRows:
    """What ``posterior.predict`` gives for the same rows, with the hidden states at the first adapted block kept.

    All posteriors must adapt the same upper blocks of the same LLM.

    Args:
        rows: rows for the task; answers are optional.
        task: the likelihood.
        batch_size: rows of a pass.
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
            ValueError: adapted blocks with nothing fixed below them.
        """
        llm = posterior.llm()
        if not llm.adapter.has_fixed_prefix:
            raise ValueError("No fixed blocks lie below the first adapted one: adapt the upper blocks alone.")
        check_tokens(self.examples, llm.llm, self.task.pad_token_id)
        s = posterior.sample(num_draws, seed=seed).s.to(llm.adapter.device).unsqueeze(1)
        outputs = []
        with eval_mode(llm.llm):
            for batch, prefix in zip(self.batches, self.prefixes, strict=True):
                with reuse(llm.adapter, prefix):
                    outputs.append((batch, self.task.outputs(llm, batch.to(llm.adapter.device), s).cpu()))
        return predict_from_outputs(self.task, self.examples, outputs)


def fit_upper_blocks(llm, task: sp.Task, rows: Sequence[dict], args: argparse.Namespace, seed: int) -> sp.Posterior:
    """ScalaBL in the uppermost ``args.blocks`` blocks and the head, from scratch; unload it before the next."""
    depth = llm.config.get_text_config().num_hidden_layers
    blora = sp.bayesian_lora(llm, layers_to_transform=range(depth - args.blocks, depth), seed=seed)
    return sp.fit(
        blora,
        task,
        rows,
        num_steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        lr_A=args.lr,  # as the results kept were made
        lr_scale=5e-2,
        init_scale=0.3,
        seed=seed,
        cache_prefix=True,
        progress=False,
    ).posterior
