"""Laplace approximation of the D latents: the exact generalized Gauss-Newton matrix at any trained adapter.

D is about 1000 for a 7B model, so the whole matrix fits; and since a row of a batch can carry its own s, one backward
pass a class gives the gradients of all examples of the batch.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from .._errors import check_positive
from ..data.encoding import encode
from ..data.rows import read_rows
from ..guides import CovarianceGuide
from ..model.derivatives import gauss_newton
from ..model.log_likelihood import LogLikelihood
from ..posterior.posterior import Posterior
from ..priors import Prior, as_prior
from ..priors.sites import prior_sites

logger = logging.getLogger(__name__)

#: Where ``prior_scale="evidence"`` looks.
SCALES = np.exp(np.linspace(math.log(1e-3), math.log(1e3), 2001))
#: A step that does not climb is halved so often at most.
MAX_HALVINGS = 12
#: Relative error that a log joint may have.
ROUNDING = 1e-6

#: (loc, scale) of the prior, each (D,), given the curvature of the likelihood at the mode.
PriorAt = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def laplace(
    posterior: Posterior,
    data: Any,
    *,
    prior_scale: float | str | None = None,
    newton_steps: int = 0,
    batch_size: int = 16,
) -> Posterior:
    """Replace the guide of a posterior by a normal with the curvature of the log joint at its mean.

    q(s) = Normal(mean, (H + P)^-1): H the Gauss-Newton matrix of ``gauss_newton``, P the
    prior's precision. The evidence is log p(y | mean) + log p(mean) + D/2 log 2 pi - 1/2 log det (H + P).

    Args:
        posterior: of any guide, for instance ``fit(..., guide="delta")``; its factors stay as they are.
        data: the training rows.
        prior_scale: standard deviation of a new prior Normal(0, prior_scale); ``"evidence"`` chooses the one of the
            largest evidence (MacKay, 1992); default: the posterior's own prior.
        newton_steps: Gauss-Newton steps toward the mode before the expansion, each as long as it climbs. One is enough
            for a linear model; far from the mode of an LLM, ``fit(guide="delta")`` is the cheaper way there.
        batch_size: rows a pass.

    Returns:
        A posterior whose provenance holds ``laplace_log_evidence`` (nats) and, where it is new, ``prior_scale``.

    Raises:
        ValueError: a prior that is not a factorized normal and no ``prior_scale``, a likelihood without curvature, or
            an option outside its range.

    References:
        Daxberger et al., Laplace Redux, NeurIPS 2021; Yang et al., Bayesian Low-rank Adaptation for LLMs, ICLR 2024.
    """
    if newton_steps < 0:
        raise ValueError(f"newton_steps={newton_steps} must be 0 (expand at the posterior mean) or more.")
    prior_at = _normal_prior(posterior.prior, prior_scale)
    examples = encode(read_rows(data), posterior.task.encode, need_target=True)
    likelihood = LogLikelihood(posterior.llm(), posterior.task, examples, batch_size=batch_size)
    dtype = posterior.mean().dtype
    mode, fit = _climb(likelihood, posterior.mean().double(), prior_at, newton_steps, dtype)
    curvature = gauss_newton(likelihood, mode)
    loc, scale = prior_at(curvature, mode)
    guide = CovarianceGuide(mode, torch.ones_like(mode))
    _set_covariance(guide, torch.linalg.inv(curvature + torch.diag(scale**-2)))
    prior, new_scale = posterior.prior, None
    if prior_scale is not None:
        new_scale = scale[0].item()
        prior = as_prior(new_scale, posterior.subspace).to(dtype)
    provenance = {
        **posterior.provenance,
        "method": "Laplace",
        "laplace_log_evidence": (fit + _log_occam(curvature, mode - loc, scale)).item(),
        "prior_scale": new_scale,
    }
    return replace(posterior, guide=guide.to(dtype).requires_grad_(False), prior=prior, provenance=provenance)


def _climb(
    likelihood: LogLikelihood, start: Tensor, prior_at: PriorAt, num_steps: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The point (D,) that Gauss-Newton steps reach, float64, and the log likelihood there.

    A whole step is exact for a linear model; elsewhere it can overshoot, and is halved until the log joint does not
    fall. Small rises drown in the rounding of the LLM, so the slope decides them: the approximate Wolfe condition
    (Hager and Zhang, A new conjugate gradient method with guaranteed descent, SIAM J. Optim. 2005).
    """

    def fit_at(s: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = likelihood.with_gradient(s.to(dtype))
        return value.cpu().double(), gradient.cpu().double()

    s, (fit, gradient) = start, fit_at(start)
    for _ in range(num_steps):
        curvature = gauss_newton(likelihood, s)
        loc, scale = prior_at(curvature, s)
        slope = gradient - (s - loc) / scale**2
        step = torch.linalg.solve(curvature + torch.diag(scale**-2), slope)
        before = fit - 0.5 * ((s - loc) / scale).square().sum()
        for halvings in range(MAX_HALVINGS):
            there = s + 0.5**halvings * step
            fit_there, gradient_there = fit_at(there)
            after = fit_there - 0.5 * ((there - loc) / scale).square().sum()
            slope_there = gradient_there - (there - loc) / scale**2
            if after >= before - ROUNDING * before.abs() and slope_there @ step >= -0.9 * (slope @ step):
                s, fit, gradient = there, fit_there, gradient_there
                break
        else:  # nothing climbs: this is the mode, as far as the precision of the LLM can tell
            break
    return s, fit


def _normal_prior(prior: Prior, prior_scale: float | str | None) -> PriorAt:
    """The normal prior to expand under, as a function of the curvature because the evidence chooses it by that."""
    if prior_scale == "evidence":
        return lambda curvature, mode: (torch.zeros_like(mode), torch.full_like(mode, _best_scale(curvature, mode)))
    if isinstance(prior_scale, str):
        raise ValueError(
            f"prior_scale={prior_scale!r}: give a number, 'evidence', or None for the posterior's own prior."
        )
    if prior_scale is not None:
        check_positive(prior_scale=prior_scale)
        return lambda curvature, mode: (torch.zeros_like(mode), torch.full_like(mode, prior_scale))
    sites = prior_sites(prior)
    own = sites["s"]["fn"] if set(sites) == {"s"} else None
    base = own.base_dist if isinstance(own, Independent) else own
    if isinstance(base, Normal):
        loc, scale = base.loc.detach().cpu().double(), base.scale.detach().cpu().double()
        return lambda curvature, mode: (loc, scale)
    flaw = "a factorized normal" if isinstance(base, MultivariateNormal) else "normal"
    raise ValueError(
        f"The prior {prior} is not {flaw}: pass prior_scale=... for a new one Normal(0, prior_scale), or "
        "prior_scale='evidence' to choose it."
    )


def _log_occam(curvature: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Log p(mode) + D/2 log 2 pi - 1/2 log det (H + P) for a factorized normal prior."""
    precision = curvature + torch.diag(scale**-2)
    return -scale.log().sum() - 0.5 * (shift / scale).square().sum() - 0.5 * torch.linalg.slogdet(precision)[1]


def _best_scale(curvature: Tensor, mode: Tensor) -> float:
    """The scale of Normal(0, scale) among ``SCALES`` whose evidence is largest at this mode."""
    eigenvalues = torch.linalg.eigvalsh(curvature).clamp_min(0).numpy()
    occam = np.log(eigenvalues + SCALES[:, None] ** -2.0).sum(1)
    evidence = -len(mode) * np.log(SCALES) - 0.5 * float(mode.square().sum()) / SCALES**2 - 0.5 * occam
    best = float(SCALES[evidence.argmax()])
    if best in (SCALES[0], SCALES[-1]):
        logger.warning("the evidence chose the prior scale %.3g, an end of its range: the data do not tell it", best)
    return best


@torch.no_grad()
def _set_covariance(guide: CovarianceGuide, covariance: Tensor) -> None:
    tril = torch.linalg.cholesky((covariance + covariance.T) / 2)
    scale = tril.diagonal()
    guide.scale = scale.clone()  # a PyroParam takes the constrained value
    guide.lower.copy_((tril / scale.unsqueeze(-1))[guide.indices[0], guide.indices[1]])
