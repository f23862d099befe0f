"""Classes by name: names of any type, and the orders of a data set and a model."""

import doctest
import logging
import pickle

import numpy as np
import pandas as pd
import pytest
import tiny
from datasets import ClassLabel, Dataset, Features, Value

import scalabl_pyro as sp
from scalabl_pyro.data import encode, labels, read_rows

TEXT = "the sky"


def classifying(classes):
    return sp.SequenceClassification(tiny.tokenizer(), classes=classes)


def named(names, label=0):
    """A data set of one row, whose label is a column with names."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(names))})
    return Dataset.from_list([{"text": TEXT, "label": label}], features=features)


def target(task, data):
    return encode(read_rows(data), task.encode, need_target=False)[0].target


@pytest.mark.parametrize(
    ("classes", "by_label"),
    [
        ([1, 2, 3], {1: 0, 2.0: 1, np.int64(3): 2, "3": 2}),
        ([2, 1, 0], {0: 2, 1: 1, 2: 0}),
        ([-1, 1], {-1: 0, 1: 1}),
        ([True, False], {True: 0, np.False_: 1, 0: 1, "True": 0}),
        ([0.5, 1.5], {0.5: 0, np.float64(1.5): 1}),
        (["no", "yes"], {"no": 0, 1: 1, np.str_("yes"): 1}),
        (["False", "True"], {True: 1, False: 0}),
        (np.array(["a", "b"]), {"a": 0, 1: 1}),
        (np.array([5, 6]), {5: 0, 6: 1}),
        (pd.Series(["a", "b"]), {"b": 1}),
    ],
    ids=repr,
)
def test_a_label_is_matched_by_name(classes, by_label):
    task = classifying(classes)
    assert {label: task.parse_target(label) for label in by_label} == by_label


@pytest.mark.parametrize(
    ("classes", "label", "message"),
    [
        (["1", "2", "3"], 1, r"label 1 could be the class named '1' or the class with index 1.*0: '1', 1: '2'"),
        (["no", "yes"], True, r"label True is a truth value.*0: 'no', 1: 'yes'.*classes=\[False, True\]"),
        ([1, 2, 3], 0, r"label 0 is not one of the classes \(0: 1, 1: 2, 2: 3\)"),
        ([1, 2, 3], "4", r"label '4' is not a class"),
        ([True, False], 2, r"label 2 is not one of the classes"),
    ],
)
def test_a_label_that_could_mean_another_class_is_refused(classes, label, message):
    with pytest.raises(ValueError, match=message):
        classifying(classes).parse_target(label)


@pytest.mark.parametrize("classes", [["a", 1], [True, 1], [1, "1"], [None, "a"], [["a"], ["b"]], [1, 1.0]], ids=repr)
def test_names_of_several_types_are_refused(classes):
    with pytest.raises(ValueError, match="classes="):
        classifying(classes)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"only"}, r"is a set, which has no order.*Give a list"),
        (frozenset(["no", "yes"]), r"is a set, which has no order"),
        ({0: "no", 1: "yes"}, r"is a dict.*classes=\['no', 'yes'\]"),
        ({"yes": 1, "no": 0}, r"is a dict.*classes=\['no', 'yes'\]"),
        ({"a": "b", "c": "d"}, r"is a dict.*Give a list"),
    ],
    ids=["set", "frozenset", "id2label", "label2id", "other dict"],
)
def test_classes_without_an_order_are_refused(classes, message):
    with pytest.raises(ValueError, match=message):
        classifying(classes)


@pytest.mark.parametrize("classes", [[1, 2, 3], [True, False], ["a", "b"]], ids=repr)
def test_classes_keep_their_type_when_they_are_saved(classes, tmp_path):
    llm = tiny.classifier(num_labels=len(classes))
    rows = [{"text": TEXT, "label": label} for label in classes]
    posterior = sp.fit(sp.bayesian_lora(llm, r=2), classifying(classes), rows, num_steps=1, progress=False).posterior
    posterior.save_pretrained(tmp_path / "posterior")
    llm = tiny.classifier(num_labels=len(classes))
    loaded = sp.Posterior.from_pretrained(llm, tmp_path / "posterior")
    assert loaded.task.classes == tuple(classes)
    prediction = loaded.predict(rows, num_draws=2)
    assert prediction.target.tolist() == list(range(len(classes)))
    assert prediction.to_frame()["target"].tolist() == classes


# the order of a data set --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [str, str.upper])
@pytest.mark.parametrize("view", [lambda d: d, lambda d: d.with_format("torch"), lambda d: d.with_format("pandas")])
def test_a_data_set_with_another_order_is_matched_by_name(view, case):
    task = classifying(["ham", "spam", "else"])
    data = view(named(map(case, ["spam", "else", "ham"])))
    assert target(task, data) == 1
    assert read_rows(data) == [{"text": TEXT, "label": 0}]
    assert target(task, named(["spam", "ham"], label=-1)) is None


def test_a_prediction_calls_a_class_as_the_data_set_does():
    rows, task = named(["spam", "ham"]), classifying(["ham", "spam"])
    result = sp.fit(sp.bayesian_lora(tiny.classifier(num_labels=2), r=2), task, rows, num_steps=1, progress=False)
    assert result.posterior.predict(rows).to_frame()["target"].tolist() == ["spam"]


def test_names_that_only_partly_agree_are_refused_with_both_orders():
    with pytest.raises(ValueError, match=r"label 1 is 'eggs'.*0: 'spam', 1: 'eggs'.*0: 'ham', 1: 'spam'"):
        target(classifying(["ham", "spam"]), named(["spam", "eggs"], label=1))


def test_names_that_share_nothing_are_matched_by_position_with_a_word(caplog):
    with caplog.at_level(logging.WARNING, logger="scalabl_pyro"):
        assert target(classifying(["bad", "good"]), named(["neg", "pos"], label=1)) == 1
    assert "0: 'neg', 1: 'pos'" in caplog.text and "0: 'bad', 1: 'good'" in caplog.text


def test_many_rows_with_other_names_log_one_line(caplog):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["minus", "plus"])})
    data = Dataset.from_list([{"text": TEXT, "label": i % 2} for i in range(9)], features=features)
    with caplog.at_level(logging.WARNING, logger="scalabl_pyro"):
        encode(read_rows(data), classifying(["bad", "good"]).encode, need_target=True)
    assert len(caplog.records) == 1


def test_the_answer_of_a_question_is_matched_by_name():
    features = Features({**{k: Value("string") for k in ("question",)}, "answer": ClassLabel(names=["no", "yes"])})
    data = Dataset.from_list([{"question": TEXT, "answer": 1}], features=features)
    task = sp.MultipleChoice(tiny.tokenizer())
    for choices, expected in ((["yes", "no"], 0), (["red", "blue"], 1)):
        assert target(task, [{**row, "choices": choices} for row in read_rows(data)]) == expected


def test_an_index_with_names_is_a_plain_number_elsewhere():
    label = labels.ClassIndex(1, ("no", "yes"))
    assert label == 1 and label.name == "yes" and hash(label) == hash(1)
    again = pickle.loads(pickle.dumps(label))
    assert (again, again.names) == (1, ("no", "yes"))


# the order of a model -----------------------------------------------------------------------------------------


def model_with(names):
    llm = tiny.classifier(num_labels=len(names))
    llm.config.id2label = dict(enumerate(names))
    return sp.bayesian_lora(llm, r=2)


ROWS = [{"text": TEXT, "label": 0}]


@pytest.mark.parametrize("names", [["POSITIVE", "NEGATIVE"], ["positive", "else"]], ids=repr)
def test_a_model_with_another_order_is_refused_with_both(names):
    with pytest.raises(ValueError, match=rf"0: 'negative', 1: 'positive'.*id2label has \(0: '{names[0]}'"):
        sp.fit(model_with(names), classifying(["negative", "positive"]), ROWS, num_steps=1, progress=False)


@pytest.mark.parametrize("names", [["NEGATIVE", "POSITIVE"], ["LABEL_0", "LABEL_1"], ["bad", "good"]], ids=repr)
def test_a_model_with_the_same_order_or_other_words_is_taken(names):
    sp.fit(model_with(names), classifying(["negative", "positive"]), ROWS, num_steps=1, progress=False)


def test_examples_of_docstrings_run():
    result = doctest.testmod(labels)
    assert result.attempted and not result.failed


def test_capital_letters_tell_classes_apart_where_names_are_equal():
    task = classifying(["A", "a"])
    assert [target(task, named(["a", "A"], label)) for label in (0, 1)] == [1, 0]
