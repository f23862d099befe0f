"""Confusion matrix and figures per class, against counting by hand."""

import numpy as np
import pytest

from scalabl_pyro import metrics

RNG = np.random.default_rng(0)
PROBS = RNG.dirichlet(np.ones(4), size=200)
LABELS = RNG.integers(0, 3, size=200)  # class 3 has no row
NAMES = ("oil", "trade", "ship", "none")


def test_the_confusion_matrix_counts_rows_by_label_and_prediction():
    table = metrics.confusion_matrix(PROBS, LABELS, classes=NAMES)
    predicted = PROBS.argmax(1)
    for i, name in enumerate(NAMES):
        for j, other in enumerate(NAMES):
            assert table.loc[name, other] == ((LABELS == i) & (predicted == j)).sum()
    assert table.to_numpy().sum() == 200 and table.index.name == "label" and table.columns.name == "predicted"


def test_precision_recall_and_f1_are_those_of_the_definitions():
    table = metrics.report_by_class(PROBS, LABELS, classes=NAMES)
    predicted = PROBS.argmax(1)
    for i, name in enumerate(NAMES):
        right = ((LABELS == i) & (predicted == i)).sum()
        assert table.loc[name, "rows"] == (LABELS == i).sum()
        assert table.loc[name, "predicted"] == (predicted == i).sum()
        assert table.loc[name, "precision"] == pytest.approx(right / (predicted == i).sum())
    assert np.isnan(table.loc["none", "recall"]) and table.loc["none", "f1"] == 0
    p, r = table.loc["oil", "precision"], table.loc["oil", "recall"]
    assert table.loc["oil", "f1"] == pytest.approx(2 * p * r / (p + r))
    right = metrics.accuracy(PROBS, LABELS)
    assert (table["recall"].fillna(0) * table["rows"]).sum() / 200 == pytest.approx(right)


@pytest.mark.parametrize("function", [metrics.confusion_matrix, metrics.report_by_class])
def test_wrong_names_and_labels_are_refused(function):
    with pytest.raises(ValueError, match="classes has 2 names, but the probabilities have 4 classes"):
        function(PROBS, LABELS, classes=("a", "b"))
    with pytest.raises(ValueError, match="Labels must lie in 0 to 3"):
        function(PROBS, LABELS + 7)


def test_read_only_arrays_are_counted_without_a_warning(recwarn):
    labels = LABELS.copy()
    labels.flags.writeable = False
    assert metrics.confusion_matrix(PROBS, labels).to_numpy().sum() == 200
    assert not [w for w in recwarn if "not writable" in str(w.message)]
