"""A guide or prior is inferred anew with the factors held fixed, and nothing else changes."""

import sys

import numpy as np
import pytest
import tiny
import torch

import scalabl_pyro as sp


@pytest.fixture(scope="module")
def rows():
    return tiny.question_rows(48)


def live_state(posterior):
    adapter = posterior.adapter
    return [p.detach().clone() for pair in adapter.factors() for p in pair] + [adapter.loc.clone()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("guide", ["normal", "full_covariance", "flow", "svgd"])
def test_the_factors_stay_and_s_is_inferred_anew(fitted, rows, guide):
    before = live_state(fitted.posterior)
    new = sp.refit(fitted.posterior, rows, guide=guide, num_steps=20, progress=False)
    for old_pair, new_pair in zip(fitted.posterior.factors, new.posterior.factors, strict=True):
        assert same(old_pair, new_pair)
    assert not torch.equal(fitted.posterior.mean(), new.posterior.mean())
    assert len(new.history) == 20
    assert same(before, live_state(fitted.posterior))
    assert all(p.requires_grad for pair in fitted.posterior.adapter.factors() for p in pair)


def test_it_starts_at_the_posterior_whatever_the_module_was_trained_to_since(rows):
    task = sp.MultipleChoice(tiny.tokenizer())
    blora = sp.bayesian_lora(tiny.causal_lm())
    first = sp.fit(blora, task, rows, num_steps=5, lr=1e-2, progress=False).posterior
    sp.fit(blora, task, rows, num_steps=20, lr=1e-2, progress=False)
    again = sp.refit(first, rows, num_steps=1, optimizer={"lr_loc": 1e-12}, progress=False).posterior
    torch.testing.assert_close(again.mean(), first.mean(), rtol=0, atol=1e-6)


def test_another_prior_replaces_the_old_one_in_the_new_posterior_alone(fitted, rows):
    new = sp.refit(
        fitted.posterior, rows, prior=0.1, num_steps=150, optimizer={"lr_loc": 3e-2, "warmup": 0}, progress=False
    ).posterior
    assert "Normal" in str(new.prior) and new.prior is not fitted.posterior.prior
    assert new.mean().norm() < 0.5 * fitted.posterior.mean().norm()  # a tighter prior shrinks s


def test_an_error_leaves_the_module_as_it_was(fitted, rows):
    before = live_state(fitted.posterior)
    with pytest.raises(ValueError, match="guide='mean-field' is unknown"):
        sp.refit(fitted.posterior, rows, guide="mean-field")
    assert same(before, live_state(fitted.posterior))


def test_start_noise_and_initial_scales_of_restarts_are_independent(fitted, rows, monkeypatch):
    """torch makes the first 8 normal numbers of a generator state from its first 8 uniform ones: correlation 0.66."""
    module = sys.modules["scalabl_pyro.inference.ensemble"]
    noise, scales = [], []
    refit = module.refit

    def recorded(posterior, data, *, guide, **options):
        def build(blora):
            built = guide(blora)
            noise.append((built.loc - blora.adapter.loc).detach()[:8])
            scales.append(built.scale.detach()[:8])
            return built

        return refit(posterior, data, guide=build, **options)

    monkeypatch.setattr(module, "refit", recorded)
    sp.ensemble(fitted.posterior, rows[:2], num_members=20, spread=1.0, num_steps=1, progress=False)
    pairs = torch.stack([torch.cat(noise), torch.cat(scales)])
    assert abs(torch.corrcoef(torch.stack([pairs[0].abs(), pairs[1]]))[0, 1]) < 5 / pairs.shape[1] ** 0.5
    assert abs(pairs[0].std() - 1) < 5 / (2 * pairs.shape[1]) ** 0.5


QUICK = {
    "mcmc": (sp.mcmc, {"num_samples": 4, "warmup_steps": 1, "num_chains": 1, "max_tree_depth": 1, "progress": False}),
    "ensemble": (sp.ensemble, {"num_members": 2, "num_steps": 1, "progress": False}),
    "laplace": (sp.laplace, {}),
}


@pytest.fixture(scope="module")
def small():
    rows = tiny.question_rows(6)
    blora = sp.bayesian_lora(tiny.causal_lm(), r=2)
    task = sp.MultipleChoice(tiny.tokenizer())
    return sp.fit(blora, task, rows, num_steps=1, progress=False).posterior, rows


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *(("mcmc", {"seed": seed}, f"seed={seed}: expected an integer") for seed in (True, None)),
        *(("ensemble", {"seed": seed}, f"seed={seed}: expected an integer") for seed in (True, 2.5, None)),
        ("mcmc", {"progress": "no"}, "progress='no': expected True or False"),
        ("ensemble", {"checkpoint_dir": 3}, r"checkpoint_dir is an int \(3\), expected the path"),
        ("laplace", {"prior_scale": np.ones(2)}, "prior_scale=.*: give a number"),
    ],
)
def test_options_of_the_wrong_kind_are_refused_by_name(small, name, options, message):
    posterior, rows = small
    method, quick = QUICK[name]
    with pytest.raises((TypeError, ValueError), match=message):
        method(posterior, rows, **{**quick, **options})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "mcmc",
            {"num_samples": np.int64(4), "num_chains": np.int64(2), "seed": np.int64(1), "jitter": np.float32(0.1)},
        ),
        ("ensemble", {"num_members": np.int64(2), "seed": np.int64(1)}),
        ("laplace", {"prior_scale": np.float32(1), "batch_size": np.int64(4)}),
    ],
)
def test_results_with_numbers_of_numpy_can_be_saved(small, name, options, tmp_path):
    posterior, rows = small
    method, quick = QUICK[name]
    method(posterior, rows, **{**quick, **options}).save_pretrained(tmp_path / "saved")
    assert sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / "saved").mean().isfinite().all()
