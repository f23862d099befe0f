"""The names of the fields are options of every task, and a saved posterior keeps them."""

from dataclasses import replace

import pytest
import tiny

import scalabl_pyro as sp
from scalabl_pyro.data import encode
from scalabl_pyro.tasks.registry import TASKS, from_options, to_config

QUESTION = {"question": "what is the sky ?", "choices": ["red", "green", "blue"], "answer": 2}
RENAMED = {"q": "what is the sky ?", "options": ["red", "green", "blue"], "gold": 2}
SPREAD = {"q": "what is the sky ?", "a": "red", "b": "green", "c": "blue", "gold": 2}
LIST = {"question": "q", "choices": "options", "target": "gold"}
WIDE = {"question": "q", "choices": ("a", "b", "c"), "target": "gold"}


def choice(**options):
    return sp.MultipleChoice(tiny.tokenizer(), **options)


@pytest.mark.parametrize(("options", "row"), [(LIST, RENAMED), (WIDE, SPREAD)], ids=["list", "one each"])
def test_a_question_with_other_names_is_the_same_question(options, row):
    task = choice(**options)
    assert task.encode(row) == choice().encode(QUESTION)
    assert list(task.row_fields) == [name for name in row]
    loaded = from_options("MultipleChoice", tiny.tokenizer(), to_config(task)["options"])
    assert loaded.encode(row) == task.encode(row) and loaded.choices == task.choices
    cut = choice(max_length=12, **options).encode({**row, "q": "the sky " * 9})
    assert cut == choice(max_length=12).encode({**QUESTION, "question": "the sky " * 9})


def test_the_last_fields_of_choices_may_be_empty():
    task = choice(**WIDE)
    short = {**SPREAD, "c": float("nan"), "gold": "green"}
    assert task.encode(short) == choice().encode({**QUESTION, "choices": ["red", "green"], "answer": 1})
    with pytest.raises(ValueError, match="a choice follows an empty one"):
        task.encode({**SPREAD, "b": None})
    with pytest.raises(ValueError, match="row has 1 choices"):
        task.encode({**SPREAD, "b": None, "c": None})
    with pytest.raises(ValueError, match=r"Row 0: the row has no field 'c'"):
        encode([{k: v for k, v in SPREAD.items() if k != "c"}], task.encode, need_target=False)


@pytest.mark.parametrize(
    "wrong",
    [{"question": 3}, {"choices": ()}, {"choices": ("a",)}, {"choices": 1}, {"choices": (1, 2)}, {"target": None}],
)
def test_names_that_are_no_texts_are_refused(wrong):
    with pytest.raises(ValueError, match=r"name of a field|two or more names"):
        choice(**wrong)


def test_a_text_in_place_of_a_list_says_what_a_csv_file_can_hold():
    with pytest.raises(ValueError, match=r"choices must be a list of texts, got a str\. A CSV file holds no lists"):
        choice().encode({**QUESTION, "choices": "['red', 'blue']"})


COMPLETION = {"prompt": "input", "target": "output", "messages": "turns"}


def completion(**options):
    return sp.Completion(tiny.tokenizer(chat=True), end_token=False, **options)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "the sky is", "completion": " blue"},
        {"prompt": "the sky is"},
        {"prompt": [{"role": "user", "content": "the sky"}], "completion": [{"role": "assistant", "content": "blue"}]},
        {"messages": [{"role": "user", "content": "the sky"}, {"role": "assistant", "content": "blue"}]},
    ],
)
def test_a_completion_with_other_names_is_the_same_completion(row):
    names = {"prompt": "input", "completion": "output", "messages": "turns"}
    other = {names[k]: v for k, v in row.items()}
    task = completion(**COMPLETION)
    assert task.encode(other) == completion().encode(row)
    assert task.prompt_tokens(other) == completion().prompt_tokens(row)
    assert from_options("Completion", task.tokenizer, to_config(task)["options"]).encode(other) == task.encode(other)


def test_generation_and_scores_read_the_named_fields():
    task = completion(prompt="input", target="output")
    rows = [{"input": "the sky is", "output": " blue"}, {"input": "grass is", "output": " green"}]
    posterior = sp.fit(sp.bayesian_lora(tiny.causal_lm()), task, rows, num_steps=1, progress=False).posterior
    usual = [{"prompt": r["input"], "completion": r["output"]} for r in rows]
    plain = replace(posterior, task=completion())
    assert (posterior.score(rows, num_draws=2).log_probs == plain.score(usual, num_draws=2).log_probs).all()
    made = [p.generate(["the sky is"], num_draws=2, max_new_tokens=2) for p in (posterior, plain)]
    assert made[0].answers == made[1].answers


def test_usual_names_are_not_shown_and_others_are():
    assert "question=" not in repr(choice()) and "question='q'" in repr(choice(**LIST))


def test_every_task_names_its_answer_by_one_option():
    assert all("target" in task.options for task in TASKS.values())
