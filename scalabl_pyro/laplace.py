"""Laplace approximation of the D latents: the exact generalised Gauss-Newton matrix at any trained adapter.

D is about 1000 for a 7B model, so the whole matrix fits; and since a row of a batch can carry its own s, one backward
pass a class gives the gradients of all examples of the batch.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data import encode, read_rows
from .guides import CovarianceGuide
from .linearised import gauss_newton
from .logdensity import LogLikelihood
from .posterior import Posterior
from .priors import FixedPrior, as_prior


def laplace(
    posterior: Posterior,
    data: Any,
    *,
    prior_scale: float | str | None = None,
    newton_steps: int = 0,
    batch_size: int = 16,
) -> Posterior:
    """Replace the guide of a posterior by a normal with the curvature of the log joint at its mean.

    q(s) = Normal(mean, (H + P)^-1): H = sum_n J_n' L_n J_n with J_n the Jacobian of the LLM's outputs with respect to
    s and L_n the Hessian of the negative log likelihood in the outputs (Martens, 2020); P the prior's precision.

    Args:
        posterior: of any guide, for instance ``fit(..., guide="delta")``; its factors stay as they are.
        data: the training rows.
        prior_scale: standard deviation of a new prior Normal(0, prior_scale); ``"evidence"`` chooses the one of the
            largest evidence (MacKay, 1992); default: the posterior's own prior.
        newton_steps: Gauss-Newton steps towards the mode before the expansion.
        batch_size: rows a pass.

    Returns:
        A posterior whose provenance holds ``log_evidence`` (nats) and, where chosen, ``prior_scale``.

    Raises:
        ValueError: a prior that is not normal and no ``prior_scale``.

    References:
        Daxberger et al., Laplace Redux, NeurIPS 2021; Yang et al., Bayesian Low-rank Adaptation for LLMs, ICLR 2024.
    """
    examples = encode(read_rows(data), posterior.task.encode, need_target=True)
    likelihood = LogLikelihood(posterior.llm(), posterior.task, examples, batch_size=batch_size)
    mode = posterior.mean().double()
    loc, scale = _normal_prior(posterior, prior_scale, mode)
    curvature = None
    for _ in range(newton_steps):
        curvature = gauss_newton(likelihood, mode)
        _, gradient = likelihood.with_gradient(mode.to(posterior.mean().dtype))
        slope = gradient.cpu().double() - (mode - loc) / scale**2
        mode = mode + torch.linalg.solve(curvature + torch.diag(scale**-2), slope)
    curvature = gauss_newton(likelihood, mode)
    fit = likelihood.with_gradient(mode.to(posterior.mean().dtype))[0].cpu().double()
    if prior_scale == "evidence":
        scale = torch.full_like(mode, _best_scale(curvature, mode, loc))
    precision = curvature + torch.diag(scale**-2)
    guide = CovarianceGuide(mode, torch.ones_like(mode))
    _set_covariance(guide, torch.linalg.inv(precision))
    own_prior = posterior.prior
    if prior_scale is not None:
        own_prior = as_prior(scale[0].item(), posterior.subspace).to(posterior.mean().dtype)
    provenance = {
        **posterior.provenance,
        "method": "Laplace",
        "laplace_log_evidence": (fit + _log_occam(curvature, mode - loc, scale)).item(),
        "prior_scale": scale[0].item() if prior_scale is not None else None,
    }
    return replace(
        posterior, guide=guide.to(posterior.mean().dtype).requires_grad_(False), prior=own_prior, provenance=provenance
    )


def _normal_prior(posterior: Posterior, prior_scale: float | str | None, mode: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(prior_scale, str) and prior_scale != "evidence":
        raise ValueError(
            f"prior_scale={prior_scale!r}: give a number, 'evidence', or None for the posterior's own prior."
        )
    if prior_scale is not None and not isinstance(prior_scale, str):
        if not 0 < prior_scale < float("inf"):
            raise ValueError(f"prior_scale={prior_scale} must be positive and finite.")
        return torch.zeros_like(mode), torch.full_like(mode, prior_scale)
    prior = posterior.prior
    if isinstance(prior, FixedPrior) and prior.family_name == "Normal":
        base = prior.distribution().base_dist
        return base.loc.double(), base.scale.double()
    if prior_scale == "evidence":
        return torch.zeros_like(mode), torch.ones_like(mode)
    raise ValueError(
        f"The prior {prior} is not normal: pass prior_scale=... for a normal one, or prior_scale='evidence' to choose "
        "it."
    )


def _log_occam(curvature: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Log p(mode) + D/2 log 2 pi - 1/2 log det (H + P) for a factorised normal prior."""
    precision = curvature + torch.diag(scale**-2)
    return -scale.log().sum() - 0.5 * (shift / scale).square().sum() - 0.5 * torch.linalg.slogdet(precision)[1]


def _best_scale(curvature: Tensor, mode: Tensor, loc: Tensor) -> float:
    """The scale in [1e-3, 1e3] whose evidence is largest at this mode."""
    eigenvalues = torch.linalg.eigvalsh(curvature).clamp_min(0).numpy()
    squares, dim = float((mode - loc).square().sum()), len(mode)
    grid = np.exp(np.linspace(math.log(1e-3), math.log(1e3), 2001))
    precision = grid[:, None] ** -2.0
    evidence = -dim * np.log(grid) - 0.5 * squares / grid**2 - 0.5 * np.log(eigenvalues + precision).sum(1)
    return float(grid[evidence.argmax()])


@torch.no_grad()
def _set_covariance(guide: CovarianceGuide, covariance: Tensor) -> None:
    tril = torch.linalg.cholesky((covariance + covariance.T) / 2)
    scale = tril.diagonal()
    guide.scale = scale.clone()  # a PyroParam takes the constrained value
    guide.lower.copy_((tril / scale.unsqueeze(-1))[guide.indices[0], guide.indices[1]])
