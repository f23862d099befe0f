"""Texts do not depend on their batch, and what generate computes is compared with plain passes."""

import logging

import pytest
import tiny
import torch
from completions import spread
from transformers import AutoModelForCausalLM as Causal
from transformers import AutoModelForSeq2SeqLM as Seq2Seq
from transformers import (
    BartConfig,
    BloomConfig,
    Gemma2Config,
    LEDConfig,
    MarianConfig,
    MBartConfig,
    PLBartConfig,
    RobertaConfig,
    RwkvConfig,
    T5Config,
)
from written import PROMPTS, tokenizer, tokens_of, wide

import scalabl_pyro as sp
from scalabl_pyro.prediction.generate_check import takes_padding

SIZE = {"vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
DECODERS = {
    "bloom": lambda: BloomConfig(vocab_size=80, hidden_size=32, n_head=4, n_layer=2, pad_token_id=0),
    "gemma2": lambda: Gemma2Config(**SIZE, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=4),
    "llama": lambda: tiny.CONFIGS["llama"](),
}
PAIR = {"vocab_size": 80, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0, "eos_token_id": 2}
PAIR |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
PAIRS = {
    "bart": lambda: BartConfig(**PAIR, decoder_start_token_id=2, bos_token_id=3),
    "marian": lambda: MarianConfig(**PAIR, decoder_start_token_id=0),
    "mbart": lambda: MBartConfig(**PAIR, decoder_start_token_id=9, bos_token_id=3),
    "plbart": lambda: PLBartConfig(**PAIR, decoder_start_token_id=9, bos_token_id=3),
    "led": lambda: LEDConfig(**PAIR, attention_window=4, decoder_start_token_id=2),
    "t5": lambda: T5Config(
        vocab_size=80, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0, eos_token_id=2
    ),
}
ENDS = (2, 6)


def posterior_of(llm, **options):
    options = options or {"chat": False}
    task = sp.Completion(tokenizer(), **options)
    blora = spread(sp.bayesian_lora(llm))
    return wide(blora, task, num_steps=1, lr=1e-3)


def model_of(kind, config):
    torch.manual_seed(0)
    llm = kind.from_config(config()).double().eval()
    llm.generation_config.eos_token_id = 2
    return llm


def greedy(posterior, log_next, count):
    """The most probable tokens under each draw, by one plain pass per token."""
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([posterior.task.prompt_tokens({"prompt": prompt})])
        for index in range(3):
            with posterior.draw(index) as module, torch.no_grad():
                text = []
                while len(text) < count and (not text or text[-1] not in ENDS):
                    text.append(int(log_next(module, ids, text).argmax()))
            texts.append(text)
    return texts


@pytest.mark.parametrize("family", DECODERS)
def test_texts_of_a_batch_are_those_of_plain_passes_over_each_row(family):
    posterior = posterior_of(model_of(Causal, DECODERS[family]))
    found = posterior.generate(PROMPTS, num_draws=3, max_new_tokens=5, batch_size=3)

    def log_next(module, ids, text):
        return module(input_ids=torch.cat([ids, ids.new_tensor([text])], 1)).logits[0, -1]

    assert tokens_of(found) == greedy(posterior, log_next, 5)
    assert takes_padding(posterior.llm().llm, [3, 4, 5, 6], 0) == (family == "llama")


@pytest.mark.parametrize("family", PAIRS)
def test_encoder_decoders_write_and_score_as_plain_passes_over_each_row(family):
    """An encoder has positions that padding on the left would shift; mBART would show its decoder the last token."""
    llm = model_of(Seq2Seq, PAIRS[family])
    start = llm.config.decoder_start_token_id
    posterior = posterior_of(llm, encoder_decoder=True)
    found = posterior.generate(PROMPTS, num_draws=3, max_new_tokens=5, batch_size=3)

    def log_p(module, ids, text):
        inputs = {"input_ids": ids, "decoder_input_ids": ids.new_tensor([[start, *text]])}
        return module(**inputs).logits[0].log_softmax(-1)

    assert tokens_of(found) == greedy(posterior, lambda *given: log_p(*given)[-1], 5)
    for number, row in enumerate(found.scored.rows):
        ids = torch.tensor([posterior.task.prompt_tokens({"prompt": PROMPTS[number // 3]})])
        text = row.tokens.tolist()
        with posterior.draw(2) as module, torch.no_grad():
            expected = log_p(module, ids, text[:-1])[range(len(text)), text]
        torch.testing.assert_close(torch.as_tensor(row.log_probs[2]), expected, rtol=0, atol=1e-10)


def test_another_dtype_is_probed_again():
    """In float32, BLOOM takes padding; in float64, it gives NaN."""
    llm = model_of(Causal, DECODERS["bloom"]).float()
    assert takes_padding(llm, [3, 4, 5, 6], 0)
    assert not takes_padding(llm.double(), [3, 4, 5, 6], 0)


def test_a_model_whose_generate_computes_something_else_is_named(caplog):
    """RoBERTa counts positions from 1 in a pass and from 0 in generate; RWKV mixes the rows of a batch."""
    size = {name: SIZE[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id")}
    for config in (
        lambda: RobertaConfig(**SIZE, intermediate_size=48, max_position_embeddings=66, is_decoder=True),
        lambda: RwkvConfig(**size, attention_hidden_size=32, intermediate_size=48),
    ):
        posterior = posterior_of(model_of(Causal, config))
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="scalabl_pyro"):
            posterior.generate(PROMPTS[:1], num_draws=2, max_new_tokens=2)
        assert "computes other logits than its forward pass" in caplog.text
    posterior = posterior_of(model_of(Causal, DECODERS["llama"]))
    caplog.clear()
    posterior.generate(PROMPTS, num_draws=2, max_new_tokens=2)
    assert "other logits" not in caplog.text
