"""Every prior with every guide, and each of them with every task, keeps the same promises."""

import functools
import importlib.metadata
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pytest
import tiny
import torch
import xarray as xr
import zoo
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from scipy.special import logsumexp

import scalabl_pyro as sp
from scalabl_pyro.data import Batch, collate, encode
from scalabl_pyro.guides import as_guide
from scalabl_pyro.model.joint import TaskModel
from scalabl_pyro.training.objective import ScopedGuide

GENERATION = int(importlib.metadata.version("arviz").split(".")[0])
DRAWS = 5
#: Tensors with masked entries, or with hidden units that may be off on so few draws.
PARTLY_USED = (".networks.", ".scale_tril")

if GENERATION == 0:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0.23 announces its own refactoring when it is imported first
        import arviz  # noqa: F401


def every(*, but: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """All combinations but those of some guides; those that add no pair and no default are ``slow``."""
    slow = [pytest.param(case, marks=pytest.mark.slow) for case in zoo.REST if case.guide not in but]
    return pytest.mark.parametrize("case", [*[c for c in zoo.CASES if c.guide not in but], *slow], ids=str)


every_case = every()
#: SVGD is an objective of its own: it takes no ELBO, and its points are not a guide for SVI.
every_case_with_an_elbo = every(but=("svgd",))


@functools.cache
def predicted(case: zoo.Case) -> Any:
    return zoo.fitted(case).result.posterior.predict(case.kind.rows, num_draws=DRAWS, seed=1)


@pytest.fixture
def fitted(case):
    """The case after three steps; one fit serves all tests."""
    return zoo.fitted(case)


@pytest.fixture
def posterior(fitted):
    return fitted.result.posterior


@pytest.fixture
def prediction(case):
    return predicted(case)


class TestEveryCombination:
    """What holds for any prior, guide and task that go together."""

    @every_case
    def test_draws_have_the_shapes_and_the_support_of_the_prior(self, case, posterior):
        draws, mean = posterior.sample(DRAWS, seed=1), posterior.sample(0)
        assert shapes(draws) == {name: (DRAWS, *shape) for name, shape in case.sites.items()}
        assert shapes(mean) == {name: (1, *shape) for name, shape in case.sites.items()}
        assert mean.is_mean and torch.equal(mean.s[0], posterior.mean())
        for name, support in supports(posterior.prior).items():
            assert support.check(draws.sites[name]).all(), f"{name} is outside of its support"

    @every_case
    def test_predictions_are_finite_normalized_and_of_the_right_shape(self, case, prediction):
        rows, classes = len(case.kind.rows), case.kind.num_classes
        assert np.isfinite(prediction.log_likelihood).all() and prediction.log_likelihood.shape == (DRAWS, rows)
        if classes is None:
            for moment in (prediction.means, prediction.variances, prediction.replicates):
                assert moment.shape == (DRAWS, rows) and np.isfinite(moment).all()
            assert prediction.mean.shape == prediction.total.shape == (rows,)
            assert (prediction.variances > 0).all()
        elif case.task == "labels":
            assert prediction.log_odds.shape == (DRAWS, rows, classes) and np.isfinite(prediction.log_odds).all()
            assert prediction.probs.shape == (rows, classes) and prediction.total.shape == (rows,)
        else:
            assert prediction.log_probs.shape == (DRAWS, rows, classes)
            np.testing.assert_allclose(logsumexp(prediction.log_probs, axis=-1), 0, atol=1e-5)
            assert prediction.probs.shape == (rows, classes)
            np.testing.assert_allclose(prediction.probs.sum(1), 1, atol=1e-5)

    @every_case
    def test_draws_differ_as_functions_unless_the_posterior_is_a_point(self, case, prediction):
        assert (np.ptp(scores(prediction), axis=0).max() > 0) is not case.is_point

    @every_case
    def test_gradients_reach_and_move_every_trainable_tensor(self, case, fitted):
        history = fitted.result.history
        assert len(history) == 3 and np.isfinite(history.to_numpy()).all()
        assert {name.split(".")[0] for name in fitted.start} == case.learned
        assert any("score" in name for name in fitted.start) is (case.task not in ("choice", "names"))
        for name, reached in fitted.reached.items():
            assert reached.any() if any(part in name for part in PARTLY_USED) else reached.all(), name
            assert torch.isfinite(fitted.end[name]).all(), name
            # More than bringing the rows of A back to unit norm can change.
            assert (fitted.end[name] - fitted.start[name]).abs().max() > 1e-4, name

    @every_case
    def test_the_posterior_holds_what_was_learned_and_no_more(self, fitted, posterior):
        held = zoo.frozen(posterior)
        assert set(held) == set(fitted.end)
        assert [name for name, value in fitted.end.items() if not torch.equal(held[name], value)] == []
        assert not any(value.requires_grad for value in held.values())

    @every_case
    def test_joint_densities_are_finite_and_weights_exist_where_the_family_has_a_density(self, case, posterior):
        weights = posterior.log_weights(case.kind.rows, num_draws=DRAWS, seed=1)
        assert weights.log_likelihood.shape == (DRAWS, len(case.kind.rows))
        assert weights.log_joint.shape == (DRAWS,) and np.isfinite(weights.log_joint).all()
        assert posterior.guide.has_density is case.has_density
        if case.has_density:
            assert weights.log_weights.shape == (DRAWS,) and np.isfinite(weights.log_weights).all()
            assert weights.elbo() == pytest.approx(weights.log_weights.mean())
        else:
            assert weights.log_q is None and math.isnan(weights.elbo())
            with pytest.raises(ValueError, match="no density"):
                _ = weights.log_weights

    @every_case
    def test_the_seed_alone_decides_draw_i(self, case, posterior, unchanged_rng):
        draws, again, fewer = (posterior.sample(n, seed=1) for n in (DRAWS, DRAWS, 2))
        other = posterior.sample(DRAWS, seed=2)
        for name, value in draws.sites.items():
            assert torch.equal(value, again.sites[name])
            assert torch.equal(value[:2], fewer.sites[name])
            assert torch.equal(value, other.sites[name]) is case.is_point
        if case.has_density:
            assert torch.equal(draws.log_q, again.log_q) and torch.equal(draws.log_q[:2], fewer.log_q)

    @every_case
    def test_what_is_saved_comes_back_bit_for_bit(self, case, posterior, prediction, tmp_path):
        posterior.save_pretrained(tmp_path / "posterior")
        loaded = sp.Posterior.from_pretrained(case.kind.llm(), tmp_path / "posterior")
        assert torch.equal(loaded.mean(), posterior.mean())
        draws, again = posterior.sample(DRAWS, seed=1), loaded.sample(DRAWS, seed=1)
        assert shapes(again) == shapes(draws)
        assert all(torch.equal(value, again.sites[name]) for name, value in draws.sites.items())
        new = loaded.predict(case.kind.rows, num_draws=DRAWS, seed=1)
        np.testing.assert_array_equal(scores(new), scores(prediction))
        np.testing.assert_array_equal(new.log_likelihood, prediction.log_likelihood)
        before, after = (p.log_weights(case.kind.rows, num_draws=2, seed=1) for p in (posterior, loaded))
        np.testing.assert_array_equal(after.log_joint, before.log_joint)
        np.testing.assert_array_equal(after.log_q, before.log_q)

    @every_case
    def test_arviz_gets_named_draws_and_predictions(self, case, posterior, prediction):
        if case.task == "labels":
            with pytest.raises(TypeError, match="prediction is a LabelSetPrediction"):
                posterior.to_arviz(num_draws=DRAWS, seed=1, prediction=prediction)
            return
        idata = posterior.to_arviz(num_draws=DRAWS, seed=1, prediction=prediction)
        group = dataset(idata, "posterior")
        dims = {name: [f"{name}_dim_{i}" for i in range(len(shape))] for name, shape in case.sites.items()}
        dims["s"] = ["layer", "rank"]
        assert {name: list(v.dims) for name, v in group.data_vars.items()} == {
            name: ["chain", "draw", *own] for name, own in dims.items()
        }
        assert group["layer"].values.tolist() == posterior.subspace.names
        assert group["rank"].values.tolist() == list(range(zoo.RANK))
        assert group["draw"].values.tolist() == list(range(DRAWS)) and group.sizes["chain"] == 1
        for name, value in posterior.sample(DRAWS, seed=1).sites.items():
            np.testing.assert_array_equal(group[name].values.reshape(value.shape), value.numpy())
        for name in ("posterior_predictive", "log_likelihood"):
            assert dataset(idata, name)["label"].dims == ("chain", "draw", "row")
        np.testing.assert_array_equal(dataset(idata, "log_likelihood")["label"].values[0], prediction.log_likelihood)
        np.testing.assert_array_equal(dataset(idata, "observed_data")["label"].values, prediction.target)

    @every_case_with_an_elbo
    def test_stock_svi_trains_all_there_is_with_the_guide_as_a_callable(self, case, stock_pyro):
        check_stock_svi(case, lambda model, blora: as_guide(zoo.GUIDES[case.guide], blora))

    @pytest.mark.parametrize("case", [c for c in zoo.CASES if c.guide in zoo.AUTO], ids=str)
    def test_stock_svi_trains_all_there_is_with_a_stock_autoguide(self, case, stock_pyro):
        auto_class = zoo.GUIDES[case.guide]
        check_stock_svi(case, lambda model, blora: auto_class(model, init_loc_fn=blora.init_loc, init_scale=0.05))

    @every_case_with_an_elbo
    def test_vectorized_particles_train_the_same_family(self, case, posterior):
        elbo = Trace_ELBO(num_particles=2, vectorize_particles=True)
        result = case.fit(case.blora(), elbo=elbo, num_steps=2)
        assert np.isfinite(result.history.to_numpy()).all()
        assert result.posterior.provenance["draws"] == posterior.provenance["draws"]
        draws = result.posterior.sample(DRAWS, seed=1)
        assert shapes(draws) == shapes(posterior.sample(DRAWS, seed=1))
        assert all(torch.isfinite(value).all() for value in draws.sites.values())
        assert np.isfinite(scores(result.posterior.predict(case.kind.rows, num_draws=2))).all()

    @every_case_with_an_elbo
    def test_particles_in_a_plate_have_the_densities_they_have_alone(self, case, posterior):
        """Why they can be vectorized: no site of guide or model mixes particles, rows and latents."""
        batch, draws = full_batch(case, posterior.task), posterior.provenance["draws"]
        model = TaskModel(posterior.blora(), posterior.task, num_data=40, draws=draws)
        guide = ScopedGuide(posterior.guide, draws=draws)
        with torch.no_grad(), pyro.settings.context(module_local_params=True), torch.random.fork_rng():
            torch.manual_seed(0)
            with pyro.plate("particles", 3, dim=-2):
                together = traces(model, guide, batch)
            values = latents(together[0])
            alone = []
            for i in range(3):
                own = {name: v[i] if draws == "per_example" else v[i, 0] for name, v in values.items()}
                alone.append(traces(poutine.condition(model, own), poutine.condition(guide, own), batch))
        for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
            expected = sum(float(part.log_prob_sum()) for part in parts)
            assert float(whole.log_prob_sum()) == pytest.approx(expected, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize(("prior", "guide"), zoo.REFUSED, ids=map("-".join, zoo.REFUSED))
def test_what_does_not_go_together_is_refused_with_the_way_out(prior, guide, unchanged_rng):
    case = zoo.Case(prior, guide, "choice")
    with pytest.raises(ValueError, match=zoo.REFUSED[prior, guide]):
        case.fit(case.blora())


@pytest.mark.parametrize("guide", ["normal", "delta", "AutoNormal", "AutoMultivariateNormal"])
def test_a_guide_stays_in_the_support_of_its_prior_however_large_the_steps(guide):
    case = zoo.Case("lognormal", guide, "choice")
    posterior = case.fit(case.blora(), optimizer={"lr_loc": 1.0, "warmup": 0.0}).posterior
    assert (posterior.sample(20).s > 0).all()


def test_the_zoo_is_the_whole_library():
    """What the library gains must be entered there, or it keeps no promises."""
    words = {prior for prior in zoo.PRIORS.values() if isinstance(prior, str)}
    assert words == {*sp.priors.DISTRIBUTIONS, *sp.priors.FAMILIES}
    assert {guide for guide in zoo.GUIDES.values() if isinstance(guide, str)} == set(sp.guides.NAMES)
    predicting = {name for name, task in sp.tasks.TASKS.items() if not task.scores_only}
    assert {type(kind.make()).__name__ for kind in zoo.TASKS.values()} == predicting
    assert set(sp.tasks.TASKS) - predicting == {"Completion"}  # the next test


COMPLETIONS = [
    {"prompt": f"the {noun} is", "completion": f" {color}{' the sky' * (i % 2)}"}
    for i, (noun, color) in enumerate([("sky", "blue"), ("night", "black"), ("rose", "red")] * 2)
]


@pytest.mark.parametrize("pair", zoo.BESIDE_CHOICE, ids="-".join)
def test_completions_take_every_prior_and_guide(pair, tmp_path):
    """What stands above for predictions holds for scores: finite, different by draw, and the same after loading."""
    case, task = zoo.Case(*pair, "choice"), sp.Completion(tiny.tokenizer(), end_token=False)
    options = {"num_steps": 3, "batch_size": 6, "lr": 1e-2, "optimizer": {"warmup": 0.0}, "progress": False}
    result = sp.fit(case.blora(), task, COMPLETIONS, guide=zoo.GUIDES[case.guide], **options)
    assert len(result.history) == 3 and np.isfinite(result.history["nll_per_token"]).all()
    scored = result.posterior.score(COMPLETIONS, num_draws=DRAWS, seed=1)
    assert scored.log_probs.shape == (DRAWS, 6) and np.isfinite(scored.log_probs).all()
    assert (np.ptp(scored.log_probs, axis=0).max() > 0) is not case.is_point
    result.posterior.save_pretrained(tmp_path / "p")
    loaded = sp.Posterior.from_pretrained(case.kind.llm(), tmp_path / "p")
    np.testing.assert_array_equal(loaded.score(COMPLETIONS, num_draws=DRAWS, seed=1).log_probs, scored.log_probs)


def check_stock_svi(case: zoo.Case, build: Callable[..., Any]) -> None:
    """A model of one's own under stock SVI: every trainable tensor enters Pyro's store, and moves there."""
    blora, task = case.blora(), case.kind.make()
    batch = full_batch(case, task)

    def model(batch):
        outputs = task.outputs(blora, batch, blora.sample_latents())
        with pyro.plate("data", 40, subsample=batch.index):
            pyro.sample("label", task(outputs, batch), obs=batch.target)

    guide = build(model, blora)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO(num_particles=2, vectorize_particles=True))
    with torch.random.fork_rng():
        pyro.set_rng_seed(0)
        losses = [svi.step(batch)]
        first = {name: value.detach().clone() for name, value in stored()}
        losses += [svi.step(batch) for _ in range(3)]
    assert all(map(math.isfinite, losses))
    assert [name for name, value in stored() if torch.equal(value, first[name])] == []
    assert all(torch.isfinite(value).all() for _, value in stored())
    own = zoo.trainable(point=blora.point_estimates, prior=blora.prior, task=task, guide=guide)
    known = {id(value) for _, value in stored()}
    assert [name for name, parameter in own.items() if id(parameter) not in known] == []


def stored() -> list[tuple[str, torch.Tensor]]:
    """Unconstrained parameters in Pyro's global store."""
    return list(pyro.get_param_store().named_parameters())


def shapes(draws: sp.Draws) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in draws.sites.items()}


def scores(prediction: Any) -> np.ndarray:
    return next(v for name in ("log_probs", "log_odds", "means") if (v := getattr(prediction, name, None)) is not None)


def dataset(idata: Any, group: str) -> xr.Dataset:
    part = idata[group]
    return part.to_dataset() if isinstance(part, xr.DataTree) else part


def supports(prior: sp.priors.Prior) -> dict[str, Any]:
    with torch.no_grad(), torch.random.fork_rng(), pyro.settings.context(module_local_params=True):
        trace = poutine.trace(prior).get_trace()
    return {name: trace.nodes[name]["fn"].support for name in trace.stochastic_nodes}


def full_batch(case: zoo.Case, task: sp.Task) -> Batch:
    examples = encode(case.kind.rows, task.encode, need_target=True)
    return collate(examples, range(len(examples)), task.pad_token_id)


def traces(model: Any, guide: Any, batch: Batch) -> tuple[Any, Any]:
    """Return the trace of the guide, and that of the model under the guide's draws."""
    q = poutine.trace(guide).get_trace(batch)
    return q, poutine.trace(poutine.replay(model, trace=q)).get_trace(batch)


def latents(trace: Any) -> dict[str, torch.Tensor]:
    """Values of what was sampled, plates aside."""
    nodes = {name: trace.nodes[name] for name in trace.stochastic_nodes}
    return {name: site["value"] for name, site in nodes.items() if not poutine.util.site_is_subsample(site)}
