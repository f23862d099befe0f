"""The sentences at the top of a report, held against counts made by hand."""

import numpy as np
import pytest

import scalabl_pyro as sp
from scalabl_pyro.cli.report_verdict import verdict
from scalabl_pyro.prediction.label_sets import LabelSetPrediction


def said(found, metrics, limit):
    return verdict(found, found.to_frame(review_above=limit), metrics, review_above=limit)


def classes(confidence, num_right, count=100):
    """Verdict on rows that are answered with one confidence, of which some are right."""
    probs = np.tile([confidence, 1 - confidence], (count, 1))
    target = np.where(np.arange(count) < num_right, 0, 1)
    found = sp.Prediction(np.log(probs)[None], target, ("a", "b"))
    return verdict(found, found.to_frame(), found.metrics(bootstrap=200), review_above=None)


@pytest.mark.parametrize(
    ("confidence", "num_right", "words"),
    [(0.8, 80, "about as sure as it should be"), (0.8, 74, "about as sure"), (0.95, 80, "too sure"), (0.6, 80, "less")],
)
def test_confidence_is_held_against_accuracy(confidence, num_right, words):
    share, sure = classes(confidence, num_right)
    assert share.startswith(f"{num_right} % of the answers for 100 rows are right (95 % interval: ")
    assert (
        words in sure and f"right in {num_right} % of the rows, and on average it says {100 * confidence:.0f} %" in sure
    )


def test_the_limit_counts_answers_mistakes_and_rows_for_a_person():
    probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.55, 0.45]])
    found = sp.Prediction(np.log(probs)[None], np.array([0, 1, 0, 1]), ("a", "b"))
    metrics = found.metrics(bootstrap=0)  # has no intervals
    assert said(found, metrics, None)[0] == "50 % of the answers for 4 rows are right."
    last = said(found, metrics, 0.3 + 1e-9)[-1]
    assert last == (
        "At the limit 0.3, the model answers 3 of 4 rows (75 %) alone. 33.3 % of these answers are wrong. A person "
        "reads the other 1."
    )
    last = said(found, metrics, 0.0)[-1]
    assert last == "At the limit 0, the model answers 0 of 4 rows (0 %) alone. A person reads the other 4."
    assert said(found, metrics, 1.0)[-1].endswith("No row is left for a person.")


def test_numbers_say_how_far_they_are_off():
    means, sds, target = np.array([[1.0, 2.0, 3.0, 4.0]]), np.full((1, 4), 0.5), np.array([1.0, 2.5, 6.0, 4.0])
    found = sp.NumericPrediction(means, sds, means, np.zeros((1, 4)), target, is_normal=True)
    frame = found.to_frame(review_above=0.1)
    off, inside, limit = verdict(found, frame, found.metrics(bootstrap=20), review_above=0.1)
    assert off == "On average, a prediction is 0.875 away from the answer, in the units of the answer."
    assert inside.startswith("75 % of the answers lie within two standard deviations")
    assert limit.startswith("At the limit 0.1, 0 of 4 rows (0 %) are answered. A person reads the other 4.")


def test_sets_of_labels_are_right_where_every_label_is():
    logits = np.array([[[4.0, -4.0], [4.0, 4.0], [-4.0, -4.0]]])
    found = LabelSetPrediction(logits, np.zeros((1, 3)), np.array([[1, 0], [1, 0], [0, 0]]), ("a", "b"))
    (share,) = verdict(found, found.to_frame(), found.metrics(bootstrap=20), review_above=None)
    assert share.startswith("67 % of the sets of labels for 3 rows are right")
