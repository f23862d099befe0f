"""Rows of a wrong kind: the error names the fields of the task that reads them."""

import re

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import tiny

import scalabl_pyro as sp
from scalabl_pyro.data import Example, encode
from scalabl_pyro.data.rows import rows_for


class Stars(sp.Task):
    """A task of a user, which says nothing about its fields."""

    def encode(self, row):
        return Example({"input_ids": self.tokenizer(row["review"]).input_ids}, row["stars"])

    def likelihood(self, outputs, batch):
        return dist.Poisson(outputs[..., 0].exp())


class NamedStars(Stars):
    """The same, with the names of its fields."""

    row_fields = ("review", "stars")


CLASSES = {"classes": ["no", "yes"]}
#: Task, the words for its fields, and the code that makes rows of texts.
TASKS = {
    "choices": (
        lambda t: sp.MultipleChoice(t),
        "with the fields 'question', 'choices' and 'answer'",
        "[{'question': text, 'choices': ...} for text in texts]",
    ),
    "classes": (
        lambda t: sp.SequenceClassification(t, **CLASSES),
        "with the fields 'text' and 'label'",
        "[{'text': text} for text in texts]",
    ),
    "pairs": (
        lambda t: sp.SequenceClassification(t, text="premise", text_pair="claim", target="gold", **CLASSES),
        "with the fields 'premise', 'claim' and 'gold'",
        "[{'premise': text, 'claim': ...} for text in texts]",
    ),
    "numbers": (
        lambda t: sp.Regression(t, target="stars"),
        "with the fields 'text' and 'stars'",
        "[{'text': text} for text in texts]",
    ),
    "own": (
        Stars,
        "with the fields that Stars.encode reads",
        "[{NAME: text} for text in texts], where NAME is the field of the text",
    ),
    "own, named": (NamedStars, "with the fields 'review' and 'stars'", "[{'review': text} for text in texts]"),
}
#: What is no row: the data, and the part of the message that says so.
WRONG = {
    "text": ("some text", "Row 0 is a str ('some text')"),
    "list": (["some text"], "Row 0 is a list of 1 str"),
    "tuple": (("some text", 1), "Row 0 is a tuple of 2 objects"),
    "None": (None, "Row 0 is None"),
    "number": (3, "Row 0 is an int (3)"),
}


@pytest.fixture(params=TASKS)
def case(request):
    build, fields, from_texts = TASKS[request.param]
    return build(tiny.tokenizer()), fields, from_texts


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("read", [rows_for, lambda encode_row, data: encode(data, encode_row, need_target=False)])
def test_an_item_that_is_not_a_dict(case, wrong, read):
    task, fields, from_texts = case
    row, said = WRONG[wrong]
    with pytest.raises(TypeError, match=re.escape(f"{said}; expected a dict {fields}.")) as caught:
        read(task.encode, [row])
    assert (from_texts in str(caught.value)) == isinstance(row, str)


@pytest.mark.parametrize("data", [None, 3, np.array(["a"]), pd.Series(["a"]), {"other": "a", "names": 1}])
def test_data_without_rows(case, data):
    task, fields, _ = case
    with pytest.raises(TypeError, match=re.escape(f"{type(task).__name__} reads rows {fields}; predict")):
        rows_for(task.encode, data)


def test_a_dict_with_other_names(case):
    task, fields, _ = case
    with pytest.raises(ValueError, match=r"Row 0: (the row has no field|KeyError) '\w+'\.") as caught:
        encode([{"words": "a", "number": 1}], task.encode, need_target=False)
    assert f"{type(task).__name__} reads rows {fields}; predict needs no answer." in str(caught.value)
    assert "'words'" in str(caught.value)


def test_a_posterior_names_the_fields_of_its_own_task():
    blora, task = sp.bayesian_lora(tiny.causal_lm()), sp.MultipleChoice(tiny.tokenizer())
    posterior = sp.fit(blora, task, tiny.question_rows(4), num_steps=1, progress=False).posterior
    for call in (posterior.predict, posterior.log_likelihood, lambda rows: sp.fit(blora, task, rows)):
        with pytest.raises(TypeError, match="'question', 'choices' and 'answer'"):
            call(["some text"])


def test_a_key_error_that_is_not_about_the_row():
    def encode_row(row):
        return {"yes": 1}[row["text"]]

    with pytest.raises(ValueError, match=r"^Row 0: KeyError 'no'\. The row has the fields \['text'\]\.$"):
        encode([{"text": "no"}], encode_row, need_target=False)


def test_a_task_that_writes_its_answers_is_not_told_of_predict():
    task = sp.Completion(tiny.tokenizer(), chat=False, end_token=False)
    with pytest.raises(ValueError, match=r"fields 'prompt' and 'completion'; generate needs no 'completion'\.$"):
        encode([{"words": "a"}], task.encode, need_target=True)
