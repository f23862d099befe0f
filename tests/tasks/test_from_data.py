"""The task that fits a table is guessed, and the guess is said."""

import logging

import numpy as np
import pandas as pd
import pytest
import tiny
from datasets import ClassLabel, Dataset, Features, Value

import scalabl_pyro as sp
from scalabl_pyro import tasks
from scalabl_pyro.data import read_rows
from scalabl_pyro.data.columns import columns_of

TEXTS = [f"the sky is blue {i}" for i in range(40)]


def table(values, name="class", **more):
    return pd.DataFrame({"id": range(40), "note": TEXTS, name: values * (40 // len(values)), **more})


def guess(data, **options):
    return tasks.from_data(tiny.tokenizer(), data, **options)


GUESSES = {
    "names": (table(["oil", "grain", None, "oil"]), tasks.SequenceClassification, ("grain", "oil")),
    "truth values": (table([True, False]), tasks.SequenceClassification, (False, True)),
    "stars": (table([1, 2, 5, 4], "stars"), tasks.SequenceClassification, (1, 2, 4, 5)),
    "whole numbers with gaps": (table([0.0, 1.0, np.nan, -1.0], "label"), tasks.SequenceClassification, (0, 1)),
    "prices": (table([1.5, 2.0, 300.25, 4.0], "price"), tasks.Regression, None),
    "many whole numbers": (table(list(range(40)), "score"), tasks.Regression, None),
    "numbers as texts": (table(["1.5", "2"], "price"), tasks.Regression, None),
    "codes as texts": (table(["007", "012"], "label"), tasks.SequenceClassification, ("007", "012")),
    "minus one and one": (table([-1, 1], "label"), tasks.SequenceClassification, (-1, 1)),
    "lists": (table([["a"], [], ["b", "a"], ["c"]], "labels"), tasks.MultiLabelClassification, ("a", "b", "c")),
}


@pytest.mark.parametrize("name", GUESSES)
def test_the_kind_of_the_answer_decides(name, caplog):
    data, kind, classes = GUESSES[name]
    with caplog.at_level(logging.WARNING):
        task = guess(data)
    assert type(task) is kind and task.text == "note" and task.target == data.columns[2]
    assert task.classes == classes
    assert caplog.text.count("Guessed the task") == 1 and kind.__name__ in caplog.text
    assert f"answer in {task.target!r}" in caplog.text and "guessed=(text in 'note'" in repr(task)


def test_what_is_seen_is_said(caplog):
    guess(table(["oil", "grain", None, "oil"]))
    assert "2 classes, 'grain', 'oil'; classes; 10 rows without an answer" in caplog.text
    guess(table(["1.5", "2"], "price"))
    assert "numbers that are written as texts" in caplog.text
    guess(table([0, 1], "flag"))
    assert "OrderedClassification" not in caplog.text  # two classes have no order to speak of
    guess(table([1, 2, 3, 4], "stars"))
    assert "pass task=OrderedClassification, or CountRegression" in caplog.text


def test_rows_with_minus_one_and_names_that_look_alike_are_said(caplog):
    guess(table([-1, 0, 1, 1], "label"))
    assert "10 rows with -1, which stands for an unknown class; if it is one, pass classes=" in caplog.text
    caplog.clear()
    guess(table(["yes", "no", "Yes ", "no"]))
    assert "has the classes 'Yes ', 'yes', which differ only in capital letters, spaces" in caplog.text
    caplog.clear()
    guess(table(["caf\u00e9", "cafe\u0301"]))
    assert "Unicode form" in caplog.text
    caplog.clear()
    guess(table(["yes", "no"]))
    assert "Unicode form" not in caplog.text and "-1" not in caplog.text


def test_the_order_of_ordered_classes_is_given_or_asked_for():
    data, levels = table(["low", "high", "mid", "low"]), ["low", "mid", "high", "top"]
    with pytest.raises(ValueError, match="'high', 'low', 'mid', whose order cannot be told: pass classes="):
        guess(data, task=tasks.OrderedClassification)
    data["class"] = pd.Categorical(data["class"], categories=levels, ordered=True)
    assert guess(data, task=tasks.OrderedClassification).classes == tuple(levels)
    assert guess(data).classes == ("high", "low", "mid")
    assert guess(data, task=tasks.OrderedClassification, classes=levels[:3]).classes == tuple(levels[:3])


def test_a_causal_lm_writes_the_names():
    task = guess(table(["red", "green sky"]), llm=tiny.causal_lm(), max_length=20)
    assert type(task) is tasks.LabelCompletion and task.max_length == 20
    blora = sp.bayesian_lora(tiny.causal_lm(), r=2)
    assert type(guess(table([1, 2]), llm=blora)) is tasks.LabelCompletion
    stars = guess(table([1, 2]), llm=blora)
    assert stars.classes == (1, 2)  # values of the table, so that 1 is not taken for an index
    assert [stars.encode({"note": "the sky", stars.target: value}).target for value in (1, 2)] == [0, 1]
    assert type(guess(table([1.5, 2.5]), llm=blora)) is tasks.Regression


def test_the_model_gives_the_order_of_its_classes():
    llm = tiny.classifier(num_labels=2)
    llm.config.id2label = {0: "OIL", 1: "GRAIN"}
    assert guess(table(["oil", "grain"]), llm=llm).classes == ("oil", "grain")
    with pytest.raises(ValueError, match=r"data has 3 classes, .*id2label has 2: 'OIL', 'GRAIN'.*num_labels=3"):
        guess(table(["oil", "grain", "ship", "oil"]), llm=llm)


def test_a_class_label_gives_the_order_and_names_without_rows():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["spam", "ham", "rare"])})
    data = Dataset.from_dict({"text": TEXTS, "label": [0, 1] * 20}, features=features)
    assert guess(data).classes == ("spam", "ham", "rare")


def test_what_is_given_is_not_guessed():
    data = table(["oil", "grain"], title=["x"] * 40, stars=[1, 2] * 20)
    task = guess(data, text="title", target="stars", task=tasks.OrderedClassification)
    assert (type(task), task.text, task.target, task.classes) == (tasks.OrderedClassification, "title", "stars", (1, 2))
    assert guess(data, target="stars", task=tasks.CountRegression).target == "stars"
    assert guess(data, classes=["grain", "oil", "ship"]).classes == ("grain", "oil", "ship")


def test_rows_of_a_known_form_have_its_task():
    assert type(guess(tiny.question_rows(4))) is sp.MultipleChoice
    rows = [{"prompt": "the sky", "completion": " is blue"}]
    assert type(guess(rows, end_token=False)) is sp.Completion


REFUSED = {
    "no answer": (table(["oil"], "other", more=[1] * 40), {}, "nothing says which one holds the answer: pass target="),
    "absent answer": (table(["oil"]), {"target": "clas"}, r"target='clas': the table has no such column.*'class'"),
    "absent text": (table(["oil"]), {"text": "nota"}, r"text='nota': the table has no such column.*'note'"),
    "no text": (pd.DataFrame({"a": [1, 2], "label": [0, 1]}), {}, "none but the answer holds texts: pass text="),
    "free texts": (
        table([f"answer {i}" for i in range(40)], "answer"),
        {},
        "holds texts: 40 different values in 40 rows",
    ),
    "one class": (table(["oil"]), {}, "at least two classes"),
    "splits": ({"train": table(["oil"])}, {}, "choose one of them"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_is_refused(name):
    data, options, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        guess(data, **options)


def test_other_kinds_of_tasks_are_refused():
    with pytest.raises(TypeError, match="expected one of the classes SequenceClassification"):
        guess(table(["oil", "grain"]), task=sp.Completion)
    with pytest.raises(TypeError, match="expected one of the classes"):
        guess(table(["oil", "grain"]), task="ordered")


def test_a_guessed_task_trains_and_its_file_holds_no_guess(tmp_path):
    table(["oil", "grain", None, "oil"]).to_csv(tmp_path / "notes.csv", index=False)
    task = guess(tmp_path / "notes.csv")
    labeled = pd.read_csv(tmp_path / "notes.csv").dropna()
    posterior = sp.fit(sp.bayesian_lora(tiny.classifier(num_labels=2), r=2), task, labeled, num_steps=2, progress=False)
    posterior.posterior.save_pretrained(tmp_path / "p")
    loaded = sp.Posterior.from_pretrained(tiny.classifier(num_labels=2), tmp_path / "p")
    assert loaded.task.classes == ("grain", "oil") and loaded.task.guessed is None
    assert len(loaded.predict(tmp_path / "notes.csv", num_draws=2).to_frame()) == 40


def test_a_real_table_of_six_topics(shared_data):
    rows = read_rows(shared_data / "text" / "trec_test.jsonl")
    data = [{"question": row["question"], "kind": row["choices"][row["answer"]]} for row in rows]
    task = guess(data)
    assert task.classes == tuple(sorted(rows[0]["choices"])) and (task.text, task.target) == ("question", "kind")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([None, ""], "nothing"),
        (["a", "b", "a"], "classes"),
        (["a", "b"], "texts"),
        ([1, 2.0], "whole numbers"),
        ([1, 2.5], "numbers"),
        ([True], "truth values"),
        ([[1], np.array([2])], "lists"),
        ([{"a": 1}], "other"),
        ([1, "a"], "other"),
    ],
)
def test_kinds_of_columns(values, kind):
    assert columns_of([{"x": value} for value in values])["x"].kind == kind
