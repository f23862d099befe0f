"""Regression in any units: training standardizes the targets, and every output is in the units of the rows."""

import warnings

import numpy as np
import pyro.distributions as dist
import pytest
import tiny
import torch
from torch.utils.data import DataLoader

import scalabl_pyro as sp
from scalabl_pyro._errors import ScalaBLWarning
from scalabl_pyro.data import collate, encode
from scalabl_pyro.tasks.standardized_normal import StandardizedNormal

TEXTS = tiny.text_rows(12)
LABELS = np.array([float(row["label"]) for row in TEXTS])
OPTIONS = {"num_steps": 12, "batch_size": 6, "seed": 1, "progress": False}
UNITS = {
    "price": (3e5, 1e4),
    "score": (55.0, 3.0),
    "tiny": (0.0, 1e-6),
    "time stamp": (1.7e9, 20.0),
    "negative": (-40, 8),
}


def rows_of(targets):
    return [{**row, "label": float(y)} for row, y in zip(TEXTS, targets, strict=True)]


def fitted(targets, *, data=None, llm=None, task=None, **options):
    blora = sp.bayesian_lora(llm or tiny.classifier(num_labels=1), r=2)
    task = task or sp.Regression(tiny.tokenizer())
    return sp.fit(blora, task, rows_of(targets) if data is None else data, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def by_hand():
    """What a fit to targets that were standardized by hand gives: mean 0 and standard deviation 1."""
    z = (LABELS - LABELS.mean()) / LABELS.std()
    task = sp.Regression(tiny.tokenizer(), standardize=False, noise_scale=1.0)
    return rows_of(z), fitted(z, task=task)


@pytest.fixture(scope="module", params=list(UNITS))
def pair(request, by_hand):
    """The fit in some units, the fit by hand, and the mean and scale between them."""
    offset, unit = UNITS[request.param]
    targets = offset + unit * LABELS
    result = fitted(targets)
    return rows_of(targets), result, *by_hand, targets.mean(), targets.std()


def test_training_is_that_on_targets_standardized_by_hand(pair):
    _, result, _, hand, mean, scale = pair
    np.testing.assert_allclose(result.posterior.task.standardize, (mean, scale), rtol=1e-12)
    np.testing.assert_allclose(result.history["nll"], hand.history["nll"] + np.log(scale), atol=1e-4)
    np.testing.assert_allclose(result.history["loss"], hand.history["loss"] + np.log(scale), atol=1e-4)
    np.testing.assert_allclose(result.history["kl"], hand.history["kl"], rtol=1e-4)
    for mine, other in zip(result.posterior.factors, hand.posterior.factors, strict=True):
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    noise, expected = (r.posterior.task.noise_scale.item() for r in (result, hand))
    assert noise == pytest.approx(scale * expected, rel=1e-4)


def test_each_output_of_a_prediction_is_in_the_units_of_the_rows(pair):
    rows, result, hand_rows, hand, mean, scale = pair
    found = result.posterior.predict(rows, num_draws=4, seed=2)
    z = hand.posterior.predict(hand_rows, num_draws=4, seed=2)
    near = {"rtol": 1e-9, "atol": 1e-3 * scale}
    np.testing.assert_allclose(found.mean, mean + scale * z.mean, **near)
    np.testing.assert_allclose(found.means, mean + scale * z.means, **near)
    np.testing.assert_allclose(found.replicates, mean + scale * z.replicates, **near)
    np.testing.assert_allclose(found.interval(0.8), mean + scale * z.interval(0.8), **near)
    for name in ("total", "aleatoric", "epistemic"):
        ours, theirs = getattr(found, name), getattr(z, name)
        np.testing.assert_allclose(ours, scale**2 * theirs, rtol=5e-3, atol=1e-6 * scale**2)
    np.testing.assert_allclose(found.log_likelihood, z.log_likelihood - np.log(scale), atol=1e-3)
    np.testing.assert_array_equal(found.target, [row["label"] for row in rows])
    ours, theirs = found.metrics().loc["value"], z.metrics().loc["value"]
    assert ours["rmse"] == pytest.approx(scale * theirs["rmse"], rel=1e-3)
    assert ours["mae"] == pytest.approx(scale * theirs["mae"], rel=1e-3)
    assert ours["nll"] == pytest.approx(theirs["nll"] + np.log(scale), abs=1e-3)


def test_densities_for_other_inference_hold_the_jacobian(pair):
    rows, result, hand_rows, hand, _, scale = pair
    s = hand.posterior.mean()
    ours, theirs = (r.log_likelihood(d)(s) for r, d in ((result.posterior, rows), (hand.posterior, hand_rows)))
    assert ours.item() == pytest.approx(theirs.item() - len(rows) * np.log(scale), abs=2e-3)
    laplace = [
        sp.laplace(r.posterior, d).guide.covariance() for r, d in ((result, rows), (hand, hand_rows))
    ]  # the curvature of the outputs does not depend on the units
    torch.testing.assert_close(laplace[0], laplace[1], rtol=1e-2, atol=1e-4)


def test_a_saved_posterior_keeps_the_units(pair, tmp_path):
    rows, result, *_ = pair
    result.posterior.save_pretrained(tmp_path / "posterior")
    loaded = sp.Posterior.from_pretrained(tiny.classifier(num_labels=1), tmp_path / "posterior")
    assert loaded.task.standardize == result.posterior.task.standardize
    was, now = (p.predict(rows, num_draws=3) for p in (result.posterior, loaded))
    for name in ("means", "variances", "replicates", "log_density", "target"):
        np.testing.assert_array_equal(getattr(now, name), getattr(was, name))


def test_a_run_resumes_in_the_same_units(tmp_path):
    targets = 3e5 + 1e4 * LABELS
    options = {"checkpoint_dir": tmp_path / "run", "checkpoint": {"every": 4}}
    whole = fitted(targets)
    fitted(targets, callbacks=[lambda row: row["step"] == 5], **options)
    resumed = fitted(targets, **options)
    np.testing.assert_array_equal(resumed.history["loss"], whole.history["loss"])
    assert resumed.posterior.task.standardize == whole.posterior.task.standardize


def test_raw_prices_are_predicted_at_their_size():
    """A head that starts near 0 never gets to 300,000 by itself: the error was 37 standard deviations."""
    targets = 3e5 + 1e4 * LABELS
    rows = rows_of(targets)
    result = fitted(targets, num_steps=40, batch_size=12)
    scores = result.posterior.predict(rows).metrics().loc["value"]
    assert scores["rmse"] < 1.1 * targets.std()
    assert result.posterior.task.noise_scale.item() < 1.5 * targets.std()


# mean and scale that are known already ------------------------------------------------------------------------


def test_a_second_fit_keeps_mean_and_scale_and_says_so_where_they_do_not_fit():
    task = sp.Regression(tiny.tokenizer())
    fitted(55 + LABELS, task=task, num_steps=1)
    known = task.standardize
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(55.5 + LABELS, task=task, num_steps=1)
    for other in (3e5 + LABELS, 55 + 100 * LABELS, 55 + 1e-3 * LABELS):
        with pytest.warns(ScalaBLWarning, match=r"have the mean .* but the task has the mean 5\d.*standardize="):
            fitted(other, task=task, num_steps=1)
    assert task.standardize == known


def test_a_fit_that_starts_afresh_learns_mean_and_scale_again():
    task, blora = sp.Regression(tiny.tokenizer()), sp.bayesian_lora(tiny.classifier(num_labels=1), r=2)
    options = {**OPTIONS, "num_steps": 2}
    sp.fit(blora, task, rows_of(55 + LABELS), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ScalaBLWarning)
        again = sp.fit(blora, task, rows_of(3e5 + 1e4 * LABELS), reset=True, **options)
    new = fitted(3e5 + 1e4 * LABELS, num_steps=2)
    assert task.standardize == new.posterior.task.standardize
    np.testing.assert_allclose(again.history["loss"], new.history["loss"], rtol=1e-6)


def test_raw_targets_without_standardization_are_named():
    task = sp.Regression(tiny.tokenizer(), standardize=False)
    with pytest.warns(ScalaBLWarning, match=r"mean 3e\+05 .* but standardize=False\. The model may learn nothing"):
        fitted(3e5 + LABELS, task=task, num_steps=1)


@pytest.mark.parametrize("offset", [0.0, 3e5])
def test_batches_of_ones_own_need_the_pair(offset):
    task = sp.Regression(tiny.tokenizer())
    examples = encode(rows_of(offset + LABELS), task.encode, need_target=True)
    loader = DataLoader(
        list(enumerate(examples)),
        batch_size=6,
        collate_fn=lambda items: collate([e for _, e in items], [i for i, _ in items], task.pad_token_id),
    )
    if offset:
        with pytest.warns(ScalaBLWarning, match="standardize="):
            fitted(LABELS, data=loader, task=task, num_steps=1)
        task = sp.Regression(tiny.tokenizer(), standardize=(offset, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ScalaBLWarning)
        fitted(LABELS, data=loader, task=task, num_steps=1)
    assert task.standardize == ((offset, 1.0) if offset else False)


def test_equal_targets_have_scale_one():
    task = sp.Regression(tiny.tokenizer())
    fitted(np.full(12, 7.1), task=task, num_steps=1)
    assert task.standardize == (pytest.approx(7.1), 1.0)


def test_a_noise_that_is_given_is_in_the_units_of_the_rows():
    task = sp.Regression(tiny.tokenizer(), noise_scale=500.0)
    fitted(3e5 + 1e4 * LABELS, task=task, num_steps=1, lr=1e-9)
    assert task.noise_scale.item() == pytest.approx(500.0, rel=1e-4)


def test_the_released_training_standardizes_too():
    task = sp.Regression(tiny.tokenizer())
    options = {"num_steps": 2, "batch_size": 6, "progress": False, "lora": {"r": 2}}
    sp.baselines.scalabl_released(tiny.classifier(num_labels=1), task, rows_of(3e5 + 1e4 * LABELS), **options)
    assert task.standardize[0] == pytest.approx((3e5 + 1e4 * LABELS).mean())


def test_a_file_of_an_earlier_version_means_raw_units():
    from scalabl_pyro.tasks.registry import from_options

    task = from_options("Regression", tiny.tokenizer(), {"noise_scale": 0.5, "target": "y"})
    assert task.standardize is False and task.mean_and_scale == (0.0, 1.0)


@pytest.mark.parametrize("wrong", [(1.0,), (0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), "yes", 3, None, ("a", 1)])
def test_a_standardization_that_is_not_a_pair_is_refused(wrong):
    with pytest.raises(ValueError, match=r"standardize=.*pair \(mean, scale\)"):
        sp.Regression(tiny.tokenizer(), standardize=wrong)


# the distribution ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_distribution_is_a_normal_one_in_the_units_of_y(dtype):
    loc, scale = torch.tensor([0.3, -1.2], dtype=dtype), torch.tensor([0.5, 2.0], dtype=dtype)
    d, plain = StandardizedNormal(loc, scale, center=40.0, unit=8.0), dist.Normal(40 + 8 * loc, 8 * scale)
    value = torch.tensor([42.0, 20.0], dtype=torch.float64)
    assert isinstance(d, dist.Normal)
    for mine, theirs in (
        (d.mean, plain.mean),
        (d.variance, plain.variance),
        (d.log_prob(value), plain.log_prob(value)),
        (d.cdf(value), plain.cdf(value)),
        (d.entropy(), plain.entropy()),
    ):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-5, atol=1e-6)
    wide = d.expand((3, 2))
    assert wide.batch_shape == (3, 2)
    torch.testing.assert_close(wide.log_prob(value), d.log_prob(value).expand(3, 2))
    assert d.log_prob(value).dtype == dtype


def test_samples_have_the_moments():
    d = StandardizedNormal(torch.tensor(0.3), torch.tensor(0.5), center=40.0, unit=8.0)
    torch.manual_seed(0)
    draws = d.sample((10_000,))
    assert abs(draws.mean() - 42.4) < 5 * 4 / 100
    assert abs(draws.std() - 4) < 5 * 4 / np.sqrt(2 * 10_000)


@pytest.mark.parametrize("unit", [1e-60, 1e50, 1e300])
@pytest.mark.parametrize("kind", [sp.Regression, sp.tasks.RobustRegression])
def test_targets_whose_spread_float32_cannot_hold_are_refused(kind, unit):
    with pytest.raises(ValueError, match=r"float32 cannot hold\. Give them in another unit"):
        kind(tiny.tokenizer()).prepare([0.0, unit, 2 * unit], are_all=True)
