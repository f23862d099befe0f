"""Values of rows and options: each kind of value, read by each task, gives the right Python value or a named error."""

import doctest
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

import scalabl_pyro as sp
from scalabl_pyro import _values
from scalabl_pyro.data import encode
from scalabl_pyro.data.labels import ClassIndex

QUESTION = {"question": "what is the sky ?", "choices": ["red", "green", "blue"]}
MISSING = {
    "None": None,
    "nan": float("nan"),
    "np.nan": np.float32("nan"),
    "tensor nan": torch.tensor(float("nan")),
    "pd.NA": pd.NA,
    "pd.NaT": pd.NaT,
    "np.datetime64": np.datetime64("NaT"),
    "masked": np.ma.masked,
    "Decimal": Decimal("nan"),
}
#: The number 2 in every type of a whole number.
TWO = {
    "int": 2,
    "float": 2.0,
    "np.int64": np.int64(2),
    "np.uint8": np.uint8(2),
    "np.float32": np.float32(2),
    "array": np.array(2),
    "tensor": torch.tensor(2),
    "float tensor": torch.tensor(2.0),
    "bfloat16": torch.tensor(2.0, dtype=torch.bfloat16),
    "Decimal": Decimal(2),
}
#: What is not one number.
NOT_A_NUMBER = {
    "list": [2],
    "tuple": (2,),
    "array": np.array([2]),
    "tensor": torch.tensor([2]),
    "dict": {"a": 2},
    "bool": True,
    "np.bool": np.True_,
    "bytes": b"2",
    "complex": 2j,
}


def each(values):
    return pytest.mark.parametrize("value", list(values.values()), ids=list(values))


@pytest.fixture(scope="module")
def tasks():
    """A task of each kind, with a row that lacks the answer, and the name of the answer's field."""
    tokenizer = tiny.tokenizer()
    text = {"text": "the sky"}
    return {
        "choice": (sp.MultipleChoice(tokenizer), QUESTION, "answer"),
        "class": (sp.SequenceClassification(tokenizer, classes=["a", "b", "c"]), text, "label"),
        "numeric class": (sp.SequenceClassification(tokenizer, classes=[0, 1, 2]), text, "label"),
        "number": (sp.Regression(tokenizer), text, "label"),
    }


TASKS = pytest.mark.parametrize("kind", ["choice", "class", "numeric class", "number"])


def target(tasks, kind, value, *, need_target=False):
    task, row, field = tasks[kind]
    return encode([{**row, field: value}], task.encode, need_target=need_target)[0].target


@TASKS
@each(MISSING)
def test_a_missing_answer_is_no_answer(tasks, kind, value):
    assert target(tasks, kind, value) is None
    with pytest.raises(ValueError, match="Row 0 has no answer"):
        target(tasks, kind, value, need_target=True)


@TASKS
@each(TWO)
def test_a_whole_number_of_any_type_is_an_answer(tasks, kind, value):
    found = target(tasks, kind, value, need_target=True)
    assert found == 2
    assert type(found) is (float if kind == "number" else int)


@TASKS
@each(NOT_A_NUMBER)
def test_what_is_not_one_number_is_refused_by_its_value(tasks, kind, value):
    if kind == "numeric class" and isinstance(value, bool | np.bool_):
        pytest.skip("True is equal to the class 1")
    with pytest.raises(ValueError, match="Row 0: ") as error:
        target(tasks, kind, value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("kind", ["choice", "class", "numeric class"])
def test_minus_one_is_an_unknown_class_and_a_number_of_a_regression(tasks, kind):
    assert target(tasks, kind, -1) is None
    assert target(tasks, kind, np.int64(-1)) is None
    assert target(tasks, "number", -1) == -1.0


@pytest.mark.parametrize("value", ["2.5", np.str_("2.5"), np.float64(2.5), torch.tensor(2.5), Decimal("2.5")], ids=repr)
def test_a_number_with_a_fraction_is_a_target_and_not_a_class(tasks, value):
    assert target(tasks, "number", value) == 2.5
    for kind in ("choice", "class", "numeric class"):
        with pytest.raises(ValueError, match=r"Row 0: .*2\.5"):
            target(tasks, kind, value)


@pytest.mark.parametrize("answer", [2, 2.0, "C", "blue", np.str_("blue"), ClassIndex(2, "ABC")], ids=repr)
def test_an_answer_is_an_index_a_label_or_the_text_of_a_choice(tasks, answer):
    assert target(tasks, "choice", answer) == 2


@pytest.mark.parametrize(
    ("choices", "answer", "expected"),
    [
        (["B", "A", "O"], "A", None),  # the label of choice 0, the text of choice 1
        (["A", "B", "O"], "A", 0),
        (["red", "red", "blue"], "red", None),
        (["1", "2", "3"], "2", 1),
        ([1, 2, 3], 2, 2),  # a number is always an index
        ([True, False], False, 1),
        (["yes", "no"], True, None),
    ],
    ids=repr,
)
def test_an_answer_that_could_mean_two_choices_is_refused(tasks, choices, answer, expected):
    task, row, _ = tasks["choice"]
    rows = [{**row, "choices": choices, "answer": answer}]
    if expected is None:
        with pytest.raises(ValueError, match=rf"Row 0: answer={answer!r}.*index"):
            encode(rows, task.encode, need_target=True)
    else:
        assert encode(rows, task.encode, need_target=True)[0].target == expected


# texts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"the sky", "the sky"),
        (np.str_("sky"), "sky"),
        (np.bytes_(b"sky"), "sky"),
        (np.array("sky"), "sky"),
        (7, "7"),
        (np.int64(7), "7"),
        (torch.tensor(7), "7"),
    ],
    ids=repr,
)
def test_a_text_of_any_type_is_read(tasks, value, expected):
    task = tasks["class"][0]
    assert task.encode({"text": value}).inputs["input_ids"] == task.tokenizer(expected).input_ids
    choice = tasks["choice"][0]
    expected_prompt = choice.prompt({**QUESTION, "question": expected, "choices": [expected, "x"]})
    assert choice.prompt({**QUESTION, "question": value, "choices": [value, "x"]}) == expected_prompt


@pytest.mark.parametrize(
    "value", [["the", "sky"], {"a": 1}, b"\xff", object(), np.array(["a", "b"])], ids=lambda value: type(value).__name__
)
def test_what_is_not_a_text_is_refused_by_its_field(tasks, value):
    for kind, field in (("class", "text"), ("choice", "question")):
        task, row, _ = tasks[kind]
        with pytest.raises(ValueError, match=rf"Row 0: the field '{field}' holds .*not a text"):
            encode([{**row, field: value}], task.encode, need_target=False)
    task, row, _ = tasks["choice"]
    with pytest.raises(ValueError, match="Row 0: choices must be a list of texts"):
        encode([{**row, "choices": ["x", value]}], task.encode, need_target=False)


@each(MISSING)
def test_a_missing_text_is_not_read_as_a_word(tasks, value):
    for kind, field in (("class", "text"), ("choice", "question"), ("choice", "choices")):
        task, row, _ = tasks[kind]
        with pytest.raises(ValueError, match=f"Row 0: the field '{field}' has no value"):
            encode([{**row, field: value}], task.encode, need_target=False)
    task, row, _ = tasks["choice"]
    with pytest.raises(ValueError, match=r"Row 0: choices=.*missing"):
        encode([{**row, "choices": ["x", value]}], task.encode, need_target=False)


# options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.int64, np.int32, torch.tensor], ids=["int64", "int32", "tensor"])
def test_whole_numbers_of_numpy_and_torch_are_options(kind, tmp_path):
    def fitted(whole, real, folder):
        blora = sp.bayesian_lora(
            tiny.causal_lm(), r=whole(2), lora_alpha=whole(8), layers_to_transform=whole(1), seed=whole(3)
        )
        task = sp.MultipleChoice(tiny.tokenizer(), max_length=whole(60))
        options = {"num_steps": whole(2), "batch_size": whole(4), "seed": whole(3), "lr": real(0.01), "progress": False}
        checkpoint = {"every": whole(1), "keep": whole(1)}
        rows = tiny.question_rows(6)
        return sp.fit(
            blora, task, rows, num_data=whole(6), checkpoint_dir=tmp_path / folder, checkpoint=checkpoint, **options
        )

    result, plain = fitted(kind, torch.tensor if kind is torch.tensor else np.float64, "a"), fitted(int, float, "b")
    np.testing.assert_allclose(result.history["loss"], plain.history["loss"], rtol=1e-6)
    result.posterior.save_pretrained(tmp_path / "posterior")


def test_numpy_numbers_are_options_of_predictions():
    blora = sp.bayesian_lora(tiny.causal_lm(), r=2)
    posterior = sp.fit(blora, sp.MultipleChoice(tiny.tokenizer()), tiny.question_rows(4), num_steps=1, progress=False)
    one, other = (
        posterior.posterior.predict(
            tiny.question_rows(5), num_draws=whole(2), seed=whole(1), batch_size=whole(2), draws_per_pass=whole(1)
        )
        for whole in (np.int64, int)
    )
    np.testing.assert_array_equal(one.log_probs, other.log_probs)


def test_a_number_that_arrives_as_a_text_names_the_cause():
    blora, task = sp.bayesian_lora(tiny.causal_lm(), r=2), sp.MultipleChoice(tiny.tokenizer())
    with pytest.raises(ValueError, match=r"lr='1e-3' must be positive and finite\. It is a text\. YAML"):
        sp.fit(blora, task, tiny.question_rows(4), lr="1e-3", progress=False)
    with pytest.raises(ValueError, match=r"num_steps='10' must be a whole number, 1 or more\.$"):
        sp.fit(blora, task, tiny.question_rows(4), num_steps="10", progress=False)


@pytest.mark.parametrize("noise_scale", [np.float32(0.5), torch.tensor(0.5), np.float64(0.5)], ids=repr)
def test_a_noise_of_any_type_of_number_is_taken(noise_scale):
    assert sp.Regression(tiny.tokenizer(), noise_scale=noise_scale).noise_scale.item() == 0.5


def test_examples_of_docstrings_run():
    result = doctest.testmod(_values)
    assert result.attempted and not result.failed
