"""Predictions as tables, intervals and short text, against closed forms."""

import gaussians
import numpy as np
import pandas as pd
import pytest
import tiny
import toys
from scipy import stats
from scipy.special import digamma

import scalabl_pyro as sp
from scalabl_pyro._display import Summarized
from scalabl_pyro.analysis.checks import Finding, as_diagnosis
from scalabl_pyro.analysis.psis import LOO, LogWeights
from scalabl_pyro.prediction.mixture import normal_mixture_quantiles
from scalabl_pyro.prediction.result import NumericPrediction


def numeric(means, variances=1.0, *, is_normal=True, replicates=None, target=None):
    means = np.asarray(means, dtype=np.float64)
    variances = np.broadcast_to(np.asarray(variances, dtype=np.float64), means.shape)
    density = None if target is None else stats.norm(means, np.sqrt(variances)).logpdf(target)
    replicates = means if replicates is None else np.asarray(replicates)
    return NumericPrediction(means, variances, replicates, density, target, is_normal=is_normal)


# intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_the_interval_of_equal_components_is_that_of_the_normal(level):
    prediction = numeric(np.tile([1.0, -2.0], (5, 1)), np.tile([4.0, 0.25], (5, 1)))
    expected = stats.norm([1.0, -2.0], [2.0, 0.5]).interval(level)
    np.testing.assert_allclose(prediction.interval(level), np.stack(expected, axis=1), rtol=1e-9)


def test_the_interval_of_a_mixture_is_not_that_of_the_normal_with_its_moments():
    """Two narrow components far apart: the 5 % quantile of the mixture is the 10 % quantile of the lower one."""
    prediction = numeric([[-10.0], [10.0]], 1.0)
    low, high = prediction.interval(0.9)[0]
    assert low == pytest.approx(-10 + stats.norm.ppf(0.1), abs=1e-9)
    assert high == pytest.approx(10 + stats.norm.ppf(0.9), abs=1e-9)
    assert abs(low - stats.norm(0, np.sqrt(prediction.total[0])).ppf(0.05)) > 4


def test_quantiles_of_a_mixture_solve_its_equation():
    rng = np.random.default_rng(0)
    means, sds = rng.normal(size=(7, 20)) * 3, rng.uniform(0.1, 2, size=(7, 20))
    for p in (0.01, 0.3, 0.975):
        x = normal_mixture_quantiles(means, sds**2, p)
        np.testing.assert_allclose(stats.norm.cdf(x, means, sds).mean(0), p, atol=1e-12)
    np.testing.assert_allclose(normal_mixture_quantiles(means[:1], 0 * means[:1], 0.3), means[0])


def test_elsewhere_the_interval_is_that_of_the_simulated_answers():
    """Exponential answers: the quantiles of 20,000 replicates are within 5 standard errors of the exact ones."""
    draws = np.random.default_rng(1).exponential(size=(20_000, 3))
    prediction = numeric(np.ones_like(draws), 1.0, is_normal=False, replicates=draws)
    for bound, p in zip(prediction.interval(0.9).T, (0.05, 0.95), strict=True):
        exact = stats.expon.ppf(p)
        error = np.sqrt(p * (1 - p) / len(draws)) / stats.expon.pdf(exact)
        assert (np.abs(bound - exact) < 5 * error).all()


def test_too_few_simulated_answers_and_wrong_levels_are_refused():
    few = numeric(np.zeros((19, 2)), is_normal=False)
    with pytest.raises(ValueError, match=r"needs 20 draws or more.*has 19"):
        few.interval(0.9)
    assert few.to_frame()[["low", "high"]].isna().all(axis=None)
    for level in (0, 1, 1.5):
        for call in (few.interval, lambda level: few.to_frame(level=level)):
            with pytest.raises(ValueError, match=f"level={level} must lie between 0 and 1"):
                call(level)


def test_intervals_of_a_conjugate_model_are_exact_within_monte_carlo_error():
    """Linear toy: the predictive distribution of a row is Normal(f mean, f' V f + noise)."""
    toy = toys.LinearToy(3)
    mean, V, _ = toy.exact()
    prediction = gaussians.posterior_of(toy).predict(toy.rows[:20], num_draws=2000, seed=1)
    assert prediction.is_normal
    f = toy.features[:20]
    sd = ((f @ V * f).sum(1) + toys.NOISE**2).sqrt().numpy()
    found = (prediction.interval(0.9) - (f @ mean).numpy()[:, None]) / sd[:, None]
    error = np.sqrt(0.05 * 0.95 / 2000) / stats.norm.pdf(stats.norm.ppf(0.05))  # of simulated answers; this has less
    assert np.abs(found - [stats.norm.ppf(0.05), stats.norm.ppf(0.95)]).max() < 5 * error


# tables and metrics -----------------------------------------------------------------------------------------------


def test_the_table_of_numbers_holds_moments_bounds_and_target():
    target = np.array([0.5, -1.0])
    prediction = numeric([[0.0, 1.0], [2.0, 1.0]], [[1.0, 4.0], [3.0, 4.0]], target=target)
    frame = prediction.to_frame(level=0.8)
    expected = {"prediction": [1, 1], "aleatoric": [2, 4], "epistemic": [1, 0], "total": [3, 4]}
    for name, values in expected.items():
        np.testing.assert_allclose(frame[name], values)
    np.testing.assert_allclose(frame["sd"], np.sqrt([3, 4]))
    np.testing.assert_allclose(frame[["low", "high"]], prediction.interval(0.8))
    np.testing.assert_array_equal(frame["target"], target)
    assert "target" not in numeric([[0.0]]).to_frame()


def test_metrics_of_numbers_have_bootstrap_intervals():
    rng = np.random.default_rng(0)
    target = rng.normal(size=400)
    prediction = numeric(np.zeros((2, 400)), 1.0, target=target)
    table = prediction.metrics(bootstrap=2000, level=0.9, seed=1)
    assert list(table.index) == ["value", "low", "high"]
    assert table.loc["value", "mae"] == pytest.approx(np.abs(target).mean())
    assert table.loc["value", "nll"] == pytest.approx(-stats.norm.logpdf(target).mean())
    half = stats.norm.ppf(0.95) * np.abs(target).std() / 20  # the percentile interval of a mean is nearly normal
    width = table.loc["high", "mae"] - table.loc["low", "mae"]
    assert width == pytest.approx(2 * half, rel=0.1)
    pd.testing.assert_frame_equal(table, prediction.metrics(bootstrap=2000, level=0.9, seed=1))
    assert not table.equals(prediction.metrics(bootstrap=2000, level=0.9, seed=2))
    for options, message in (({"bootstrap": 2.5}, "bootstrap=2.5"), ({"bootstrap": -1}, "bootstrap=-1")):
        with pytest.raises(ValueError, match=message):
            prediction.metrics(**options)
    with pytest.raises(ValueError, match="have no answers"):
        numeric([[0.0]]).metrics(bootstrap=3)


def certain(*log_odds):
    """A prediction of two classes for one row, whose answer is the second; log odds of the first under each draw."""
    x = np.array(log_odds, dtype=np.float32)[:, None]
    log_probs = np.stack([-np.logaddexp(0, -x), -np.logaddexp(0, x)], axis=-1)
    return sp.Prediction(log_probs, np.array([1]), ("a", "b"))


@pytest.mark.parametrize("log_odds", [(800.0,), (2000.0, 2000.0), (1e5, 3e5)])
def test_the_nll_of_an_answer_held_nearly_impossible_is_exact(log_odds):
    """Probabilities below 1e-308 are no floats; log probabilities are."""
    expected = min(log_odds) + np.log(len(log_odds)) - np.log(np.sum(np.array(log_odds) == min(log_odds)))
    table = certain(*log_odds).metrics(bootstrap=3)
    np.testing.assert_allclose(table["nll"], expected, rtol=1e-7)
    both = NumericPrediction(*[np.zeros((2, 1))] * 3, np.array([[-900.0], [-900.0]]), np.zeros(1))
    assert both.metrics().loc["value", "nll"] == pytest.approx(900)


# uncertainty from few draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_draws", [2, 5, 20])
def test_the_epistemic_variance_of_few_draws_is_low_by_one_over_s_and_the_corrected_one_is_not(num_draws):
    means = np.random.default_rng(0).normal(size=(num_draws, 40_000))
    prediction = numeric(means)
    error = 5 * np.sqrt(2 / (num_draws - 1) / means.shape[1])
    assert prediction.epistemic_corrected.mean() == pytest.approx(1, abs=error)
    assert prediction.epistemic.mean() == pytest.approx(1 - 1 / num_draws, abs=error)


@pytest.mark.parametrize("num_draws", [5, 10, 20])
def test_the_jackknife_removes_the_first_order_bias_of_the_mutual_information(num_draws):
    """The probability of a class is Beta(a, b) over the posterior, so the mutual information is known exactly."""
    a, b, rows = 2.0, 3.0, 20_000
    p = np.random.default_rng(1).beta(a, b, size=(num_draws, rows))
    prediction = sp.Prediction(np.log(np.stack([p, 1 - p], axis=-1)), None, ("a", "b"))
    mean, variance = a / (a + b), a * b / (a + b) ** 2 / (a + b + 1)
    of_draw = digamma(a + b + 1) - mean * digamma(a + 1) - (1 - mean) * digamma(b + 1)
    exact = stats.entropy([mean, 1 - mean]) - of_draw
    bias = -variance * (1 / mean + 1 / (1 - mean)) / (2 * num_draws)
    raw = prediction.total - prediction.aleatoric
    corrected = prediction.epistemic_corrected
    error = 5 * corrected.std() / np.sqrt(rows)
    assert raw.mean() - exact == pytest.approx(bias, abs=error + 0.5 / num_draws**2)
    assert corrected.mean() == pytest.approx(exact, abs=error + 0.1 / num_draws**2)
    assert abs(corrected.mean() - exact) < 0.2 * abs(raw.mean() - exact)
    assert np.isnan(sp.Prediction(prediction.log_probs[:1], None, ("a", "b")).epistemic_corrected).all()


def test_one_draw_knows_no_disagreement():
    assert np.isnan(numeric([[1.0, 2.0]]).epistemic_corrected).all()


# options that are counts -------------------------------------------------------------------------------------------

ROWS = tiny.question_rows(6)
CALLS = {
    "predict": ("num_draws", "batch_size", "draws_per_pass"),
    "predict_linearized": ("num_draws", "batch_size"),
    "prior_predictive": ("num_draws", "batch_size"),
    "log_weights": ("num_draws", "batch_size"),
    "loo": ("num_draws", "batch_size"),
    "diagnose": ("num_draws", "batch_size"),
    "log_likelihood": ("batch_size",),
}


@pytest.mark.parametrize(("method", "option"), [(m, o) for m, options in CALLS.items() for o in options])
def test_counts_that_are_no_whole_numbers_are_refused(fitted, method, option):
    for value in (2.5, True, -1, "3") + ((0,) if option != "num_draws" else ()):
        with pytest.raises(ValueError, match=f"{option}={value!r} must be a whole number"):
            getattr(fitted.posterior, method)(ROWS, **{option: value})


def test_counts_of_calls_without_rows_are_refused(fitted):
    posterior = fitted.posterior
    calls = (
        lambda n: posterior.sample(n),
        lambda n: posterior.summary(num_draws=n),
        lambda n: posterior.to_arviz(num_draws=n),
        lambda n: sp.plots.posterior_by_layer(posterior, num_draws=n),
        lambda n: sp.compare([posterior], ROWS, num_draws=n),
        lambda n: posterior.log_likelihood(ROWS).by_row(posterior.sample(2).s, draws_per_pass=n),
    )
    for call in calls:
        for value in (2.5, True, -1):
            with pytest.raises(ValueError, match=f"={value} must be a whole number"):
                call(value)


# short text --------------------------------------------------------------------------------------------------------


def shown(fitted):
    posterior = fitted.posterior
    return {
        "Posterior": (posterior, ["Normal", "MultipleChoice", str(posterior.subspace.dim), "num_data=48"]),
        "Prediction": (posterior.predict(ROWS, num_draws=3), ["rows=6", "draws=3", "classes=4", "answers=True"]),
        "NumericPrediction": (numeric(np.zeros((3, 2))), ["rows=2", "draws=3", "normal", "answers=False"]),
        "Draws": (posterior.sample(3, seed=5), ["draws=3", f"s (3, {posterior.subspace.dim})", "seed=5"]),
        "Diagnosis": (as_diagnosis([Finding("elbo", "ok", 1.0, 0.0, "", "")]), ["ok=elbo"]),
        "LOO": (LOO(-3.0, 0.5, 1.0, np.zeros(1000), np.zeros(1000), 0.7), ["elpd=-3", "se=0.5", "rows=1000"]),
        "LogWeights": (LogWeights(np.zeros((4, 900)), np.zeros(4), np.ones(4)), ["draws=4", "rows=900", "elbo=-1"]),
    }


NAMES = ["Posterior", "Prediction", "NumericPrediction", "Draws", "Diagnosis", "LOO", "LogWeights"]


@pytest.mark.parametrize("name", NAMES)
def test_objects_show_their_facts_and_no_tensors(fitted, name):
    value, facts = shown(fitted)[name]
    text, table = repr(value), value._repr_html_()
    assert len(text) < 600 and len(table) < 1200
    assert "tensor" not in text and "array" not in text
    assert text.startswith(f"{name}(")
    assert table.startswith("<table>") and name in table
    for fact in facts:
        assert fact in text
        assert fact.split("=")[-1] in table


def test_html_is_escaped():
    class Strange(Summarized):
        def _summary(self):
            return {"<b>": "<script>", "long": "x" * 500}

    assert "<script>" not in Strange()._repr_html_() and "&lt;script&gt;" in Strange()._repr_html_()
    assert len(repr(Strange())) < 150
