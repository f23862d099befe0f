"""Laplace approximation of the D latents, with the exact generalized Gauss-Newton matrix.

D is about 1000 for a 7B model, so the whole matrix fits into memory. Each row of a batch can carry its own s, so one
backward pass per class gives the gradients of all rows of a batch.
"""

import numbers
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from .._arguments import check_role, known_arguments
from .._errors import check_count, check_scale
from ..data.encoding import encode_data
from ..guides import CovarianceGuide
from ..model.derivatives import gauss_newton, value_and_gauss_newton
from ..model.log_likelihood import LogLikelihood
from ..posterior.posterior import Posterior
from ..priors import Prior, as_prior
from ..priors.sites import prior_sites
from .evidence import scale_of_largest_evidence

#: Largest number of times that a step is halved when the log joint does not rise.
MAX_HALVINGS = 12
#: Relative rounding error that a log joint may have.
ROUNDING = 1e-6

#: Function that gives loc and scale of the prior, each (D,), from the curvature of the likelihood and the mode.
PriorAt = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@known_arguments
def laplace(
    posterior: Posterior,
    data: Any,
    *,
    prior_scale: float | Literal["evidence"] | None = None,
    newton_steps: int = 0,
    batch_size: int = 16,
) -> Posterior:
    """Replace the guide of a posterior by a normal with the curvature of log p(y, s) at its mean.

    q(s) = Normal(mean, (H + P)^-1), where H is the Gauss-Newton matrix of the log likelihood and P the precision of the
    prior. The evidence is log p(y | mean) + log p(mean) + D/2 log 2 pi - 1/2 log det (H + P).

    Args:
        posterior: Posterior with any guide, for instance from ``fit(..., guide="delta")``. Its factors stay unchanged.
        data: Training rows.
        prior_scale: Standard deviation of a new prior Normal(0, prior_scale); ``"evidence"`` chooses the one with the
            largest evidence (MacKay, 1992); None keeps the posterior's own prior.
        newton_steps: Number of Gauss-Newton steps toward the mode before the curvature is computed. One is enough for a
            linear model. Far from the mode of an LLM, ``fit(guide="delta")`` gets there at less cost.
        batch_size: Rows per forward pass.

    Returns:
        A posterior whose provenance holds ``laplace_log_evidence`` (nats) and, if the prior is new, ``prior_scale``.

    Raises:
        ValueError: The prior is not a factorized normal and ``prior_scale`` is None, the likelihood has no curvature,
            or an option is outside its range.

    Example:
        >>> normal = scalabl_pyro.laplace(posterior, train_data, prior_scale="evidence")
        >>> normal.provenance["method"]
        'Laplace'

    References:
        Daxberger et al., Laplace Redux, NeurIPS 2021; Yang et al., Bayesian Low-rank Adaptation for LLMs, ICLR 2024.
    """
    check_role("posterior", posterior, "posterior", call="laplace(posterior, data)")
    check_count(newton_steps=newton_steps, least=0)
    check_count(batch_size=batch_size)
    posterior.task.check_use("laplace()")
    prior_at = _normal_prior(posterior.prior, prior_scale)
    examples = encode_data(data, posterior.task.encode, need_target=True)
    likelihood = LogLikelihood(posterior.llm(), posterior.task, examples, batch_size=batch_size)
    dtype = posterior.mean().dtype
    mode = _gauss_newton_ascent(likelihood, posterior.mean().double(), prior_at, newton_steps, dtype)
    fit, curvature = value_and_gauss_newton(likelihood, mode)
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


def _gauss_newton_ascent(
    likelihood: LogLikelihood, start: Tensor, prior_at: PriorAt, num_steps: int, dtype: torch.dtype
) -> Tensor:
    """Take Gauss-Newton steps; return the point (D,) that they reach, in float64.

    A whole step is exact for a linear model. Elsewhere it can overshoot, so it is halved until the log joint does not
    fall. A small rise can be smaller than the rounding errors of the LLM; then the slope decides. This is the
    approximate Wolfe condition (Hager and Zhang, A new conjugate gradient method with guaranteed descent, SIAM J.
    Optim. 2005).
    """

    def fit_at(s: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = likelihood.with_gradient(s.to(dtype))
        return value.cpu().double(), gradient.cpu().double()

    if not num_steps:
        return start
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
        else:  # no step rises: this is the mode, within the precision of the LLM
            break
    return s


def _normal_prior(prior: Prior, prior_scale: float | Literal["evidence"] | None) -> PriorAt:
    """The normal prior of the expansion, as a function of the curvature, by which the evidence chooses its scale."""
    if isinstance(prior_scale, str) and prior_scale == "evidence":
        return lambda curvature, mode: (torch.zeros_like(mode), torch.full_like(mode, _best_scale(curvature, mode)))
    if prior_scale is not None:
        if not isinstance(prior_scale, numbers.Real):
            raise ValueError(
                f"prior_scale={prior_scale!r}: give a number, 'evidence', or None for the posterior's own prior."
            )
        check_scale(prior_scale=prior_scale)
        return lambda curvature, mode: (torch.zeros_like(mode), torch.full_like(mode, prior_scale))
    sites = prior_sites(prior)
    own = sites["s"]["fn"] if set(sites) == {"s"} else None
    base = own.base_dist if isinstance(own, Independent) else own
    if isinstance(base, Normal):
        loc, scale = base.loc.detach().cpu().double(), base.scale.detach().cpu().double()
        return lambda curvature, mode: (loc, scale)
    expected = "a factorized normal" if isinstance(base, MultivariateNormal) else "normal"
    raise ValueError(
        f"The prior {prior} is not {expected}: pass prior_scale=<number> for a new prior Normal(0, prior_scale), or "
        "prior_scale='evidence' to choose the number."
    )


def _log_occam(curvature: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Log p(mode) + D/2 log 2 pi - 1/2 log det (H + P) for a factorized normal prior."""
    precision = curvature + torch.diag(scale**-2)
    return -scale.log().sum() - 0.5 * (shift / scale).square().sum() - 0.5 * torch.linalg.slogdet(precision)[1]


def _best_scale(curvature: Tensor, mode: Tensor) -> float:
    """Scale of the prior Normal(0, scale) whose evidence is largest at this mode."""
    return scale_of_largest_evidence(torch.linalg.eigvalsh(curvature), float(mode.square().sum()))


@torch.no_grad()
def _set_covariance(guide: CovarianceGuide, covariance: Tensor) -> None:
    """Set scale and correlations of the guide from a covariance (D, D)."""
    tril = torch.linalg.cholesky((covariance + covariance.T) / 2)
    scale = tril.diagonal()
    guide.scale = scale.clone()  # a PyroParam takes the constrained value
    guide.lower.copy_((tril / scale.unsqueeze(-1))[guide.indices[0], guide.indices[1]])
