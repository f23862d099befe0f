"""Reading one token of each row: the same numbers and gradients, from less arithmetic."""

import pytest
import tiny
import torch
from transformers import ProphetNetConfig, ProphetNetForConditionalGeneration

import scalabl_pyro as sp
from scalabl_pyro.lora.read_tokens import AtPositions, tokenwise_end

FAMILIES = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gpt2"]
IDS = torch.randint(2, 40, (3, 7), generator=torch.Generator().manual_seed(0))
LAST = torch.tensor([6, 2, 4])


def adapted(family, **options):
    blora = sp.bayesian_lora(tiny.causal_lm(family, dtype=torch.float64), **options)
    with torch.no_grad():
        for _, B in blora.adapter.factors():
            B.normal_(generator=torch.Generator().manual_seed(0))
    return blora


def draws(blora, *shape):
    return torch.randn(*shape, blora.subspace.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"layers_to_transform": [1]}], ids=["all blocks", "upper block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_whole_pass(family, options):
    blora = adapted(family, **options)
    s = draws(blora, 2, 1).requires_grad_(True)
    tensors = [s, *blora.point_estimates.parameters()]
    whole = blora(input_ids=IDS, s=s).logits[:, torch.arange(3), LAST]
    read = blora(input_ids=IDS, s=s, positions=LAST).logits[:, :, 0]
    torch.testing.assert_close(read, whole, rtol=1e-10, atol=1e-12)
    slopes = [torch.autograd.grad(logits.cos().sum(), tensors) for logits in (whole, read)]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_mlp_sees_one_token_of_each_row(family):
    blora = adapted(family)
    seen = []
    mlp = next(m for m in blora.llm.modules() if isinstance(m.__dict__.get("forward"), AtPositions))
    first = next(m for m in mlp.modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D")
    first.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
    blora(input_ids=IDS, s=draws(blora), positions=LAST)
    blora(input_ids=IDS, s=draws(blora))
    blora(input_ids=IDS, s=draws(blora, 2, 1), positions=LAST)
    assert seen == [(3, 1), (3, 7), (6, 1)]


def test_unloading_gives_the_mlp_its_forward_back():
    llm = tiny.causal_lm()
    before = [m.__dict__.get("forward") for m in llm.modules()]
    blora = sp.bayesian_lora(llm)
    assert [m for m in llm.modules() if "forward" in m.__dict__]
    llm = blora.unload()
    assert [m.__dict__.get("forward") for m in llm.modules()] == before == [None] * len(before)


def test_experts_are_left_alone():
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = torch.nn.Linear(2, 2), torch.nn.ModuleList()

    block = torch.nn.Module()
    block.mlp = Experts()
    assert tokenwise_end([block]) is None and tokenwise_end([]) is None and tokenwise_end([torch.nn.Module()]) is None


def test_a_head_that_predicts_several_tokens_at_each_place_is_refused():
    sizes = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_encoder_layers": 1, "num_decoder_layers": 1}
    heads = {"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2, "max_position_embeddings": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
    config = ProphetNetConfig(vocab_size=len(tiny.VOCABULARY), hidden_size=16, **sizes, **heads, **tokens)
    blora = sp.bayesian_lora(ProphetNetForConditionalGeneration(config).eval(), r=2)
    task = sp.Completion(tiny.tokenizer(), encoder_decoder=True, end_token=False)
    rows = [{"prompt": "the sky", "completion": " is blue"}, {"prompt": "the rose", "completion": " is red"}]
    with pytest.raises(ValueError, match=r"expected \(rows, tokens, width\).* such as ProphetNet"):
        sp.fit(blora, task, rows, num_steps=2, progress=False)
