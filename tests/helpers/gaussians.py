"""Posteriors that are known exactly: normal guides of the linear toy, and its leave-one-out densities."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from toys import NOISE, PRIOR_SCALE, LinearToy

import scalabl_pyro as sp
from scalabl_pyro.guides import CovarianceGuide, Guide
from scalabl_pyro.priors import as_prior


@dataclass(frozen=True)
class Exact:
    """Exact results for y ~ Normal(F s, NOISE), s ~ Normal(0, prior_scale).

    They are the posterior of s, the log evidence, and log p(y_i | y without i).
    """

    mean: Tensor
    covariance: Tensor
    evidence: float
    loo: Tensor


def log_normal(y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * ((y - mean).square() / variance + variance.log() + math.log(2 * math.pi))


def solve(features: Tensor, y: Tensor, prior_scale: float = PRIOR_SCALE) -> Exact:
    """Everything in closed form; each row is left out by solving again without it."""
    prior = torch.eye(features.shape[1], dtype=torch.float64) / prior_scale**2

    def posterior(rows: Tensor) -> tuple[Tensor, Tensor]:
        F = features[rows]
        covariance = torch.linalg.inv(F.T @ F / NOISE**2 + prior)
        return covariance @ F.T @ y[rows] / NOISE**2, covariance

    everything = torch.arange(len(y))
    loo = []
    for i in everything:
        mean, covariance = posterior(everything[everything != i])
        f = features[i]
        loo.append(log_normal(y[i], f @ mean, f @ covariance @ f + NOISE**2))
    marginal = features @ features.T * prior_scale**2 + NOISE**2 * torch.eye(len(y), dtype=torch.float64)
    evidence = torch.distributions.MultivariateNormal(torch.zeros_like(y), marginal).log_prob(y)
    return Exact(*posterior(everything), float(evidence), torch.stack(loo))


def normal_guide(mean: Tensor, covariance: Tensor) -> CovarianceGuide:
    """A guide that is this normal distribution."""
    tril = torch.linalg.cholesky(covariance)
    guide = CovarianceGuide(mean, tril.diagonal())
    with torch.no_grad():
        guide.lower.copy_((tril / tril.diagonal().unsqueeze(1))[tuple(guide.indices)])
    return guide


def posterior_of(toy: LinearToy, guide: Guide | None = None, *, prior: object = None) -> sp.Posterior:
    """The posterior of the toy with any guide (default: the exact one) and prior, without training."""
    if prior is not None:
        toy.blora.prior = as_prior(prior, toy.blora.subspace).double()
    if guide is None:
        scale = toy.blora.prior.distribution().base_dist.scale[0].item()
        exact = solve(toy.features, toy.y, scale)
        guide = normal_guide(exact.mean, exact.covariance)
    provenance = {"num_data": toy.num_data}
    return sp.Posterior.capture(toy.blora, toy.task, guide, provenance=provenance)
