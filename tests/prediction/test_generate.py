"""Generation: each draw writes what its exported adapter would write, and scores are those of the generation itself."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from written import PROMPTS, ROWS, tokenizer, tokens_of, wide

import scalabl_pyro as sp
from scalabl_pyro.data import Example
from scalabl_pyro.prediction.mixture import log_mean_exp
from scalabl_pyro.prediction.score import score


@pytest.fixture(scope="module")
def posterior():
    """A posterior in float64 whose draws write different texts."""
    task = sp.Completion(tokenizer(), chat=False)
    blora = sp.bayesian_lora(tiny.causal_lm().double())
    return wide(blora, task)


def plain_tokens(module, task, prompt, **options):
    ids = torch.tensor([task.prompt_tokens({"prompt": prompt})])
    ends = [module.generation_config.eos_token_id, task.tokenizer.eos_token_id]
    given = {"do_sample": False, "pad_token_id": 0, "eos_token_id": [e for e in ends if e is not None], **options}
    found = module.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given)[:, ids.shape[1] :]
    return [_cut(row, given["eos_token_id"]) for row in found.tolist()]


def _cut(row, ends):
    place = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[: place + 1]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_draw_writes_what_the_plain_model_writes_under_it(posterior, batch_size):
    found = posterior.generate(PROMPTS, num_draws=4, max_new_tokens=6, batch_size=batch_size)
    assert found.draw == (0, 1, 2, 3) * 3
    expected = []
    for prompt in PROMPTS:
        for index in range(4):
            with posterior.draw(index) as module:
                expected += plain_tokens(module, posterior.task, prompt, max_new_tokens=6)
    assert tokens_of(found) == expected
    assert len({tuple(row) for row in expected}) > 4  # the draws differ


def test_one_draw_writes_what_its_exported_adapter_writes(posterior, tmp_path):
    (path,) = posterior.export_peft(tmp_path / "out", draws=1)
    base = tiny.causal_lm().double()
    alone = PeftModel.from_pretrained(base, str(path))
    found = posterior.generate(PROMPTS, num_draws=1, max_new_tokens=8)
    assert tokens_of(found) == [plain_tokens(alone, posterior.task, p, max_new_tokens=8)[0] for p in PROMPTS]


def test_beams_and_several_sequences_keep_each_row_at_its_draw(posterior):
    options = {"num_beams": 3, "max_new_tokens": 5}
    found = posterior.generate(PROMPTS[:2], num_draws=3, num_samples=2, **options)
    expected = []
    for prompt in PROMPTS[:2]:
        for index in range(3):
            with posterior.draw(index) as module:
                expected += plain_tokens(module, posterior.task, prompt, num_return_sequences=2, **options)
    assert tokens_of(found) == expected
    assert found.draw == (0, 0, 1, 1, 2, 2) * 2


class Record(LogitsProcessor):
    """Keeps the log probabilities of each step."""

    def __init__(self):
        self.steps = []

    def __call__(self, input_ids, scores):
        self.steps.append(scores.log_softmax(-1))
        return scores


def test_scores_are_those_inside_the_generation(posterior):
    steps = []  # transformers itself rounds the logits to float32 before it samples

    def keep(module, args, kwargs, output):
        if kwargs.get("use_cache"):
            steps.append(output.logits[:, -1].log_softmax(-1))

    hook = posterior.llm().llm.register_forward_hook(keep, with_kwargs=True)
    try:
        found = posterior.generate(PROMPTS, num_draws=4, do_sample=True, seed=1, batch_size=3, max_new_tokens=6)
    finally:
        hook.remove()
    order = sorted(range(3), key=lambda i: len(posterior.task.prompt_tokens({"prompt": PROMPTS[i]})))
    for place, prompt in enumerate(order):
        for draw in range(4):
            row = found.scored.rows[prompt * 4 + draw]
            for t, token in enumerate(row.tokens):
                inside = steps[t][place * 4 + draw, token].item()
                assert row.log_probs[draw, t] == pytest.approx(inside, abs=1e-9)


@pytest.mark.parametrize("do_sample", [False, True])
def test_the_mixture_weights_draws_by_what_they_say_of_the_text_so_far(posterior, do_sample):
    record = Record()
    options = {"max_new_tokens": 6, "logits_processor": LogitsProcessorList([record]), "do_sample": do_sample}
    found = posterior.generate(PROMPTS[:1], num_draws=4, decode="mixture", num_samples=1 + 2 * do_sample, **options)
    prompt = posterior.task.prompt_tokens({"prompt": PROMPTS[0]})
    for sample, row in enumerate(found.scored.rows):
        for t, token in enumerate(row.tokens):
            by_draw = log_next(posterior, prompt + row.tokens[:t].tolist(), len(prompt))
            np.testing.assert_allclose(record.steps[t][sample].numpy(), by_draw, atol=1e-5)  # rounded to float32
            assert row.log_mixture[t] == pytest.approx(by_draw[token], abs=1e-9)
            if not do_sample:
                assert token == by_draw.argmax()


def log_next(posterior, tokens, start):
    """The log probabilities of the next token by Bayes' rule, from whole sequences."""
    joint, prefix = [], []
    for index in range(4):
        with posterior.draw(index) as module, torch.no_grad():
            log_p = module(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1).numpy()
        before = sum(log_p[i - 1, tokens[i]] for i in range(start, len(tokens)))
        joint.append(before + log_p[-1])
        prefix.append(before)
    return log_mean_exp(np.stack(joint)) - log_mean_exp(np.array(prefix)[:, None])


def test_the_mutual_information_is_that_of_all_texts(posterior):
    """All texts of two tokens are enumerated, and the estimate lies within 5 standard errors."""
    task, s = posterior.task, posterior.sample(3).s
    prompt = task.prompt_tokens({"prompt": PROMPTS[0]})
    size, ends = posterior.llm().llm.config.vocab_size, {posterior.llm().llm.generation_config.eos_token_id, 6}
    assert task.tokenizer.eos_token_id == 6
    texts = [[a] for a in range(size) if a in ends]
    texts += [[a, b] for a, b in itertools.product(range(size), range(size)) if a not in ends]
    examples = [
        Example({"input_ids": prompt + t}, t, {"positions": [len(prompt) - 1 + i for i in range(len(t))]})
        for t in texts
    ]
    log_p = score(posterior.llm(), task, s, examples, batch_size=512).log_probs  # (3, texts)
    assert np.exp(log_p).sum(1) == pytest.approx(1.0, abs=1e-9)
    mixture = log_mean_exp(log_p)
    exact = (np.exp(log_p) * (log_p - mixture)).sum(1).mean()
    for decode, samples in (("draws", 60), ("mixture", 180)):
        options = {"num_samples": samples, "do_sample": True, "max_new_tokens": 2, "batch_size": 1}
        found = posterior.generate(PROMPTS[:1], num_draws=3, decode=decode, **options).mutual_information.iloc[0]
        assert abs(found["mutual_information"] - exact) < 5 * found["standard_error"], decode
        assert found["standard_error"] < 0.2 * exact


def test_an_encoder_decoder_writes_under_each_draw():
    task = sp.Completion(tokenizer(), encoder_decoder=True)
    size = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    blora = sp.bayesian_lora(T5ForConditionalGeneration(T5Config(vocab_size=80, **size)).double().eval())
    posterior = sp.fit(blora, task, ROWS, num_steps=10, batch_size=4, lr=0.05, progress=False).posterior
    posterior.guide.scale = torch.full_like(posterior.guide.scale, 1.0)
    found = posterior.generate(PROMPTS, num_draws=3, max_new_tokens=5, batch_size=2)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([task.prompt_tokens({"prompt": prompt})])
        for index in range(3):
            with posterior.draw(index) as module:
                ends = [e for e in (module.generation_config.eos_token_id, 6) if e is not None]
                options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
                row = module.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, 1:]
                expected.append(_cut(row.tolist(), ends))
    assert tokens_of(found) == expected
    several = posterior.generate(PROMPTS, num_draws=3, num_samples=2, do_sample=True, max_new_tokens=3)
    assert several.draw == (0, 0, 1, 1, 2, 2) * 3
    for options in ({"decode": "mixture"}, {"num_beams": 2}):
        with pytest.raises(ValueError, match="encoder-decoder can write with"):
            posterior.generate(PROMPTS, num_draws=2, **options)


def test_the_seed_fixes_the_texts_and_no_generator_moves(posterior, unchanged_rng):
    options = {"num_draws": 2, "do_sample": True, "max_new_tokens": 5, "num_samples": 2}
    first, second = (posterior.generate(PROMPTS, seed=3, **options) for _ in range(2))
    other = posterior.generate(PROMPTS, seed=4, **options)
    assert tokens_of(first) == tokens_of(second) != tokens_of(other)


def test_options_of_the_models_own_configuration_do_not_shape_the_texts(posterior):
    module = posterior.llm().llm
    options = {"num_draws": 2, "do_sample": True, "max_new_tokens": 5}
    before = tokens_of(posterior.generate(PROMPTS, **options))
    module.generation_config.top_k, module.generation_config.temperature = 1, 0.1
    try:
        assert tokens_of(posterior.generate(PROMPTS, **options)) == before
    finally:
        module.generation_config.top_k, module.generation_config.temperature = 50, 1.0


def test_a_text_that_does_not_end_is_not_finished(posterior):
    found = posterior.generate(["the sky is"], num_draws=6, max_new_tokens=5, do_sample=True, num_samples=4)
    for text, finished in zip(tokens_of(found), found.finished, strict=True):
        assert finished == (text[-1] in (6, posterior.llm().llm.generation_config.eos_token_id))


def test_texts_end_at_a_stop_string():
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    blocks = Tokenizer(models.BPE(letters, []))
    blocks.pre_tokenizer, blocks.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    own = PreTrainedTokenizerFast(tokenizer_object=blocks, eos_token="<end>", pad_token="<end>")
    task = sp.Completion(own)
    blora = sp.bayesian_lora(tiny.causal_lm(vocab_size=300))
    rows = [{"prompt": "a", "completion": "bcd"}] * 4
    posterior = sp.fit(blora, task, rows, num_steps=60, lr=0.05, progress=False).posterior
    options = {"num_draws": 6, "max_new_tokens": 5, "do_sample": True, "num_samples": 4}
    stopped = posterior.generate(["a"], stop_strings="c", **options)
    texts = [own.decode(text) for text in tokens_of(stopped)]
    assert any(text.endswith("c") for text in texts)
    for text, tokens, finished in zip(texts, tokens_of(stopped), stopped.finished, strict=True):
        assert "c" not in text[:-1]
        assert finished == (text.endswith("c") or tokens[-1] in (own.eos_token_id, 2) or len(tokens) < 5)
    never = posterior.generate(["a"], stop_strings=["sunshine"], **options)
    assert tokens_of(never) == tokens_of(posterior.generate(["a"], **options))


class Words:
    """A streamer, as transformers calls it."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens.append(value.flatten().tolist())

    def end(self):
        self.tokens.append("end")


@pytest.mark.parametrize("decode", ["mean", "mixture"])
def test_a_streamer_gets_each_token_as_it_is_written(posterior, decode):
    words = Words()
    found = posterior.generate(["the sky is"], num_draws=3, decode=decode, max_new_tokens=4, streamer=words)
    prompt, *written, end = words.tokens
    assert prompt == posterior.task.prompt_tokens({"prompt": "the sky is"}) and end == "end"
    assert [tokens_of(found)[0]] == [[token for (token,) in written]]


def test_summaries_of_texts(posterior):
    found = posterior.generate(PROMPTS, num_draws=4, do_sample=True, max_new_tokens=4, num_samples=2)
    frame, summary = found.to_frame(), found.summary()
    assert list(frame["prompt"]) == [0] * 8 + [1] * 8 + [2] * 8
    assert found.per_prompt == 8 and len(found.texts(1)) == 8
    np.testing.assert_allclose(frame["log_prob"], log_mean_exp(found.scored.log_probs))
    data = found.to_xarray()
    assert data["log_prob"].shape == (3, 8, 4)
    assert data["log_prob"].values[1, 2, 3] == found.scored.log_probs[3, 10]
    agreed = found.agreement()
    assert agreed["share"].between(1 / 8, 1).all() and agreed["answer"][0] in [t.strip() for t in found.texts(0)]
    assert found.mbr(lambda text, other: float(text.strip() == other.strip()))[0].strip() == agreed["answer"][0]
    assert found.semantic_entropy(lambda a, b: True) == pytest.approx(0.0)
    kept = found.keep(0.4)
    assert kept == [int(summary["epistemic_per_token"].argmin())]
    assert found.keep(1.0, by=[3.0, 1.0, 2.0]) == [0, 1, 2] and found.keep(0.5, by=[3.0, 1.0, 2.0]) == [1, 2]


def test_a_notebook_shows_answers_and_shaded_texts(posterior):
    found = posterior.generate(PROMPTS[:2], num_draws=2, max_new_tokens=3)
    unsafe = replace(found, prompts=("<script>alert(1)</script>", "b"))
    page = unsafe._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert page.count("<span title=") == sum(len(row.tokens) for row in found.scored.rows)


def test_conversations_and_rows_are_prompts_too(posterior):
    rows = posterior.generate([{"prompt": "the sky is", "completion": " blue"}], num_draws=2, max_new_tokens=3)
    texts = posterior.generate(["the sky is"], num_draws=2, max_new_tokens=3)
    assert rows.answers == texts.answers


# bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        (PROMPTS, {"num_samples": 0}, ValueError, "num_samples=0"),
        (PROMPTS, {"num_draws": 0}, ValueError, "num_draws=0"),
        (PROMPTS, {"max_new_tokens": 0}, ValueError, "max_new_tokens=0"),
        (PROMPTS, {"num_samples": 2}, ValueError, "same text 2 times: pass do_sample=True"),
        (PROMPTS, {"decode": "beam"}, ValueError, "decode='beam'"),
        (PROMPTS, {"decode": "mixture", "num_beams": 2}, ValueError, "no beam search"),
        (PROMPTS, {"num_return_sequences": 2}, ValueError, "num_samples"),
        (PROMPTS, {"temprature": 2.0}, (TypeError, ValueError), "temprature"),
        ("the sky is", {}, ValueError, "Give a list of prompts"),
        ([], {}, ValueError, "prompts is empty"),
        ([""], {}, ValueError, "prompt is empty"),
        ([{"question": "the sky"}], {}, ValueError, "no field 'prompt'"),
        ([None], {}, ValueError, "prompt"),
    ],
)
def test_wrong_options_are_explained(posterior, prompts, options, error, message):
    with pytest.raises(error, match=message):
        posterior.generate(prompts, **options)


def test_the_mutual_information_needs_texts_at_random(posterior):
    for options in ({}, {"do_sample": True, "temperature": 0.5}, {"do_sample": True, "decode": "mean"}):
        found = posterior.generate(PROMPTS, num_draws=2, max_new_tokens=2, **options)
        with pytest.raises(ValueError, match="do_sample=True"):
            _ = found.mutual_information
    one = posterior.generate(PROMPTS, num_draws=2, max_new_tokens=2, do_sample=True, decode="mixture")
    with pytest.raises(ValueError, match="no standard error"):
        _ = one.mutual_information


def test_a_text_must_fit_into_the_table_of_positions():
    torch.manual_seed(0)
    llm = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, n_positions=12, vocab_size=80))
    task = sp.Completion(tokenizer(), chat=False)
    blora = sp.bayesian_lora(llm, target_modules=["c_attn"])
    posterior = sp.fit(blora, task, ROWS, num_steps=2, progress=False).posterior
    with pytest.raises(ValueError, match="positions for 12 tokens only"):
        posterior.generate(PROMPTS, max_new_tokens=12)
    assert len(posterior.generate(PROMPTS[:1], max_new_tokens=4, num_draws=2).answers) == 2


def test_other_tasks_are_told_which_task_writes_texts():
    task = sp.MultipleChoice(tiny.tokenizer())
    blora = sp.bayesian_lora(tiny.causal_lm())
    posterior = sp.fit(blora, task, tiny.question_rows(4), num_steps=1, progress=False).posterior
    for call in (posterior.generate, posterior.score):
        with pytest.raises(TypeError, match="needs a posterior of the task Completion, and this one has"):
            call(["the sky is"])


def test_arviz_reads_texts_and_their_scores(posterior, tmp_path):
    import arviz as az

    found = posterior.generate([*PROMPTS, PROMPTS[0]], num_draws=4, do_sample=True, max_new_tokens=4, num_samples=2)
    data = found.to_arviz()
    group = data["posterior_predictive"]
    log_prob, constant = group["log_prob"], data["constant_data"]
    assert log_prob.dims == ("chain", "draw", "prompt", "sample") and log_prob.shape == (1, 4, 4, 8)
    assert log_prob.values[0, 3, 1, 2] == found.scored.log_probs[3, 10]
    assert constant["num_tokens"].dims == ("prompt", "sample")
    np.testing.assert_array_equal(constant["num_tokens"].values.ravel(), found.scored.num_tokens)
    np.testing.assert_array_equal(constant["epistemic"].values.ravel(), found.scored.epistemic)
    assert constant["text"].values.ravel().tolist() == list(found.answers)
    assert constant["written_by"].values.ravel().tolist() == list(found.draw)
    assert constant["prompt_text"].values.tolist() == list(found.prompts)
    summary = az.summary(data, group="posterior_predictive", kind="stats", round_to=12)
    np.testing.assert_allclose(summary["mean"].astype(float), found.scored.log_probs.mean(0), rtol=1e-9)
    data.to_netcdf(tmp_path / "texts.nc")
    mean = posterior.generate(PROMPTS[:1], num_draws=2, decode="mean", max_new_tokens=3).to_arviz()
    assert mean["constant_data"]["written_by"].values.tolist() == [[-1]]
