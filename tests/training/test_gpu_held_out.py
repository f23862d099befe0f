"""On a GPU, evaluations between captured steps change no bit of the training, and early stopping keeps the best."""

import pytest
import tiny
import torch

import scalabl_pyro as sp

pytestmark = pytest.mark.gpu
ALL = list({row["question"]: row for row in tiny.question_rows(200)}.values())


def fit(**options):
    blora, task = sp.bayesian_lora(tiny.causal_lm().cuda()), sp.MultipleChoice(tiny.tokenizer())
    own = {"num_steps": 40, "batch_size": 4, "lr": 2e-2, "lr_A": 1e-2, "progress": False}
    return sp.fit(blora, task, ALL[:12], **own, **options)


@pytest.mark.parametrize("graph", [True, False], ids=["captured", "eager"])
def test_evaluations_between_captured_steps_change_nothing(graph):
    plain = fit(hardware={"cuda_graph": graph})
    watched = fit(hardware={"cuda_graph": graph}, eval_data=ALL[12:], eval_every=7)
    assert torch.equal(plain.posterior.mean(), watched.posterior.mean())
    for one, other in zip(plain.posterior.factors, watched.posterior.factors, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    expected = watched.posterior.predict(ALL[12:], num_draws=8, seed=0).metrics().loc["value", "nll"]
    assert watched.evaluations["eval_nll"].iloc[-1] == pytest.approx(float(expected), rel=1e-4)


def test_the_best_state_of_a_captured_run_is_put_back():
    result = fit(eval_data=ALL[12:], eval_every=2, patience=2, hardware={"cuda_graph": True})
    kept = result.evaluations.loc[result.evaluations["kept"], "eval_nll"].item()
    assert kept == result.evaluations["eval_nll"].min()
    found = result.posterior.predict(ALL[12:], num_draws=8, seed=0).metrics().loc["value", "nll"]
    assert float(found) == pytest.approx(kept, rel=1e-4)
