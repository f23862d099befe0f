"""Gradients of masks against exact enumeration: leave-one-out has no bias, straight-through has the bias it admits."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import kl_divergence

import scalabl_pyro as sp
from scalabl_pyro.data import Example, collate, encode
from scalabl_pyro.guides import Guide, RankMaskGuide
from scalabl_pyro.model.joint import TaskModel
from scalabl_pyro.training.objective import Objective, ScopedGuide, default_elbo
from scalabl_pyro.training.score_function import LeaveOneOutELBO

ROWS, DIM, NUM_DATA = 6, 4, 30
LOGITS = torch.tensor([-1.0, -0.3, 0.8, 2.0], dtype=torch.float64)


class Curved(nn.Module):
    """A sum of tanh of the adapted layer, which is far from quadratic in a mask."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(DIM, DIM, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.hidden.weight)

    def forward(self, input_ids, attention_mask=None):
        return 2 * torch.tanh(self.hidden(input_ids.double())).sum(-1, keepdim=True)


class YesOrNo(sp.Task):
    """y ~ Bernoulli(sigmoid(output))."""

    def encode(self, row):
        return Example({"input_ids": row["x"]}, row["y"])

    def outputs(self, llm, batch, s):
        return llm(**batch.inputs, s=s)

    def likelihood(self, outputs, batch):
        return dist.Bernoulli(logits=outputs[..., 0])


@pytest.fixture(scope="module")
def problem():
    """An LLM of four masks, its task, its rows and a batch of them."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(ROWS, DIM, generator=generator).double()
    y = (torch.rand(ROWS, generator=generator) > 0.5).double()
    blora = sp.bayesian_lora(Curved(), r=DIM, lora_alpha=DIM, target_modules=["hidden"], prior="rank_mask")
    with torch.no_grad():
        for A, B in blora.adapter.factors():
            A.copy_(torch.eye(DIM))
            B.copy_(2 * torch.eye(DIM))
    task, rows = YesOrNo(), [{"x": a.tolist(), "y": b.item()} for a, b in zip(x, y, strict=True)]
    return blora, task, rows, collate(encode(rows, task.encode, need_target=True), range(ROWS), 0)


def exact(problem, kl_weight):
    """Loss and its gradient, from all 16 masks, nats per example."""
    blora, task, _, batch = problem
    logits = LOGITS.clone().requires_grad_(True)
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * DIM)
    with torch.no_grad():
        outputs = task.outputs(blora, batch, masks.unsqueeze(1))
        log_likelihood = task.likelihood(outputs, batch).log_prob(batch.target.double()).sum(-1)
    q = dist.Bernoulli(logits=logits).to_event(1)
    p = dist.Bernoulli(blora.prior.probability.double().expand(DIM)).to_event(1)
    elbo = q.log_prob(masks).exp() @ log_likelihood * NUM_DATA / ROWS - kl_weight * kl_divergence(q, p)
    loss = -elbo / NUM_DATA
    return loss.item(), torch.autograd.grad(loss, logits)[0]


class Estimate:
    """Mean and standard error of loss and gradient over several steps."""

    def __init__(self, problem, guide, *, draws, kl_weight, elbo=None, steps=60):
        blora, task, _, batch = problem
        model = TaskModel(blora, task, num_data=NUM_DATA, draws=draws)
        elbo = elbo or default_elbo(guide, blora.prior)
        objective = Objective(elbo, model, ScopedGuide(guide, draws=draws))
        losses, gradients = [], []
        with torch.random.fork_rng(), pyro.settings.context(module_local_params=True):
            torch.manual_seed(0)
            for _ in range(steps):
                objective.zero_grad()
                losses.append(objective.accumulate(batch, kl_weight, share=1.0)[0].double())
                gradients.append(guide.logits.grad.clone())
        (self.loss, self.loss_error), (self.gradient, self.error) = map(_mean, (losses, gradients))


def _mean(values):
    stack = torch.stack(values)
    return stack.mean(0), stack.std(0) / len(stack) ** 0.5


@pytest.mark.parametrize("kl_weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize(
    ("draws", "num_particles", "vectorize"),
    [("per_example", 2, True), ("per_example", 1, True), ("shared", 3, True), ("shared", 2, False)],
)
def test_the_leave_one_out_gradient_is_unbiased(problem, kl_weight, draws, num_particles, vectorize):
    loss, gradient = exact(problem, kl_weight)
    guide, elbo = RankMaskGuide(LOGITS, gradient="leave_one_out"), LeaveOneOutELBO(num_particles, vectorize=vectorize)
    found = Estimate(problem, guide, draws=draws, kl_weight=kl_weight, elbo=elbo)
    assert ((found.gradient - gradient).abs() < 5 * found.error).all()
    assert abs(found.loss - loss) < 5 * found.loss_error


def test_the_straight_through_gradient_is_biased_and_leave_one_out_is_as_quiet(problem):
    """What the docs of the guide say. The noise of one estimator bounds what the other may cost."""
    _, gradient = exact(problem, 1.0)
    options = {"draws": "per_example", "kl_weight": 1.0, "steps": 100}
    biased = Estimate(problem, RankMaskGuide(LOGITS), **options)
    assert ((biased.gradient - gradient).abs() > 5 * biased.error).any()
    assert (biased.gradient - gradient).norm() > 0.2 * gradient.norm()
    unbiased = Estimate(problem, RankMaskGuide(LOGITS, gradient="leave_one_out"), **options)
    assert ((unbiased.gradient - gradient).abs() < 5 * unbiased.error).all()
    assert unbiased.error.norm() < 2 * biased.error.norm()


def test_a_baseline_takes_most_noise_of_the_score_function(problem):
    guide = RankMaskGuide(LOGITS, gradient="leave_one_out")
    options = {"draws": "per_example", "kl_weight": 1.0, "steps": 40}
    without = Estimate(problem, guide, elbo=Trace_ELBO(num_particles=2), **options)
    assert Estimate(problem, guide, **options).error.norm() < 0.5 * without.error.norm()


class OwnMasks(Guide):
    """A user's guide over masks."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(LOGITS.clone())

    def forward(self, *args, **kwargs):
        return pyro.sample("s", dist.Bernoulli(logits=self.logits).to_event(1))

    def mean(self):
        return {"s": self.logits.sigmoid()}


@pytest.mark.parametrize("per_example", [True, False])
def test_a_guide_of_the_users_own_gets_the_estimator(problem, per_example):
    guide = OwnMasks()
    guide.per_example = per_example
    elbo = default_elbo(guide, problem[0].prior)
    assert isinstance(elbo, LeaveOneOutELBO) and elbo.vectorize_particles is per_example
    draws = "per_example" if per_example else "shared"
    found = Estimate(problem, guide, draws=draws, kl_weight=1.0)
    assert ((found.gradient - exact(problem, 1.0)[1]).abs() < 5 * found.error).all()


def test_masks_fitted_without_bias_remember_their_estimator(problem):
    blora, task, rows, _ = problem

    def unbiased(blora):
        return RankMaskGuide(LOGITS, gradient="leave_one_out")

    with pytest.raises(ValueError, match="gradient='exact' is unknown"):
        RankMaskGuide(LOGITS, gradient="exact")
    before = [(A.detach().clone(), B.detach().clone()) for A, B in blora.adapter.factors()]
    posterior = sp.fit(blora, task, rows, guide=unbiased, num_steps=3, batch_size=ROWS, progress=False).posterior
    assert posterior.provenance["elbo"] == "LeaveOneOutELBO" and posterior.provenance["draws"] == "per_example"
    assert not torch.equal(posterior.guide.logits, LOGITS)
    assert posterior.guide.options() == {"gradient": "leave_one_out"}
    assert RankMaskGuide.from_options(posterior.guide.options(), blora).gradient == "leave_one_out"
    assert RankMaskGuide.from_options({}, blora).gradient == "straight_through"  # files of earlier releases
    with torch.no_grad():
        for pair, values in zip(blora.adapter.factors(), before, strict=True):
            for factor, value in zip(pair, values, strict=True):
                factor.copy_(value)
