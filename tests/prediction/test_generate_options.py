"""Options of generate: those of the model's configuration do not act, and wrong ones are explained."""

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList
from written import PROMPTS, tokenizer, tokens_of, wide

import scalabl_pyro as sp

OWN = {
    "num_beams": 3,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 5,
    "min_p": 0.3,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.02,
    "bad_words_ids": [[3], [4], [17]],
    "suppress_tokens": [3, 4, 17],
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 9,
    "encoder_repetition_penalty": 2.0,
    "exponential_decay_length_penalty": (1, 3.0),
    "sequence_bias": [[[8], 10.0]],
    "guidance_scale": 3.0,
    "stop_strings": ["sky"],
    "max_time": 1e-9,
    "return_dict_in_generate": True,
    "prompt_lookup_num_tokens": 3,
    "prefill_chunk_size": 2,
    "repetition_penalty": 2.0,
}


@pytest.fixture(scope="module")
def posterior():
    return wide(sp.bayesian_lora(tiny.causal_lm().double()), sp.Completion(tokenizer(), chat=False))


@pytest.mark.parametrize("decode", ["draws", "mixture"])
@pytest.mark.parametrize("name", OWN)
def test_the_models_own_configuration_shapes_no_text(posterior, name, decode):
    """The mutual information is an average over texts of the model itself."""
    own = posterior.llm().llm.generation_config
    options = {"num_draws": 2, "do_sample": True, "max_new_tokens": 5, "decode": decode}
    expected = tokens_of(posterior.generate(PROMPTS, **options))
    before = getattr(own, name)
    setattr(own, name, OWN[name])
    try:
        found = posterior.generate(PROMPTS, **options)
        assert getattr(own, name) == OWN[name]
    finally:
        setattr(own, name, before)
    assert tokens_of(found) == expected and found.is_pure


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"generation_config": GenerationConfig(do_sample=True)}, ValueError, "give its options by name"),
        ({"max_length": 8}, ValueError, "use max_new_tokens"),
        ({"input_ids": torch.ones(1, 1)}, ValueError, "follows from the prompts"),
        ({"decoder_start_token_id": 3}, ValueError, "begin as in training"),
        ({"tokenizer": None}, ValueError, "tokenizer of the task"),
        ({"do_sample": "no"}, TypeError, "expected True or False"),
        ({"num_beams": "2"}, ValueError, "num_beams='2'"),
        ({"num_beams": 2, "num_samples": 3, "do_sample": True}, ValueError, "one text per beam"),
        ({"eos_token_id": "night"}, TypeError, "eos_token_id='night'"),
        ({"stop_strings": [""]}, ValueError, "none of them empty"),
        ({"stop_strings": 3}, ValueError, "stop_strings=3"),
        ({"decode": "mixture", "prefill_chunk_size": 2}, ValueError, "does not work with prefill_chunk_size"),
        ({"decode": "mixture", "guidance_scale": 2.0}, ValueError, "does not work with guidance_scale"),
    ],
)
def test_options_that_would_be_lost_or_mislead_are_refused(posterior, options, error, message):
    with pytest.raises(error, match=message):
        posterior.generate(PROMPTS, **options)


def test_options_that_change_nothing_leave_texts_pure(posterior):
    options = {"num_draws": 2, "do_sample": True, "max_new_tokens": 2}
    for extra in ({"temperature": 1.0}, {"num_beams": 1}, {"top_k": 0}, {"min_p": None}, {"prefill_chunk_size": 1}):
        assert posterior.generate(PROMPTS, **options, **extra).is_pure, extra
    for extra in ({"temperature": 0.5}, {"top_k": 50}, {"min_p": 0.1}, {"num_beams": 2}):
        found = posterior.generate(PROMPTS, **options, **extra)
        assert not found.is_pure, extra
    for number in (3, -1, "0"):
        with pytest.raises(ValueError, match="the prompts have the numbers 0 to 2"):
            found.texts(number)


@pytest.mark.parametrize("do_sample", [False, True])
def test_probabilities_that_are_nan_are_told(posterior, do_sample):
    weight = posterior.llm().llm.model.layers[1].mlp.down_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    try:
        for decode in ("draws", "mixture"):
            with pytest.raises(FloatingPointError, match="outputs of the LLM overflow"):
                posterior.generate(PROMPTS, num_draws=2, decode=decode, do_sample=do_sample, max_new_tokens=2)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_end_tokens_may_be_arrays_and_tensors(posterior):
    options = {"num_draws": 4, "max_new_tokens": 5, "do_sample": True}
    expected = tokens_of(posterior.generate(PROMPTS, eos_token_id=[3, 6], **options))
    for ends in (torch.tensor([3, 6]), np.array([3, 6]), (np.int64(3), [6]), {3, 6}):
        assert tokens_of(posterior.generate(PROMPTS, eos_token_id=ends, **options)) == expected
    endless = posterior.generate(PROMPTS, eos_token_id=None, **options)
    assert all(len(text) == 5 for text in tokens_of(endless)) and not any(endless.finished)


# ends of texts ----------------------------------------------------------------------------------------------


def letters(pad):
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(alphabet, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token=pad)


@pytest.fixture(scope="module", params=["<end>", "<pad>"])
def of_letters(request):
    """A posterior that writes a few letters and ends; the pad token is the end token, or one of its own."""
    task = sp.Completion(letters(request.param), chat=False)
    blora = sp.bayesian_lora(tiny.causal_lm(vocab_size=300))
    rows = [{"prompt": "a", "completion": "bcd"}] * 4
    return wide(blora, task, rows, num_steps=60)


def texts_of(of_letters, found):
    return [of_letters.task.tokenizer.decode(text) for text in tokens_of(found)]


def shortest(text, is_end):
    return next((text[:i] for i in range(1, len(text) + 1) if is_end(text[:i])), text)


WRITE = {"num_draws": 4, "do_sample": True, "num_samples": 4, "max_new_tokens": 4}


@pytest.mark.parametrize("decode", ["draws", "mixture"])
@pytest.mark.parametrize("stop", ["ab", "c", "cd"])
def test_a_text_ends_at_a_stop_string_also_at_its_last_token_and_across_the_prompt(of_letters, stop, decode):
    free = texts_of(of_letters, of_letters.generate(["a"], batch_size=1, decode=decode, **WRITE))
    one = {**WRITE, "num_samples": 1, "num_draws": 1, "do_sample": False}
    free += texts_of(of_letters, of_letters.generate(["a"], decode=decode, **one))
    found = of_letters.generate(["a"], stop_strings=stop, decode=decode, **one)
    (text,) = texts_of(of_letters, found)
    assert text == shortest(free[-1], lambda begun: stop in "a" + begun)
    assert found.finished == (stop in "a" + text or text.endswith("<end>"),)
    many = of_letters.generate(["a"], stop_strings=[stop], decode=decode, **WRITE)
    for text, is_finished in zip(texts_of(of_letters, many), many.finished, strict=True):
        assert "<pad>" not in text and text.count("<end>") <= 1
        assert text == shortest(text, lambda begun: stop in "a" + begun)
        assert is_finished == (stop in "a" + text or text.endswith("<end>"))


class AtLetter(StoppingCriteria):
    """Stops each row at a letter of its own accord."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("beams", [1, 3])
def test_a_text_ends_where_a_criterion_stops_it_without_the_padding_behind_it(of_letters, beams):
    token = of_letters.task.tokenizer("c").input_ids[0]
    options = {**WRITE, "num_beams": beams, "do_sample": beams == 1, "num_samples": 3}
    for criteria in (AtLetter(token), StoppingCriteriaList([AtLetter(token)])):
        found = of_letters.generate(["a", "ab"], stopping_criteria=criteria, **options)
        texts = texts_of(of_letters, found)
        assert any(text.endswith("c") for text in texts)
        for text, is_finished in zip(texts, found.finished, strict=True):
            assert "<pad>" not in text
            if beams == 1:
                assert "c" not in text[:-1]
                assert is_finished == (text.endswith(("c", "<end>")))


def test_a_text_that_had_no_more_time_is_not_finished(of_letters):
    found = of_letters.generate(["a"], num_draws=3, max_new_tokens=4, max_time=1e-9)
    for text, is_finished in zip(texts_of(of_letters, found), found.finished, strict=True):
        assert is_finished == text.endswith("<end>")
