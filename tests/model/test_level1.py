"""Level 1: the user's own Pyro model, stock Pyro inference, nothing else."""

import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from pyro.nn import PyroModule
from torch.distributions import constraints

import scalabl_pyro as sp

pytestmark = pytest.mark.usefixtures("stock_pyro")

N, ROWS = 40, 6
CHOICES = torch.tensor([21, 22, 23, 24])


@pytest.fixture
def data():
    ids = torch.arange(2, 2 + 7 * ROWS).view(ROWS, 7) % 50 + 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.arange(ROWS) % 4


@pytest.fixture
def model(blora):
    """The model of the README, word for word."""

    def model(input_ids, attention_mask, labels=None):
        logits = blora(input_ids=input_ids, attention_mask=attention_mask).logits[..., -1, :][..., CHOICES]
        with pyro.plate("data", N, subsample_size=len(input_ids)):
            pyro.sample("label", dist.Categorical(logits=logits.float()), obs=labels)

    return model


def fit(model, guide, data, elbo, *, steps=3):
    inputs, labels = data
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    return [svi.step(**inputs, labels=labels) for _ in range(steps)]


FAMILIES = {
    AutoDelta: {},
    AutoNormal: {"init_scale": 0.05},
    AutoDiagonalNormal: {"init_scale": 0.05},
    AutoMultivariateNormal: {"init_scale": 0.05},
    AutoLowRankMultivariateNormal: {"init_scale": 0.05, "rank": 2},
    AutoLaplaceApproximation: {},
}


@pytest.mark.parametrize("elbo", [Trace_ELBO(num_particles=3, vectorize_particles=True), TraceMeanField_ELBO()])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_autoguide_trains_factors_and_guide(blora, model, data, family, elbo):
    guide = family(model, init_loc_fn=blora.init_loc, **FAMILIES[family])
    before = [t.clone() for pair in blora.adapter.factors() for t in pair]
    losses = fit(model, guide, data, elbo)
    assert all(torch.isfinite(torch.tensor(losses)))
    moved = [
        not torch.equal(t, b) for t, b in zip([t for p in blora.adapter.factors() for t in p], before, strict=True)
    ]
    assert all(moved), "stock SVI left a factor where it was"
    assert guide(**data[0])["s"].shape[-1] == blora.subspace.dim


@pytest.mark.parametrize("family", [AutoIAFNormal, None])
def test_flows_train_too(model, data, family):
    def flow(m):
        return AutoNormalizingFlow(m, lambda dim: dist.transforms.planar(dim))

    guide = (family or flow)(model)
    losses = fit(model, guide, data, Trace_ELBO(num_particles=2, vectorize_particles=True))
    assert all(torch.isfinite(torch.tensor(losses)))


def test_init_loc_starts_at_the_papers_mean(blora, model, data):
    guide = AutoNormal(model, init_loc_fn=blora.init_loc, init_scale=0.05)
    guide(**data[0], labels=data[1])
    torch.testing.assert_close(guide.locs.s.data, blora.adapter.loc)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("num_samples", [1, ROWS, 5])
def test_predictive_folds_draws_into_rows(model, blora, data, parallel, num_samples):
    """ROWS draws are the trap: a (ROWS, D) stack of draws must not be taken for one draw per row."""
    guide = AutoNormal(model, init_loc_fn=blora.init_loc)
    guide(**data[0], labels=data[1])
    samples = Predictive(model, guide=guide, num_samples=num_samples, parallel=parallel)(**data[0])
    assert samples["label"].shape == (num_samples, ROWS)


def test_a_trace_holds_three_sample_sites_at_most_and_no_base_weight(blora, model, data):
    trace = poutine.trace(model).get_trace(**data[0], labels=data[1])
    sites = [n for n, node in trace.nodes.items() if node["type"] == "sample"]
    assert sites == ["s", "data", "label"]
    names = [n for n, node in trace.nodes.items() if node["type"] == "param"]
    assert len(names) == 2 * len(blora.subspace)
    assert not any("base_layer" in n or "embed" in n for n in names)


def test_conditioning_on_s_gives_the_llm_with_that_s(blora, data):
    s = torch.linspace(-1, 1, blora.subspace.dim)
    with torch.no_grad():
        conditioned = poutine.condition(lambda: blora(**data[0]).logits, data={"s": s})()
        assert torch.equal(conditioned, blora(**data[0], s=s).logits)


def test_vectorized_draws_equal_looped_draws(blora, data):
    with torch.no_grad():
        for _, B in blora.adapter.factors():
            B.normal_(generator=torch.Generator().manual_seed(0))
        s = torch.randn(3, 1, blora.subspace.dim, generator=torch.Generator().manual_seed(1))
        together = blora(**data[0], s=s).logits
        looped = torch.stack([blora(**data[0], s=s[i, 0]).logits for i in range(3)])
    assert together.shape == (3, ROWS, 7, looped.shape[-1])
    torch.testing.assert_close(together, looped, rtol=1e-4, atol=1e-5)


def test_a_vectorized_elbo_equals_the_mean_of_its_particles(blora, model, data):
    inputs, labels = data
    draws = torch.randn(4, 1, blora.subspace.dim, generator=torch.Generator().manual_seed(0))

    def guide_of(s):
        return lambda *args, **kwargs: pyro.sample("s", dist.Delta(s).to_event(1))

    def loss(elbo, guide):
        pyro.set_rng_seed(0)
        return elbo.loss(model, guide, **inputs, labels=labels)

    with torch.random.fork_rng():
        looped = [loss(Trace_ELBO(), guide_of(s[0])) for s in draws]
        together = loss(Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1), guide_of(draws))
    assert together == pytest.approx(sum(looped) / 4, rel=1e-5)


def test_s_in_a_plate_over_rows_gives_each_row_its_own(blora, data):
    inputs, _ = data

    def model():
        with pyro.plate("rows", ROWS):
            return blora(**inputs).logits

    with torch.no_grad():
        for _, B in blora.adapter.factors():
            B.normal_(generator=torch.Generator().manual_seed(0))
        trace = poutine.trace(model).get_trace()
        s = trace.nodes["s"]["value"]
        assert s.shape == (ROWS, blora.subspace.dim)
        row = blora(input_ids=inputs["input_ids"][2:3], attention_mask=inputs["attention_mask"][2:3], s=s[2]).logits
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"][2:3], row, rtol=1e-4, atol=1e-5)


def test_it_can_be_part_of_a_larger_pyro_module(blora, data):
    class Whole(PyroModule):
        def __init__(self):
            super().__init__()
            self.language = blora
            self.bias = pyro.nn.PyroParam(torch.tensor(1.0), constraints.positive)

        def forward(self, labels=None, **inputs):
            logits = self.language(**inputs).logits[:, -1, CHOICES] * self.bias
            with pyro.plate("data", N, subsample_size=ROWS):
                pyro.sample("label", dist.Categorical(logits=logits), obs=labels)

    model = Whole()
    guide = AutoNormal(model, init_loc_fn=blora.init_loc)
    assert all(torch.isfinite(torch.tensor(fit(model, guide, data, Trace_ELBO()))))
    assert model.bias.item() != 1.0


def test_two_models_do_not_share_parameters_in_the_global_store(data):
    """Pyro's store goes by name; the second adapter must not read the first one's factors."""
    factors = []
    for _ in range(2):
        blora = sp.bayesian_lora(tiny.causal_lm())

        def model(labels=None, *, blora=blora, **inputs):
            logits = blora(**inputs).logits[..., -1, :][..., CHOICES]
            with pyro.plate("data", N, subsample_size=ROWS):
                pyro.sample("label", dist.Categorical(logits=logits), obs=labels)

        def guide(labels=None, *, blora=blora, **inputs):
            pyro.sample("s", dist.Delta(blora.adapter.loc).to_event(1))

        with torch.random.fork_rng():
            pyro.set_rng_seed(0)
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
            for _ in range(3):
                svi.step(labels=data[1], **data[0])
        factors.append([t.clone() for pair in blora.adapter.factors() for t in pair])
    for a, b in zip(*factors, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((5, 40), r"s has shape \(5, 40\) and the batch has 6 rows"), ((39,), "39.*40 latents|40 latents")],
)
def test_draws_of_the_wrong_shape_are_explained(blora, data, shape, message):
    with pytest.raises(ValueError, match=message):
        blora(**data[0], s=torch.zeros(shape))


def test_an_empty_batch_is_refused(blora):
    with pytest.raises(ValueError, match="empty: it has 0 rows"):
        blora(input_ids=torch.zeros(0, 3, dtype=torch.long))


def test_a_call_without_tensors_is_refused(blora):
    with pytest.raises(ValueError, match="at least one tensor"):
        blora()


def test_the_module_moves_and_changes_mode_with_its_llm(llm):
    blora = sp.bayesian_lora(llm)
    assert "latents" in repr(blora) and type(llm).__name__ in repr(blora)
    assert not blora.eval().llm.training and blora.train().llm.training
    blora.double()
    assert next(llm.parameters()).dtype == torch.float64
    assert blora(input_ids=torch.arange(2, 6).view(1, 4)).logits.dtype == torch.float64
