"""Masks in a capture: none where an eager pass has none. The capture is pretended, so that a CPU can run it."""

import pytest
import tiny
import torch
from transformers import masking_utils

from scalabl_pyro.lora.causal_masks import NAMES, decided_as_in_eager_passes

IDS = torch.arange(2, 14).view(2, 6)


def masks_of(llm, **inputs):
    """What each attention layer gets as its mask."""
    seen = []
    hooks = [
        module.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
        for name, module in llm.named_modules()
        if name.endswith("self_attn")
    ]
    with torch.no_grad():
        logits = llm(input_ids=IDS, use_cache=False, **inputs).logits
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2
    return seen, logits


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "mistral"])
def test_a_captured_pass_has_the_masks_of_an_eager_one(family, monkeypatch):
    llm = tiny.causal_lm(family)
    eager, expected = masks_of(llm)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert all(mask is None for mask in eager)
    assert all(mask is not None for mask in masks_of(llm)[0]), "transformers does it by itself: this file can go"
    with decided_as_in_eager_passes({"input_ids": IDS}):
        captured, logits = masks_of(llm)
    assert all(mask is None for mask in captured)
    assert torch.equal(logits, expected)


def test_a_window_smaller_than_the_rows_keeps_its_mask(capturing):
    llm = tiny.causal_lm("mistral", sliding_window=3)
    with decided_as_in_eager_passes({"input_ids": IDS}):
        assert all(mask is not None for mask in masks_of(llm)[0])


def test_padding_and_packed_rows_keep_their_masks(capturing):
    llm = tiny.causal_lm()
    with decided_as_in_eager_passes({"input_ids": IDS}):
        padded = torch.ones_like(IDS).index_fill(1, torch.tensor([5]), 0)
        assert all(mask is not None for mask in masks_of(llm, attention_mask=padded)[0])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(2, 6)
    with decided_as_in_eager_passes({"input_ids": IDS, "position_ids": positions}):
        packed = masks_of(llm, position_ids=positions)[0][0]
    assert packed[0, 0, 2].tolist() == [True, True, True, False, False, False]
    assert packed[0, 0, 5].tolist() == [False, False, False, True, True, True]


def test_passes_that_are_not_captured_find_packed_rows_as_ever():
    """Those of another thread, say."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(2, 6)
    with decided_as_in_eager_passes({"input_ids": IDS}):
        packed = masks_of(tiny.causal_lm(), position_ids=positions)[0][0]
    assert packed[0, 0, 5].tolist() == [False, False, False, True, True, True]


def test_transformers_is_as_before_afterwards():
    before = [getattr(masking_utils, name) for name in NAMES]
    with pytest.raises(ZeroDivisionError), decided_as_in_eager_passes({"input_ids": IDS}):
        raise ZeroDivisionError
    assert [getattr(masking_utils, name) for name in NAMES] == before


def test_another_transformers_without_these_names_is_left_alone(monkeypatch):
    monkeypatch.delattr(masking_utils, "is_tracing")
    with decided_as_in_eager_passes({"input_ids": IDS}):
        assert not hasattr(masking_utils, "is_tracing")
