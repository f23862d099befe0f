"""Derivatives of the outputs and the likelihood with respect to s, and the Gauss-Newton matrix of a data set."""

from typing import cast

import torch
from torch import Tensor

from ..data.batch import Batch
from ..tasks import Task, at_least_float32
from .log_likelihood import LogLikelihood


def gauss_newton(likelihood: LogLikelihood, s: Tensor) -> Tensor:
    """Compute the generalized Gauss-Newton matrix of the negative log likelihood at s.

    H = sum_n J_n' L_n J_n. Here J_n is the Jacobian of the outputs of row n with respect to s, and L_n is the Hessian
    of the negative log likelihood with respect to these outputs. Negative eigenvalues of L_n are set to 0.

    Args:
        likelihood: Log likelihood of N rows.
        s: Latents, (D,).

    Returns:
        Matrix H, (D, D), in float64 on the CPU.

    Raises:
        ValueError: If the likelihood has no curvature, so that H does not depend on the data.

    References:
        Martens, New insights and perspectives on the natural gradient method, JMLR 2020, section 8.

    Example:
        >>> H = gauss_newton(posterior.log_likelihood(train_data), posterior.mean())
    """
    return value_and_gauss_newton(likelihood, s)[1]


@torch.no_grad()
def value_and_gauss_newton(likelihood: LogLikelihood, s: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the log likelihood at s, nats, and its :func:`gauss_newton` matrix, from one forward pass per row.

    Example:
        >>> log_likelihood, H = value_and_gauss_newton(posterior.log_likelihood(train_data), posterior.mean())
    """
    likelihood.task.check_use("gauss_newton()")
    value = torch.zeros((), dtype=torch.float64)
    total = torch.zeros(len(s), len(s), dtype=torch.float64)
    point = s.to(likelihood.llm.adapter.loc.dtype)

    def add(batch: Batch) -> bool:
        """Add the value and the matrix of a batch, and tell whether its rows have curvature."""
        own, outputs = likelihood.with_own_s(batch, point)
        log_prob = likelihood.task.distribution(outputs.detach(), batch).log_prob(cast(Tensor, batch.target))
        value.add_(at_least_float32(log_prob).sum().cpu())
        hessian = output_hessian(likelihood.task, batch, outputs)
        active = hessian.abs().amax(dim=(0, 1)).nonzero()[:, 0]  # outputs that no row uses add nothing
        if not len(active):
            return False
        jacobian = jacobian_of(outputs, own, active).double()
        # With a square root of L, J' L J needs only products of (rows * classes, D) matrices.
        values, vectors = torch.linalg.eigh(hessian[:, active][:, :, active].double())
        root = (vectors * values.clamp_min(0).sqrt().unsqueeze(1)).transpose(1, 2)  # (B, K, K), root' root = L
        half = torch.einsum("bij,bjd->bid", root, jacobian).flatten(0, 1)
        total.add_((half.T @ half).cpu())
        return True

    if not any(likelihood.passes.map(add)):
        raise ValueError(
            f"The log likelihood of {type(likelihood.task).__name__} has no curvature in the outputs of these rows, "
            "because it is piecewise linear or saturated. A Laplace approximation would return the prior. Use fit() "
            "with guide='normal', or mcmc()."
        )
    return value, total


def output_hessian(task: Task, batch: Batch, outputs: Tensor) -> Tensor:
    """Compute the Hessian of -log p(y | outputs) with respect to the outputs of each row.

    Args:
        task: Task that defines the likelihood.
        batch: Batch of B rows with answers.
        outputs: Outputs of the LLM, (B, K). The likelihood of a row must depend only on the outputs of that row.

    Returns:
        Hessian of each row, (B, K, K).
    """
    with torch.enable_grad():
        point = outputs.detach().requires_grad_(True)
        nll = -task.distribution(point, batch).log_prob(cast(Tensor, batch.target)).sum()
        (slope,) = torch.autograd.grad(nll, point, create_graph=True)
        if not slope.requires_grad:
            return torch.zeros(*outputs.shape, outputs.shape[1], device=outputs.device)
        columns = [
            torch.autograd.grad(slope[:, k].sum(), point, retain_graph=True, allow_unused=True)[0]
            for k in range(outputs.shape[1])
        ]
    return torch.stack([torch.zeros_like(point) if c is None else c for c in columns], dim=1).detach()


def jacobian_of(outputs: Tensor, own: Tensor, active: Tensor) -> Tensor:
    """Compute the gradients of some outputs of each row with respect to s, with one backward pass per output.

    Args:
        outputs: Outputs of the LLM, (B, K).
        own: Copy of s that each row used, (B, D).
        active: Indices of the outputs to differentiate, at most K.

    Returns:
        Gradient of each such output, (B, len(active), D).
    """
    with torch.enable_grad():
        rows = [torch.autograd.grad(outputs[:, k].sum(), own, retain_graph=True)[0] for k in active.tolist()]
    return torch.stack(rows, dim=1).detach()
