"""Prompts, and posteriors whose draws write different texts."""

import tiny
import torch

import scalabl_pyro as sp

PROMPTS = ["the sky is", "the night", "the sky and the night and the sky are"]
ROWS = [
    {"prompt": "the sky is", "completion": " blue"},
    {"prompt": "the night is", "completion": " red the sky"},
    {"prompt": "the sky", "completion": " is red"},
] * 4


def tokenizer():
    own = tiny.tokenizer()
    own.eos_token = "night"
    return own


def wide(blora, task, rows=ROWS, **options):
    """A posterior whose draws lie far from each other."""
    given = {"num_steps": 30, "batch_size": 4, "lr": 0.05, "progress": False, **options}
    posterior = sp.fit(blora, task, rows, **given).posterior
    posterior.guide.scale = torch.full_like(posterior.guide.scale, 1.0)
    return posterior


def tokens_of(found):
    return [row.tokens.tolist() for row in found.scored.rows]
