"""Families that do something unusual: the default works, and draws are the same folded, one by one, and read early."""

import families
import numpy as np
import pytest
import tiny
import torch

import scalabl_pyro as sp

IDS = torch.arange(2, 14).view(2, 6)


def with_factors(llm):
    """Adapt a model by default, and give B values that matter."""
    blora = sp.bayesian_lora(llm, r=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, B in blora.adapter.factors():
            B.copy_(0.3 * torch.randn(B.shape, generator=generator))
    return blora, torch.randn(3, 1, blora.subspace.dim, generator=generator)


def assert_fits_and_unloads(blora, task, rows, state):
    result = sp.fit(blora, task, rows, num_steps=2, batch_size=4, progress=False)
    assert np.isfinite(result.history.to_numpy()).all()
    assert np.isfinite(result.posterior.predict(rows, num_draws=2).log_probs).all()
    assert all(torch.equal(value, state[name]) for name, value in blora.unload().state_dict().items())


@pytest.mark.parametrize("family", families.CAUSAL)
def test_a_causal_lm_goes_the_whole_way(family, task):
    llm = families.causal_lm(family)
    state = {name: value.clone() for name, value in llm.state_dict().items()}
    blora, s = with_factors(llm)
    positions = torch.tensor([5, 2])
    with torch.no_grad():
        folded = blora(input_ids=IDS, s=s, positions=positions).logits[..., 0, :]
        alone = torch.stack([blora(input_ids=IDS, s=draw[0]).logits[torch.arange(2), positions] for draw in s])
    torch.testing.assert_close(folded, alone, rtol=1e-4, atol=1e-5)
    assert (folded[0] - folded[1]).abs().max() > 1e-4  # the draws matter
    assert_fits_and_unloads(blora, task, tiny.question_rows(4), state)


@pytest.mark.parametrize("family", families.CLASSIFIERS)
def test_a_classifier_goes_the_whole_way(family, tokenizer):
    llm = families.classifier(family)
    state = {name: value.clone() for name, value in llm.state_dict().items()}
    blora, s = with_factors(llm)
    with torch.no_grad():
        folded = blora(input_ids=IDS, s=s).logits
        alone = torch.stack([blora(input_ids=IDS, s=draw[0]).logits for draw in s])
    torch.testing.assert_close(folded, alone, rtol=1e-4, atol=1e-5)
    assert (folded[0] - folded[1]).abs().max() > 1e-6
    task = sp.SequenceClassification(tokenizer, classes=["a", "b", "c"])
    assert_fits_and_unloads(blora, task, tiny.text_rows(4), state)
