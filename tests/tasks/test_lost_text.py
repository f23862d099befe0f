"""Text that would be lost on its way to the tokens: it is refused, or it counts."""

import numpy as np
import pandas as pd
import prompts
import pytest
import tiny
from written import tokenizer, tokens_of, wide

import scalabl_pyro as sp
from scalabl_pyro.data import encode

SYSTEM = {"role": "system", "content": "be short"}
ASKED = {"role": "user", "content": "the color ?"}
ANSWER = {"role": "assistant", "content": "blue"}
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def conversation(template):
    return sp.Completion(prompts.tokenizer("byte BPE", template))


@pytest.mark.parametrize("lost", [SYSTEM, {"role": "developer", "content": "be short"}])
def test_a_template_that_drops_what_the_model_was_told_is_refused(lost):
    template = NO_SYSTEM.replace("'system'", repr(lost["role"]))
    message = f"leaves out text of a message of the role '{lost['role']}'"
    for row in ({"messages": [lost, ASKED, ANSWER]}, {"prompt": [lost, ASKED], "completion": [ANSWER]}):
        for read in (conversation(template).encode, conversation(template).prompt_tokens):
            with pytest.raises(ValueError, match=message):
                read(row)
        assert conversation(PLAIN).encode(row).target


def test_a_chat_template_may_come_with_the_options():
    row = {"prompt": "the color ?", "completion": "blue"}
    task = sp.Completion(prompts.tokenizer("byte BPE", None), chat=True, chat_options={"chat_template": PLAIN})
    assert task.encode(row) == conversation(PLAIN).encode({"messages": [ASKED, ANSWER]})


def test_an_answer_that_contains_the_end_token_counts_to_its_end():
    task = conversation(PLAIN)
    text = f"red {task.tokenizer.eos_token} blue"
    row = {"messages": [ASKED, {"role": "assistant", "content": text}]}
    assert task.tokenizer.decode(task.encode(row).target).strip() == text


@pytest.mark.parametrize("options", [{"chat": False}, {"chat": False, "end_token": False}, {"encoder_decoder": True}])
def test_a_completion_without_tokens_is_not_an_end_token_alone(options):
    task = sp.Completion(tokenizer(), **options)
    with pytest.raises(ValueError, match="Row 0: the completion is empty: it has no tokens"):
        encode([{"prompt": "the sky", "completion": " "}], task.encode, need_target=True)


def test_half_a_character_is_named_in_every_field():
    half, message = "a \ud83d sky", r"contains half a character, U\+D83D, at place 2"
    completion, choices = (
        sp.Completion(tokenizer(), chat=False),
        sp.MultipleChoice(tiny.tokenizer(), template="{question}"),
    )
    chat = conversation(PLAIN)
    for task, row in (
        (completion, {"prompt": half, "completion": " blue"}),
        (completion, {"prompt": "the", "completion": half}),
        (chat, {"messages": [{"role": "user", "content": half}, ANSWER]}),
        (choices, {"question": half, "choices": ["a", "b"]}),
        (choices, {"question": "the sky", "choices": ["a", half]}),
        (sp.Regression(tiny.tokenizer()), {"text": half}),
    ):
        with pytest.raises(ValueError, match=message):
            encode([row], task.encode, need_target=False)


# prompts of generate ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def posterior():
    return wide(sp.bayesian_lora(tiny.causal_lm()), sp.Completion(tokenizer(), chat=False, max_length=6), num_steps=3)


WRITE = {"num_draws": 2, "max_new_tokens": 2}


@pytest.mark.parametrize("make", [np.array, pd.Series, pd.Index, tuple, lambda x: pd.DataFrame({"prompt": x})])
def test_texts_come_in_arrays_and_columns_too(posterior, make):
    expected = tokens_of(posterior.generate(["the sky", "3"], **WRITE))
    assert tokens_of(posterior.generate(make(["the sky", "3"]), **WRITE)) == expected
    assert tokens_of(posterior.generate(["the sky", 3], **WRITE)) == expected


def test_a_cut_prompt_is_told(posterior, caplog):
    found = posterior.generate(["the sky is red . the sky is", "the sky"], **WRITE)
    assert found.prompts == ("is red . the sky is", "the sky")
    assert "1 of 2 rows were longer than max_length" in caplog.text


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["the sky", None], "Row 1: the field 'prompt' has no value"),
        (["the sky", ""], "Row 1: the prompt is empty"),
        ([SYSTEM, ASKED], r"prompts is one conversation\. Give a list of conversations: \[messages\]"),
        (b"the sky", "Give a list of prompts"),
    ],
)
def test_a_wrong_prompt_is_told_with_its_number(posterior, prompts, message):
    with pytest.raises(ValueError, match=message):
        posterior.generate(prompts, **WRITE)
