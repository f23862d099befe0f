"""Normal posteriors with covariance: within each layer, between all latents, or of low rank."""

from typing import Any, Literal, cast

import pyro
import torch
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from .._errors import check_choice
from .._values import plain
from ..model.bayesian_lora import BayesianLoRA
from .base import Guide
from .closed_form_kl import FullNormal, LowRankNormal, strict_lower_indices

#: Which latents a :class:`CovarianceGuide` correlates: those within each layer, or all.
Structure = Literal["layer", "full"]


class CovarianceGuide(Guide):
    """q(s) = Normal(loc, L L'), L = diag(scale) (I + lower).

    Args:
        loc: Initial means (D,).
        scale: Initial standard deviations (D,).
        ranks: Rank of each layer, for one full covariance per layer (r x r blocks, the paper's ablation); None for a
            full covariance of all D latents, which has D (D + 1) / 2 entries.

    Example:
        >>> import torch
        >>> guide = scalabl_pyro.guides.CovarianceGuide(torch.zeros(4), torch.ones(4), ranks=[2, 2])
        >>> guide.covariance().shape
        torch.Size([4, 4])
    """

    family = "covariance"

    def __init__(self, loc: Tensor, scale: Tensor, *, ranks: list[int] | None = None) -> None:
        super().__init__()
        self.structure: Structure = "full" if ranks is None else "layer"
        self.loc = nn.Parameter(loc.detach().clone())
        self.scale: Tensor | PyroParam = PyroParam(scale.detach().clone(), constraint=constraints.positive)
        indices = strict_lower_indices(ranks, len(loc))
        self.lower = nn.Parameter(torch.zeros(indices.shape[1], dtype=loc.dtype, device=loc.device))
        self.register_buffer("indices", indices.to(loc.device), persistent=False)

    def scale_tril(self) -> Tensor:
        """Return the Cholesky factor (D, D) of the covariance."""
        scale = cast(Tensor, self.scale)
        unit = torch.eye(len(self.loc), dtype=self.loc.dtype, device=self.loc.device)
        return scale.unsqueeze(-1) * unit.index_put((self.indices[0], self.indices[1]), self.lower)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample s, (..., D)."""
        return pyro.sample("s", FullNormal(self.loc, scale_tril=self.scale_tril()))

    def mean(self) -> dict[str, Tensor]:
        """Return ``loc``."""
        return {"s": self.loc}

    def covariance(self) -> Tensor:
        """Return the covariance (D, D)."""
        tril = self.scale_tril()
        return tril @ tril.T

    def options(self) -> dict[str, Any]:
        """Return which latents are correlated."""
        return {"structure": self.structure}

    @classmethod
    def from_options(cls, options: dict[str, Any], blora: BayesianLoRA) -> "CovarianceGuide":
        """Rebuild the family; the caller fills its tensors."""
        check_choice("structure", options.get("structure"), ("layer", "full"))
        loc = blora.adapter.loc
        ranks = blora.subspace.ranks if options["structure"] == "layer" else None
        return cls(loc, torch.ones_like(loc), ranks=ranks)


class LowRankGuide(Guide):
    """q(s) = Normal(loc, diag(scale) (W W' + I) diag(scale)): a few directions in which latents move together.

    Args:
        loc: Initial means (D,).
        scale: Initial standard deviations (D,) of the diagonal part.
        rank: Number of columns of W, from 1 to D.
        seed: Seed of the small random initial W. At W = 0 its gradient would be zero.

    Raises:
        ValueError: ``rank`` is not between 1 and D.

    Example:
        >>> import torch
        >>> guide = scalabl_pyro.guides.LowRankGuide(torch.zeros(4), torch.ones(4), rank=2)
        >>> guide.factor.shape
        torch.Size([4, 2])
    """

    family = "lowrank"

    def __init__(self, loc: Tensor, scale: Tensor, *, rank: int = 10, seed: int = 0) -> None:
        super().__init__()
        rank = plain(rank)
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= len(loc):
            raise ValueError(f"rank={rank!r} must be a whole number from 1 to {len(loc)}, the number of latents.")
        self.rank = rank
        self.loc = nn.Parameter(loc.detach().clone())
        self.scale: Tensor | PyroParam = PyroParam(scale.detach().clone(), constraint=constraints.positive)
        noise = torch.randn(len(loc), rank, generator=torch.Generator().manual_seed(seed), dtype=loc.dtype)
        self.factor = nn.Parameter(0.1 * noise.to(loc.device) / rank**0.5)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample s, (..., D)."""
        scale = cast(Tensor, self.scale)
        return pyro.sample("s", LowRankNormal(self.loc, scale.unsqueeze(-1) * self.factor, scale.square()))

    def mean(self) -> dict[str, Tensor]:
        """Return ``loc``."""
        return {"s": self.loc}

    def covariance(self) -> Tensor:
        """Return the covariance (D, D)."""
        scale = cast(Tensor, self.scale)
        scaled_factor = scale.unsqueeze(-1) * self.factor
        return scaled_factor @ scaled_factor.T + torch.diag(scale.square())

    def options(self) -> dict[str, Any]:
        """Return the rank."""
        return {"rank": self.rank}

    @classmethod
    def from_options(cls, options: dict[str, Any], blora: BayesianLoRA) -> "LowRankGuide":
        """Rebuild the family; the caller fills its tensors."""
        loc = blora.adapter.loc
        return cls(loc, torch.ones_like(loc), **options)
