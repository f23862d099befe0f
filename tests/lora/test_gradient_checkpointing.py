"""Gradient checkpointing: blocks run again with the draws of the first run, whatever is bound by then."""

import pytest
import tiny
import torch

import scalabl_pyro as sp
from scalabl_pyro.lora.gradient_checkpointing import recompute

FAMILIES = ["llama", "mistral", "qwen3", "gemma", "gpt2"]
ROWS = tiny.question_rows(16)


def loss_and_slopes(blora, s, scope):
    ids = torch.randint(2, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    tensors = [s, *blora.point_estimates.parameters()]
    with scope:
        loss = blora(input_ids=ids, s=s).logits.cos().mean()
        return [loss, *torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_one_run(family):
    blora = sp.bayesian_lora(tiny.causal_lm(family, dtype=torch.float64))
    with torch.no_grad():
        for _, B in blora.adapter.factors():
            B.normal_(generator=torch.Generator().manual_seed(0))
    s = torch.randn(3, blora.subspace.dim, dtype=torch.float64).requires_grad_(True)
    plain = loss_and_slopes(blora, s, recompute([]))
    runs = []
    for block in blora.adapter.blocks:
        (block.self_attn if hasattr(block, "self_attn") else block.attn).register_forward_hook(
            lambda *_: runs.append(1)
        )
    again = loss_and_slopes(blora, s, recompute(blora.adapter.blocks))
    assert len(runs) == 2 * len(blora.adapter.blocks)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"draws": "shared"}, {"guide": "svgd"}], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_fit_does_not_change(options, dropout):
    def run(**more):
        blora = sp.bayesian_lora(tiny.causal_lm(), lora_dropout=dropout)
        settings = {"num_steps": 4, "lr": 1e-2, "init_scale": 0.3, "progress": False}
        return sp.fit(blora, sp.MultipleChoice(tiny.tokenizer()), ROWS, **settings, **options, **more)

    plain, again = run(), run(hardware={"gradient_checkpointing": True})
    assert list(again.history["loss"]) == list(plain.history["loss"])
    for one, other in zip(plain.posterior.factors, again.posterior.factors, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_forwards_are_as_before_even_after_an_error():
    llm = tiny.causal_lm()
    blora = sp.bayesian_lora(llm, layers_to_transform=[1])
    before = [m.__dict__.get("forward") for m in llm.modules()]
    with pytest.raises(KeyError), recompute(blora.adapter.blocks):
        raise KeyError
    assert [m.__dict__.get("forward") for m in llm.modules()] == before


def test_layers_without_blocks_cannot_be_run_again():
    blora = sp.bayesian_lora(tiny.causal_lm(), target_modules=["lm_head"])
    with pytest.raises(ValueError, match="do not lie in one stack of blocks"):
        sp.fit(
            blora, sp.MultipleChoice(tiny.tokenizer()), ROWS, hardware={"gradient_checkpointing": True}, progress=False
        )
