"""The table of predictions beside the rows: index, columns, classes by name, and which rows need a review."""

import numpy as np
import pandas as pd
import pytest
import tiny

import scalabl_pyro as sp
from scalabl_pyro.prediction.averaged import AveragedNumericPrediction, AveragedPrediction

PROBS = np.array([[0.9, 0.05, 0.05], [0.3, 0.4, 0.3], [0.1, 0.2, 0.7]])
CLASSES = ("oil", "trade", "ship")
NOTES = pd.DataFrame({"note": ["a", "b", "c"], "id": [7, 8, 9]}, index=["x", "y", "z"])


def prediction(target=None):
    return sp.Prediction(np.log(PROBS)[None], target, CLASSES)


def averaged():
    return AveragedPrediction(PROBS, np.zeros(3), None, None, CLASSES, num_draws=5)


def numbers(sd=(1.0, 2.0, 3.0)):
    zero = np.zeros((1, 3))
    return sp.NumericPrediction(zero, zero + np.square(sd), zero, None, None, is_normal=True)


def averaged_numbers():
    return AveragedNumericPrediction(np.zeros(3), np.array([1.0, 4.0, 9.0]), np.zeros(3), None, None, num_draws=5)


@pytest.mark.parametrize("make", [prediction, averaged, numbers, averaged_numbers])
def test_the_rows_come_first_with_the_index_of_their_table(make):
    alone, frame = make().to_frame(), make().to_frame(NOTES)
    assert frame.index.tolist() == ["x", "y", "z"]
    assert list(frame.columns) == ["note", "id", *alone.columns]
    pd.testing.assert_frame_equal(frame[alone.columns].reset_index(drop=True), alone)
    pd.testing.assert_frame_equal(frame[["note", "id"]], NOTES)
    from_dicts = make().to_frame(NOTES.to_dict("records"))
    assert from_dicts.index.tolist() == [0, 1, 2] and from_dicts["note"].tolist() == ["a", "b", "c"]


@pytest.mark.parametrize("make", [prediction, averaged])
def test_each_class_has_a_column_by_its_name(make):
    frame = make().to_frame(class_probs=True)
    np.testing.assert_allclose(frame[["p(oil)", "p(trade)", "p(ship)"]], PROBS, rtol=1e-12)
    assert "p(oil)" not in make().to_frame()


@pytest.mark.parametrize("make", [prediction, averaged])
@pytest.mark.parametrize(
    ("limit", "expected"),
    [(0.2, [False, True, True]), (0.5, [False, True, False]), (-np.inf, [True] * 3), (1, [False] * 3)],
)
def test_a_row_needs_a_review_if_its_doubt_is_above_the_limit(make, limit, expected):
    assert make().to_frame(review_above=limit)["needs_review"].tolist() == expected


@pytest.mark.parametrize("make", [numbers, averaged_numbers])
def test_a_number_needs_a_review_if_its_sd_is_above_the_limit(make):
    assert make().to_frame(review_above=2.0)["needs_review"].tolist() == [False, False, True]
    assert "needs_review" not in make().to_frame()


def test_unknown_answers_stay_empty_beside_the_rows():
    frame = prediction(np.array([0, -1, 2])).to_frame(NOTES, review_above=0.2)
    assert frame["target"].dropna().to_dict() == {"x": "oil", "z": "ship"}
    assert frame.loc["y", "needs_review"]


@pytest.mark.parametrize("make", [prediction, averaged, numbers, averaged_numbers])
def test_wrong_rows_and_limits_are_refused(make):
    with pytest.raises(ValueError, match="data has 2 rows, but 3 rows were predicted"):
        make().to_frame(NOTES[:2])
    with pytest.raises(ValueError, match=r"data has a column 'prediction'.*rename\(columns=\{'prediction': 'given_"):
        make().to_frame(NOTES.assign(prediction=1))
    for limit in (float("nan"), "0.3", True):
        with pytest.raises(ValueError, match="review_above="):
            make().to_frame(review_above=limit)


def test_a_limit_above_every_doubt_of_classes_is_refused():
    """30 instead of 0.3 would send no row to a person."""
    with pytest.raises(ValueError, match="review_above=30 is above 1, the largest doubt that a row can have"):
        prediction(np.array([0, 1, 2])).to_frame(review_above=30)


def test_a_real_prediction_keeps_the_order_of_its_rows():
    rows = tiny.question_rows(8)
    task = sp.MultipleChoice(tiny.tokenizer())
    blora = sp.bayesian_lora(tiny.causal_lm())
    posterior = sp.fit(blora, task, rows, num_steps=2, batch_size=4, progress=False).posterior
    table = pd.DataFrame(rows).set_index(pd.Index(range(100, 108)))
    found = posterior.predict(table, num_draws=2)
    frame = found.to_frame(table, class_probs=True)
    assert frame["question"].tolist() == [row["question"] for row in rows] and frame.index[0] == 100
    best = frame[[f"p({name})" for name in found.classes]].idxmax(axis=1)
    assert (best == "p(" + frame["prediction"] + ")").all()
