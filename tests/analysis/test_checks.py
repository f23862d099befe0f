"""Diagnostics call what is bad bad, what is healthy ok, and what is not a number never ok."""

import inspect
import warnings
from dataclasses import replace

import arviz as az
import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import tiny
import torch
from gaussians import log_normal, normal_guide, posterior_of
from scipy.special import ndtri
from toys import NOISE, PRIOR_SCALE, LinearGaussian, LinearToy

import scalabl_pyro as sp
from scalabl_pyro.analysis import arviz_data
from scalabl_pyro.analysis import checks as diag
from scalabl_pyro.analysis.checks import Finding
from scalabl_pyro.guides import DeltaGuide, EmpiricalGuide, MixtureGuide, NormalGuide
from scalabl_pyro.lora.subspace import Layer, Subspace

SUBSPACE = Subspace((Layer("low.q_proj", 2, 7, 6), Layer("high.v_proj", 2, 7, 6)))
GRID = ndtri((np.arange(400) + 0.5) / 400)[:, None]  # a standard normal without Monte Carlo error
PRIOR = GRID * np.ones(4)


def arviz_loo(log_likelihood):
    """LOO of ArviZ itself, of any generation: elpd, se, p, k."""
    groups = {
        "posterior": arviz_data.per_row_group("s", np.zeros((len(log_likelihood), 1))),
        "log_likelihood": arviz_data.per_row_group("label", log_likelihood),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a k above the threshold is wanted here
        loo = az.loo(arviz_data.to_arviz(groups, {}), pointwise=True, reff=1.0)
    new = arviz_data.arviz_version() >= (1, 0)
    elpd, p = (loo.elpd, loo.p) if new else (loo.elpd_loo, loo.p_loo)
    num_rows = log_likelihood.shape[1]
    pointwise = np.asarray(loo.elpd_i if new else loo.loo_i).ravel()
    se, other = ((num_rows * pointwise.var(ddof=ddof)) ** 0.5 for ddof in (0, 1))  # ArviZ 1.3 divides by N - 1
    assert float(loo.se) in (pytest.approx(se, rel=1e-9), pytest.approx(other, rel=1e-9))
    return float(elpd), float(se), float(p), np.asarray(loo.pareto_k)


def pareto_log_weights(k, num_draws, seed=0):
    """Logarithms of Pareto weights, whose tail index k is known."""
    return -k * np.log(np.random.default_rng(seed).uniform(size=num_draws))


@pytest.fixture(scope="module")
def healthy(toy):
    return posterior_of(toy)


# importance weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_draws", "expected"), [(10, 0.0), (100, 0.5), (1000, 2 / 3), (10**4, 0.7), (10**6, 0.7)])
def test_the_threshold_of_k_rises_with_the_draws_up_to_its_limit(num_draws, expected):
    assert diag.good_k(num_draws) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [0.3, 0.85, 1.5])
def test_k_is_the_tail_index_of_the_weights_and_what_arviz_finds(k):
    num_draws = 50_000
    log_weights = pareto_log_weights(k, num_draws)
    found, threshold, share = diag.pareto_k(log_weights)
    tail = 3 * num_draws**0.5
    # Standard error of a Pareto fit; smoothing shrinks k toward 0.5 as if by ten more points.
    assert abs(found - k) < 5 * (1 + k) / tail**0.5 + 10 * abs(k - 0.5) / tail
    assert threshold == 0.7
    assert found == pytest.approx(arviz_loo(-log_weights[:, None])[3].item(), rel=1e-6)
    assert 0 < share < 1


def test_the_share_of_draws_is_that_of_kish():
    """The weights are smoothed first; with a short tail that changes them little."""
    log_weights = 0.1 * np.random.default_rng(0).normal(size=5000)
    weights = np.exp(log_weights)
    assert diag.pareto_k(log_weights)[2] == pytest.approx(weights.sum() ** 2 / (weights**2).sum() / 5000, rel=1e-3)


def test_equal_weights_are_perfect():
    k, _, share = diag.pareto_k(np.full(100, -3.0))
    assert k == -np.inf and share == pytest.approx(1)
    assert {f.severity for f in diag.check_weights(np.full(100, -3.0))} == {"ok"}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_have_no_k_and_are_never_ok(bad):
    log_weights = np.append(np.random.default_rng(0).normal(size=200), bad)
    k, _, share = diag.pareto_k(log_weights)
    assert np.isnan(k) and np.isnan(share)
    severities = {f.check: f.severity for f in diag.as_diagnosis(diag.check_weights(log_weights)).findings}
    assert severities["pareto_k"] == severities["elbo"] == "error" and severities["importance_share"] != "ok"


@pytest.mark.parametrize(("k", "severity"), [(0.3, "ok"), (0.85, "warning"), (1.5, "error")])
def test_k_is_graded_at_its_threshold_and_at_one(k, severity):
    finding = diag.check_weights(pareto_log_weights(k, 50_000))[0]
    assert (finding.check, finding.severity, finding.threshold) == ("pareto_k", severity, 0.7)
    assert ("laplace()" in finding.advice) == (severity != "ok")


def test_few_useful_draws_are_noted_and_the_elbo_is_the_mean():
    narrow = diag.check_weights(5 * np.random.default_rng(0).normal(size=400))
    share, elbo = narrow[1], narrow[2]
    assert (share.check, share.severity) == ("importance_share", "warning") and share.value < 0.1
    log_weights = np.linspace(-3, -1, 400)
    assert diag.check_weights(log_weights)[2].value == pytest.approx(-2)
    assert np.isnan(elbo.threshold)


# history, scales, drift, chains -------------------------------------------------------------------------------


def history(loss):
    return pd.DataFrame({"loss": np.asarray(loss, dtype=float)})


NOISY = 0.1 * np.random.default_rng(1).normal(size=300)


@pytest.mark.parametrize(
    ("loss", "severity"),
    [
        pytest.param(1 - 0.01 * np.arange(300) + NOISY, "warning", id="falling"),
        pytest.param(1 + NOISY, "ok", id="flat with noise"),
        pytest.param(np.exp(-np.arange(300) / 10) + NOISY, "ok", id="fell long ago"),
        pytest.param(1 - 0.01 * np.arange(300), "warning", id="falling without noise"),
        pytest.param(np.where(np.arange(300) == 250, np.nan, 1.0), "warning", id="NaN"),
    ],
)
def test_a_loss_that_still_falls_is_a_warning(loss, severity):
    finding, _ = diag.check_history(history(loss))
    assert (finding.check, finding.severity, finding.threshold) == ("loss_slope", severity, -3)
    expected = "" if severity == "ok" else "Train longer" if np.isfinite(loss).all() else "Lower the learning rates"
    assert finding.advice.startswith(expected) and bool(finding.advice) == bool(expected)


def decaying(length, noise=0.07, steps=300, rate=8e-3, seed=0):
    """A run of ``length`` time constants under a learning rate that decays to 0, as ``fit`` does by default."""
    lr = rate * (1 - np.arange(steps) / steps)
    share = np.cumsum(lr) / lr.sum()
    loss = np.exp(-length * share) + noise * np.random.default_rng(seed).normal(size=steps)
    return pd.DataFrame({"loss": loss, "lr": lr})


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("length", "severity"), [(2, "warning"), (30, "ok")])
def test_a_training_that_was_too_short_is_seen_under_a_decay_to_zero(length, severity, seed):
    """Its loss is flat over the last steps, because they are small, not because the loss has arrived."""
    found = diag.check_history(decaying(length, seed=seed))
    assert [f.severity for f in found] == [severity, "ok"]


@pytest.mark.parametrize("rate", [1e-4, 8e-3, 1.0, 1000.0])
def test_no_advice_raises_a_learning_rate(rate):
    for frame in (decaying(2, rate=rate), decaying(2, rate=rate).iloc[::-1].assign(lr=rate)):
        for finding in diag.check_history(frame):
            assert "raise the learning rate" not in finding.advice and "raise lr" not in finding.advice


@pytest.mark.parametrize(
    ("loss", "severity"),
    [
        pytest.param(1 + NOISY, "ok", id="flat with noise"),
        pytest.param(1 - 0.01 * np.arange(300) + NOISY, "ok", id="falling"),
        pytest.param(1 + 3 * (np.arange(300) > 100) + NOISY, "error", id="a jump"),
        pytest.param(np.where(np.arange(300) < 10, 2.0, 511451.0) + NOISY, "error", id="diverged"),
        pytest.param(np.where(np.arange(300) > 290, np.inf, 1.0), "error", id="infinite"),
    ],
)
def test_a_loss_that_ends_above_its_start_is_an_error_that_names_the_rate(loss, severity):
    _, finding = diag.check_history(history(loss).assign(lr=1.0))
    assert (finding.check, finding.severity) == ("loss_end", severity)
    assert ("lr went up to 1)" in finding.advice) == (severity == "error")


@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, 1 / 3, 2.345])
@pytest.mark.parametrize("steps", [30, 72, 300])
def test_a_constant_loss_does_not_fall(value, steps):
    """Rounding is not a slope."""
    assert [f.severity for f in diag.check_history(history(np.full(steps, value)))] == ["ok", "ok"]


def test_the_slope_is_in_standard_errors_of_least_squares():
    loss = 0.3 - 1e-3 * np.arange(90) + NOISY[:90]
    x, y = np.arange(30), loss[-30:]
    coefficients, covariance = np.polyfit(x, y, 1, cov=True)
    assert diag.check_history(history(loss))[0].value == pytest.approx(coefficients[0] / covariance[0, 0] ** 0.5)


@pytest.mark.parametrize("given", [None, history(np.arange(29))], ids=["none", "29 steps"])
def test_a_history_that_is_too_short_says_nothing(given):
    assert diag.check_history(given) == []


def scales(loc, scale):
    """Severity and value of each finding for normal draws, against a standard normal prior of four latents."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = diag.check_scales(np.asarray(loc) + np.asarray(scale) * GRID * np.ones(4), PRIOR, SUBSPACE)
    return {f.check: (f.severity, f.value) for f in diag.as_diagnosis(found).findings}


HEALTHY = {"collapsed_latents": ("ok", 0), "exploded_latents": ("ok", 0), "idle_layers": ("ok", 0)}


@pytest.mark.parametrize(
    ("loc", "scale", "changed"),
    [
        pytest.param([1, 1, 1, 1], 0.2, {}, id="healthy"),
        pytest.param([0, 0, 0, 0], [0.2, 0.2, 0.2, 0.2], {}, id="narrow at the center of the prior"),
        pytest.param([2, 2, 2, 2], 1.0, {}, id="as wide as the prior elsewhere"),
        pytest.param([1, 1, 1, 1], [5e-3, 5e-3, 0.2, 0.2], {"collapsed_latents": ("ok", 0.5)}, id="half are points"),
        pytest.param([1, 1, 1, 1], [5e-3] * 3 + [0.2], {"collapsed_latents": ("warning", 0.75)}, id="most are points"),
        pytest.param([1, 1, 1, 1], 0.0, {"collapsed_latents": ("warning", 1)}, id="all are points"),
        pytest.param([1, 1, 1, 1], [0.2, 0.2, 0.2, 11], {"exploded_latents": ("warning", 0.25)}, id="one too wide"),
        pytest.param([1, 1, 1, 1], [0.2, 0.2, 0.2, 9], {}, id="one wide"),
        pytest.param([0, 0, 1, 1], [1, 1, 0.2, 0.2], {"idle_layers": ("note", 0.5)}, id="one layer is its prior"),
        pytest.param([0, 0, 0, 0], 1.0, {"idle_layers": ("note", 1)}, id="all layers are their prior"),
    ],
)
def test_scales_are_held_against_the_prior(loc, scale, changed):
    assert scales(loc, scale) == HEALTHY | changed


def test_an_idle_layer_is_named():
    draws = np.array([0, 0, 1, 1]) + np.array([1, 1, 0.2, 0.2]) * PRIOR
    idle = diag.check_scales(draws, PRIOR, SUBSPACE)[-1]
    assert "low.q_proj" in idle.cause and "high" not in idle.cause and "target_modules" in idle.advice


def test_a_prior_with_heavy_tails_is_measured_by_its_middle():
    cauchy = np.tan(np.pi * ((np.arange(400) + 0.5) / 400 - 0.5))[:, None] * np.ones(4)
    found = {f.check: f.severity for f in diag.check_scales(1 + 0.2 * PRIOR, cauchy, SUBSPACE)}
    assert set(found.values()) == {"ok"}  # the standard deviation of these draws is 20 times as large


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_draws_that_are_not_finite_are_an_error(bad):
    draws = 0.2 * PRIOR.copy()
    draws[7, 2] = bad
    assert [(f.check, f.severity) for f in diag.check_scales(draws, PRIOR, SUBSPACE)] == [("draws", "error")]


def classes(*probs):
    """A prediction of two classes for one row; each number is the first class's probability under a draw."""
    p = np.array(probs, dtype=float)[:, None]
    return sp.Prediction(np.log(np.stack([p, 1 - p], axis=-1)), None, ("a", "b"))


def numbers(means, variance=1.0):
    means = np.array(means, dtype=float)[:, None]
    return sp.NumericPrediction(means, np.full_like(means, variance), means, None, None)


@pytest.mark.parametrize(
    ("mean", "draws", "value", "severity"),
    [
        pytest.param(classes(0.5), classes(0.3, 0.7), 0.0, "ok", id="draws average to the mean"),
        pytest.param(classes(0.5), classes(0.54, 0.54), 0.04, "ok", id="near"),
        pytest.param(classes(0.5), classes(0.5, 0.7), 0.1, "note", id="far"),
        pytest.param(classes(np.nan), classes(0.5), np.nan, "note", id="NaN"),
        pytest.param(numbers([2.0]), numbers([1.0, 3.0]), 0.0, "ok", id="numbers"),
        pytest.param(numbers([2.0]), numbers([4.0, 4.0], 16.0), 0.5, "note", id="numbers half a deviation off"),
    ],
)
def test_the_prediction_at_the_mean_is_held_against_that_over_draws(mean, draws, value, severity):
    (finding,) = diag.check_drift(mean, draws)
    assert finding.value == pytest.approx(value, abs=1e-12, nan_ok=True)
    assert (finding.check, finding.severity, finding.threshold) == ("mean_vs_draws", severity, 0.05)


def test_predictions_of_different_kinds_cannot_drift():
    assert diag.check_drift(classes(0.5), numbers([1.0])) == []


def chains(*locs, num_draws=2000, dim=2):
    noise = np.random.default_rng(2).normal(size=(len(locs), num_draws, dim))
    noise[..., 0] += np.array(locs)[:, None]  # only one of the latents
    return noise


@pytest.mark.parametrize(
    ("locs", "what", "severity"),
    [
        ((0, 0), "chain", "ok"),
        ((0, 0.4), "chain", "warning"),
        ((0, 2), "chain", "error"),
        ((0, 0.4), "restart", "ok"),
        ((0, 2), "restart", "warning"),
        ((0, 9), "restart", "error"),
    ],
)
def test_the_latent_on_which_chains_disagree_most_decides(locs, what, severity):
    (finding,) = diag.check_chains(chains(*locs), what)
    assert (finding.check, finding.severity) == ("r_hat", severity)
    assert finding.threshold == (1.01 if what == "chain" else 1.1)
    assert (f"The {what}s disagree" in finding.advice) == (severity != "ok")


@pytest.mark.parametrize("stuck", [0, 1])
def test_a_latent_that_never_moves_is_never_ok(stuck):
    """Its R-hat is not a number, at whichever place it stands."""
    s = chains(0, 0)
    s[..., stuck] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ divides by its variance
        (finding,) = diag.check_chains(s, "chain")
    assert finding.severity == "error"


def test_one_chain_cannot_tell():
    (finding,) = diag.check_chains(chains(0), "chain")
    assert finding.severity == "warning" and np.isnan(finding.value) and "Run two chains or more" in finding.advice


# the report ---------------------------------------------------------------------------------------------------


def finding(check, severity, value=1.0, **words):
    return Finding(check, severity, value, 0.5, **{"cause": "because.", "advice": "Do this.", **words})


def test_the_worst_comes_first_and_equals_keep_their_order():
    order = ["ok", "note", "error", "warning", "ok", "error"]
    report = diag.as_diagnosis([finding(f"{i}", severity) for i, severity in enumerate(order)])
    assert [f.check for f in report.findings] == ["2", "5", "3", "1", "0", "4"]
    assert report.severity == "error"


def test_what_is_not_a_number_is_never_ok():
    report = diag.as_diagnosis([finding("fine", "ok"), finding("unknown", "ok", np.nan), finding("n", "note", np.nan)])
    assert [(f.check, f.severity) for f in report.findings] == [("unknown", "error"), ("n", "note"), ("fine", "ok")]
    assert report.findings[0].cause == "could not be computed."


def test_the_report_can_be_read_as_a_table_and_as_text():
    report = diag.as_diagnosis([finding("a", "ok", 0.25, advice=""), finding("b", "warning", 1234.5)])
    frame = report.to_frame()
    assert frame.index.tolist() == ["b", "a"] and frame.index.name == "check"
    assert frame.columns.tolist() == ["severity", "value", "threshold", "cause", "advice"]
    assert frame.loc["a", "value"] == 0.25
    assert str(report).splitlines() == [
        "Do not trust the uncertainties yet, because because.",
        "WARNING  because (b = 1.23e+03). Do this.",
        "     OK  because (a = 0.25).",
    ]


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ([("width", "ok"), ("skill", "note")], "No check speaks against these predictions and their uncertainties."),
        ([("width", "warning"), ("skill", "ok")], "Do not trust the uncertainties yet, because of width."),
        ([("width", "warning"), ("shift", "error")], "Do not trust the uncertainties, because of shift."),
        ([("skill", "warning"), ("width", "note")], "Do not use the predictions yet, because of skill."),
        (
            [("shift", "warning"), ("loss_end", "error")],
            "Do not use the predictions, because of loss_end. Do not trust the uncertainties yet, because of shift.",
        ),
    ],
)
def test_the_report_begins_with_a_sentence_for_people(found, verdict):
    report = diag.as_diagnosis([finding(name, severity, cause=f"of {name}.") for name, severity in found])
    assert report.verdict == str(report).splitlines()[0] == verdict
    assert verdict in report._repr_html_() and report._repr_html_().startswith("<table><caption>Diagnosis")


def test_the_sentence_names_what_could_not_be_computed():
    assert "because width could not be computed." in diag.as_diagnosis([finding("width", "ok", np.nan)]).verdict


# q against a posterior that is known ---------------------------------------------------------------------------


def whitened(kind, dim, seed):
    """Location and precision of the posterior beside a q = N(0, 1) that is wrong in one way."""
    sign = np.sign(np.random.default_rng(seed).normal(size=dim))
    loc, precision = np.zeros(dim), np.eye(dim)
    if kind == "shifted":
        loc = sign
    elif kind == "correlated":  # what a diagonal q at the optimum of the ELBO cannot show: unit diagonal, correlations
        precision = 0.08 * np.eye(dim) + 0.92 * np.outer(sign, sign)
    else:
        precision *= {"exact": 1, "narrow": 0.5, "wide": 2}[kind] ** 2
    return loc, precision


def judge(kind, dim, seed, num_draws=1000):
    """The findings on 1,000 draws of q, by check."""
    loc, precision = whitened(kind, dim, seed)
    draws = np.random.default_rng(seed).normal(size=(num_draws, dim))
    x = draws - loc
    log_joint, log_q = -0.5 * ((x @ precision) * x).sum(1) - 7.0, -0.5 * (draws**2).sum(1)
    found = diag.against_posterior(log_joint, log_q, 3.0 + 2.0 * draws, [f"latent {d}" for d in range(dim)])
    return {f.check: f for f in diag.as_diagnosis(found).findings}


CALLS = {  # by kind: the checks that must call it, and those that must not
    "exact": (set(), {"pareto_k", "importance_share", "width", "shift"}),
    "narrow": ({"width"}, {"shift"}),
    "wide": ({"width"}, {"shift"}),
    "shifted": ({"shift"}, {"width"}),
    "correlated": ({"importance_share"}, {"width", "shift"}),  # and by k-hat, but for its noise
}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dim", [3, 20])
@pytest.mark.parametrize("kind", CALLS)
def test_each_kind_of_wrong_posterior_is_called_by_its_name(kind, dim, seed):
    found = judge(kind, dim, seed)
    called = {name for name, f in found.items() if f.severity in ("warning", "error")}
    must, must_not = CALLS[kind]
    assert must <= called and not must_not & called
    assert (found["importance_share"].severity == "ok") == (kind == "exact")
    assert kind != "correlated" or found["pareto_k"].value > 0.6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dim", [5, 40, 200])
@pytest.mark.parametrize(("kind", "words"), [("wide", "too wide"), ("narrow", "too narrow")])
def test_the_verdict_on_a_wrong_width_names_it_in_any_number_of_latents(kind, words, dim, seed):
    """In many latents even a guide that is too wide has a large k-hat, which is worse than the width."""
    found = judge(kind, dim, seed)
    verdict = diag.as_diagnosis([*found.values()]).verdict
    assert words in verdict and ("too wide" in verdict) != ("too narrow" in verdict)
    assert dim < 40 or found["pareto_k"].severity == "error"
    assert all(words in f.cause for f in found.values() if f.severity in ("warning", "error"))


@pytest.mark.parametrize("dim", [5, 40])
def test_a_guide_with_small_errors_in_its_scales_has_a_clean_verdict(dim):
    rng = np.random.default_rng(11)
    scale, draws = np.exp(0.05 * rng.normal(size=dim)), rng.normal(size=(1000, dim))
    log_joint, log_q = -0.5 * ((scale * draws) ** 2).sum(1), -0.5 * (draws**2).sum(1)
    found = diag.against_posterior(log_joint, log_q, draws, [str(d) for d in range(dim)])
    assert {f.severity for f in found} == {"ok"}


@pytest.mark.parametrize("seed", range(3))
def test_width_and_shift_are_measured_where_q_and_posterior_are_normal(seed):
    for kind, width in (("narrow", 0.5), ("wide", 2.0), ("exact", 1.0)):
        found = judge(kind, 6, seed)
        assert found["width"].value == pytest.approx(width) and found["shift"].value == pytest.approx(0, abs=1e-9)
    assert judge("wide", 3, seed)["pareto_k"].value < 0.2  # k-hat cannot see it
    shifted = judge("shifted", 4, seed)
    noise = shifted["shift"].threshold - 0.5  # four standard errors
    assert shifted["shift"].value == pytest.approx(1.0, abs=1.25 * noise)
    assert shifted["width"].value == pytest.approx(1.0, abs=0.2)
    assert "latent" in shifted["shift"].cause


def test_a_q_without_a_varying_density_has_no_width():
    draws = np.random.default_rng(0).uniform(size=(100, 2))
    assert diag.check_width(-draws.sum(1), np.zeros(100)) == []
    assert diag.check_shift(-draws.sum(1), np.zeros(100), draws, ["a", "b"]) == []
    assert diag.check_width(np.full(100, np.nan), draws.sum(1)) == []


def test_few_draws_say_that_they_cannot_tell():
    """Log densities that have nothing to do with each other."""
    rng = np.random.default_rng(3)
    (finding,) = diag.check_width(40 * rng.normal(size=30) + 1, rng.normal(size=30))
    assert finding.severity == "note" and "cannot tell" in finding.cause


# usefulness -------------------------------------------------------------------------------------------------------


def answered(probs, target):
    probs = np.asarray(probs, dtype=float)
    return sp.Prediction(np.log(probs)[None], np.array(target), ("a", "b", "c")[: probs.shape[1]])


def usefulness(prediction):
    return {f.check: (f.severity, f.value) for f in diag.check_usefulness(prediction)}


def test_predictions_are_held_against_the_class_frequencies():
    target = [0, 0, 0, 1] * 25
    right = np.where(np.eye(2)[target] > 0, 0.9, 0.1)
    baseline = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert usefulness(answered(right, target))["skill"] == ("ok", pytest.approx(1 + np.log(0.9) / baseline))
    same = usefulness(answered([[0.75, 0.25]] * 100, target))
    assert same["skill"] == ("warning", pytest.approx(0)) and same["one_class"] == ("warning", 1)
    worse = usefulness(answered(right[:, ::-1], target))
    assert worse["skill"][0] == "warning" and worse["skill"][1] < -1


def test_class_frequencies_are_shared_out_among_the_choices_of_a_row():
    """Half of the rows lack the third class: their baseline is the ratio of the first two frequencies."""
    probs = np.array([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]] * 10)
    with np.errstate(divide="ignore"):
        prediction = answered(probs, [0, 2, 1, 2] * 5)
    baseline = np.log(2) / 2 + np.log(2) / 2  # frequencies 1/4, 1/4, 1/2
    assert usefulness(prediction)["skill"][1] == pytest.approx(1 - np.log(2) / baseline)


def test_one_class_for_all_rows_is_called_where_the_answers_differ():
    probs = np.array([[0.8, 0.2], [0.6, 0.4]] * 50)
    assert usefulness(answered(probs, [0, 1] * 50))["one_class"][0] == "warning"
    assert usefulness(answered(probs, [0] * 99 + [1]))["one_class"][0] == "note"
    constant = usefulness(answered(probs, [0] * 100))
    assert constant["one_class"][0] == "ok" and constant["skill"][0] == "note"


def test_numbers_are_held_against_their_mean():
    target = np.linspace(-1, 1, 50)
    for means, expected, severity in ((target, 1.0, "ok"), (0 * target, 0.0, "warning"), (-target, -3.0, "warning")):
        prediction = sp.NumericPrediction(*[means[None]] * 3, np.zeros((1, 50)), target)
        assert usefulness(prediction) == {"skill": (severity, pytest.approx(expected))}
    assert diag.check_usefulness(numbers([1.0])) == []


# leave-one-out ------------------------------------------------------------------------------------------------


def test_loo_of_draws_of_the_posterior_is_that_of_arviz():
    log_likelihood = -np.random.default_rng(0).gamma(2.0, 0.5, size=(500, 20))
    loo = diag.psis_loo(log_likelihood, log_p=None, log_q=None)
    elpd, se, p, k = arviz_loo(log_likelihood)
    assert (loo.elpd, loo.se, loo.p) == pytest.approx((elpd, se, p), rel=1e-9)
    np.testing.assert_allclose(loo.pareto_k, k, rtol=1e-6)
    assert loo.elpd == pytest.approx(loo.elpd_i.sum()) and loo.elpd_i.shape == (20,)


@pytest.mark.parametrize("width", [1.0, 1.3], ids=["the posterior", "a wider q"])
def test_loo_is_exact_where_it_is_known(toy, exact, width):
    posterior = posterior_of(toy, normal_guide(exact.mean, width**2 * exact.covariance))
    found = np.array([posterior.loo(toy.rows, num_draws=400, seed=seed).elpd for seed in range(12)])
    expected = exact.loo.sum().item()
    assert abs(found.mean() - expected) < 5 * found.std(ddof=1) / 12**0.5 + 0.01
    assert found.std() < 0.2


@pytest.mark.parametrize("width", [1.0, 1.5, 2.5], ids=["the posterior", "a wider q", "a much wider q"])
def test_the_effective_number_of_parameters_is_that_of_the_posterior_however_wide_q_is(toy, exact, width):
    """Without the weights p / q in the in-sample term it is negative at a wide q."""
    f = toy.features
    in_sample = log_normal(toy.y, f @ exact.mean, (f @ exact.covariance * f).sum(1) + NOISE**2)
    expected = (in_sample - exact.loo).sum().item()
    q = dist.MultivariateNormal(exact.mean, width**2 * exact.covariance)
    p = dist.MultivariateNormal(exact.mean, exact.covariance)

    def loo(seed):
        z = torch.as_tensor(np.random.default_rng(seed).normal(size=(400, 3)))
        s = exact.mean + z @ q.scale_tril.T
        log_likelihood = log_normal(toy.y, s @ f.T, torch.tensor(NOISE**2))
        return diag.psis_loo(log_likelihood.numpy(), log_p=p.log_prob(s).numpy(), log_q=q.log_prob(s).numpy())

    found = np.array([loo(seed).p for seed in range(12)])
    assert expected > 2  # of three parameters
    assert abs(found.mean() - expected) < 5 * found.std(ddof=1) / 12**0.5 + 0.01
    assert (found > 0).all()


def test_without_the_correction_a_wider_q_would_give_another_number(toy, exact):
    """So the test above can fail."""
    posterior = posterior_of(toy, normal_guide(exact.mean, 1.3**2 * exact.covariance))
    weights = posterior.log_weights(toy.rows, num_draws=400)
    uncorrected = diag.psis_loo(weights.log_likelihood, log_p=None, log_q=None).elpd
    assert uncorrected < exact.loo.sum().item() - 0.5


def test_rows_without_a_tail_and_equal_rows_are_told_apart():
    """Draws that repeat have no tail to smooth: unreliable. A row that all draws predict alike is fine."""
    repeated = np.tile(np.random.default_rng(0).normal(size=(5, 1)), (20, 1))
    loo = diag.psis_loo(np.hstack([repeated, np.full((100, 1), -1.0)]), log_p=None, log_q=None)
    assert np.isnan(loo.pareto_k[0]) and loo.pareto_k[1] == -np.inf
    assert loo.elpd_i[1] == pytest.approx(-1.0)
    assert loo.bad_rows == 0.5


@pytest.mark.parametrize(
    ("log_likelihood", "message"),
    [
        (np.random.default_rng(0).normal(size=(24, 3)), r"LOO needs 25 draws or more .*got 24"),
        (np.full((30, 3), np.nan), "some are NaN or infinite"),
        (np.where(np.eye(30, 3) > 0, -np.inf, -1.0), "some are NaN or infinite"),
        (np.full((30, 3), -1.0), "All draws predict the same.*Use held-out rows, or a guide with a spread"),
    ],
    ids=["few draws", "NaN", "infinite", "a point"],
)
def test_loo_says_what_it_needs(log_likelihood, message):
    with pytest.raises(ValueError, match=message):
        diag.psis_loo(log_likelihood, log_p=None, log_q=None)


# of a posterior -----------------------------------------------------------------------------------------------


def test_the_weights_are_the_densities_of_the_joint_model(toy, healthy, exact):
    weights = healthy.log_weights(toy.rows, num_draws=7, seed=3)
    s = healthy.sample(7, seed=3).s
    q = dist.MultivariateNormal(exact.mean, exact.covariance)
    np.testing.assert_allclose(
        weights.log_likelihood, dist.Normal(s @ toy.features.T, NOISE).log_prob(toy.y).numpy(), rtol=1e-9, atol=1e-9
    )
    prior = dist.Normal(0.0, s.new_tensor(PRIOR_SCALE))  # a scale that is a float would be float32
    np.testing.assert_allclose(weights.log_prior, prior.log_prob(s).sum(1), rtol=1e-9)
    np.testing.assert_allclose(weights.log_q, q.log_prob(s), rtol=1e-9)
    np.testing.assert_allclose(weights.log_weights, exact.evidence, rtol=1e-9)  # q is the posterior: p / q is constant
    assert weights.elbo() == pytest.approx(exact.evidence)


def test_a_part_of_the_data_stands_for_the_whole(toy, healthy):
    rows = toy.rows[:16]
    part, whole = healthy.log_weights(rows, num_draws=5), healthy.log_weights(rows, num_draws=5, num_data=64)
    assert (part.scale, whole.scale) == (1.0, 4.0)
    np.testing.assert_allclose(whole.log_joint - whole.log_prior, 4 * (part.log_joint - part.log_prior))


@pytest.mark.parametrize("num_data", [0, -1, 15])
def test_a_part_larger_than_the_whole_is_refused(toy, healthy, num_data):
    why = "16 rows" if num_data > 0 else r"must be a whole number, 1 or more"
    with pytest.raises(ValueError, match=rf"num_data={num_data}.*{why}"):
        healthy.log_weights(toy.rows[:16], num_draws=5, num_data=num_data)


def test_a_family_without_a_density_has_no_weights(toy, exact):
    posterior = posterior_of(toy, EmpiricalGuide({"s": exact.mean + torch.randn(30, 3, dtype=torch.float64)}))
    weights = posterior.log_weights(toy.rows, num_draws=30)
    assert weights.log_q is None and np.isnan(weights.elbo()) and np.isnan(weights.pareto_k()).all()
    with pytest.raises(ValueError, match="have no density"):
        weights.log_weights  # noqa: B018  # a property that raises
    assert np.isfinite(posterior.loo(toy.rows, num_draws=30).elpd)  # as draws of the posterior


def test_loo_of_a_point_and_of_few_draws_says_what_to_do(toy, healthy, exact):
    with pytest.raises(ValueError, match="a guide with a spread"):
        posterior_of(toy, DeltaGuide(exact.mean)).loo(toy.rows, num_draws=30)
    with pytest.raises(ValueError, match="LOO needs 25 draws or more"):
        healthy.loo(toy.rows, num_draws=10)


def severities(posterior, toy, **options):
    return {f.check: f.severity for f in posterior.diagnose(toy.rows, **{"num_draws": 100, **options}).findings}


def test_a_diagnosis_takes_a_thousand_draws_by_default():
    """With 200 draws k-hat passed a posterior half as wide in one of four seeds."""
    assert inspect.signature(sp.Posterior.diagnose).parameters["num_draws"].default == 1000


def test_a_posterior_that_is_exact_is_healthy(toy, healthy):
    found = severities(healthy, toy)
    found.pop("mean_vs_draws")  # of its own below
    assert set(found) == {
        "pareto_k",
        "importance_share",
        "elbo",
        "width",
        "shift",
        "skill",
        "collapsed_latents",
        "exploded_latents",
        "idle_layers",
    }
    assert set(found.values()) == {"ok"}


@pytest.mark.parametrize("seed", range(6))
def test_the_mean_of_a_linear_model_predicts_like_its_draws(seed):
    """It does so exactly; what is left is the Monte Carlo error of the draws, which is not a finding."""
    toy = LinearToy(5, num_data=12, seed=seed)
    assert severities(posterior_of(toy), toy)["mean_vs_draws"] == "ok"


@pytest.mark.parametrize(
    ("change", "check", "severity"),
    [
        pytest.param(lambda m, c: (m + 4 * c.diagonal().sqrt(), c), "pareto_k", "error", id="elsewhere"),
        pytest.param(lambda m, c: (m, 0.01 * c), "pareto_k", "error", id="far too narrow"),
        pytest.param(lambda m, c: (m, 1e-6 * c), "collapsed_latents", "warning", id="almost a point"),
        pytest.param(lambda m, c: (m, 1e6 * c), "exploded_latents", "warning", id="far too wide"),
        pytest.param(lambda m, c: (m * 0, torch.eye(3).double() * PRIOR_SCALE**2), "idle_layers", "note", id="prior"),
        pytest.param(lambda m, c: (m * 0, torch.eye(3).double() * PRIOR_SCALE**2), "skill", "warning", id="useless"),
        pytest.param(lambda m, c: (m, 0.25 * c), "width", "warning", id="half as wide"),
        pytest.param(lambda m, c: (m, 4 * c), "width", "warning", id="twice as wide"),
        pytest.param(lambda m, c: (m, 16 * c), "width", "error", id="four times as wide"),
        pytest.param(lambda m, c: (m + 2 * c[0] / c[0, 0].sqrt(), c), "shift", "warning", id="two deviations off"),
        pytest.param(lambda m, c: (m * 0, torch.eye(3).double() * 9), "importance_share", "warning", id="wide"),
    ],
)
def test_a_posterior_that_is_wrong_is_found_out(toy, exact, change, check, severity):
    wrong = posterior_of(toy, normal_guide(*change(exact.mean, exact.covariance)))
    assert severities(wrong, toy)[check] == severity


def test_a_posterior_that_is_not_a_number_is_an_error(toy, exact):
    broken = posterior_of(toy, NormalGuide(exact.mean * torch.nan, exact.mean.abs()))
    assert severities(broken, toy)["draws"] == "error"


class NotANumber(LinearGaussian):
    """A likelihood that gives no number and does not say so."""

    def likelihood(self, outputs, batch):
        return dist.Normal(outputs[..., 0] * torch.nan, 1.0, validate_args=False)


def test_a_likelihood_that_is_not_a_number_is_an_error(toy, healthy):
    report = replace(healthy, task=NotANumber()).diagnose(toy.rows, num_draws=50).to_frame()
    assert report.loc[["pareto_k", "elbo"], "severity"].eq("error").all()
    assert report.loc[["importance_share", "mean_vs_draws"], "severity"].ne("ok").all()
    assert "gives no probability" in report.loc["elbo", "advice"]


def test_a_prior_that_is_not_a_number_is_an_error():
    wide = np.where(np.eye(400, 4) > 0, np.nan, PRIOR)
    (finding,) = diag.check_scales(0.2 * PRIOR, wide, SUBSPACE)
    assert (finding.check, finding.severity) == ("prior_draws", "error") and "parameters of the prior" in finding.advice


def test_rows_without_an_answer_have_no_loo(toy, healthy):
    with pytest.raises(ValueError, match=r"Row 0 has no answer"):
        healthy.loo([{"x": row["x"], "y": None} for row in toy.rows])


def test_what_is_checked_depends_on_the_guide_and_on_what_is_given(toy, healthy, exact):
    assert "loss_slope" in severities(healthy, toy, history=history(NOISY))
    point = severities(posterior_of(toy, DeltaGuide(exact.mean)), toy)
    assert point["collapsed_latents"] == "warning" and not {"pareto_k", "elbo", "r_hat"} & set(point)
    near, far = (normal_guide(exact.mean + shift, exact.covariance) for shift in (0, 20))
    assert severities(posterior_of(toy, MixtureGuide([near, near])), toy)["r_hat"] == "ok"
    assert severities(posterior_of(toy, MixtureGuide([near, far])), toy)["r_hat"] == "error"
    points = healthy.sample(400).s
    assert severities(posterior_of(toy, EmpiricalGuide({"s": points}, num_chains=2)), toy)["r_hat"] == "ok"
    apart = torch.cat([points[:200], points[200:] + 5])
    assert severities(posterior_of(toy, EmpiricalGuide({"s": apart}, num_chains=2)), toy)["r_hat"] == "error"


def test_particles_are_no_chains(toy):
    """One cloud of Stein particles is all there is: advice to run two chains leads nowhere."""
    posterior = sp.refit(posterior_of(toy), toy.rows, guide="svgd", num_steps=2, progress=False).posterior
    assert "r_hat" not in severities(posterior, toy)


def test_masks_have_no_width_to_explode(task):
    rows = tiny.question_rows(12)
    blora = sp.bayesian_lora(tiny.causal_lm(), prior="rank_mask")
    posterior = sp.fit(blora, task, rows, num_steps=2, progress=False).posterior
    found = {f.check: f.severity for f in posterior.diagnose(rows, num_draws=30).findings}
    assert found.get("exploded_latents") != "warning"


@pytest.mark.parametrize("num_draws", [0, 1, 2, 24])
def test_too_few_draws_are_refused_instead_of_called_healthy(toy, healthy, num_draws):
    why = "25 draws or more" if num_draws else "num_draws=0 must be a whole number, 1 or more"
    with pytest.raises(ValueError, match=why):
        healthy.diagnose(toy.rows, num_draws=num_draws)


@pytest.mark.parametrize("verb", ["log_weights", "loo", "diagnose", "predict_linearized", "prior_predictive"])
def test_a_batch_size_that_is_not_positive_is_named(toy, healthy, verb):
    with pytest.raises(ValueError, match="batch_size=0 must be a whole number, 1 or more"):
        getattr(healthy, verb)(toy.rows, batch_size=0)


def test_a_diagnosis_can_be_repeated_and_moves_no_random_state(toy, healthy, unchanged_rng):
    first, second = (healthy.diagnose(toy.rows, num_draws=50, seed=5) for _ in range(2))
    pd.testing.assert_frame_equal(first.to_frame(), second.to_frame())
    other = healthy.diagnose(toy.rows, num_draws=50, seed=6)
    assert not first.to_frame()["value"].equals(other.to_frame()["value"])


def test_the_batch_size_does_not_matter(toy, exact):
    posterior = posterior_of(toy, normal_guide(exact.mean, 1.2 * exact.covariance))
    a, b = (posterior.loo(toy.rows, num_draws=50, batch_size=size) for size in (5, 64))
    np.testing.assert_allclose(a.elpd_i, b.elpd_i, rtol=1e-9)


def test_a_posterior_of_a_trained_llm_is_diagnosed(fitted):
    rows = tiny.question_rows(48)
    report = fitted.posterior.diagnose(rows, history=fitted.history, num_draws=100)
    expected = {"pareto_k", "loss_slope", "importance_share", "collapsed_latents", "exploded_latents", "idle_layers"}
    new = {"loss_end", "width", "shift", "skill", "one_class"}
    assert {f.check for f in report.findings} == expected | new | {"elbo", "mean_vs_draws"}
    assert report.to_frame().loc[["skill", "one_class", "loss_end"], "severity"].eq("ok").all()
    assert report.to_frame()["value"].notna().all()
    untrained = replace(fitted.posterior, guide=NormalGuide(torch.zeros(40), torch.ones(40)))
    assert untrained.diagnose(rows, num_draws=100).to_frame().loc["idle_layers", "severity"] == "note"
