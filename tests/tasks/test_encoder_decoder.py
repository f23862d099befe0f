"""Completions with an encoder-decoder: the encoder reads the prompt, and the value is that of the model's own loss."""

import numpy as np
import pytest
import tiny
import torch
import transformers as tf
from completions import EXACT, FEW, adapted, batch_of, draws_of, likelihood, rows, tokenizer
from tokenizers.processors import TemplateProcessing

import scalabl_pyro as sp
from scalabl_pyro.data import encode

WIDTH = {"d_model": 32, "vocab_size": len(tiny.VOCABULARY), "pad_token_id": 0}
SIDES = {f"{side}_{name}": value for side in ("encoder", "decoder")
         for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
END = tiny.VOCABULARY.index(".")
CONFIGS = {
    "T5": lambda: tf.T5Config(
        **WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, eos_token_id=END
    ),
    "BART": lambda: tf.BartConfig(
        **WIDTH, **SIDES, max_position_embeddings=64, decoder_start_token_id=END, eos_token_id=END, bos_token_id=1
    ),
}
TARGETS = {"T5": ["q", "v", "lm_head"], "BART": ["q_proj", "v_proj", "lm_head"]}


def model(name, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return tf.AutoModelForSeq2SeqLM.from_config(CONFIGS[name](), dtype=torch.float64).eval()


def task_for(name, **options):
    """T5's tokenizer ends each text, BART's also begins each."""
    tok = tokenizer()
    around = "<unk> $A ." if name == "BART" else "$A ."
    tok._tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=[("<unk>", 1), (".", END)])
    return sp.Completion(tok, encoder_decoder=True, **options)


def own_loss(llm, task, row):
    """The model's own loss times the number of its labels."""
    example = task.encode(row)
    ids, labels = torch.tensor([example.inputs["input_ids"]]), torch.tensor([example.target])
    return -llm(input_ids=ids, labels=labels).loss * labels.shape[1]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("where", ["both", "decoder", "encoder"])
def test_the_value_is_that_of_the_models_own_loss(name, where):
    part = {"both": "", "decoder": r"decoder\.", "encoder": r"encoder\."}[where]
    projections = "|".join(TARGETS[name][:2])
    stack = r".*1\..*" if where == "encoder" else ".*"  # upper blocks alone share the lower ones between draws
    blora = adapted(model(name), target_modules=rf".*{part}{stack}({projections})")
    task = task_for(name)
    posterior = sp.fit(blora, task, rows(), **FEW).posterior
    s = posterior.sample(3, seed=2).s
    found = posterior.log_likelihood(rows(), batch_size=4).by_row(s)
    for i in range(3):
        with posterior.draw(i, seed=2) as llm, torch.no_grad():
            plain = torch.stack([own_loss(llm, task, row) for row in rows()])
        torch.testing.assert_close(found[i], plain, **EXACT)
    scored = posterior.score(rows(), num_draws=3, seed=2)
    np.testing.assert_allclose(scored.log_probs, found, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_and_draws_of_their_own_agree_with_single_runs(name):
    blora, task = adapted(model(name), target_modules=TARGETS[name]), task_for(name)
    batch, s = batch_of(task, rows()), draws_of(adapted(model(name), target_modules=TARGETS[name]), 3)
    single = torch.stack([likelihood(task, blora, batch, one) for one in s])
    torch.testing.assert_close(likelihood(task, blora, batch, s.unsqueeze(1)), single, **EXACT)
    own = likelihood(task, blora, batch, s[[0, 1, 2, 0, 1, 2]])
    torch.testing.assert_close(own, single[[0, 1, 2, 0, 1, 2], range(6)], **EXACT)


def test_a_bias_behind_the_head_counts():
    llm = model("BART")
    llm.final_logits_bias.normal_(generator=torch.Generator().manual_seed(0))
    blora, task = adapted(llm, target_modules=TARGETS["BART"]), task_for("BART")
    found = likelihood(task, blora, batch_of(task, rows()), blora.adapter.loc)
    plain = torch.stack([own_loss(llm, task, row) for row in rows()])
    torch.testing.assert_close(found, plain, **EXACT)


def test_the_tokens_of_both_sides():
    row = {"prompt": "the sky is", "completion": " blue"}
    t5, bart = (task_for(name) for name in CONFIGS)
    decode = t5.tokenizer.decode
    assert [decode(task.encode(row).inputs["input_ids"]) for task in (t5, bart)] == [
        "the sky is .",
        "<unk> the sky is .",
    ]
    assert [decode(task.encode(row).target) for task in (t5, bart)] == ["blue .", "<unk> blue ."]
    assert decode(task_for("T5", end_token=False).encode(row).target) == "blue"
    assert (
        t5.prompt_tokens(row)
        == t5.encode(row).inputs["input_ids"]
        == t5.encode({"prompt": "the sky is"}).inputs["input_ids"]
    )
    short = task_for("BART", max_length=4)
    example = short.encode(row)
    assert example.is_cut and decode(example.inputs["input_ids"]) == "<unk> sky is ."
    with pytest.raises(ValueError, match="max_length=4 is too small: the completion has 5 tokens"):
        short.encode({"prompt": "the sky", "completion": " red green blue"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "reads a 'prompt', not 'messages'"),
        ({"prompt": "", "completion": " blue"}, "the prompt is empty"),
        ({"prompt": "the sky", "completion": ""}, "the completion is empty"),
    ],
    ids=str,
)
def test_rows_that_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        encode([row], task_for("T5").encode, need_target=True)


def test_the_wrong_kind_of_model_is_refused_with_the_option():
    pair = sp.bayesian_lora(model("T5"), target_modules=["q"])
    with pytest.raises(ValueError, match=r"T5.* is an encoder-decoder.*Completion\(tokenizer, encoder_decoder=True\)"):
        sp.fit(pair, sp.Completion(tokenizer()), rows(), **FEW)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is no encoder-decoder.*encoder_decoder=False"):
        sp.fit(adapted(), task_for("T5"), rows(), **FEW)


def test_what_encoder_decoders_cannot_do_is_refused():
    blora = sp.bayesian_lora(model("BART"), target_modules=r".*decoder\.layers\.1\..*(q_proj|v_proj)")
    task = task_for("BART")
    with pytest.raises(ValueError, match="cache_prefix=True: no fixed blocks"):
        sp.fit(blora, task, rows(), **FEW, hardware={"cache_prefix": True})
    long = [{"prompt": "the sky", "completion": " the" * 70}]
    with pytest.raises(ValueError, match="positions for 64 tokens"):
        sp.fit(blora, task, long, **FEW)
    posterior = sp.fit(blora, task, rows(), **FEW).posterior
    with pytest.raises(ValueError, match="positions for 64 tokens only"):
        posterior.generate(["the sky"], max_new_tokens=64)
    assert len(posterior.generate(["the sky"], num_draws=2, max_new_tokens=60).answers) == 2


def test_a_posterior_of_an_encoder_decoder_is_saved(tmp_path):
    task = task_for("T5")
    posterior = sp.fit(adapted(model("T5"), target_modules=TARGETS["T5"]), task, rows(), **FEW).posterior
    posterior.save_pretrained(tmp_path / "posterior")
    loaded = sp.Posterior.from_pretrained(model("T5"), tmp_path / "posterior")
    assert loaded.task.encoder_decoder
    was, now = (p.score(rows(), num_draws=2).log_probs for p in (posterior, loaded))
    np.testing.assert_array_equal(now, was)
