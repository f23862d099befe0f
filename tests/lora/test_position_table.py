"""The longest input of a model with a table of positions, for many families: a pass agrees with it."""

import logging

import pytest
import tiny
import torch
import transformers as tf

import scalabl_pyro as sp
from scalabl_pyro.lora.position_table import position_limit

V, N = len(tiny.VOCABULARY), 24
SHAPE = {
    "vocab_size": V, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16,
    "max_position_embeddings": N, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
GPT = {"vocab_size": V, "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": N}
BART = {
    "vocab_size": V, "d_model": 16, "max_position_embeddings": N, "decoder_layers": 1, "encoder_layers": 1,
    "decoder_attention_heads": 2, "encoder_attention_heads": 2, "decoder_ffn_dim": 16, "encoder_ffn_dim": 16,
}  # fmt: skip
DISTILBERT = {"vocab_size": V, "dim": 16, "n_heads": 2, "n_layers": 1, "hidden_dim": 16, "max_position_embeddings": N}
OPT = {"num_attention_heads": 2, "num_hidden_layers": 1, "ffn_dim": 16, "word_embed_proj_dim": 16}

LM, CLASSIFIER = tf.AutoModelForCausalLM, tf.AutoModelForSequenceClassification
#: Kind of model, configuration, and number of tokens that it can read; None for any number.
FAMILIES = {
    "GPT-2": (LM, lambda: tf.GPT2Config(**GPT), N),
    "GPT": (LM, lambda: tf.OpenAIGPTConfig(**GPT), N),
    "GPT-J": (LM, lambda: tf.GPTJConfig(**GPT, rotary_dim=4), N),
    "GPT-Neo": (LM, lambda: tf.GPTNeoConfig(vocab_size=V, hidden_size=16, num_heads=2, num_layers=1,
                                            attention_types=[[["global"], 1]], max_position_embeddings=N), N),
    "OPT": (LM, lambda: tf.OPTConfig(vocab_size=V, hidden_size=16, max_position_embeddings=N, **OPT), N),
    "CTRL": (LM, lambda: tf.CTRLConfig(**GPT, dff=16), N),
    "MPT": (LM, lambda: tf.MptConfig(vocab_size=V, d_model=16, n_heads=2, n_layers=1, max_seq_len=N), N),
    "BERT": (CLASSIFIER, lambda: tf.BertConfig(**SHAPE), N),
    "RoBERTa": (CLASSIFIER, lambda: tf.RobertaConfig(**SHAPE), N - 2),
    "MPNet": (CLASSIFIER, lambda: tf.MPNetConfig(**SHAPE), N - 2),
    "DistilBERT": (CLASSIFIER, lambda: tf.DistilBertConfig(**DISTILBERT, sinusoidal_pos_embds=True), N),
    "BART": (CLASSIFIER, lambda: tf.BartConfig(**BART), N),
    "Marian": (LM, lambda: tf.MarianConfig(**BART, pad_token_id=V - 1), N),
    "DeBERTa-v2": (CLASSIFIER, lambda: tf.DebertaV2Config(
        **SHAPE, relative_attention=True, position_biased_input=False, pos_att_type=["p2c", "c2p"]), None),
    "Llama": (LM, lambda: tf.LlamaConfig(**SHAPE), None),
    "BLOOM": (LM, lambda: tf.BloomConfig(vocab_size=V, hidden_size=16, n_head=2, n_layer=1), None),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_the_limit_is_the_longest_input_that_the_model_reads(name):
    kind, config, limit = FAMILIES[name]
    llm = kind.from_config(config()).eval()
    assert position_limit(llm) == limit
    longest = 2 * N if limit is None else limit
    ids = torch.full((1, longest + 1), 5)
    ids[:, longest - 1 :] = 2  # BART reads its answer at the end of the text
    with torch.no_grad():
        llm(input_ids=ids[:, :longest])
        if limit is not None:
            with pytest.raises((IndexError, RuntimeError)):
                llm(input_ids=ids)


def test_a_module_without_a_configuration_has_no_limit():
    assert position_limit(torch.nn.Embedding(9, 2)) is None


def test_a_table_for_images_is_no_limit_for_texts():
    llm = tiny.causal_lm(max_position_embeddings=256)
    llm.vision = torch.nn.Module()
    llm.vision.position_embedding = torch.nn.Embedding(16, 8)
    assert position_limit(llm) is None


LONG = {"question": "the " * 200, "text": "the " * 200, "choices": ["a", "b"], "answer": 0, "label": 0}


@pytest.mark.parametrize("predicts", [False, True])
@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_a_row_that_is_too_long_is_refused_before_the_pass(kind, predicts):
    def task(**options):
        if kind == "causal":
            return sp.MultipleChoice(tiny.tokenizer(), **options)
        return sp.SequenceClassification(tiny.tokenizer(), classes=["a", "b", "c"], **options)

    llm = tiny.causal_lm("gpt2") if kind == "causal" else tiny.classifier("bert")
    blora = sp.bayesian_lora(llm, r=2)
    short = [{**LONG, "question": "sky", "text": "sky"}] * 2
    fit = {"num_steps": 1, "progress": False}
    with pytest.raises(ValueError, match=r"Row 1 has 2\d\d tokens, .*positions for 128 tokens only.*max_length=128"):
        if predicts:
            sp.fit(blora, task(), short, **fit).posterior.predict([short[0], LONG], num_draws=2)
        else:
            hook = llm.register_forward_pre_hook(lambda *args: pytest.fail("the model ran"))
            try:
                sp.fit(blora, task(), [short[0], LONG], **fit)
            finally:
                hook.remove()
    posterior = sp.fit(blora, task(max_length=128), [short[0], LONG], **fit).posterior  # the remedy
    assert len(posterior.predict([LONG], num_draws=2).probs) == 1


def test_a_row_longer_than_in_the_training_of_the_llm_is_reported(caplog):
    blora = sp.bayesian_lora(tiny.causal_lm("llama"), r=2)
    with caplog.at_level(logging.WARNING, logger="scalabl_pyro"):
        sp.fit(blora, sp.MultipleChoice(tiny.tokenizer()), [LONG], num_steps=1, progress=False)
    assert "the model was made for 128 tokens" in caplog.text
