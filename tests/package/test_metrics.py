"""Metrics against numbers worked out by hand, and the laws that they obey on any data."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from scalabl_pyro import metrics
from scalabl_pyro.metrics import CLASSIFICATION, classification_report

PROPERTY = settings(max_examples=100, derandomize=True, deadline=None)

#: Three right rows of four; every number below can be checked by hand.
PROBS = np.array([[0.9, 0.1, 0.0], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8], [0.46, 0.3, 0.24]])
LABELS = np.array([0, 1, 2, 1])


@st.composite
def predictions(draw):
    """(N, C) probabilities and labels; counts out of a total, so that ties, zeros, ones and bin edges are common."""
    rows, classes = draw(st.integers(1, 25)), draw(st.integers(2, 5))
    if draw(st.booleans()):
        weights = draw(hnp.arrays(np.int64, (rows, classes), elements=st.integers(0, 20))).astype(float)
        weights[:, 0] += weights.sum(1) == 0
    else:
        weights = draw(hnp.arrays(np.float64, (rows, classes), elements=st.floats(0.01, 1.0)))
    labels = draw(hnp.arrays(np.int64, rows, elements=st.integers(0, classes - 1)))
    return weights / weights.sum(1, keepdims=True), labels


def same(a, b):
    return a == pytest.approx(b, abs=1e-6, nan_ok=True)


# by hand ------------------------------------------------------------------------------------------------------


def test_accuracy_by_hand():
    assert metrics.accuracy(PROBS, LABELS) == 0.75


def test_nll_by_hand():
    assert metrics.nll(PROBS, LABELS) == pytest.approx(-(math.log(0.9 * 0.6 * 0.8 * 0.3)) / 4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nll_of_an_answer_ruled_out_is_infinite(dtype):
    assert metrics.nll(np.array([[1.0, 0.0]], dtype=dtype), np.array([1])) == math.inf


def test_brier_by_hand():
    rows = [0.01 + 0.01, 0.04 + 0.16 + 0.04, 0.01 + 0.01 + 0.04, 0.2116 + 0.49 + 0.0576]
    assert metrics.brier(PROBS, LABELS) == pytest.approx(sum(rows) / 4)


def test_ece_by_hand():
    # One bin: mean confidence (.9 + .6 + .8 + .46) / 4 against 3 right of 4.
    assert metrics.ece(PROBS, LABELS, num_bins=1) == pytest.approx(0.75 - 0.69)
    # Two bins: {.46} with accuracy 0, {.6, .8, .9} with accuracy 1.
    assert metrics.ece(PROBS, LABELS, num_bins=2) == pytest.approx(0.25 * 0.46 + 0.75 * (1 - 2.3 / 3))


def test_adaptive_ece_by_hand():
    # Equal counts: {.46, .6} with accuracy 1/2, {.8, .9} with accuracy 1.
    assert metrics.adaptive_ece(PROBS, LABELS, num_bins=2) == pytest.approx(0.5 * 0.03 + 0.5 * 0.15)


def test_rounding_of_float32_does_not_part_rows_that_tie():
    rng = np.random.default_rng(0)
    confidence = np.float32(0.7) + np.float32(1e-7) * rng.standard_normal(1000).astype(np.float32)
    labels = (np.arange(1000) % 10 >= 7).astype(int)  # right in 7 of 10 rows
    assert metrics.adaptive_ece(np.stack([confidence, 1 - confidence], 1), labels) < 1e-6


@pytest.mark.parametrize("num_bins", [1, 2, 15, 40])
@pytest.mark.parametrize("right", [0.7, 0.4])
def test_adaptive_ece_of_rows_that_tie_is_their_gap(right, num_bins):
    """A constant confidence of 0.7 is calibrated at an accuracy of 0.7, in whichever order the rows come."""
    labels = np.repeat([0, 1], [round(100 * right), 100 - round(100 * right)])
    probs = np.tile([0.7, 0.3], (100, 1))
    assert metrics.adaptive_ece(probs, labels, num_bins=num_bins) == pytest.approx(abs(0.7 - right), abs=1e-12)


def test_adaptive_ece_of_few_values_is_exact_where_bins_cut_through_them():
    """Two values, each with its own accuracy, in 15 bins: the right rows of a value are spread over its bins."""
    probs = np.repeat([[0.6, 0.4], [0.9, 0.1]], 50, axis=0)
    labels = np.concatenate([np.arange(50) >= 30, np.arange(50) >= 40]).astype(int)
    assert metrics.adaptive_ece(probs, labels) == pytest.approx(0.5 * 0.0 + 0.5 * 0.1, abs=0.004)


def test_risk_coverage_by_hand():
    coverage, risk = metrics.risk_coverage(PROBS, LABELS)
    np.testing.assert_allclose(coverage, [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(risk, [0, 0, 0, 0.25])
    assert metrics.aurc(PROBS, LABELS) == pytest.approx(0.25 / 4)


def test_risk_coverage_in_the_order_of_another_score():
    wrong = PROBS.argmax(1) != LABELS
    worst_first = np.where(wrong, 0.0, 1.0)
    _, risk = metrics.risk_coverage(PROBS, LABELS, uncertainty=worst_first)
    np.testing.assert_allclose(risk, [1, 1 / 2, 1 / 3, 1 / 4])
    assert metrics.aurc(PROBS, LABELS, uncertainty=worst_first) == pytest.approx(np.mean(risk))
    same = metrics.risk_coverage(PROBS, LABELS, uncertainty=1 - PROBS.max(1))
    np.testing.assert_array_equal(same, metrics.risk_coverage(PROBS, LABELS))


def test_rows_of_one_score_are_answered_in_random_order():
    _, risk = metrics.risk_coverage(PROBS, LABELS, uncertainty=np.zeros(4))
    np.testing.assert_allclose(risk, 0.25)


@pytest.mark.parametrize("uncertainty", [np.zeros(3), np.zeros((4, 1)), np.array([0, 0, 0, np.nan])])
def test_an_uncertainty_must_be_a_number_a_row(uncertainty):
    with pytest.raises(ValueError, match=r"expected \(4,\), one finite number per row"):
        metrics.risk_coverage(PROBS, LABELS, uncertainty=uncertainty)


def test_entropy_by_hand():
    values = metrics.entropy(np.array([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]]))
    np.testing.assert_allclose(values, [math.log(2), 0, -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))])


def test_auroc_by_hand():
    score, positive = np.array([0.1, 0.4, 0.4, 7.0]), np.array([False, False, True, True])
    assert metrics.auroc(score, positive) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert math.isnan(metrics.auroc(score, np.ones(4, dtype=bool)))
    assert math.isnan(metrics.auroc(score, np.zeros(4, dtype=bool)))


def test_error_auroc_by_hand():
    assert metrics.error_auroc(PROBS, LABELS) == 1.0  # the wrong row has the largest entropy
    assert metrics.error_auroc(PROBS, np.array([0, 1, 0, 0])) == pytest.approx(1 / 3)  # above one right row of three
    assert math.isnan(metrics.error_auroc(PROBS, PROBS.argmax(1)))


def test_ood_auroc_by_hand():
    assert metrics.ood_auroc(np.array([0.1, 0.2]), np.array([0.3, 0.4])) == 1.0
    assert metrics.ood_auroc(np.array([0.3, 0.4]), np.array([0.1, 0.2])) == 0.0
    assert metrics.ood_auroc(np.array([0.1, 0.3]), np.array([0.2])) == 0.5


def test_reliability_by_hand():
    table = metrics.reliability(PROBS, LABELS, num_bins=4)
    assert table.index.tolist() == [1, 2, 3]
    np.testing.assert_allclose(table["confidence"], [0.46, 0.6, 0.85])
    np.testing.assert_allclose(table["accuracy"], [0, 1, 1])
    assert table["count"].tolist() == [1, 1, 2]


def test_reliability_of_equal_numbers_by_hand():
    table = metrics.reliability(PROBS, LABELS, num_bins=2, bins="mass")
    np.testing.assert_allclose(table["confidence"], [0.53, 0.85])
    np.testing.assert_allclose(table["accuracy"], [0.5, 1])
    assert table["count"].tolist() == [2, 2]


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_intervals_of_the_reliability_table_are_those_of_scipy(level):
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(3), 200)
    labels = rng.integers(3, size=200)
    table = metrics.reliability(probs, labels, level=level)
    for _, line in table.iterrows():
        right = round(line["accuracy"] * line["count"])
        expected = stats.binomtest(right, int(line["count"])).proportion_ci(level, method="wilson")
        assert (line["low"], line["high"]) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_bin_without_mistakes_still_has_an_interval():
    table = metrics.reliability(np.tile([0.9, 0.1], (5, 1)), np.zeros(5, dtype=int))
    assert table["high"].item() == 1.0 and 0.5 < table["low"].item() < 0.6  # 1 / (1 + 1.96^2 / 5) = 0.566


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_bins": 0}, "num_bins=0 must be a whole number"),
        ({"bins": "count"}, "bins='count' is unknown"),
        ({"level": 0}, "level=0 must lie between 0 and 1"),
    ],
    ids=str,
)
def test_options_of_the_reliability_table_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        metrics.reliability(PROBS, LABELS, **options)


@pytest.mark.parametrize(
    ("threshold", "mistakes", "confident"), [(0, 1, 4), (0.45, 1, 4), (0.46, 0, 3), (0.8, 0, 1), (0.9, 0, 0)]
)
def test_confident_mistakes_by_hand(threshold, mistakes, confident):
    """A probability must exceed the threshold: 0.8 does not count above 0.8."""
    assert metrics.confident_mistakes(PROBS, LABELS, threshold=threshold) == (mistakes, confident, 4)


@pytest.mark.parametrize("threshold", [-0.1, 1, 90, math.nan, "0.9", True])
def test_a_threshold_is_a_probability_below_one(threshold):
    with pytest.raises(ValueError, match=r"threshold=.* must be a probability"):
        metrics.confident_mistakes(PROBS, LABELS, threshold=threshold)


# laws ---------------------------------------------------------------------------------------------------------

BOUNDS = {
    "accuracy": (0, 1),
    "nll": (0, math.inf),
    "ece": (0, 1),
    "adaptive_ece": (0, 1),
    "brier": (0, 2),
    "error_auroc": (0, 1),
    "aurc": (0, 1),
}


def test_every_metric_of_the_report_is_covered_here():
    assert set(BOUNDS) == set(CLASSIFICATION)


@PROPERTY
@given(predictions())
def test_metrics_stay_within_their_bounds(data):
    for name, fn in CLASSIFICATION.items():
        value, (low, high) = fn(*data), BOUNDS[name]
        assert isinstance(value, float)
        assert low - 1e-6 <= value <= high + 1e-6 or (name == "error_auroc" and math.isnan(value))


@PROPERTY
@given(predictions(), st.randoms(use_true_random=False))
@pytest.mark.parametrize("name", CLASSIFICATION)
def test_metrics_do_not_depend_on_the_order_of_rows(name, data, random):
    probs, labels = data
    order = random.sample(range(len(labels)), len(labels))
    assert same(CLASSIFICATION[name](probs[order], labels[order]), CLASSIFICATION[name](probs, labels))


@PROPERTY
@given(predictions(), st.randoms(use_true_random=False))
def test_proper_scores_do_not_depend_on_the_order_of_classes(data, random):
    probs, labels = data
    order = random.sample(range(probs.shape[1]), probs.shape[1])
    for fn in (metrics.nll, metrics.brier):
        assert same(fn(probs[:, order], np.argsort(order)[labels]), fn(probs, labels))
    np.testing.assert_allclose(metrics.entropy(probs[:, order]), metrics.entropy(probs), atol=1e-12)


@PROPERTY
@given(predictions())
@pytest.mark.parametrize("name", ["accuracy", "nll", "ece", "brier"])
def test_rows_seen_twice_change_nothing(name, data):
    probs, labels = data
    twice = np.concatenate([probs, probs]), np.concatenate([labels, labels])
    assert same(CLASSIFICATION[name](*twice), CLASSIFICATION[name](probs, labels))


@PROPERTY
@given(predictions())
def test_single_precision_gives_the_same_proper_scores(data):
    probs, labels = data
    single = probs.astype(np.float32)
    assert metrics.nll(single, labels) == pytest.approx(metrics.nll(probs, labels), rel=1e-5, abs=1e-5)
    assert metrics.brier(single, labels) == pytest.approx(metrics.brier(probs, labels), abs=1e-5)


@PROPERTY
@given(predictions(), st.integers(1, 20))
@example((np.array([[1.0, 0.0], [0.95, 0.05]]), np.array([1, 0])), 15)  # a probability of 1
@example((np.array([[0.6, 0.4], [0.65, 0.35]]), np.array([1, 0])), 5)  # a probability on the edge of two bins
@example((np.array([[0.2] * 5, [0.0, 0.25, 0.25, 0.25, 0.25]]), np.array([0, 0])), 15)  # the same, where floats round
def test_the_reliability_table_gives_the_ece(data, num_bins):
    probs, labels = data
    table = metrics.reliability(probs, labels, num_bins=num_bins)
    from_table = (table["count"] * (table["confidence"] - table["accuracy"]).abs()).sum() / len(labels)
    assert metrics.ece(probs, labels, num_bins=num_bins) == pytest.approx(from_table, abs=1e-6)


@PROPERTY
@given(predictions(), st.integers(1, 20))
def test_the_reliability_table_accounts_for_every_row(data, num_bins):
    probs, labels = data
    table = metrics.reliability(probs, labels, num_bins=num_bins)
    assert list(table.columns) == ["confidence", "accuracy", "count", "low", "high"]
    assert ((table["low"] <= table["accuracy"]) & (table["accuracy"] <= table["high"])).all()
    assert table["count"].sum() == len(labels) and (table["count"] >= 1).all()
    assert np.average(table["accuracy"], weights=table["count"]) == pytest.approx(metrics.accuracy(probs, labels))
    assert np.average(table["confidence"], weights=table["count"]) == pytest.approx(probs.max(1).mean())
    low, high = table.index / num_bins, (table.index + 1) / num_bins
    assert ((low - 1e-9 <= table["confidence"]) & (table["confidence"] <= high + 1e-9)).all()


@PROPERTY
@given(predictions())
def test_one_bin_compares_mean_confidence_with_accuracy(data):
    probs, labels = data
    gap = abs(probs.max(1).mean() - metrics.accuracy(probs, labels))
    assert metrics.ece(probs, labels, num_bins=1) == pytest.approx(gap, abs=1e-6)
    assert metrics.adaptive_ece(probs, labels, num_bins=1) == pytest.approx(gap, abs=1e-6)


def test_a_certain_answer_shares_the_last_bin():
    """Guo et al. (2017): the bins cover (0, 1], so a probability of 1 has no bin of its own."""
    probs, labels = np.array([[1.0, 0.0], [0.95, 0.05]]), np.array([1, 0])
    assert metrics.ece(probs, labels) == pytest.approx(abs(0.975 - 0.5))


@PROPERTY
@given(predictions())
def test_certain_and_right_is_perfect(data):
    probs, labels = np.eye(data[0].shape[1])[data[1]], data[1]
    best = {"accuracy": 1, "nll": 0, "ece": 0, "adaptive_ece": 0, "brier": 0, "aurc": 0}
    assert {name: CLASSIFICATION[name](probs, labels) for name in best} == best


@PROPERTY
@given(predictions())
def test_certain_and_wrong_is_worst(data):
    num_classes = data[0].shape[1]
    probs, labels = np.eye(num_classes)[(data[1] + 1) % num_classes], data[1]
    worst = {"accuracy": 0, "ece": 1, "adaptive_ece": 1, "brier": 2, "aurc": 1}
    assert {name: CLASSIFICATION[name](probs, labels) for name in worst} == worst


@PROPERTY
@given(predictions())
def test_coverage_ends_at_everything_and_its_risk_at_the_error(data):
    coverage, risk = metrics.risk_coverage(*data)
    assert coverage[-1] == 1 and (np.diff(coverage) > 0).all()
    assert risk[-1] == pytest.approx(1 - metrics.accuracy(*data))
    assert ((risk >= 0) & (risk <= 1)).all()


@PROPERTY
@given(predictions())
def test_entropy_lies_between_certainty_and_uniform(data):
    probs, _ = data
    values = metrics.entropy(probs)
    assert values.shape == (len(probs),)
    assert (values >= -1e-12).all() and (values <= math.log(probs.shape[1]) + 1e-9).all()
    np.testing.assert_allclose(metrics.entropy(np.stack([probs, probs])), [values, values])


SCORES = hnp.arrays(np.float64, st.integers(2, 25), elements=st.integers(-8, 8).map(lambda k: k / 4))


@PROPERTY
@given(SCORES, st.data())
def test_auroc_counts_pairs(score, data):
    positive = data.draw(hnp.arrays(bool, len(score)))
    assume(positive.any() and not positive.all())
    above = score[positive][:, None] - score[~positive][None]
    expected = ((above > 0) + 0.5 * (above == 0)).mean()
    assert metrics.auroc(score, positive) == pytest.approx(expected, abs=1e-6)
    assert metrics.auroc(-score, positive) == pytest.approx(1 - expected, abs=1e-6)
    assert metrics.auroc(np.exp(score), positive) == pytest.approx(expected, abs=1e-6)
    assert metrics.ood_auroc(score[~positive], score[positive]) == pytest.approx(expected, abs=1e-6)


# the report ---------------------------------------------------------------------------------------------------


def test_a_report_is_one_row_of_all_metrics():
    report = classification_report(PROBS, LABELS)
    assert isinstance(report, pd.DataFrame)
    assert report.index.tolist() == ["value"]
    assert report.loc["value"].to_dict() == {name: fn(PROBS, LABELS) for name, fn in CLASSIFICATION.items()}


def many(rows=60):
    rng = np.random.default_rng(1)
    probs = rng.dirichlet(np.ones(3), rows)
    return probs, np.array([rng.choice(3, p=p) for p in probs])


def test_bootstrap_intervals_are_repeatable_and_nested(unchanged_rng):
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    wide = classification_report(*many(), bootstrap=50, level=0.95)
    narrow = classification_report(*many(), bootstrap=50, level=0.5)
    assert wide.index.tolist() == ["value", "low", "high"]
    pd.testing.assert_frame_equal(wide, classification_report(*many(), bootstrap=50))
    outer, inner = (table.drop(columns=["ece", "adaptive_ece"]) for table in (wide, narrow))
    assert (outer.loc["low"] < inner.loc["low"]).all() and (inner.loc["high"] < outer.loc["high"]).all()
    assert (inner.loc["low"] < inner.loc["high"]).all()
    assert not wide.equals(classification_report(*many(), bootstrap=50, seed=1))
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


def test_bootstrap_of_rows_that_are_all_alike_has_no_width():
    report = classification_report(np.tile(PROBS[:1], (8, 1)), np.zeros(8, dtype=int), bootstrap=5)
    for name in set(CLASSIFICATION) - {"error_auroc", "ece", "adaptive_ece"}:
        assert report.loc["low", name] == report.loc["high", name] == report.loc["value", name]


def test_a_bootstrap_interval_contains_its_own_value_or_is_left_out():
    """The calibration errors of resamples of a calibrated model lie above the value: no interval is better."""
    table = classification_report(*many(300), bootstrap=60)
    assert table.columns[table.loc["low"].isna()].tolist() == ["ece", "adaptive_ece"]
    assert table.columns[table.loc["high"].isna()].tolist() == ["ece", "adaptive_ece"]
    kept = table.drop(columns=["ece", "adaptive_ece"])
    assert (kept.loc["low"] <= kept.loc["value"]).all() and (kept.loc["value"] <= kept.loc["high"]).all()


def test_bounds_of_an_nll_that_is_infinite_are_not_nan():
    probs, labels = np.array([[1.0, 0.0]] * 30), np.array([1] + [0] * 29)
    column = classification_report(probs, labels, bootstrap=100)["nll"]
    assert column.tolist() == [math.inf, 0, math.inf]


def test_the_bootstrap_interval_of_accuracy_has_the_width_of_a_binomial():
    probs, labels = many(400)
    report = classification_report(probs, labels, bootstrap=300)
    accuracy = report.loc["value", "accuracy"]
    width = report.loc["high", "accuracy"] - report.loc["low", "accuracy"]
    assert width == pytest.approx(2 * 1.96 * math.sqrt(accuracy * (1 - accuracy) / 400), rel=0.25)


@pytest.mark.parametrize("level", [95, 1.5, -0.5])
def test_a_level_that_is_no_coverage_is_refused(level):
    with pytest.raises(ValueError, match=f"level={level}"):
        classification_report(PROBS, LABELS, bootstrap=5, level=level)


@pytest.mark.parametrize(
    ("probs", "labels"),
    [
        (PROBS[:0], LABELS[:0]),
        (PROBS[:2], LABELS),
        (PROBS[0], LABELS),
        (PROBS[None], LABELS),
        (PROBS, LABELS[:, None]),
    ],
    ids=["no rows", "other length", "one row", "draws", "column of labels"],
)
def test_shapes_that_do_not_fit_are_refused_with_those_expected(probs, labels):
    with pytest.raises(ValueError, match=r"probs has shape .*, labels .*: expected \(N, C\) and \(N,\)") as error:
        classification_report(probs, labels)
    assert str(probs.shape) in str(error.value) and str(labels.shape) in str(error.value)


@pytest.mark.parametrize(
    "row",
    [[0.5, 0.4, 0.0], [2.0, 1.0, 0.5], [np.nan, 0.5, 0.5], [np.inf, 0, 0], [1.5, -0.5, 0.0], [-3.0, -1.0, -2.0]],
    ids=["too little", "too much", "NaN", "infinite", "negative", "log probabilities"],
)
def test_rows_that_are_no_probabilities_are_refused(row):
    with pytest.raises(ValueError, match=r"(?i)each row of probs must .*sum to 1"):
        classification_report(np.vstack([PROBS[:3], row]), LABELS)


@pytest.mark.parametrize(("label", "found"), [(3, "0 to 3"), (-1, "-1 to 2"), (-100, "-100 to 2")])
def test_labels_outside_the_classes_are_refused(label, found):
    with pytest.raises(ValueError, match=f"Labels must lie in 0 to 2, got {found}"):
        classification_report(PROBS, np.array([0, 1, 2, label]))


def test_labels_that_are_no_integers_are_refused_in_words():
    with pytest.raises((ValueError, TypeError), match=r"(?i)labels.*integer"):
        classification_report(PROBS, LABELS + 0.5)


@pytest.mark.parametrize("kind", [list, torch.as_tensor], ids=["lists", "tensors"])
@pytest.mark.parametrize("name", [*CLASSIFICATION, "report"])
def test_lists_and_tensors_are_as_good_as_arrays(kind, name):
    fn = CLASSIFICATION.get(name, classification_report)
    given = (kind(PROBS.tolist()), kind(LABELS.tolist()))
    if name == "report":
        pd.testing.assert_frame_equal(fn(*given), fn(PROBS, LABELS))
    else:
        assert same(fn(*given), fn(PROBS, LABELS))


@pytest.mark.parametrize("above", [1e-7, 1e-4])
def test_probabilities_that_rounding_lifts_above_one_are_still_probabilities(above):
    """torchmetrics takes anything above 1 for logits and would squash all rows."""
    rounded = np.array([[1 + above, 0.0], [0.6, 0.4]])
    exact = np.array([[1.0, 0.0], [0.6, 0.4]])
    labels = np.array([0, 0])
    for name, fn in CLASSIFICATION.items():
        assert fn(rounded, labels) == pytest.approx(fn(exact, labels), abs=1e-3, nan_ok=True), name


# each function alone ------------------------------------------------------------------------------------------

SINGLE = {
    **CLASSIFICATION,
    "reliability": metrics.reliability,
    "risk_coverage": metrics.risk_coverage,
    "confident_mistakes": metrics.confident_mistakes,
    "classification_report": classification_report,
}
WRONG = {
    "unknown label": (PROBS, np.array([0, 1, 2, -1]), r"Labels must lie in 0 to 2, got -1 to 2.*not known"),
    "label out of range": (PROBS, np.array([0, 1, 2, 3]), r"Labels must lie in 0 to 2, got 0 to 3"),
    "one label": (PROBS, LABELS[:1], r"probs has shape \(4, 3\), labels \(1,\)"),
    "column of labels": (PROBS, LABELS[:, None], r"labels \(4, 1\)"),
    "float labels": (PROBS, LABELS.astype(float), r"Labels must be integers"),
    "bool labels": (PROBS[:, :2] / PROBS[:, :2].sum(1, keepdims=True), LABELS > 0, r"Labels must be integers"),
    "class 1 alone": (PROBS[:, 1], LABELS, r"probs has shape \(4,\).*np\.stack\(\[1 - p, p\]"),
    "percentages": (100 * PROBS, LABELS, r"sum to 1\. They sum to 100: divide"),
    "logits": (np.log(PROBS + 0.01) - 3, LABELS, r"logits or log probabilities\. Apply softmax"),
    "positive logits": (PROBS + 3, LABELS, r"The sums lie between 10 and 10"),
    "NaN": (np.where(np.arange(4)[:, None] == 1, np.nan, PROBS), LABELS, r"Some are NaN"),
    "texts": (np.full((4, 3), "a"), LABELS, r"must hold real numbers"),
}


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize(("probs", "labels", "message"), WRONG.values(), ids=WRONG)
def test_a_metric_alone_refuses_what_it_would_misread(name, probs, labels, message):
    with pytest.raises(ValueError, match=message):
        SINGLE[name](probs, labels)


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("kind", [list, torch.tensor], ids=["list", "tensor"])
def test_a_metric_alone_reads_lists_and_tensors(name, kind):
    expected, found = SINGLE[name](PROBS, LABELS), SINGLE[name](kind(PROBS), kind(LABELS))
    np.testing.assert_allclose(np.asarray(found, dtype=float), np.asarray(expected, dtype=float))


@pytest.mark.parametrize("probs", [100 * PROBS, np.log(PROBS + 0.01), np.full((2, 2), np.nan)], ids=["%", "log", "nan"])
def test_an_entropy_of_what_is_not_probabilities_is_refused(probs):
    with pytest.raises(ValueError, match="Each row of probs must be finite"):
        metrics.entropy(probs)


@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [
        ([0.1, np.nan], [0.3, 0.4], r"scores of rows \[1\] are NaN"),
        ([[0.1], [0.2]], [[0.3]], r"shapes \(2, 1\) and \(1, 1\)"),
        ([], [0.3], r"shapes \(0,\) and \(1,\)"),
    ],
)
def test_scores_that_cannot_be_ranked_are_refused(inside, outside, message):
    with pytest.raises(ValueError, match=message):
        metrics.ood_auroc(np.array(inside), np.array(outside))


def test_positives_that_are_not_true_or_false_are_refused():
    with pytest.raises(ValueError, match="score has shape"):
        metrics.auroc(np.ones(3), np.array([True, False]))
    with pytest.raises(ValueError, match="True and False"):
        metrics.auroc(np.ones(3), np.array([0, 1, 2]))
