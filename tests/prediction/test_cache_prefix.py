"""Hidden states below the first adapted block, kept between predictions of the same rows."""

import gc

import numpy as np
import pytest
import tiny
import torch

import scalabl_pyro as sp
from scalabl_pyro.prediction import prefix_cache

ROWS = tiny.question_rows(9, seed=4)
OPTIONS = {"num_draws": 4, "batch_size": 4, "seed": 2}


def fitted_upper(llm, seed=0, layers=(1,)):
    blora = sp.bayesian_lora(llm, layers_to_transform=list(layers), seed=seed)
    task = sp.MultipleChoice(tiny.tokenizer())
    return sp.fit(blora, task, tiny.question_rows(8), num_steps=3, lr=3e-2, seed=seed, progress=False).posterior


@pytest.fixture
def counted():
    """An LLM, and how often its lowest block really ran."""
    llm, calls = tiny.causal_lm(), []
    llm.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    return llm, calls


def test_the_lower_blocks_run_once_for_all_calls_draws_and_posteriors(counted):
    llm, calls = counted
    for seed, passes in ((0, 3), (1, 0)):
        posterior = fitted_upper(llm, seed)
        plain = posterior.predict(ROWS, **OPTIONS)
        calls.clear()
        kept = posterior.predict(ROWS, cache_prefix=True, **OPTIONS)
        assert len(calls) == passes
        np.testing.assert_array_equal(kept.log_probs, plain.log_probs)
        more = {**OPTIONS, "num_draws": 7, "seed": 5}
        again = posterior.predict(ROWS, cache_prefix=True, draws_per_pass=3, **more)
        assert len(calls) == passes
        np.testing.assert_allclose(again.log_probs, posterior.predict(ROWS, **more).log_probs, rtol=1e-5, atol=1e-6)
        posterior.blora().unload()


def test_other_rows_batches_and_weights_are_not_taken_for_the_same(counted):
    llm, calls = counted
    posterior = fitted_upper(llm)
    posterior.predict(ROWS, cache_prefix=True, **OPTIONS)
    for rows, options in ((ROWS[:8], OPTIONS), (ROWS, {**OPTIONS, "batch_size": 3})):
        calls.clear()
        kept = posterior.predict(rows, cache_prefix=True, **options)
        assert calls
        np.testing.assert_array_equal(kept.log_probs, posterior.predict(rows, **options).log_probs)
    before = posterior.predict(ROWS, cache_prefix=True, **OPTIONS).log_probs
    with torch.no_grad():
        llm.model.layers[0].mlp.down_proj.weight.mul_(3.0)
    after = posterior.predict(ROWS, cache_prefix=True, **OPTIONS).log_probs
    assert np.abs(after - before).max() > 1e-4
    np.testing.assert_array_equal(after, posterior.predict(ROWS, **OPTIONS).log_probs)


def test_what_is_kept_is_bounded_and_can_be_freed(counted):
    llm, calls = counted
    posterior = fitted_upper(llm)
    for i in range(prefix_cache.MAX_ROW_SETS + 2):
        posterior.predict(tiny.question_rows(2, seed=i), cache_prefix=True, num_draws=1)
    assert len(prefix_cache._KEPT[llm]) == prefix_cache.MAX_ROW_SETS
    prefix_cache.clear_prefix_cache(llm)
    assert llm not in prefix_cache._KEPT
    posterior.predict(ROWS, cache_prefix=True, num_draws=1)
    count = len(prefix_cache._KEPT)
    del posterior, llm, counted
    calls.clear()
    gc.collect()
    assert len(prefix_cache._KEPT) <= count


def test_a_model_without_fixed_prefix_is_refused_with_what_to_do():
    posterior = fitted_upper(tiny.causal_lm(), layers=(0, 1))
    with pytest.raises(ValueError, match=r"no fixed blocks lie below .* Adapt the upper blocks alone"):
        posterior.predict(ROWS, cache_prefix=True)
