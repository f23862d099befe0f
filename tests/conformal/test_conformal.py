"""Coverage has its exact law, sets and intervals are those of other libraries, and mistakes are named."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import scalabl_pyro as sp
from scalabl_pyro import NumericPrediction, Prediction, conformal
from scalabl_pyro.conformal.ranks import least_rows, rank
from scalabl_pyro.conformal.sets import class_scores, uniform_of
from scalabl_pyro.prediction.averaged import AveragedPrediction

REPEATS = 1000


def prediction(probs, target=None) -> Prediction:
    probs = np.asarray(probs, dtype=np.float64)
    with np.errstate(divide="ignore"):
        log_probs = np.log(probs)[None]
    return Prediction(log_probs, None if target is None else np.asarray(target), tuple("abcdef"[: probs.shape[1]]))


def numbers(mean, sd, target=None) -> NumericPrediction:
    mean, sd = (np.asarray(x, dtype=np.float64)[None] for x in (mean, sd))
    log_density = None if target is None else np.zeros_like(mean)
    return NumericPrediction(mean, sd**2, mean, log_density, target, is_normal=True)


def dirichlet(n: int, seed: int, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and labels that come from them."""
    generator = np.random.default_rng(seed)
    probs = generator.dirichlet(np.full(classes, 0.6), size=n)
    labels = (generator.uniform(size=(n, 1)) > probs.cumsum(1)).sum(1).clip(max=classes - 1)
    return probs, labels


def check_law(coverages, n: int, level: float) -> None:
    """Compare with Beta(k, n + 1 - k): the distribution, and the mean within 5 standard errors."""
    law = stats.beta(rank(n, level), n + 1 - rank(n, level))
    assert stats.kstest(coverages, law.cdf).pvalue > 1e-4
    assert abs(np.mean(coverages) - law.mean()) < 5 * law.std() / math.sqrt(len(coverages))


# ---- ranks


def test_rank_reads_the_decimal_digits():
    assert rank(9, 0.9) == 9  # (9 + 1) * 0.9 in binary floats can be above 9
    assert rank(99, 0.7) == 70
    assert [least_rows(level) for level in (0.5, 0.8, 0.9, 0.95, 0.99)] == [1, 4, 9, 19, 99]


def test_law_of_coverage():
    law = conformal.coverage_law(500, 0.9)
    assert law.mean() == pytest.approx(451 / 501)
    with pytest.raises(ValueError, match="needs 99 calibration rows"):
        conformal.coverage_law(98, 0.99)


# ---- sets of classes


@pytest.mark.parametrize(("n", "level"), [(9, 0.9), (40, 0.8), (101, 0.95)])
def test_coverage_of_lac_has_its_exact_law(n, level):
    """With two classes and p_y = 1 - u, u uniform, the score of a row is u: the coverage is the threshold itself."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(REPEATS):
        u = generator.uniform(size=n)
        rule = conformal.prediction_sets(
            prediction(np.stack([1 - u, u], 1), np.zeros(n, int)), level=level, score="lac"
        )
        found.append(rule.thresholds[0])
    check_law(found, n, level)


@pytest.mark.parametrize(("n", "level"), [(9, 0.9), (60, 0.75)])
def test_coverage_of_aps_has_its_exact_law(n, level):
    """Where labels come from the probabilities, the randomized score of a row is uniform on (0, 1)."""
    found = []
    for i in range(REPEATS):
        probs, labels = dirichlet(n, i)
        found.append(conformal.prediction_sets(prediction(probs, labels), level=level, seed=i).thresholds[0])
    check_law(found, n, level)


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_share_of_new_rows_that_are_covered(score):
    """Sets of new rows, with a wrong model: coverage over calibration set and new row is k / (n + 1)."""
    n, level, held = 39, 0.85, []
    for i in range(600):
        probs, labels = dirichlet(n + 1, i)
        tilted = probs**3 / (probs**3).sum(1, keepdims=True)  # overconfident
        rule = conformal.prediction_sets(prediction(tilted[:n], labels[:n]), level=level, score=score, seed=i)
        held.append(rule.apply(prediction(tilted[n:], labels[n:]), seed=i).metrics()["coverage"].item())
    expected = rank(n, level) / (n + 1)
    assert abs(np.mean(held) - expected) < 5 * math.sqrt(expected * (1 - expected) / len(held))


def test_law_of_coverage_with_ties():
    """Scores take three values v with P(score <= v) = F(v). P(threshold <= v) is the Beta law at F(v), exactly."""
    n, level = 30, 0.8
    values, F = np.array([0.1, 0.4, 0.8]), np.array([0.55, 0.85, 1.0])
    generator, found = np.random.default_rng(1), []
    for _ in range(REPEATS):
        u = values[np.searchsorted(F, generator.uniform(size=n))]
        rule = conformal.prediction_sets(
            prediction(np.stack([1 - u, u], 1), np.zeros(n, int)), level=level, score="lac"
        )
        found.append(rule.thresholds[0])
    k = rank(n, level)
    for value, share in zip(values, stats.beta(k, n + 1 - k).cdf(F), strict=True):
        error = 5 * math.sqrt(share * (1 - share) / REPEATS) + 1e-12
        assert abs(np.mean(np.array(found) <= value + 1e-9) - share) <= error


def test_each_class_has_its_own_law():
    n, level, found = {0: 12, 1: 30}, 0.8, {0: [], 1: []}
    generator = np.random.default_rng(2)
    labels = np.repeat([0, 1], [12, 30])
    for _ in range(REPEATS):
        u = generator.uniform(size=42)
        u_of_class = np.where(labels == 0, u, u**2)  # the two classes have different scores
        own = np.where(labels == 0, 1 - u_of_class, u_of_class)
        probs = np.stack([own, 1 - own], 1)
        rule = conformal.prediction_sets(prediction(probs, labels), level=level, score="lac", by_class=True)
        found[0].append(rule.thresholds[0])
        found[1].append(math.sqrt(rule.thresholds[1]))
    for c, values in found.items():
        check_law(values, n[c], level)


def test_scores_by_hand():
    probs = np.array([[0.2, 0.5, 0.3], [0.0, 0.4, 0.6]])
    np.testing.assert_allclose(class_scores(probs, "lac", seed=0), [[0.8, 0.5, 0.7], [np.inf, 0.6, 0.4]])
    u = uniform_of(probs, seed=7)
    expected = [[0.8 + 0.2 * u[0], 0.5 * u[0], 0.5 + 0.3 * u[0]], [np.inf, 0.6 + 0.4 * u[1], 0.6 * u[1]]]
    np.testing.assert_allclose(class_scores(probs, "aps", seed=7), expected)


def test_sets_names_sizes_table_and_metrics():
    rule = conformal.SetRule(0.8, "lac", np.full(3, 0.65), ("a", "b", "c"), np.array([9, 9, 9]), False, True)
    sets = rule.apply(prediction([[0.4, 0.4, 0.2], [0.34, 0.33, 0.33], [0.9, 0.1, 0.0]], [1, 0, -1]))
    assert sets.names == [("a", "b"), (), ("a",)]
    assert sets.metrics().iloc[0].to_dict() == {"coverage": 0.5, "mean_size": 1.0, "single": 1 / 3, "empty": 1 / 3}
    assert sets.to_frame()["target"].tolist()[:2] == ["b", "a"]
    assert pd.isna(sets.to_frame()["target"][2])
    filled = replace(rule, allow_empty=False).apply(prediction([[0.34, 0.33, 0.33]]))
    assert filled.names == [("a",)]
    assert math.isnan(filled.metrics()["coverage"].item())


def test_a_choice_that_a_row_lacks_is_in_no_set():
    rule = conformal.SetRule(0.9, "lac", np.full(2, 1.0), ("a", "b"), np.array([9, 9]), False, True)
    assert rule.apply(prediction([[1.0, 0.0]])).names == [("a",)]


def test_the_numbers_of_rows_look_uniform_and_belong_to_the_row_and_the_seed():
    probs, _ = dirichlet(4000, 0)
    u = uniform_of(probs, seed=3)
    assert stats.kstest(u, "uniform").pvalue > 1e-3 and abs(np.corrcoef(u, probs.max(1))[0, 1]) < 0.08
    np.testing.assert_array_equal(uniform_of(probs[::-1], seed=3), u[::-1])
    assert abs(np.corrcoef(u, uniform_of(probs, seed=4))[0, 1]) < 0.08
    assert (uniform_of(probs * (1 + 1e-9), seed=3) == u).mean() > 0.99  # rounding of a batch


def test_the_set_of_a_row_does_not_depend_on_the_other_rows():
    probs, labels = dirichlet(100, 0)
    rule = conformal.prediction_sets(prediction(probs, labels), level=0.8, seed=3)
    whole = rule.apply(prediction(probs)).members
    for i in range(100):
        np.testing.assert_array_equal(rule.apply(prediction(probs[i : i + 1])).members[0], whole[i])
    assert (rule.apply(prediction(probs), seed=4).members != whole).any()


@pytest.mark.parametrize("by_class", [False, True])
def test_the_level_holds_for_the_default_seed_and_rows_one_by_one(by_class):
    """Rows that are predicted alone got one random number each time before, and the level did not hold for a seed."""
    held = []
    for i in range(400):
        probs, labels = dirichlet(120, i, classes=2)
        rule = conformal.prediction_sets(prediction(probs[:80], labels[:80]), level=0.8, by_class=by_class)
        new = range(80, 120)
        held.append(np.mean([rule.apply(prediction(probs[i : i + 1])).members[0, labels[i]] for i in new]))
    least = 0.8 if by_class else rank(80, 0.8) / 81
    error = 4 * np.std(held) / math.sqrt(len(held))
    assert np.mean(held) > least - error
    assert by_class or np.mean(held) < least + error


def test_rows_without_answers_are_left_out_and_averages_work():
    probs, labels = dirichlet(50, 0)
    labels[::5] = -1
    known = labels >= 0
    full, part = prediction(probs, labels), prediction(probs[known], labels[known])
    assert (
        conformal.prediction_sets(full, score="lac").thresholds[0]
        == (conformal.prediction_sets(part, score="lac").thresholds[0])
    )
    averaged = AveragedPrediction(probs, np.zeros(50), np.zeros(50), labels, full.classes, 10)
    assert repr(conformal.prediction_sets(averaged)) == repr(conformal.prediction_sets(full))


# ---- intervals


@pytest.mark.parametrize("score", ["sd", "quantile"])
def test_coverage_of_intervals_has_its_exact_law(score):
    n, level, found = 29, 0.9, []
    generator = np.random.default_rng(3)
    for _ in range(300 if score == "quantile" else REPEATS):
        mean, sd = generator.normal(size=n), np.ones(n) if score == "quantile" else generator.gamma(2.0, size=n)
        rule = conformal.prediction_intervals(numbers(mean, sd, generator.normal(mean, sd)), level=level, score=score)
        half = rule.threshold + (stats.norm.ppf(0.95) if score == "quantile" else 0.0)
        found.append(2 * stats.norm.cdf(half) - 1)
    check_law(found, n, level)


def test_intervals_of_a_wrong_model_cover():
    """Standard deviations three times too small; intervals have the units of y."""
    generator = np.random.default_rng(4)
    mean, sd = generator.normal(50, 10, size=2000), generator.gamma(3.0, size=2000)
    y = generator.normal(mean, 3 * sd)
    old, new = numbers(mean[:1000], sd[:1000], y[:1000]), numbers(mean[1000:], sd[1000:], y[1000:])
    assert ((new.interval(0.9)[:, 0] <= y[1000:]) & (y[1000:] <= new.interval(0.9)[:, 1])).mean() < 0.5
    rule = conformal.prediction_intervals(old, level=0.9)
    assert rule.threshold == pytest.approx(3 * 1.645, rel=0.15)
    assert rule.apply(new).metrics()["coverage"].item() == pytest.approx(0.9, abs=0.05)
    assert rule.apply(new).to_frame().columns.tolist() == ["low", "high", "target"]


def test_ends_that_would_cross_meet_in_the_middle():
    rule = conformal.IntervalRule(0.9, "quantile", -10.0, 50)
    found = rule.apply(numbers([2.0], [1.0]))
    assert found.low.item() == found.high.item() == pytest.approx(2.0)


# ---- answers with a bounded error rate


def simulated(n: int, generator, wrong) -> Prediction:
    """Rows whose doubt is u / 2, u uniform, and which are answered wrong with probability ``wrong(u)``."""
    u = generator.uniform(size=n)
    probs = np.stack([1 - u / 2, u / 2], 1)
    return prediction(probs, (generator.uniform(size=n) < wrong(u)).astype(int))


@pytest.mark.filterwarnings("ignore::scalabl_pyro.ScalaBLWarning")
@pytest.mark.parametrize("shape", ["rising", "falling first", "flat"])
def test_the_error_rate_breaks_the_risk_as_rarely_as_it_says(shape):
    """The true error rate of the answered rows is known; it may exceed the risk in a share delta of all cases."""
    risk, delta, n = 0.1, 0.2, 300
    wrong = {
        "rising": lambda u: 0.3 * u,
        "falling first": lambda u: np.where(u < 0.2, 0.15, np.where(u < 0.8, 0.01, 0.5)),
        "flat": lambda u: np.full_like(u, risk * 1.0001),
    }[shape]
    grid = np.linspace(0, 1, 10001)[1:]
    error_rate = np.cumsum(wrong(grid)) / np.arange(1, len(grid) + 1)  # of rows with u below the grid point
    generator, broken, answered = np.random.default_rng(5), [], []
    for _ in range(200):
        rule = conformal.selective_answers(simulated(n, generator, wrong), risk=risk, delta=delta, num_thresholds=4)
        limit = min(2 * rule.threshold, 1.0)
        broken.append(limit > 0 and error_rate[min(int(limit * 10000), 9999)] > risk)
        answered.append(rule.share)
    assert np.mean(broken) <= delta + 5 * math.sqrt(delta * (1 - delta) / 200)
    assert shape == "flat" or np.mean(answered) > 0.1  # the rule is of use


def test_answer_rule_by_hand():
    """Ten wrong rows, all among the least certain 100 of 1000."""
    p = np.linspace(0.99, 0.5, 1000)
    target = np.zeros(1000, int)
    target[-100::10] = 1
    rule = conformal.selective_answers(
        prediction(np.stack([p, 1 - p], 1), target), risk=0.01, num_thresholds=1, delta=0.05
    )
    assert rule.share == 0.299  # one threshold: as few rows as can show the risk, ln 0.05 / ln 0.99
    assert rule.bound == pytest.approx(1 - 0.05 ** (1 / 299))
    more = conformal.selective_answers(prediction(np.stack([p, 1 - p], 1), target), risk=0.01, num_thresholds=10)
    assert 0.8 < more.share <= 0.93
    new = prediction([[0.9, 0.1], [0.52, 0.48]])
    assert more.apply(new).tolist() == [True, False]
    assert more.bound <= 0.01


def test_all_rows_are_answered_where_none_is_wrong():
    rule = conformal.selective_answers(prediction(np.tile([0.7, 0.3], (400, 1)), np.zeros(400, int)))
    assert (rule.share, rule.threshold) == (1.0, math.inf)
    assert rule.apply(prediction([[0.5, 0.5]])).tolist() == [True]


def test_a_rule_that_answers_no_row_says_so():
    probs = np.random.default_rng(0).dirichlet([1, 1], size=400)
    with pytest.warns(sp.ScalaBLWarning, match="answers no row: the lowest bound"):
        rule = conformal.selective_answers(prediction(probs, 1 - probs.argmax(1)))
    assert (rule.share, rule.threshold) == (0.0, -math.inf)
    assert not rule.apply(prediction(probs)).any()


def test_own_doubt():
    probs, _ = dirichlet(400, 0)
    own = prediction(probs, probs.argmax(1))
    rules = [conformal.selective_answers(own, score=s) for s in ("entropy", "epistemic", lambda p: p.total)]
    assert [rule.share for rule in rules] == [1.0] * 3
    with pytest.raises(ValueError, match=r"The doubt has shape \(400, 4\)"):
        conformal.selective_answers(own, score=lambda p: p.probs)


# ---- what rules say


def test_guarantees_are_said_in_words():
    probs, labels = dirichlet(500, 0)
    rule = conformal.prediction_sets(prediction(probs, labels))
    assert "the 500 calibration rows are exchangeable" in rule.guarantee
    assert "between 0.877 and 0.921" in rule.guarantee
    by_class = conformal.prediction_sets(prediction(probs, labels), by_class=True)
    assert by_class.guarantee.startswith("For each class")
    y = np.zeros(99)
    interval = conformal.prediction_intervals(numbers(y, y + 1, y + 1))
    assert "99 calibration rows" in interval.guarantee
    answers = conformal.selective_answers(prediction(probs, probs.argmax(1)), risk=0.05)
    assert "at least 0.95" in answers.guarantee
    for shown in (rule, by_class, interval, answers):
        assert "rows=" in repr(shown)


PROBS, LABELS = dirichlet(30, 0)
CLASSES = prediction(PROBS, LABELS)
NUMBERS = numbers(np.zeros(30), np.ones(30), np.zeros(30))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: conformal.prediction_sets(CLASSES, level=0.99),
            ValueError,
            "needs 99 .* there are 30.*at most 0.9677",
        ),
        (lambda: conformal.prediction_intervals(NUMBERS, level=0.97), ValueError, "needs 33 calibration rows"),
        (lambda: conformal.prediction_sets(CLASSES, level=1.0), ValueError, "level"),
        (lambda: conformal.prediction_sets(CLASSES, score="raps"), ValueError, "score='raps'.*'aps'"),
        (lambda: conformal.prediction_sets(NUMBERS), TypeError, r"Use prediction_intervals\(\)"),
        (lambda: conformal.prediction_intervals(CLASSES), TypeError, r"Use prediction_sets\(\)"),
        (lambda: conformal.prediction_sets(PROBS), TypeError, "calibration is a ndarray"),
        (lambda: conformal.prediction_sets(replace(CLASSES, target=None)), ValueError, "no answers"),
        (
            lambda: conformal.prediction_sets(prediction(PROBS, np.minimum(LABELS, 1)), level=0.5, by_class=True),
            ValueError,
            "fewer: {'c': 0, 'd': 0}. No calibration row has the class 'c', 'd'",
        ),
        (
            lambda: conformal.prediction_sets(CLASSES).apply(replace(CLASSES, classes=("a", "b", "d", "c"))),
            ValueError,
            "the calibration rows had",
        ),
        (lambda: conformal.prediction_sets(CLASSES).apply(NUMBERS), TypeError, "prediction of numbers"),
        (
            lambda: conformal.prediction_intervals(numbers(np.zeros(30), np.r_[0.0, np.ones(29)], np.zeros(30))),
            ValueError,
            "calibration row 0 is 0",
        ),
        (lambda: conformal.selective_answers(CLASSES), ValueError, "needs 263 calibration rows.*there are 30"),
        (lambda: conformal.selective_answers(CLASSES, risk=2), ValueError, "risk=2 must lie between 0 and 1"),
        (lambda: conformal.selective_answers(CLASSES, risk=0.5, score="x"), ValueError, "score='x' is unknown"),
        (lambda: conformal.selective_answers(CLASSES, alpha=0.1), TypeError, "no argument 'alpha'"),
    ],
)
def test_mistakes_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


# ---- other libraries


@pytest.mark.parametrize("by_class", [False, True])
def test_sets_of_crepes(by_class):
    crepes = pytest.importorskip("crepes")
    probs, labels = dirichlet(200, 1)
    new, _ = dirichlet(100, 2)
    own = conformal.prediction_sets(prediction(probs, labels), level=0.85, score="lac", by_class=by_class)
    theirs = crepes.ConformalClassifier()
    scores = 1 - probs[np.arange(200), labels]
    theirs.fit(scores, bins=labels if by_class else None)
    if by_class:
        expected = np.stack(
            [
                theirs.predict_set((1 - new)[:, [c]], bins=np.full(100, c), confidence=0.85, smoothing=False)[:, 0]
                for c in range(4)
            ],
            axis=1,
        )
    else:
        expected = theirs.predict_set(1 - new, confidence=0.85, smoothing=False)
    np.testing.assert_array_equal(own.apply(prediction(new)).members, expected.astype(bool))


def test_intervals_of_crepes():
    crepes = pytest.importorskip("crepes")
    generator = np.random.default_rng(6)
    mean, sd = generator.normal(size=150), generator.gamma(2.0, size=150)
    y = generator.normal(mean, sd)
    own = conformal.prediction_intervals(numbers(mean[:100], sd[:100], y[:100]), level=0.9)
    theirs = crepes.ConformalRegressor()
    theirs.fit(np.abs(y - mean)[:100], sigmas=sd[:100])
    expected = theirs.predict_int(mean[100:], sigmas=sd[100:], confidence=0.9)
    found = own.apply(numbers(mean[100:], sd[100:]))
    np.testing.assert_allclose(np.stack([found.low, found.high], 1), expected)


def test_sets_of_mapie():
    mapie = pytest.importorskip("mapie.classification")
    base = pytest.importorskip("sklearn.base")
    probs, labels = dirichlet(200, 3)
    new, _ = dirichlet(100, 4)

    class Given(base.ClassifierMixin, base.BaseEstimator):
        """Its features are the probabilities themselves."""

        def fit(self, X, y):
            self.classes_ = np.arange(4)
            self.is_fitted_ = True
            return self

        def predict_proba(self, X):
            return X

        def predict(self, X):
            return X.argmax(1)

    theirs = mapie.SplitConformalClassifier(
        Given().fit(probs, labels), confidence_level=0.9, conformity_score="lac", prefit=True
    )
    theirs.conformalize(probs, labels)
    expected = theirs.predict_set(new)[1][:, :, 0]
    own = conformal.prediction_sets(prediction(probs, labels), level=0.9, score="lac").apply(prediction(new))
    np.testing.assert_array_equal(own.members, expected)


@pytest.mark.parametrize("level", ["0.9", True, None, 90])
def test_a_level_that_is_no_number_between_0_and_1_is_refused(level):
    probs, labels = dirichlet(50, 0)
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        conformal.prediction_sets(prediction(probs, labels), level=level)
