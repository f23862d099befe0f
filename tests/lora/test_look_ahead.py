"""Models that look ahead get a mask for their padding, or are refused. Causal models run without a mask."""

import numpy as np
import pytest
import tiny
import torch
import transformers as tf

import scalabl_pyro as sp
from scalabl_pyro.data import collate
from scalabl_pyro.lora.look_ahead import needs_mask

V = len(tiny.VOCABULARY)
SHAPE = {"vocab_size": V, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": 0}
ENCODER = {**SHAPE, "intermediate_size": 48, "initializer_range": 0.3}
IDS = torch.randint(2, 40, (3, 7), generator=torch.Generator().manual_seed(0))

#: Language models that see all tokens of a row.
AHEAD = {
    "RoBERTa": lambda: tf.RobertaConfig(**ENCODER),
    "BERT": lambda: tf.BertConfig(**ENCODER),
    "ELECTRA": lambda: tf.ElectraConfig(**ENCODER),
    "RemBERT": lambda: tf.RemBertConfig(**ENCODER),
    "XLM": lambda: tf.XLMConfig(vocab_size=V, emb_dim=32, n_heads=4, n_layers=2, init_std=0.3, embed_init_std=0.3),
    "XLNet": lambda: tf.XLNetConfig(vocab_size=V, d_model=32, n_head=4, n_layer=2, d_inner=48, initializer_range=0.3),
}
#: Language models that do not.
CAUSAL = {
    **{name: tiny.CONFIGS[name] for name in ("llama", "qwen3", "gemma", "gpt2")},
    "RoBERTa as decoder": lambda: tf.RobertaConfig(**ENCODER, is_decoder=True),
    "BERT as decoder": lambda: tf.BertConfig(**ENCODER, is_decoder=True),
    "BLOOM": lambda: tf.BloomConfig(vocab_size=V, hidden_size=32, n_head=4, n_layer=2),
    "OPT": lambda: tf.OPTConfig(
        vocab_size=V, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, ffn_dim=48, word_embed_proj_dim=32
    ),
    "GPT-NeoX": lambda: tf.GPTNeoXConfig(**SHAPE, intermediate_size=48),
    "Mamba": lambda: tf.MambaConfig(vocab_size=V, hidden_size=32, state_size=4, num_hidden_layers=2),
    "Mixtral": lambda: tf.MixtralConfig(
        **SHAPE, intermediate_size=48, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    ),
}


def build(config, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.AutoModelForCausalLM.from_config(config(), **options).eval()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in (*AHEAD, *CAUSAL)]
    + [(name, torch.bfloat16) for name in ("RoBERTa", "BERT", "llama", "gpt2", "Mixtral")],
    ids=str,
)
def test_the_probe_tells_models_that_look_ahead_from_causal_ones(name, dtype, unchanged_rng):
    llm = build({**AHEAD, **CAUSAL}[name], dtype=dtype)
    assert needs_mask(llm, IDS) is (name in AHEAD)
    assert needs_mask(llm.train(), IDS[:1, :1]) is (name in AHEAD), "the result is kept"
    assert llm.training


@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_weak_attention_is_found_as_well(spread):
    """With the weights of a new model, the tokens of a row hardly influence each other."""
    assert needs_mask(build(lambda: tf.RobertaConfig(**{**ENCODER, "initializer_range": spread})), IDS)


@pytest.mark.parametrize("name", ["RoBERTa", "BERT", "XLM", "BERT as decoder", "llama"])
def test_a_prediction_does_not_depend_on_the_rows_beside_it(name):
    rows = tiny.question_rows(8)
    assert len({len(row["question"]) for row in rows}) > 1
    blora = sp.bayesian_lora(build({**AHEAD, **CAUSAL}[name]), r=2)
    posterior = sp.fit(
        blora, sp.MultipleChoice(tiny.tokenizer()), rows, num_steps=2, batch_size=4, progress=False
    ).posterior
    alone, together = (posterior.predict(rows, num_draws=3, seed=0, batch_size=size).probs for size in (1, 8))
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


def test_a_causal_model_gets_no_mask_and_one_that_looks_ahead_does():
    for name, masked in (("llama", False), ("RoBERTa", True)):
        blora = sp.bayesian_lora(build({**AHEAD, **CAUSAL}[name]), r=2)
        task, seen = sp.MultipleChoice(tiny.tokenizer()), []
        blora.llm.register_forward_pre_hook(lambda m, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)  # noqa: B023
        examples = [task.encode(row) for row in tiny.question_rows(3)]
        batch = collate(examples, range(3), task.pad_token_id)
        for _ in range(2):
            task.outputs(blora, batch, blora.adapter.loc)
        assert ("attention_mask" in seen[-1]) is ("attention_mask" in seen[-2]) is masked


class Ahead(torch.nn.Module):
    """A model whose tokens see the mean of their row, whatever a mask says."""

    def __init__(self):
        super().__init__()
        self.embed, self.q_proj = torch.nn.Embedding(V, 8), torch.nn.Linear(8, V)

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        return tf.modeling_outputs.CausalLMOutput(logits=self.q_proj(hidden + hidden.mean(1, keepdim=True)))


class AheadWithMask(Ahead):
    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids)


@pytest.mark.parametrize("kind", [Ahead, AheadWithMask])
def test_a_model_that_no_mask_helps_is_refused(kind):
    blora = sp.bayesian_lora(kind(), r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"looks ahead.*mask does not hide padding.*AutoModelForCausalLM"):
        sp.fit(blora, sp.MultipleChoice(tiny.tokenizer()), tiny.question_rows(4), num_steps=1, progress=False)


def test_tokens_that_show_nothing_keep_the_mask_and_are_not_remembered():
    llm = build(CAUSAL["llama"])
    assert needs_mask(llm, torch.full((2, 3), 5))
    assert not needs_mask(llm, IDS)
    with torch.no_grad():
        silent = build(CAUSAL["llama"])
        silent.lm_head.weight.zero_()
    assert needs_mask(silent, IDS)


def test_the_probe_leaves_kept_hidden_states_and_bound_draws_alone():
    """It runs in the middle of a pass, with the number of tokens of its rows by chance."""
    rows = [{**row, "question": "sky", "choices": ["a", "b"]} for row in tiny.question_rows(6)]
    rows = [{**row, "answer": row["answer"] % 2} for row in rows]
    task = sp.MultipleChoice(tiny.tokenizer(), labels="AB", template="{question} {choices} :")
    options = {"num_steps": 3, "batch_size": 1, "progress": False, "hardware": {"cache_prefix": True}, "lr": 1e-2}
    losses = []
    for probed in (False, True):
        blora = sp.bayesian_lora(tiny.causal_lm(), r=2, layers_to_transform=[1])
        if probed:
            needs_mask(blora.llm, IDS)
        losses.append(sp.fit(blora, task, rows, **options).history["loss"].to_numpy())
    np.testing.assert_array_equal(*losses)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_is_refused_before_its_pass(family):
    shape = {"vocab_size": V, "d_model": 16, "decoder_start_token_id": 0}
    config = (
        tf.T5Config(**shape, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        if family == "t5"
        else tf.BartConfig(**shape, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
                           encoder_attention_heads=2, decoder_attention_heads=2)
    )  # fmt: skip
    llm = tf.AutoModelForSeq2SeqLM.from_config(config).eval()
    blora = sp.bayesian_lora(llm, r=2, target_modules=["q", "v"] if family == "t5" else ["q_proj", "v_proj"])
    llm.register_forward_pre_hook(lambda *args: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=r"needs a causal LM, but \w+ is an encoder-decoder"):
        sp.fit(blora, sp.MultipleChoice(tiny.tokenizer()), tiny.question_rows(4), num_steps=1, progress=False)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_no_sign_of_a_look_ahead(weight):
    llm = build(CAUSAL["llama"])
    with torch.no_grad():
        llm.lm_head.weight.fill_(weight)
    assert needs_mask(llm, IDS)


def test_a_module_without_a_mask_gets_none_where_the_probe_shows_nothing():
    assert not needs_mask(Ahead(), torch.full((2, 3), 5))
    assert needs_mask(AheadWithMask(), torch.full((2, 3), 5))
