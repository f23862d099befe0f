"""First and second derivatives of the outputs and the likelihood in s, and the Gauss-Newton matrix of a data set."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from .._process.lock import LOCK
from ..data.batch import Batch
from ..tasks import Task
from .log_likelihood import LogLikelihood


@torch.no_grad()
def gauss_newton(likelihood: LogLikelihood, s: Tensor) -> Tensor:
    """(D, D) generalized Gauss-Newton matrix of the negative log likelihood at s, float64.

    H = sum_n J_n' L_n J_n with J_n the Jacobian of the outputs in s and L_n the Hessian of the negative log likelihood
    in the outputs (Martens, JMLR 2020); where L_n is not positive semidefinite, its positive part.

    Raises:
        ValueError: a likelihood without curvature, for which H says nothing of the data.
    """
    total = torch.zeros(len(s), len(s), dtype=torch.float64)
    is_curved = False
    for jacobian, hessian in _curvatures(likelihood, s):
        is_curved = True
        # J' L J by a square root of L: products of (rows * classes, D) matrices alone.
        values, vectors = torch.linalg.eigh(hessian)
        root = (vectors * values.clamp_min(0).sqrt().unsqueeze(1)).transpose(1, 2)  # (B, K, K), root' root = L
        half = torch.einsum("bij,bjd->bid", root, jacobian).flatten(0, 1)
        total += (half.T @ half).cpu()
    if not is_curved:
        raise ValueError(
            f"The log likelihood of {type(likelihood.task).__name__} has no curvature in the outputs of these rows (it "
            "is piecewise linear, or saturated), so a Laplace approximation would give back the prior: use fit() with "
            "guide='normal', or mcmc()."
        )
    return total


def _curvatures(likelihood: LogLikelihood, s: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each batch with curvature: Jacobians (B, K, D) and Hessians (B, K, K) of -log p(y | outputs), float64."""
    dtype = likelihood.llm.adapter.loc.dtype
    for batch, own, outputs in likelihood.rows_with_own_s(s.to(dtype)):
        hessian = output_hessian(likelihood.task, batch, outputs)
        active = hessian.abs().amax(dim=(0, 1)).nonzero()[:, 0]  # labels that no row has do not matter
        if not len(active):
            continue
        jacobian = jacobian_of(outputs, own, active)
        yield jacobian.double(), hessian[:, active][:, :, active].double()


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


def jacobian_of(outputs: Tensor, own: Tensor, active: Tensor) -> Tensor:
    """(B, K, D) gradients of the ``active`` outputs of each row, one backward pass an output."""
    with torch.enable_grad():
        rows = [torch.autograd.grad(outputs[:, k].sum(), own, retain_graph=True)[0] for k in active.tolist()]
    return torch.stack(rows, dim=1).detach()
