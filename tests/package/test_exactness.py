"""Every family that contains the exact posterior of a linear model finds it, and its ELBO is then the log evidence.

The noise of the draws is the only thing in the way of an exact optimum, so that here it has mean 0 and covariance I in
every step and not on average alone (moment matching): what is quadratic in s then has its expectation exactly.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from gaussians import posterior_of, solve
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from scipy.stats import qmc
from torch.distributions import lowrank_multivariate_normal, multivariate_normal, normal
from toys import NOISE, PRIOR_SCALE, LinearToy

import scalabl_pyro as sp
from scalabl_pyro.guides import FlowGuide, LowRankGuide, NormalGuide

#: Draws that stand for a posterior: a power of two, as Sobol points want it.
NUM_POINTS = 2**13


def rank_one(blora):
    loc = blora.adapter.loc
    return LowRankGuide(loc, torch.full_like(loc, 0.3), rank=1)


DIAGONAL = {"dim": 4}
BLOCKS = {"dim": 6, "correlation": 0.5, "layers": 2}
EQUAL = {"dim": 4, "correlation": 0.5}  # the identity and one direction: rank 1 is enough
#: Guide, the linear model whose posterior is in its family, and the steps that it takes to get there.
FAMILIES = {
    "normal": ("normal", DIAGONAL, 300),
    "layer_covariance": ("layer_covariance", BLOCKS, 400),
    "full_covariance": ("full_covariance", EQUAL, 300),
    "lowrank": ("lowrank", EQUAL, 300),
    "lowrank of rank 1": (rank_one, EQUAL, 600),
    "flow": ("flow", {"dim": 2, "correlation": 0.5}, 1000),
    "AutoNormal": (AutoNormal, DIAGONAL, 300),
    "AutoMultivariateNormal": (AutoMultivariateNormal, EQUAL, 300),
    "AutoLowRankMultivariateNormal": (AutoLowRankMultivariateNormal, EQUAL, 800),
}

#: Left to the slow suite: their class is Pyro's, or another row has it too.
LONG = ("lowrank of rank 1", "AutoNormal", "AutoMultivariateNormal", "AutoLowRankMultivariateNormal")


class EvenNoise:
    """Standard normal draws (..., D) whose mean is 0 and covariance I exactly, and not those of the draws before."""

    before = None

    def __call__(self, shape, dtype, device):
        noise = torch.randn(shape[:-1].numel(), shape[-1], dtype=torch.float64)
        noise -= noise.mean(0)
        if len(noise) < 4 * shape[-1]:  # too few to have a covariance, as a single draw is
            return noise.reshape(shape).to(dtype)
        if self.before is not None and len(self.before) == len(noise):  # a low-rank normal takes two sets of them
            noise -= self.before @ (self.before.T @ noise) / len(noise)
        tril = torch.linalg.cholesky(noise.T @ noise / len(noise))
        self.before = torch.linalg.solve_triangular(tril, noise.T, upper=False).T
        return self.before.reshape(shape).to(dtype)


@dataclass(frozen=True)
class Found:
    """Moments and ELBO of a fitted guide, without Monte Carlo error worth the name."""

    mean: torch.Tensor
    covariance: torch.Tensor
    elbo: float


def fitted(toy, guide, *, num_steps):
    """Fit a guide to the whole of a linear model with even noise."""
    elbo = Trace_ELBO if isinstance(guide, type) or guide == "flow" else TraceMeanField_ELBO
    with pytest.MonkeyPatch.context() as patch:
        for module in (normal, multivariate_normal, lowrank_multivariate_normal):
            patch.setattr(module, "_standard_normal", EvenNoise())
        return sp.fit(
            toy.blora,
            toy.task,
            toy.rows,
            guide=guide,
            num_steps=num_steps,
            batch_size=toy.num_data,
            optimizer={"lr_loc": 0.05 if guide == "flow" else 0.1, "lr_scale": 0.05},
            init_scale=0.3,
            draws="shared",
            elbo=elbo(num_particles=64, vectorize_particles=True, max_plate_nesting=1),
            progress=False,
        ).posterior


def moments(posterior, toy):
    """Return the moments of Sobol points, carried to the posterior by the transforms of its guide."""
    with torch.no_grad(), sp._process.pyro_modes.local_params():
        trace = poutine.trace(posterior.guide).get_trace()
    sites = [trace.nodes[name]["fn"] for name in trace.stochastic_nodes]
    (q,) = [fn for fn in sites if type(fn).__name__ != "Delta"]  # where an AutoGuide draws all sites at once
    q = getattr(q, "base_dist", q) if type(q).__name__ == "Independent" else q
    dim = toy.features.shape[1]
    z = torch.from_numpy(qmc.MultivariateNormalQMC(np.zeros(dim), seed=0).random(NUM_POINTS))
    log_q = torch.distributions.Normal(0.0, torch.ones((), dtype=torch.float64)).log_prob(z).sum(1)
    if isinstance(posterior.guide, FlowGuide):
        s = z
        with torch.no_grad():
            for transform in q.transforms:
                moved = transform(s)
                change = transform.log_abs_det_jacobian(s, moved)
                log_q, s = log_q - change, moved
    else:  # normal
        covariance = q.covariance_matrix if hasattr(q, "covariance_matrix") else q.variance.diag()
        tril = torch.linalg.cholesky(covariance.detach())
        s = q.mean.detach() + z @ tril.T
        log_q = log_q - tril.diagonal().log().sum()
    fit = torch.distributions.Normal(s @ toy.features.T, NOISE).log_prob(toy.y).sum(1)
    prior = torch.distributions.Normal(0.0, torch.tensor(PRIOR_SCALE).double()).log_prob(s).sum(1)
    return Found(s.mean(0), torch.cov(s.T), float((fit + prior - log_q).mean()))


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in FAMILIES],
)
def test_a_family_that_contains_the_posterior_finds_it_and_its_elbo_is_the_evidence(family):
    guide, options, num_steps = FAMILIES[family]
    toy = LinearToy(**options)
    exact = solve(toy.features, toy.y)
    posterior = fitted(toy, guide, num_steps=num_steps)
    found = moments(posterior, toy)
    sd = exact.covariance.diagonal().sqrt()
    assert (found.mean - exact.mean).abs().max() < 1e-3
    assert ((found.covariance - exact.covariance).abs() / sd.outer(sd)).max() < 0.01
    assert found.elbo == pytest.approx(exact.evidence, abs=1e-3)
    assert posterior.log_weights(toy.rows, num_draws=1000).pareto_k()[0] < 0.5


def test_the_point_of_largest_density_is_the_mean():
    toy = LinearToy(**EQUAL)
    point = sp.fit(
        toy.blora,
        toy.task,
        toy.rows,
        guide="delta",
        num_steps=500,
        batch_size=64,
        optimizer={"lr_loc": 0.05},
        progress=False,
    ).posterior
    torch.testing.assert_close(point.mean(), solve(toy.features, toy.y).mean, rtol=0, atol=1e-3)


@pytest.mark.parametrize("newton_steps", [1, 5])
def test_laplace_has_a_good_k_and_the_evidence_for_its_elbo(newton_steps):
    toy = LinearToy(5, correlation=0.95)
    exact = solve(toy.features, toy.y)
    posterior = sp.laplace(posterior_of(toy), toy.rows, newton_steps=newton_steps)
    weights = posterior.log_weights(toy.rows, num_draws=1000)
    assert weights.pareto_k()[0] < 0.5
    assert weights.elbo() == pytest.approx(exact.evidence, abs=1e-3)
    assert posterior.provenance["laplace_log_evidence"] == pytest.approx(exact.evidence, abs=1e-3)


def test_the_weights_of_the_best_factorized_guide_under_strong_correlations_have_no_good_k():
    """The best one has the conditional variances, and its weights a tail whose index is known.

    With q = Normal(m, diag(P)^-1) and p = Normal(m, P^-1) the mean of (p / q)^(1 / k) under q is finite where
    P / k + (1 - 1 / k) diag(P) is positive definite: for k > 1 - (smallest eigenvalue of P, scaled to diagonal 1).
    """
    toy = LinearToy(4, correlation=0.95)
    exact = solve(toy.features, toy.y)
    precision = torch.linalg.inv(exact.covariance)
    conditional = precision.diagonal() ** -0.5
    best = toy.elbo(exact.mean, conditional.square().diag())
    assert all(toy.elbo(exact.mean, (factor * conditional).square().diag()) < best for factor in (0.98, 1.02))
    posterior = posterior_of(toy, NormalGuide(exact.mean, conditional))
    ks = [posterior.log_weights(toy.rows, num_draws=2000, seed=seed).pareto_k()[0] for seed in range(3)]
    index = 1 - torch.linalg.eigvalsh(precision * conditional.outer(conditional))[0].item()
    assert index > 0.95 and min(ks) > 0.7 and np.mean(ks) == pytest.approx(index, abs=0.3)
    finding = posterior.diagnose(toy.rows, num_draws=4000).to_frame().loc["pareto_k"]
    assert finding.severity in ("warning", "error") and "full_covariance" in finding.advice
    assert posterior_of(toy).log_weights(toy.rows, num_draws=1000).pareto_k()[0] < 0.5  # the posterior itself
