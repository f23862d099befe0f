"""Two processes learn completions as one process does: parameters, history, and what the posterior writes."""

import numpy as np
import pytest
import torch
from completions import adapted, rows, tokenizer
from processes import results, run_together

import scalabl_pyro as sp

#: Options of each run; rows of several lengths, in batches that two processes divide unevenly.
WAYS = {
    "whole batches": {},
    "micro-batches": {"hardware": {"micro_batch_size": 1}},
}


def learned(hardware=None):
    task = sp.Completion(tokenizer())
    options = {"num_steps": 4, "batch_size": 5, "lr": 1e-2, "progress": False, "hardware": hardware or {}}
    result = sp.fit(adapted(), task, rows(11), **options)
    posterior = result.posterior
    scored = posterior.score(rows(6), num_draws=3)
    written = posterior.generate(["the sky is", "sky"], num_draws=3, max_new_tokens=4, seed=1)
    parts = [posterior.guide.loc, posterior.guide.scale, *(t.flatten() for pair in posterior.factors for t in pair)]
    parameters = torch.cat(parts).detach().numpy()
    history = result.history[["loss", "nll", "kl", "nll_per_token", "grad_norm"]].to_numpy(float)
    return parameters, history, scored.log_probs, written.answers


def every_way(rank):
    torch.manual_seed(rank)
    return {name: learned(**way) for name, way in WAYS.items()}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return results(run_together(every_way, tmp_path_factory.mktemp("processes")))


@pytest.mark.parametrize("name", WAYS)
def test_two_processes_learn_completions_as_one_does(both, name):
    hardware = {option: 2 * number for option, number in WAYS[name].get("hardware", {}).items()}  # per process
    expected = learned(hardware)
    for found in both:
        for one, other in zip(found[name][:-1], expected[:-1], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-10)
        assert found[name][-1] == expected[-1]
