"""A model that is linear in its latents, so that posterior and evidence are known exactly."""

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

import scalabl_pyro as sp
from scalabl_pyro.data import Example

NOISE, PRIOR_SCALE = 0.5, 1.25


class LinearLLM(nn.Module):
    """``input_ids`` are features (rows, D); the output is their weighted sum."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, dim, bias=False, dtype=torch.float64)
        self.out = nn.Linear(dim, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.hidden.weight.zero_()
            self.out.weight.copy_(torch.linspace(0.5, 1.5, dim)[None])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.out(self.hidden(input_ids.double()))


class SplitLLM(nn.Module):
    """As :class:`LinearLLM`, but the first half of the features goes through one layer and the rest through another."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.halves = nn.ModuleDict({name: LinearLLM(dim // 2) for name in ("first", "second")})
        self.weights = torch.cat([half.out.weight.detach()[0] for half in self.halves.values()])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        parts = input_ids.double().chunk(2, dim=-1)
        return sum(half(part) for half, part in zip(self.halves.values(), parts, strict=True))


class LinearGaussian(sp.Task):
    """y ~ Normal(output, NOISE)."""

    def encode(self, row):
        return Example({"input_ids": row["x"]}, row["y"])

    def outputs(self, llm, batch, s):
        return llm(**batch.inputs, s=s)

    def likelihood(self, outputs, batch):
        return dist.Normal(outputs[..., 0], torch.tensor(NOISE, dtype=outputs.dtype))


class LinearToy:
    """N rows of y = F s + noise with s ~ Normal(0, PRIOR_SCALE).

    Args:
        dim: number of latents.
        num_data: N.
        correlation: between the latents of a layer under the posterior; 0 makes it diagonal.
        layers: 1, or 2 with half of the latents each, which makes the posterior block diagonal.
    """

    def __init__(
        self,
        dim: int = 5,
        *,
        num_data: int = 64,
        correlation: float = 0.0,
        layers: int = 1,
        prior=PRIOR_SCALE,
        seed: int = 0,
    ):
        generator = torch.Generator().manual_seed(seed)
        rank = dim // layers
        llm = LinearLLM(dim) if layers == 1 else SplitLLM(dim)
        self.blora = sp.bayesian_lora(llm, r=rank, lora_alpha=rank, target_modules=["hidden"], prior=prior)
        with torch.no_grad():
            for A, B in self.blora.adapter.factors():
                A.copy_(torch.eye(rank))
                B.copy_(torch.eye(rank))
        self.blora.point_estimates.requires_grad_(False)
        basis = torch.linalg.qr(torch.randn(num_data, dim, generator=generator, dtype=torch.float64)).Q * 4
        weights = llm.out.weight.detach()[0] if layers == 1 else llm.weights
        # (F'F)^-1 proportional to a matrix of equal correlations: F = Q R with R'R its inverse.
        equal = torch.full((rank, rank), correlation, dtype=torch.float64).fill_diagonal_(1.0)
        mix = torch.linalg.cholesky(torch.linalg.inv(torch.block_diag(*[equal] * layers))).T
        x = (basis @ mix / weights).float().double()  # as the batches will hold it
        self.features = x * weights
        true_s = torch.randn(dim, generator=generator, dtype=torch.float64)
        noise = torch.randn(num_data, generator=generator, dtype=torch.float64)
        self.y = (self.features @ true_s + NOISE * noise).float().double()
        self.rows = [{"x": a.tolist(), "y": b.item()} for a, b in zip(x, self.y, strict=True)]
        self.task = LinearGaussian()
        self.num_data = num_data

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior mean, covariance, and log evidence."""
        F, y = self.features, self.y
        precision = F.T @ F / NOISE**2 + torch.eye(F.shape[1], dtype=torch.float64) / PRIOR_SCALE**2
        covariance = torch.linalg.inv(precision)
        mean = covariance @ F.T @ y / NOISE**2
        marginal = F @ F.T * PRIOR_SCALE**2 + NOISE**2 * torch.eye(len(y), dtype=torch.float64)
        return mean, covariance, dist.MultivariateNormal(torch.zeros(len(y), dtype=torch.float64), marginal).log_prob(y)

    def elbo(self, mean: Tensor, covariance: Tensor) -> float:
        """The ELBO of Normal(mean, covariance), in closed form."""
        F, y = self.features, self.y
        residual = (y - F @ mean).square().sum() + torch.trace(F @ covariance @ F.T)
        fit = -0.5 * residual / NOISE**2 - len(y) * math.log(NOISE * math.sqrt(2 * math.pi))
        dim = len(mean)
        kl = 0.5 * (
            (torch.trace(covariance) + mean.square().sum()) / PRIOR_SCALE**2
            - dim
            + 2 * dim * math.log(PRIOR_SCALE)
            - torch.linalg.slogdet(covariance)[1]
        )
        return float(fit - kl)
