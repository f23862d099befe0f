"""Laplace approximation of the D latents: the exact generalised Gauss-Newton matrix at any trained adapter.

D is about 1000 for a 7B model, so the whole matrix fits; and since a row of a batch can carry its own s, one backward
pass a class gives the gradients of all examples of the batch.
"""

import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from .data import Batch, encode, read_rows
from .guides import CovarianceGuide
from .likelihoods import Task
from .logdensity import LogLikelihood
from .posterior import Posterior
from .predictive import NumericPrediction, Prediction, predict_from_outputs
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
        "laplace_log_evidence": (fit + _log_occam(curvature, mode - loc, scale)).item(),
        "prior_scale": scale[0].item() if prior_scale is not None else None,
    }
    return replace(
        posterior, guide=guide.to(posterior.mean().dtype).requires_grad_(False), prior=own_prior, provenance=provenance
    )


@torch.no_grad()
def gauss_newton(likelihood: LogLikelihood, s: Tensor) -> Tensor:
    """(D, D) generalised Gauss-Newton matrix of the negative log likelihood at s, float64."""
    total = torch.zeros(len(s), len(s), dtype=torch.float64)
    for batch, jacobian, hessian in _curvatures(likelihood, s):
        del batch
        # J' L J by a square root of L: products of (rows * classes, D) matrices alone.
        values, vectors = torch.linalg.eigh(hessian)
        root = (vectors * values.clamp_min(0).sqrt().unsqueeze(1)).transpose(1, 2)  # (B, K, K), root' root = L
        half = torch.einsum("bij,bjd->bid", root, jacobian).flatten(0, 1)
        total += (half.T @ half).cpu()
    return total


def predict_linearised(
    posterior: Posterior, data: Any, *, num_draws: int = 100, seed: int = 0, batch_size: int = 16
) -> Prediction | NumericPrediction:
    """Predict with outputs linear in s: f(x, s) = f(x, mean) + J (s - mean), so that no draw needs a pass of its own.

    Args:
        posterior: with a normal guide.
        data: rows; answers are optional.
        num_draws: draws of the K outputs of each row, which are normal.
        seed: of those draws.
        batch_size: rows a pass.

    References:
        Immer et al., Improving predictions of Bayesian neural nets via local linearization, AISTATS 2021.
    """
    covariance = posterior.guide.covariance().double()
    examples = encode(read_rows(data, split="test"), posterior.task.encode, need_target=False)
    likelihood = LogLikelihood(posterior.llm(), posterior.task, examples, batch_size=batch_size)
    noise = torch.Generator().manual_seed(seed)
    parts: list[tuple[Batch, Tensor]] = []
    for batch, own, outputs in likelihood.rows_with_own_s(posterior.mean()):
        active = torch.arange(outputs.shape[1], device=outputs.device)
        jacobian = _jacobian(outputs, own, active).cpu().double()
        spread = torch.einsum("bkd,de,ble->bkl", jacobian, covariance, jacobian)
        values, vectors = torch.linalg.eigh(spread)
        root = vectors * values.clamp_min(0).sqrt().unsqueeze(1)  # root root' = spread
        draws = torch.randn(num_draws, *outputs.shape, generator=noise, dtype=torch.float64)
        parts.append(
            (batch, outputs.detach().cpu() + torch.einsum("bkl,sbl->sbk", root, draws).to(outputs.dtype).cpu())
        )
    return predict_from_outputs(posterior.task, examples, parts)


def _curvatures(likelihood: LogLikelihood, s: Tensor) -> Any:
    """For each batch: Jacobians (B, K, D) and Hessians (B, K, K) of the negative log likelihood, float64."""
    dtype = likelihood.llm.adapter.loc.dtype
    for batch, own, outputs in likelihood.rows_with_own_s(s.to(dtype)):
        hessian = output_hessian(likelihood.task, batch, outputs)
        active = hessian.abs().amax(dim=(0, 1)).nonzero()[:, 0]  # labels that no row has do not matter
        jacobian = _jacobian(outputs, own, active)
        yield batch, jacobian.double(), hessian[:, active][:, :, active].double()


def output_hessian(task: Task, batch: Batch, outputs: Tensor) -> Tensor:
    """(B, K, K) Hessian of -log p(y | outputs) in the outputs (B, K); rows do not interact."""
    with torch.enable_grad():
        point = outputs.detach().requires_grad_(True)
        nll = -task.likelihood(point, batch).log_prob(cast(Tensor, batch.target)).sum()
        (slope,) = torch.autograd.grad(nll, point, create_graph=True)
        if not slope.requires_grad:
            return torch.zeros(*outputs.shape, outputs.shape[1], device=outputs.device)
        columns = [
            torch.autograd.grad(slope[:, k].sum(), point, retain_graph=True, allow_unused=True)[0]
            for k in range(outputs.shape[1])
        ]
    return torch.stack([torch.zeros_like(point) if c is None else c for c in columns], dim=1).detach()


def _jacobian(outputs: Tensor, own: Tensor, active: Tensor) -> Tensor:
    """(B, K, D) gradients of the ``active`` outputs of each row, one backward pass an output."""
    rows = [torch.autograd.grad(outputs[:, k].sum(), own, retain_graph=True)[0] for k in active.tolist()]
    return torch.stack(rows, dim=1).detach()


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
