"""Blocks below the first adapted one are skipped once their result is known, and nobody can tell but by the clock."""

import copy
import threading

import pytest
import tiny
import torch

import scalabl_pyro as sp
from scalabl_pyro.data import encode, evaluation_batches
from scalabl_pyro.lora.hidden_state_cache import Prefix, reuse
from scalabl_pyro.lora.look_ahead import needs_mask
from scalabl_pyro.model.log_likelihood import LogLikelihood

FAMILIES = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gpt2"]


@pytest.fixture
def rows():
    return tiny.question_rows(24)


def upper(family="llama", **options):
    """A model of two blocks whose upper one is adapted. The probe for a mask has run, so that tests count passes."""
    blora = sp.bayesian_lora(tiny.causal_lm(family), layers_to_transform=[1], **options)
    assert not needs_mask(blora.llm, torch.arange(2, 9).unsqueeze(0))
    return blora


def counted(block):
    """A list that grows with each run of a block's attention; forwards that are skipped do not reach it."""
    calls = []
    attention = block.self_attn if hasattr(block, "self_attn") else block.attn
    attention.register_forward_hook(lambda *_: calls.append(1))
    return calls


def lower_block(blora):
    inner = blora.llm.transformer.h if hasattr(blora.llm, "transformer") else blora.llm.model.layers
    return inner[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kept_prefix_gives_the_same_outputs_without_the_lower_block(family, task, rows):
    blora = upper(family)
    calls = counted(lower_block(blora))
    (batch,) = evaluation_batches(encode(rows[:6], task.encode, need_target=True), 6, task.pad_token_id)
    s = blora.sample_latents().detach()
    draws = torch.randn(3, 1, blora.subspace.dim)
    with torch.no_grad():
        plain, plain_draws = task.outputs(blora, batch, s), task.outputs(blora, batch, draws)
        assert len(calls) == 2
        with reuse(blora.adapter, Prefix()):
            first = task.outputs(blora, batch, s)
            again, again_draws = task.outputs(blora, batch, s), task.outputs(blora, batch, draws)
    assert len(calls) == 3
    assert torch.equal(plain, first) and torch.equal(plain, again)
    assert torch.equal(plain_draws, again_draws)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_training_is_the_same_and_runs_the_lower_block_once_a_row(family, task, rows):
    options = {"num_steps": 12, "batch_size": 6, "lr": 1e-2, "progress": False}
    plain = sp.fit(upper(family), task, rows, **options)
    blora = upper(family)
    calls = counted(lower_block(blora))
    kept = sp.fit(blora, task, rows, hardware={"cache_prefix": True}, **options)
    assert len(calls) == 4  # 24 rows in batches of 6: one epoch of three
    torch.testing.assert_close(
        torch.tensor(kept.history["loss"].to_numpy()), torch.tensor(plain.history["loss"].to_numpy()), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(kept.posterior.mean(), plain.posterior.mean(), rtol=1e-4, atol=1e-5)


def test_accumulated_batches_use_it_too(task, rows):
    options = {"num_steps": 9, "batch_size": 8, "lr": 1e-2, "progress": False}
    plain, kept = (
        sp.fit(upper(), task, rows, hardware={"micro_batch_size": 4, "cache_prefix": cache}, **options)
        for cache in (False, True)
    )
    torch.testing.assert_close(kept.posterior.mean(), plain.posterior.mean(), rtol=1e-4, atol=1e-5)


def test_a_likelihood_of_the_whole_data_set_runs_it_once(task, rows):
    posterior = sp.fit(upper(), task, rows, num_steps=5, progress=False).posterior
    examples = encode(rows, task.encode, need_target=True)
    plain = LogLikelihood(posterior.llm(), task, examples, batch_size=8)
    kept = LogLikelihood(posterior.llm(), task, examples, batch_size=8, cache_prefix=True)
    calls = counted(lower_block(posterior.blora()))
    s = posterior.mean()
    for _ in range(3):
        value, gradient = kept.with_gradient(s)
    assert len(calls) == 3
    expected, slope = plain.with_gradient(s)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize(
    "blora",
    [
        pytest.param(lambda: sp.bayesian_lora(tiny.causal_lm()), id="first-block-adapted"),
        pytest.param(lambda: sp.bayesian_lora(tiny.classifier()), id="classifier"),
        pytest.param(lambda: upper(modules_to_save=["model.embed_tokens"]), id="embedding-trained"),
    ],
)
def test_it_is_refused_where_nothing_fixed_lies_below(blora, task, rows):
    with pytest.raises(ValueError, match=r"cache_prefix=True: no fixed blocks.*layers_to_transform"):
        sp.fit(blora(), task, rows, hardware={"cache_prefix": True}, num_steps=1)


def test_it_is_refused_for_batches_whose_rows_nobody_knows(task, rows):
    batches = list(evaluation_batches(encode(rows, task.encode, need_target=True), 6, task.pad_token_id))
    with pytest.raises(ValueError, match="pass rows as train_data, not batches"):
        sp.fit(upper(), task, batches, num_data=24, hardware={"cache_prefix": True}, num_steps=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_unloading_takes_it_away(family):
    blora = upper(family)
    lower = lower_block(blora)
    assert "forward" in lower.__dict__
    blora.unload()
    assert "forward" not in lower.__dict__
    assert not lower._forward_pre_hooks


def test_a_forward_that_was_replaced_before_is_put_back(llm):
    block = llm.model.layers[0]
    block.forward = own = block.forward  # as accelerate's device hooks do
    blora = sp.bayesian_lora(llm, layers_to_transform=[1])
    assert block.forward is not own
    blora.unload()
    assert block.__dict__["forward"] is own


def test_another_adapter_and_another_batch_do_not_take_it(task, rows):
    blora, other = upper(), upper()
    short, long = (
        next(evaluation_batches(encode(part, task.encode, need_target=True), 6, task.pad_token_id))
        for part in (rows[:4], rows[4:10])
    )
    s = blora.sample_latents().detach()
    with torch.no_grad(), reuse(blora.adapter, Prefix()):
        task.outputs(blora, short, s)
        assert torch.equal(task.outputs(other, long, s), task.outputs(blora, long, s))


def test_a_copy_of_the_module_skips_its_own_blocks(task, rows):
    """A deep copy has an adapter of its own, and its blocks call themselves rather than the original's."""
    blora = upper()
    copied = copy.deepcopy(blora.llm)
    forward = copied.model.layers[0].forward
    assert forward.forward.__self__ is copied.model.layers[0]
    assert forward.owner is not blora.adapter


def test_a_thread_does_not_see_the_prefix_of_another(task, rows):
    blora = upper()
    (batch,) = evaluation_batches(encode(rows[:6], task.encode, need_target=True), 6, task.pad_token_id)
    other = batch.map(lambda t: t.flip(0))
    s, found = blora.sample_latents().detach(), []
    with torch.no_grad():
        expected = task.outputs(blora, other, s)
        with reuse(blora.adapter, Prefix()):
            task.outputs(blora, batch, s)

            def run():
                with torch.no_grad():
                    found.append(task.outputs(blora, other, s))

            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
    assert torch.equal(found[0], expected)
