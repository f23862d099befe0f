"""First and second derivatives of the outputs and the likelihood in s: Gauss-Newton matrices, linearised prediction."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from ._lock import LOCK
from .data import Batch
from .likelihoods import Task
from .logdensity import LogLikelihood
from .predictive import NumericPrediction, Prediction, predict_from_outputs


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
    likelihood: LogLikelihood, mean: Tensor, covariance: Tensor, *, num_draws: int, seed: int
) -> Prediction | NumericPrediction:
    """Predict with outputs linear in s: f(x, s) = f(x, mean) + J (s - mean), so that no draw needs a pass of its own.

    Args:
        likelihood: of the rows.
        mean: (D,) of a normal posterior.
        covariance: (D, D).
        num_draws: draws of the K outputs of each row, which are normal.
        seed: of those draws.

    References:
        Immer et al., Improving predictions of Bayesian neural nets via local linearization, AISTATS 2021.
    """
    covariance = covariance.double()
    noise = torch.Generator().manual_seed(seed)
    parts: list[tuple[Batch, Tensor]] = []
    for batch, own, outputs in likelihood.rows_with_own_s(mean):
        active = torch.arange(outputs.shape[1], device=outputs.device)
        jacobian = _jacobian(outputs, own, active).cpu().double()
        spread = torch.einsum("bkd,de,ble->bkl", jacobian, covariance, jacobian)
        values, vectors = torch.linalg.eigh(spread)
        root = vectors * values.clamp_min(0).sqrt().unsqueeze(1)  # root root' = spread
        draws = torch.randn(num_draws, *outputs.shape, generator=noise, dtype=torch.float64)
        parts.append(
            (batch, outputs.detach().cpu() + torch.einsum("bkl,sbl->sbk", root, draws).to(outputs.dtype).cpu())
        )
    return predict_from_outputs(likelihood.task, likelihood.examples, parts, seed=seed)


def _curvatures(likelihood: LogLikelihood, s: Tensor) -> Iterator[tuple[Batch, Tensor, Tensor]]:
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
        with LOCK:
            d = task.likelihood(point, batch)
        nll = -d.log_prob(cast(Tensor, batch.target)).sum()
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
    with torch.enable_grad():
        rows = [torch.autograd.grad(outputs[:, k].sum(), own, retain_graph=True)[0] for k in active.tolist()]
    return torch.stack(rows, dim=1).detach()
