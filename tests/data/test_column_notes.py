"""Gaps are counted and named, and columns of the wrong type are not used in silence."""

import logging

import numpy as np
import pandas as pd
import pytest
import tiny

import scalabl_pyro as sp
from scalabl_pyro.data import encode
from scalabl_pyro.data.model_names import check_model_names

TABLE = pd.DataFrame(
    {"note": ["the sky", None, "grass", None, "rose", "night"], "class": ["a", "b", None, "a", float("nan"), "b"]}
)


def task(**options):
    return sp.SequenceClassification(tiny.tokenizer(), classes=["a", "b"], text="note", target="class", **options)


def rows(**columns):
    return pd.DataFrame(columns).to_dict("records")


def test_all_rows_without_a_text_are_counted():
    with pytest.raises(ValueError, match=r"Row 1: the field 'note' has no value.*2 of 6 rows \(1, 3\) have no value"):
        encode(TABLE.to_dict("records"), task().encode, need_target=False)


def test_a_single_gap_is_named_once():
    with pytest.raises(
        ValueError, match=r"Row 1: the field 'note' has no value \(\w+\): fill it, or leave the row out\.$"
    ):
        encode(TABLE[:3].to_dict("records"), task().encode, need_target=False)


def test_all_rows_without_an_answer_are_counted():
    data = TABLE.dropna(subset=["note"]).to_dict("records")
    with pytest.raises(ValueError, match=r"Row 1 has no answer.*2 of 4 rows \(1, 2\) have none\.") as caught:
        encode(data, task().encode, need_target=True)
    assert "['note', 'class']" in str(caught.value)
    assert [e.target for e in encode(data, task().encode, need_target=False)] == [0, None, None, 1]


def logged(caplog, task, data):
    with caplog.at_level(logging.WARNING, logger="scalabl_pyro.data"):
        encode(data, task.encode, need_target=False)
    return caplog.text


def test_empty_texts_are_counted(caplog):
    data = rows(note=["the sky", " ", "grass"], **{"class": ["a", "b", "a"]})

    class Bos(sp.SequenceClassification):
        def encode(self, row):
            example = super().encode(row)
            example.inputs["input_ids"].append(5)
            return example

    own = Bos(tiny.tokenizer(), classes=["a", "b"], text="note", target="class")
    assert "1 of 3 rows (1) have an empty text in 'note'" in logged(caplog, own, data)


def test_a_column_of_numbers_as_the_text_is_named(caplog):
    assert "field 'note' holds numbers, such as 3" in logged(caplog, task(), rows(note=[3, 4], **{"class": ["a", "b"]}))


def test_answers_that_hold_numbers_as_texts_are_named(caplog):
    own = sp.Regression(tiny.tokenizer(), target="price")
    found = logged(caplog, own, rows(text=["sky", "rose"], price=["2.5", "3"]))
    assert "field 'price' holds numbers as texts in 2 of 2 rows, such as '2.5'" in found


def test_good_columns_say_nothing(caplog):
    assert not logged(caplog, task(), TABLE.dropna().to_dict("records"))
    assert not logged(caplog, sp.Regression(tiny.tokenizer()), rows(text=["sky"], label=[np.float64(2.5)]))
    assert not logged(caplog, sp.MultipleChoice(tiny.tokenizer()), tiny.question_rows(3))


def test_numbers_in_another_form_say_what_to_do():
    with pytest.raises(ValueError, match=r"'2,5' is not a number.*decimal=','"):
        encode(rows(text=["sky"], label=["2,5"]), sp.Regression(tiny.tokenizer()).encode, need_target=True)
    with pytest.raises(ValueError, match=r"'0' is not a class.*a number as a text: convert the column"):
        encode(rows(note=["sky"], **{"class": ["0"]}), task().encode, need_target=True)


def test_the_names_of_the_model_are_compared(caplog):
    check_model_names(["a", "b"], {0: "A", 1: "B"})
    check_model_names(["a", "b"], {0: "LABEL_0", 1: "LABEL_1"})
    check_model_names(["a", "b"], {0: "A", 1: "B", 2: "C"})  # the number is the likelihood's to check
    assert not caplog.text
    with pytest.raises(ValueError, match="same names in different orders"):
        check_model_names(["a", "b"], {0: "B", 1: "A"})
    with caplog.at_level(logging.WARNING, logger="scalabl_pyro.data"):
        for _ in range(2):
            check_model_names(["a", "b"], {0: "POSITIVE", 1: "NEGATIVE"})
    assert caplog.text.count("config.id2label has the classes ['POSITIVE', 'NEGATIVE']") == 1
