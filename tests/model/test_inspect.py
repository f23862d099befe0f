"""``pyro.infer.inspect``, AutoGuides that use it, messengers, scopes and jitted NUTS on models with an LLM inside."""

import importlib.util
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from pyro.contrib.autoname import scope
from pyro.infer import MCMC, NUTS, SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, autoguide
from pyro.infer.inspect import generate_graph_specification, get_dependencies, get_model_relations
from pyro.ops.provenance import ProvenanceTensor, get_provenance
from torch import nn

import scalabl_pyro as sp
from scalabl_pyro.data import collate, encode
from scalabl_pyro.model.joint import TaskModel

pytestmark = pytest.mark.usefixtures("stock_pyro")

IDS, LABELS = torch.arange(2, 12).view(2, 5), torch.tensor([0, 1])


def level_1(blora, outputs):
    """A model of the user's own."""

    def model(ids, labels=None):
        logits = outputs(blora(input_ids=ids))
        with pyro.plate("data", len(ids)):
            pyro.sample("label", dist.Categorical(logits=logits), obs=labels)

    return model


def causal(prior=1.0):
    blora = sp.bayesian_lora(tiny.causal_lm(), r=2, prior=prior)
    return blora, level_1(blora, lambda output: output.logits[..., -1, :4])


def classifier(prior=1.0):
    blora = sp.bayesian_lora(tiny.classifier(), r=2, prior=prior)
    return blora, level_1(blora, lambda output: output.logits)


def upper_block():
    """The lower block runs once for all draws."""
    options = {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1]}
    blora = sp.bayesian_lora(tiny.causal_lm(), **options)
    return blora, level_1(blora, lambda output: output.logits[..., -1, :4])


def as_tuple():
    blora = sp.bayesian_lora(tiny.causal_lm(), r=2)
    return blora, level_1(partial(blora, return_dict=False), lambda output: output[0][..., -1, :4])


def plain_net():
    net = nn.Sequential(nn.Embedding(64, 8), nn.Flatten(), nn.Linear(40, 4))
    net.forward = lambda input_ids: nn.Sequential.forward(net, input_ids)
    blora = sp.bayesian_lora(net, r=2)
    return blora, level_1(blora, lambda output: output)


MODELS = {
    "causal LM": causal,
    "classifier with a new head": classifier,
    "upper block": upper_block,
    "tuples": as_tuple,
    "plain net": plain_net,
    "hierarchical": lambda: causal("hierarchical"),
    "horseshoe": lambda: causal("horseshoe"),
    "empirical": lambda: causal("empirical"),
    "rank mask": lambda: causal("rank_mask"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_answers_depend_on_the_latents(name):
    blora, model = MODELS[name]()
    found = get_dependencies(model, (IDS, LABELS))["prior_dependencies"]
    assert set(found["label"]) == {"label", "s"}
    sites = {*pyro.poutine.trace(blora.prior).get_trace().stochastic_nodes} - {"s"}
    assert set(found["s"]) == {"s", *sites}


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_of_a_model_holds_all_that_is_trained(name):
    blora, model = MODELS[name]()
    relations = get_model_relations(model, (IDS, LABELS))
    assert relations["sample_sample"]["label"] == ["s"] and relations["observed"] == ["label"]
    trained = {key for key in relations["param_constraint"] if key.startswith("scalabl_pyro.")}
    assert len(trained) == len(list(blora.point_estimates.parameters()))
    assert trained <= set(relations["sample_param"]["label"])
    graph = generate_graph_specification(relations, render_params=True)
    assert set(graph["node_data"]) == {*relations["sample_sample"], *relations["param_constraint"]}
    if importlib.util.find_spec("graphviz"):
        assert "label" in pyro.render_model(model, (IDS, LABELS), render_params=True).source


@pytest.mark.parametrize(
    ("task", "llm", "rows"),
    [
        (sp.MultipleChoice(tiny.tokenizer()), tiny.causal_lm, tiny.question_rows(4)),
        (
            sp.SequenceClassification(tiny.tokenizer(), classes=["a", "b", "c"]),
            lambda: tiny.classifier(num_labels=3),
            tiny.text_rows(4),
        ),
        (sp.Regression(tiny.tokenizer()), lambda: tiny.classifier(num_labels=1), tiny.text_rows(4)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_the_model_of_every_task_has_a_graph(task, llm, rows):
    model = TaskModel(sp.bayesian_lora(llm(), r=2), task, num_data=len(rows))
    batch = collate(encode(rows, task.encode, need_target=True), range(len(rows)), task.pad_token_id)
    relations = get_model_relations(model, (batch,))
    assert relations["sample_sample"]["label"] == ["s"]
    assert relations["plate_sample"] == {"data": ["label"]}


def test_origins_pass_through_every_input_and_leave_numbers_as_they_are():
    blora, _ = causal()
    s = torch.randn(blora.subspace.dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = blora(input_ids=IDS, s=s).logits
        of_s = blora(input_ids=IDS, s=ProvenanceTensor(s, frozenset({"z"}))).logits
        of_input = blora(ProvenanceTensor(IDS, frozenset({"x"})), s=s).logits
    assert type(plain) is torch.Tensor
    assert get_provenance(of_s) == {"z"} and get_provenance(of_input) == {"x"}
    assert torch.equal(of_s._t, plain) and torch.equal(of_input._t, plain)


def test_a_fixed_likelihood_is_seen_to_depend_on_the_latents(fitted):
    posterior = fitted.posterior
    likelihood = posterior.log_likelihood(tiny.question_rows(4))

    def model():
        pyro.factor("likelihood", likelihood(posterior.prior()))

    assert get_model_relations(model)["sample_sample"]["likelihood"] == ["s"]


ELBOS = {
    "one draw": lambda: Trace_ELBO(),
    "vectorized": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    "graph": lambda: TraceGraph_ELBO(),
    "Renyi": lambda: RenyiELBO(alpha=0, num_particles=3, vectorize_particles=True, max_plate_nesting=1),
}
FAMILIES = [
    autoguide.AutoGaussian,
    autoguide.AutoStructured,
    autoguide.AutoNormalMessenger,
    autoguide.AutoHierarchicalNormalMessenger,
    autoguide.AutoRegressiveMessenger,
]


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_guides_that_read_the_dependencies_train_by_stock_svi(family, elbo):
    blora, model = causal()
    before = blora.adapter.factors()[0][1].clone()
    svi = SVI(model, family(model), pyro.optim.Adam({"lr": 1e-2}), ELBOS[elbo]())
    assert all(math.isfinite(svi.step(IDS, LABELS)) for _ in range(2))
    assert not torch.equal(blora.adapter.factors()[0][1], before)


@pytest.mark.parametrize("build", [causal, classifier], ids=["factors", "factors and a head"])
def test_jitted_nuts_equals_nuts(build):
    blora, model = build()
    with torch.no_grad():
        for _, B in blora.adapter.factors():
            B.normal_(generator=torch.Generator().manual_seed(0))
    draws = []
    for jit_compile in (False, True):
        pyro.clear_param_store()
        with torch.random.fork_rng():
            pyro.set_rng_seed(0)
            options = {"step_size": 0.1, "adapt_step_size": False, "max_tree_depth": 2, "ignore_jit_warnings": True}
            sampler = MCMC(NUTS(model, jit_compile=jit_compile, **options), 3, warmup_steps=1, disable_progbar=True)
            sampler.run(IDS, LABELS)
        draws.append(sampler.get_samples()["s"])
    torch.testing.assert_close(draws[1], draws[0], rtol=1e-4, atol=1e-5)
    assert len(draws[0].unique(dim=0)) > 1
    assert all(p.requires_grad for p in blora.point_estimates.parameters())


@pytest.mark.parametrize("prefix", [(), ("a",), ("a", "b")], ids="/".join)
def test_init_loc_knows_its_site_under_scopes(prefix):
    blora, inner = causal()
    model = inner
    for name in reversed(prefix):
        model = scope(model, prefix=name)
    guide = autoguide.AutoDelta(model, init_loc_fn=blora.init_loc)
    guide(IDS, LABELS)
    (found,) = guide.parameters()
    torch.testing.assert_close(found.data, blora.adapter.loc)


def test_init_loc_leaves_the_latents_of_another_llm_to_their_prior():
    first, other = causal()[0], sp.bayesian_lora(tiny.causal_lm(), r=3)
    site = {"name": "b/s", "fn": dist.Normal(torch.full((other.subspace.dim,), 7.0), 1e-6).to_event(1)}
    torch.testing.assert_close(first.init_loc(site), torch.full((other.subspace.dim,), 7.0), atol=1e-3, rtol=0)


# one loss for several draws -------------------------------------------------------------------------------------


def several(blora, shape):
    return torch.randn(*shape, blora.subspace.dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(3, 1), (2,), (3, 2), (1, 3, 1)], ids=str)
@pytest.mark.parametrize("build", [causal, classifier, upper_block], ids=lambda build: build.__name__)
def test_labels_beside_several_draws_are_refused(build, shape):
    blora, _ = build()
    labels = LABELS if build is classifier else IDS
    with pytest.raises(ValueError, match=r"labels= gives one loss for several draws.*from the logits"):
        blora(input_ids=IDS, labels=labels, s=several(blora, shape))
    assert blora(input_ids=IDS, s=several(blora, shape)).logits.shape[: len(shape)] == (*shape[:-1], 2)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("build", [causal, classifier], ids=lambda build: build.__name__)
def test_labels_beside_one_draw_give_the_loss_of_that_draw(build, shape):
    blora, _ = build()
    labels = LABELS if build is classifier else IDS
    with torch.no_grad():
        output = blora(input_ids=IDS, labels=labels, s=several(blora, shape))
        logits = output.logits.reshape(2, *output.logits.shape[len(shape) or 1 :])
    flat = (logits, labels) if build is classifier else (logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(*flat))


class LossAlone(nn.Module):
    """A module that is given its answers under a name of its own and returns nothing but a loss."""

    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, x, answers):
        return self.wrap(nn.functional.cross_entropy(self.linear(x), answers))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"loss": x}], ids=["tensor", "tuple", "dict"])
def test_a_module_that_returns_one_loss_is_refused_several_draws(wrap):
    blora = sp.bayesian_lora(LossAlone(wrap), r=2)
    x, answers = torch.ones(2, 4), torch.tensor([0, 1])
    blora(x, answers, s=several(blora, ()))
    with pytest.raises(ValueError, match="The model gives one loss for several draws"):
        blora(x, answers, s=several(blora, (3, 1)))


@pytest.mark.parametrize("num_particles", [2, 3])
def test_particles_in_the_place_of_rows_are_refused(num_particles):
    """Without a plate over rows, two particles of two rows would give each row its own draw."""
    blora, _ = causal()

    def model(ids, labels):
        logits = blora(input_ids=ids).logits[..., -1, :4]
        pyro.sample("label", dist.Categorical(logits=logits).to_event(1), obs=labels)

    guide = autoguide.AutoNormal(model)
    elbo = Trace_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=0)
    with pytest.raises(
        ValueError, match=r"lie in the dimension of the rows.*pyro.plate\('data', N|and the batch has 2"
    ):
        elbo.loss(model, guide, IDS, LABELS)
