"""ArviZ reads a posterior: the same tests for ArviZ 0.x (InferenceData) and 1.x (DataTree)."""

import dataclasses
import importlib.metadata
import warnings
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import peft
import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
import xarray as xr
from pyro.infer import autoguide

import scalabl_pyro as sp
from scalabl_pyro.analysis import arviz_data
from scalabl_pyro.guides import EmpiricalGuide
from scalabl_pyro.prediction import inference_data
from scalabl_pyro.prediction.draws import sample_prior
from scalabl_pyro.priors import Prior

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # 0.23 announces its own refactoring at each import
    import arviz as az

GENERATION = int(importlib.metadata.version("arviz").split(".")[0])
ROWS = tiny.question_rows(12, seed=5)
DRAWS = 60
RANKS = {"q_proj": 2, "v_proj": 3}


def dataset(idata: Any, group: str) -> xr.Dataset:
    part = idata[group]
    return part.to_dataset() if isinstance(part, xr.DataTree) else part


def groups(idata: Any) -> set[str]:
    return set(idata.groups()) if GENERATION == 0 else {name.lstrip("/") for name in idata.groups} - {""}


@pytest.fixture(scope="module")
def posterior(fitted):
    """The tiny Llama that has learned the questions."""
    return fitted.posterior


@pytest.fixture(scope="module")
def prediction(posterior):
    """Class probabilities of rows with answers."""
    return posterior.predict(ROWS, num_draws=DRAWS)


@pytest.fixture(scope="module")
def idata(posterior, prediction):
    """Draws and predictions as the installed ArviZ reads them."""
    return posterior.to_arviz(num_draws=DRAWS, prediction=prediction)


@pytest.fixture(scope="module")
def unequal():
    """A posterior over LoRA layers of two ranks, which PEFT had put there."""
    config = peft.LoraConfig(r=2, rank_pattern={"v_proj": 3}, target_modules=list(RANKS), init_lora_weights=False)
    blora = sp.bayesian_lora(peft.get_peft_model(tiny.causal_lm(), config))
    return sp.fit(blora, sp.MultipleChoice(tiny.tokenizer()), ROWS, num_steps=2, progress=False).posterior


@pytest.fixture(scope="module")
def regression():
    """A posterior over numbers with a trained head and learned noise, and its prediction."""
    rows = [{"text": row["text"], "label": float(row["label"]) - 0.5} for row in tiny.text_rows(9)]
    blora = sp.bayesian_lora(tiny.classifier(num_labels=1))
    posterior = sp.fit(blora, sp.Regression(tiny.tokenizer()), rows, num_steps=2, progress=False).posterior
    return posterior, posterior.predict(rows, num_draws=DRAWS, seed=2)


# containers and groups --------------------------------------------------------------------------------------


def test_container_is_the_one_that_the_installed_arviz_reads(idata):
    expected = xr.DataTree if GENERATION else az.InferenceData
    assert type(idata) is expected


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (None, {"posterior"}),
        (False, {"posterior", "posterior_predictive"}),
        (True, {"posterior", "posterior_predictive", "log_likelihood", "observed_data"}),
    ],
    ids=["no prediction", "rows without answers", "rows with answers"],
)
def test_groups_are_those_that_are_known(posterior, prediction, answers, expected):
    if answers is None:
        given = None
    else:
        given = prediction if answers else dataclasses.replace(prediction, target=None)
    assert groups(posterior.to_arviz(num_draws=2, prediction=given)) == expected


def test_each_group_has_chain_and_draw_as_arviz_wants_them(idata):
    for name in ("posterior", "posterior_predictive", "log_likelihood"):
        group = dataset(idata, name)
        assert dict(group.sizes)["chain"] == 1 and group.sizes["draw"] == DRAWS
        assert group["chain"].values.tolist() == [0]
        assert group["draw"].values.tolist() == list(range(DRAWS))
        for variable in group.data_vars.values():
            assert variable.dims[:2] == ("chain", "draw")


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.23.4", (0, 23)), ("1.3.0", (1, 3)), ("1.4.dev0", (1, 4)), ("1.0rc1", (1, 0)), ("0.24b2", (0, 24))],
)
def test_every_form_of_version_number_is_understood(monkeypatch, version, expected):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    assert arviz_data.arviz_version() == expected


# the latents ------------------------------------------------------------------------------------------------


def test_equal_ranks_give_a_table_of_layers_and_ranks(idata, posterior):
    s = dataset(idata, "posterior")["s"]
    assert s.dims == ("chain", "draw", "layer", "rank") and s.shape == (1, DRAWS, 5, 8)
    assert s["layer"].values.tolist() == posterior.subspace.names
    assert "model.layers.0.self_attn.q_proj" in s["layer"].values and "lm_head" in s["layer"].values
    assert s["rank"].values.tolist() == list(range(8))


def test_values_are_the_draws_of_the_same_seed(idata, posterior):
    draws = posterior.sample(DRAWS, seed=0).s
    s = dataset(idata, "posterior")["s"]
    assert s.dtype == np.float32
    for name, part in zip(posterior.subspace.names, posterior.subspace.split(draws), strict=True):
        np.testing.assert_array_equal(s.sel(layer=name, chain=0).values, part.numpy())


def test_another_seed_gives_other_draws(posterior):
    first, again, other = (
        dataset(posterior.to_arviz(num_draws=3, seed=seed), "posterior")["s"].values for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.isclose(first, other).any()


def test_draw_has_the_same_values_however_many_are_asked_for(posterior, idata):
    few = dataset(posterior.to_arviz(num_draws=3), "posterior")["s"]
    xr.testing.assert_equal(few, dataset(idata, "posterior")["s"].isel(draw=slice(3)))


def test_no_draws_give_the_posterior_mean(posterior):
    s = dataset(posterior.to_arviz(num_draws=0), "posterior")["s"]
    assert s.sizes["draw"] == 1
    np.testing.assert_array_equal(s.values.reshape(-1), posterior.mean().numpy())


def test_negative_number_of_draws_is_refused(posterior):
    with pytest.raises(ValueError, match="num_draws=-1 must be a whole number, 0 or more"):
        posterior.to_arviz(num_draws=-1)


def test_unequal_ranks_give_one_named_dimension(unequal):
    s = dataset(unequal.to_arviz(num_draws=4), "posterior")["s"]
    assert s.dims == ("chain", "draw", "latent") and s.shape == (1, 4, 2 * (2 + 3))
    expected = [
        f"model.layers.{block}.self_attn.{name}[{i}]"
        for block in range(2)
        for name, rank in RANKS.items()
        for i in range(rank)
    ]
    assert s["latent"].values.tolist() == expected
    assert s["latent_layer"].values.tolist() == [label.split("[")[0] for label in expected]


def test_layer_of_unequal_ranks_can_be_selected_by_name(unequal):
    s = dataset(unequal.to_arviz(num_draws=4), "posterior")["s"]
    parts = unequal.subspace.split(unequal.sample(4).s)
    for name, part in zip(unequal.subspace.names, parts, strict=True):
        selected = s.isel(latent=(s["latent_layer"] == name).values)
        np.testing.assert_array_equal(selected.values[0], part.numpy())
    np.testing.assert_array_equal(
        s.sel(latent="model.layers.1.self_attn.v_proj[2]").values[0], unequal.sample(4).s[:, -1].numpy()
    )


class Hierarchical(Prior):
    """Scales of the latents have a prior of their own."""

    def forward(self):
        global_scale = pyro.sample("global_scale", dist.HalfCauchy(torch.tensor(1.0)))
        halves = pyro.sample("halves", dist.Gamma(torch.full((2,), 2.0), torch.tensor(2.0)).to_event(1))
        scale = global_scale.unsqueeze(-1) * halves.repeat_interleave(20, -1)
        return pyro.sample("s", dist.Normal(torch.zeros(40), scale).to_event(1))


def test_further_latents_of_a_prior_become_variables_of_their_own():
    blora = sp.bayesian_lora(tiny.causal_lm(), prior=Hierarchical())
    task = sp.MultipleChoice(tiny.tokenizer())
    posterior = sp.fit(blora, task, ROWS, guide=autoguide.AutoNormal, num_steps=2, progress=False).posterior
    group = dataset(posterior.to_arviz(num_draws=5), "posterior")
    sites = posterior.sample(5).sites
    assert set(group.data_vars) == {"global_scale", "halves", "s"}
    assert group["global_scale"].dims == ("chain", "draw")
    assert group["halves"].dims == ("chain", "draw", "halves_dim_0")
    np.testing.assert_array_equal(group["global_scale"].values[0], sites["global_scale"].numpy())
    np.testing.assert_array_equal(group["halves"].values[0], sites["halves"].numpy())
    assert len(az.summary(posterior.to_arviz(num_draws=5))) == 1 + 2 + 40


# predictions ------------------------------------------------------------------------------------------------


def test_log_likelihood_and_observations_are_those_of_the_prediction(idata, prediction):
    log_likelihood, observed = dataset(idata, "log_likelihood")["label"], dataset(idata, "observed_data")["label"]
    assert log_likelihood.dims == ("chain", "draw", "row") and observed.dims == ("row",)
    np.testing.assert_array_equal(log_likelihood.values[0], prediction.log_likelihood)
    np.testing.assert_array_equal(observed.values, [row["answer"] for row in ROWS])
    for name in ("log_likelihood", "observed_data", "posterior_predictive"):
        assert dataset(idata, name)["row"].values.tolist() == list(range(len(ROWS)))


def test_likelihood_of_a_draw_belongs_to_the_latents_of_that_draw(idata, posterior):
    s = dataset(idata, "posterior")["s"].isel(chain=0, draw=7).values.reshape(-1)
    log_likelihood = dataset(idata, "log_likelihood")["label"].isel(chain=0, draw=7).values
    np.testing.assert_array_equal(s, posterior.sample(8).s[7].numpy())
    alone = posterior.predict(ROWS, num_draws=8).log_likelihood[7]
    np.testing.assert_allclose(log_likelihood, alone, rtol=0, atol=1e-5)


def by_hand(log_probs: np.ndarray, target: list[int] | None = None) -> sp.Prediction:
    classes = tuple("ABCD"[: log_probs.shape[-1]])
    return sp.Prediction(log_probs, None if target is None else np.array(target), classes)


def test_replicated_answers_are_drawn_from_the_probabilities(posterior):
    num_draws = 4000
    probs = np.array([[0.7, 0.2, 0.1], [0.0, 0.25, 0.75], [1.0, 0.0, 0.0]])
    with np.errstate(divide="ignore"):
        prediction = by_hand(np.broadcast_to(np.log(probs), (num_draws, 3, 3)))
    answers = dataset(posterior.to_arviz(num_draws=2, prediction=prediction), "posterior_predictive")["label"].values
    assert answers.shape == (1, num_draws, 3) and np.issubdtype(answers.dtype, np.integer)
    for row in range(3):
        shares = np.bincount(answers[0, :, row], minlength=3) / num_draws
        standard_error = np.sqrt(probs[row] * (1 - probs[row]) / num_draws)
        assert (np.abs(shares - probs[row]) <= 5 * standard_error).all()


def test_replicated_answers_follow_the_seed_alone(posterior, prediction):
    first, again, other = (
        dataset(posterior.to_arviz(num_draws=2, seed=seed, prediction=prediction), "posterior_predictive")["label"]
        for seed in (3, 3, 4)
    )
    xr.testing.assert_equal(first, again)
    assert not first.equals(other)


def test_prediction_with_the_posterior_mean_has_one_draw(posterior):
    idata = posterior.to_arviz(num_draws=5, prediction=posterior.predict(ROWS[:3], num_draws=0))
    assert dataset(idata, "log_likelihood")["label"].shape == (1, 1, 3)
    assert dataset(idata, "posterior")["s"].sizes["draw"] == 5


def test_regression_gives_numbers_replicates_and_densities(regression):
    posterior, prediction = regression
    idata = posterior.to_arviz(num_draws=DRAWS, seed=2, prediction=prediction)
    replicates, density = (dataset(idata, name)["label"] for name in ("posterior_predictive", "log_likelihood"))
    np.testing.assert_array_equal(replicates.values[0], prediction.replicates)
    np.testing.assert_array_equal(density.values[0], prediction.log_density)
    np.testing.assert_array_equal(dataset(idata, "observed_data")["label"].values, prediction.target)
    expected = torch.distributions.Normal(
        torch.as_tensor(prediction.means), torch.as_tensor(prediction.variances).sqrt()
    ).log_prob(torch.as_tensor(prediction.target))
    np.testing.assert_allclose(density.values[0], expected, rtol=1e-5)


def test_regression_without_answers_has_no_likelihood(regression):
    posterior, prediction = regression
    unknown = dataclasses.replace(prediction, target=None, log_density=None)
    assert groups(posterior.to_arviz(num_draws=2, prediction=unknown)) == {"posterior", "posterior_predictive"}


# the prior --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", [0, 1])
def test_prior_groups_come_on_request_in_both_generations(posterior, prediction, generation, monkeypatch):
    if GENERATION == 1 and generation == 0:
        pytest.skip("InferenceData is not installed")
    monkeypatch.setattr(inference_data, "arviz_version", lambda: (generation, 23))
    of_prior = posterior.prior_predictive(ROWS, num_draws=7, seed=3)
    idata = posterior.to_arviz(num_draws=7, seed=3, prediction=prediction, prior=True, prior_prediction=of_prior)
    names = set(idata.groups()) if generation == 0 else {name.lstrip("/") for name in idata.groups} - {""}
    assert names == {
        *("posterior", "posterior_predictive", "log_likelihood", "observed_data"),
        *("prior", "prior_predictive"),
    }
    prior, answers = dataset(idata, "prior")["s"], dataset(idata, "prior_predictive")["label"]
    assert prior.dims == dataset(idata, "posterior")["s"].dims and prior.sizes["draw"] == 7
    np.testing.assert_array_equal(
        prior.values.reshape(7, -1), sample_prior(posterior.prior, 7, seed=3).numpy()
    )  # so that draw i of both groups is the same function
    assert answers.shape == (1, 7, len(ROWS)) and set(np.unique(answers)) <= set(range(4))


def test_all_sites_of_a_prior_are_in_its_group():
    blora = sp.bayesian_lora(tiny.causal_lm(), prior=Hierarchical())
    options = {"guide": autoguide.AutoNormal, "num_steps": 1, "progress": False}
    posterior = sp.fit(blora, sp.MultipleChoice(tiny.tokenizer()), ROWS, **options).posterior
    group = dataset(posterior.to_arviz(num_draws=5, prior=True), "prior")
    assert set(group.data_vars) == {"global_scale", "halves", "s"} and group.sizes["draw"] == 5
    assert (group["global_scale"].values > 0).all()


def test_the_prior_is_asked_for_by_a_switch(posterior):
    with pytest.raises(TypeError, match="prior=3: expected True or False"):
        posterior.to_arviz(num_draws=2, prior=3)


@pytest.mark.parametrize("num_chains", [1, 2])
def test_statistics_of_a_sampler_stand_beside_its_draws_in_their_order(posterior, num_chains):
    """Draws of one chain are not shuffled: each number belongs to its draw, and energies to their predecessors."""
    points = torch.randn(12, posterior.subspace.dim, generator=torch.Generator().manual_seed(0))
    statistics = {"energy": torch.arange(12.0), "diverging": torch.arange(12) % 5 == 4}
    guide = EmpiricalGuide({"s": points}, num_chains=num_chains, statistics=statistics)
    idata = dataclasses.replace(posterior, guide=guide).to_arviz(num_draws=3)
    stats, s = dataset(idata, "sample_stats"), dataset(idata, "posterior")["s"]
    np.testing.assert_array_equal(s.values.reshape(12, -1), points.numpy())
    assert stats["energy"].values.tolist() == np.arange(12).reshape(num_chains, -1).tolist()
    assert stats["diverging"].dtype == bool and stats["diverging"].values.sum() == 2
    steps = np.diff(stats["energy"].values, axis=1) ** 2
    expected = steps.sum(1) / 12 * num_chains / stats["energy"].values.var(axis=1)
    if GENERATION == 0:
        np.testing.assert_allclose(az.bfmi(idata), expected, rtol=0.3)  # ArviZ reads it; it divides by N - 1


def test_statistics_are_one_number_per_draw():
    with pytest.raises(ValueError, match=r"'energy' has shape \(3,\): expected one number per point"):
        EmpiricalGuide({"s": torch.zeros(4, 2)}, statistics={"energy": torch.zeros(3)})


# what users call --------------------------------------------------------------------------------------------


def test_summary_has_a_row_for_each_latent_by_name(idata, posterior):
    summary = az.summary(idata, var_names=["s"], **({"round_to": "none"} if GENERATION == 0 else {}))
    names = [f"s[{layer}, {i}]" for layer in posterior.subspace.names for i in range(8)]
    assert summary.index.tolist() == names
    means = posterior.sample(DRAWS).s.mean(0).numpy()
    np.testing.assert_allclose(summary["mean"].astype(float), means, atol=0.06)  # 1.x rounds by the standard error


def test_summary_of_unequal_ranks_names_each_latent(unequal):
    summary = az.summary(unequal.to_arviz(num_draws=20))
    assert summary.index.tolist() == [f"s[{label}]" for label in unequal.subspace.labels()]


def test_loo_uses_the_likelihood_of_the_prediction(idata, prediction):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 60 draws are few
        loo = az.loo(idata, pointwise=True)
    elpd, p = (loo.elpd, loo.p) if GENERATION else (loo.elpd_loo, loo.p_loo)
    values = prediction.log_likelihood.astype(np.float64)
    in_sample = (np.logaddexp.reduce(values, axis=0) - np.log(DRAWS)).sum()
    np.testing.assert_allclose(elpd + p, in_sample, rtol=1e-6)  # the definition of p
    assert elpd < in_sample < 0
    assert loo.n_data_points == len(ROWS) and loo.n_samples == DRAWS


def test_loo_compares_two_posteriors(idata, posterior, prediction):
    certain = dataclasses.replace(prediction, log_probs=np.log(0.9 * np.exp(prediction.log_probs) + 0.025))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = az.compare({"fitted": idata, "flattened": posterior.to_arviz(prediction=certain, num_draws=DRAWS)})
    assert sorted(table.index) == ["fitted", "flattened"]


def test_loo_of_a_regression_is_finite(regression):
    posterior, prediction = regression
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loo = az.loo(posterior.to_arviz(num_draws=DRAWS, seed=2, prediction=prediction))
    assert np.isfinite(loo.elpd if GENERATION else loo.elpd_loo)


def test_loo_works_from_thirty_draws_on(posterior):
    """ArviZ 1.x has no tail to smooth with fewer than 25."""
    idata = posterior.to_arviz(prediction=posterior.predict(ROWS, num_draws=30))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loo = az.loo(idata)
    assert np.isfinite(loo.elpd if GENERATION else loo.elpd_loo)


SELECTION = {"var_names": ["s"], "coords": {"layer": ["lm_head"], "rank": [0, 1]}}
PLOTS = {
    "plot_forest": SELECTION,
    "plot_trace": SELECTION,
    "plot_autocorr": SELECTION,
    "plot_dist" if GENERATION else "plot_posterior": SELECTION,
    "plot_ppc_dist" if GENERATION else "plot_ppc": {},
}


@pytest.mark.parametrize("name", PLOTS)
def test_arviz_draws_it(idata, name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plot = getattr(az, name)(idata, **PLOTS[name])
        if GENERATION:
            plot.savefig(tmp_path / "figure.png")
        else:
            np.ravel(plot)[0].get_figure().savefig(tmp_path / "figure.png")
    plt.close("all")
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize("kind", ["classes", "unequal ranks", "numbers"])
def test_netcdf_round_trip_keeps_everything(idata, unequal, regression, kind, tmp_path):
    if kind == "classes":
        before = idata
    elif kind == "unequal ranks":
        before = unequal.to_arviz(num_draws=3)
    else:
        before = regression[0].to_arviz(num_draws=DRAWS, seed=2, prediction=regression[1])
    before.to_netcdf(str(tmp_path / "posterior.nc"))
    after = az.from_netcdf(str(tmp_path / "posterior.nc"))
    assert groups(after) == groups(before)
    for name in groups(before):
        old, new = dataset(before, name), dataset(after, name).load()
        xr.testing.assert_equal(old, new)
        assert set(new.coords) == set(old.coords)
        assert {k: new[k].dtype for k in new.data_vars} == {k: old[k].dtype for k in old.data_vars}
        assert {k: new.attrs[k] for k in old.attrs} == old.attrs
    after.close()


def test_provenance_of_any_kind_can_be_written(posterior, tmp_path):
    provenance = {"note": "naïve", "converged": True, "rate": 0.5, "missing": None, "nested": {"a": 1}, "list": [1, 2]}
    idata = dataclasses.replace(posterior, provenance=provenance).to_arviz(num_draws=2)
    idata.to_netcdf(str(tmp_path / "posterior.nc"))
    after = az.from_netcdf(str(tmp_path / "posterior.nc"))
    attrs = dataset(after, "posterior").attrs
    assert attrs["note"] == "naïve" and attrs["rate"] == 0.5
    after.close()


# attributes and side effects --------------------------------------------------------------------------------


def test_attributes_say_where_the_draws_come_from(posterior, prediction):
    idata = posterior.to_arviz(num_draws=2, seed=7, prediction=prediction)
    for name in groups(idata):
        attrs = dataset(idata, name).attrs
        assert attrs["inference_library"] == "scalabl_pyro" and attrs["inference_method"] == "SVI"
        assert attrs["guide"] == "NormalGuide" and attrs["sampling_seed"] == 7
        assert attrs["num_data"] == 48 and attrs["num_steps"] == 60 and attrs["seed"] == 0


def test_attributes_carry_the_version_under_arviz_own_name(idata):
    assert dataset(idata, "posterior").attrs["inference_library_version"] == sp.__version__


def test_attributes_name_the_family_of_an_autoguide():
    blora = sp.bayesian_lora(tiny.causal_lm())
    task = sp.MultipleChoice(tiny.tokenizer())
    fitted = sp.fit(blora, task, ROWS, guide=autoguide.AutoMultivariateNormal, num_steps=1, progress=False)
    attrs = dataset(fitted.posterior.to_arviz(num_draws=2), "posterior").attrs
    assert "AutoMultivariateNormal" in attrs["guide"]


def test_conversion_moves_no_random_state_and_changes_no_prediction(posterior, prediction, unchanged_rng):
    numpy_state, log_probs = np.random.get_state()[1].copy(), prediction.log_probs.copy()  # noqa: NPY002
    idata = posterior.to_arviz(num_draws=2, prediction=prediction)
    dataset(idata, "log_likelihood")["label"].values[...] = 0
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    np.testing.assert_array_equal(prediction.log_probs, log_probs)


def test_loaded_posterior_gives_the_same_data(posterior, tmp_path):
    posterior.save_pretrained(tmp_path / "p")
    loaded = sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / "p")
    old, new = (dataset(p.to_arviz(num_draws=3), "posterior") for p in (posterior, loaded))
    xr.testing.assert_identical(old, new)
