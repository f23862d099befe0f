"""Tiny posteriors for the tests of the HTTP service. As a script, a real server of one:

python tests/helpers/served.py PORT
"""

import sys

import completions
import tiny
import torch

import scalabl_pyro as sp

FEW = {"num_steps": 20, "lr": 1e-2, "progress": False}


def questions(dtype: torch.dtype = torch.float64, **options) -> sp.Posterior:
    """Posterior of multiple-choice questions."""
    blora = completions.spread(sp.bayesian_lora(tiny.causal_lm(dtype=dtype)))
    return sp.fit(blora, sp.MultipleChoice(tiny.tokenizer(), **options), tiny.question_rows(24), **FEW).posterior


def numbers() -> sp.Posterior:
    """Posterior of numbers."""
    blora = completions.spread(sp.bayesian_lora(tiny.classifier(num_labels=1, dtype=torch.float64)))
    return sp.fit(blora, sp.Regression(tiny.tokenizer()), tiny.text_rows(24), **FEW).posterior


def texts() -> sp.Posterior:
    """Posterior of completions."""
    blora = completions.adapted()
    return completions.posterior_of(blora, sp.Completion(completions.tokenizer(), chat=False))


if __name__ == "__main__":
    from scalabl_pyro.integrations import serve

    torch.set_num_threads(1)
    serve(questions(torch.float32), port=int(sys.argv[1]), num_draws=4, max_queue=64, log_level="warning")
