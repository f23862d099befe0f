"""The first pass finds layers that the model bypasses, and rows that mix."""

import warnings

import families
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, XLNetConfig

import scalabl_pyro as sp


class Bypass(nn.Module):
    """Two layers, of which the model treats the second in some unusual way."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second, self.how = nn.Linear(4, 5), nn.Linear(5, 3), how
        self.alias = [self.second]  # not a submodule: PEFT does not replace it

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if self.how == "weight":  # as HF Mamba reads dt_proj
            return F.linear(h, self.second.weight, self.second.bias)
        if self.how == "alias":
            return self.alias[0](h)
        if self.how == "idle":
            return h
        return self.second(h).to(self.second.weight.dtype)  # T5 reads the dtype of a layer that it calls


def blora_of(how, **options):
    return sp.bayesian_lora(Bypass(how), r=2, **options)


@pytest.mark.parametrize("how", ["weight", "alias"])
@pytest.mark.parametrize("draws", [(), (3,), (2, 1)], ids=["one", "rows", "folded"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_layer_whose_weight_is_read_without_a_call_is_refused_by_name(how, draws, grad):
    blora = blora_of(how).train()
    random_state = torch.get_rng_state()
    flags = [p.requires_grad for p in blora.llm.parameters()]
    message = r"reads the weights of 'second' without calling.*exclude_modules=\['second'\]"
    with pytest.raises(RuntimeError, match=message), torch.set_grad_enabled(grad):
        blora(torch.ones(3, 4), s=torch.zeros(*draws, blora.subspace.dim))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [p.requires_grad for p in blora.llm.parameters()] == flags
    assert all(m.training for m in blora.llm.modules())
    blora.unload()
    sp.bayesian_lora(blora.llm, r=2, exclude_modules=["second"])(torch.ones(3, 4))  # the way out


def test_a_layer_that_is_called_and_read_passes():
    blora = blora_of("both")
    assert blora(torch.ones(3, 4)).shape == (3, 3)


def test_an_idle_layer_is_named_in_a_warning_and_once():
    blora = blora_of("idle")
    with pytest.warns(sp.ScalaBLWarning, match="did not use 'second'"):
        blora(torch.ones(3, 4))
    blora(torch.ones(3, 4))


def test_the_check_runs_the_model_once_more_at_most_and_changes_nothing():
    """Models that call all layers run once; the numbers are those without the check."""
    for how, passes in [("both", 1), ("idle", 2)]:
        blora, count = blora_of(how), []
        blora.llm.register_forward_hook(lambda *_, count=count: count.append(1))
        s = torch.zeros(blora.subspace.dim)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sp.ScalaBLWarning)
            first = blora(torch.ones(3, 4), s=s)
        assert len(count) == passes
        assert torch.equal(blora(torch.ones(3, 4), s=s), first)
        assert len(count) == passes + 1


def test_fit_refuses_mambas_dt_proj_before_it_changes_anything(task):
    blora = sp.bayesian_lora(families.causal_lm("mamba"), r=2, target_modules=["in_proj", "dt_proj"])
    before = [p.detach().clone() for pair in blora.adapter.factors() for p in pair]
    with pytest.raises(RuntimeError, match=r"'backbone.layers.0.mixer.dt_proj', 'backbone.layers.1.mixer.dt_proj'"):
        sp.fit(blora, task, tiny.question_rows(4), num_steps=1, progress=False)
    assert all(torch.equal(p, b) for p, b in zip(sum(blora.adapter.factors(), ()), before, strict=True))


# rows that mix ------------------------------------------------------------------------------------------------


def clip_inputs(rows):
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(2, 40, (rows, 5), generator=generator),
        "pixel_values": torch.randn(rows, 3, 16, 16, generator=generator),
    }


@pytest.mark.parametrize("draws", [(3,), (2, 1), (2, 3)], ids=str)
def test_a_model_that_compares_rows_refuses_draws_that_differ_between_rows(draws):
    blora = sp.bayesian_lora(families.clip(), r=2)
    assert blora(**clip_inputs(3), s=torch.zeros(blora.subspace.dim)).logits_per_image.shape == (3, 3)
    with pytest.raises(ValueError, match=r"one column per row.*once per draw, with s of shape \(D,\)"):
        blora(**clip_inputs(3), s=torch.zeros(*draws, blora.subspace.dim))


@pytest.mark.parametrize("draws", [(3,), (1, 1), (3, 1)], ids=str)
def test_as_many_classes_as_rows_is_not_taken_for_a_comparison(draws):
    """Three classes, and three rows altogether."""
    rows = 1 if draws == (3, 1) else 3
    blora = sp.bayesian_lora(tiny.classifier("llama", num_labels=3), r=2)
    ids = torch.arange(2, 2 + 4 * rows).view(rows, 4)
    logits = blora(input_ids=ids, s=torch.zeros(*draws, blora.subspace.dim)).logits
    assert logits.shape[-1] == 3


# as many tokens as rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"layers_to_transform": 1}, {"target_modules": ["layer_1"]}], ids=str)
@pytest.mark.parametrize(("draws", "rows", "tokens"), [((4,), 4, 4), ((2, 1), 2, 4), ((4, 1), 1, 4), ((2, 1), 4, 4)])
def test_draws_never_go_to_the_tokens_of_a_model_that_puts_tokens_first(options, draws, rows, tokens):
    config = XLNetConfig(vocab_size=9, d_model=8, n_layer=2, n_head=2, d_inner=8)
    blora = sp.bayesian_lora(AutoModelForCausalLM.from_config(config), r=2, **options)
    ids = torch.arange(rows * tokens).reshape(rows, tokens) % 9
    with pytest.raises(ValueError, match=r"received \d rows, but the batch has .* tokens before rows as in XLNet"):
        blora(ids, s=torch.zeros(*draws, blora.subspace.dim))
    assert blora(ids, s=torch.zeros(blora.subspace.dim)).logits.shape[:2] == (rows, tokens)


def test_a_model_with_rows_first_takes_as_many_tokens_as_rows():
    blora = sp.bayesian_lora(tiny.causal_lm(), r=2)
    ids, s = torch.arange(2, 18).reshape(4, 4), torch.randn(4, blora.subspace.dim)
    together = blora(ids, s=s).logits
    alone = torch.cat([blora(row[None], s=draw).logits for row, draw in zip(ids, s, strict=True)])
    torch.testing.assert_close(together, alone)
