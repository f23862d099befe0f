"""Normal distributions with covariance whose KL from a factorized normal prior is in closed form.

torch registers no such KL. Registering one for torch's own classes would change them for everybody, so these are
subclasses.
"""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl_divergence, register_kl


class FullNormal(dist.MultivariateNormal):
    """Multivariate normal given by ``scale_tril``."""


class LowRankNormal(dist.LowRankMultivariateNormal):
    """Normal with covariance W W' + diag(d).

    torch's constructor waits for the device, to learn whether a Cholesky factor exists. This one does not: where it
    does not exist, because a number is not finite, its entries are NaN, and so is the density.

    Args:
        loc: Mean (..., D).
        cov_factor: W (..., D, K).
        cov_diag: d (..., D).
        validate_args: Whether to check arguments and values.
    """

    def __init__(self, loc: Tensor, cov_factor: Tensor, cov_diag: Tensor, validate_args: bool | None = None) -> None:
        batch_shape = torch.broadcast_shapes(loc.shape[:-1], cov_factor.shape[:-2], cov_diag.shape[:-1])
        self.loc = loc.expand(batch_shape + loc.shape[-1:])
        self._unbroadcasted_cov_factor = cov_factor
        self._unbroadcasted_cov_diag = cov_diag
        self.cov_factor = cov_factor.expand(batch_shape + cov_factor.shape[-2:])
        self.cov_diag = cov_diag.expand(batch_shape + cov_diag.shape[-1:])
        capacitance = (cov_factor.mT / cov_diag.unsqueeze(-2)) @ cov_factor
        capacitance.diagonal(dim1=-2, dim2=-1).add_(1)
        tril, info = torch.linalg.cholesky_ex(capacitance)
        self._capacitance_tril = tril.masked_fill((info != 0)[..., None, None], torch.nan)
        Distribution.__init__(self, batch_shape, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LowRankNormal":
        """Give the distribution more independent copies."""
        return super().expand(batch_shape, _instance=type(self).__new__(type(self)) if _instance is None else _instance)


@register_kl(FullNormal, Independent)
def _kl_full(q: FullNormal, p: Independent) -> Tensor:
    tril = q._unbroadcasted_scale_tril
    return _kl_from_factorized(q.loc, tril.square().sum(-1), 2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1), p)


@register_kl(LowRankNormal, Independent)
def _kl_low_rank(q: LowRankNormal, p: Independent) -> Tensor:
    W, d = q._unbroadcasted_cov_factor, q._unbroadcasted_cov_diag
    # det(W W' + diag d) = det(I + W' diag(1/d) W) det(diag d). torch caches the Cholesky factor of the first matrix.
    log_det = d.log().sum(-1) + 2 * q._capacitance_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return _kl_from_factorized(q.loc, W.square().sum(-1) + d, log_det, p)


def _kl_from_factorized(loc: Tensor, variance: Tensor, log_det: Tensor, p: Independent) -> Tensor:
    """KL(q || p) for a normal q given by its mean, marginal variances and log determinant; p independent normals."""
    base = p.base_dist
    if not isinstance(base, Normal) or p.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    ratio = (variance + (loc - base.loc).square()) / base.variance
    return 0.5 * ((ratio - 1 + base.variance.log()).sum(-1) - log_det)


def closed_kl(of_q: dict[str, Any], of_p: dict[str, Any]) -> Tensor | None:
    """Return KL(q || p) of a site with its scale and mask; None if no closed form is known.

    Args:
        of_q: Site in the trace of the guide.
        of_p: The same site in the trace of the model.
    """
    try:
        divergence = kl_divergence(of_q["fn"], of_p["fn"])
    except NotImplementedError:
        return None
    return scale_and_mask(divergence, scale=of_q["scale"], mask=of_q["mask"])


def strict_lower_indices(ranks: list[int] | None, dim: int) -> Tensor:
    """Return rows and columns (2, M) of the free entries below the diagonal.

    Args:
        ranks: Rank of each layer, for entries within layers alone; None for all entries.
        dim: Number D of latents.
    """
    if ranks is None:
        return torch.tril_indices(dim, dim, offset=-1)
    start, parts = 0, []
    for rank in ranks:
        parts.append(torch.tril_indices(rank, rank, offset=-1) + start)
        start += rank
    return torch.cat(parts, dim=1)
