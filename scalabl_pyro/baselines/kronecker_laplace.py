"""Laplace-LoRA: a normal posterior of A and B with Kronecker-factored curvature (Yang et al., ICLR 2024).

It is written here because laplace-torch 0.3 does not support these layers. Its Kronecker backend (curvlinops) finds
``nn.Linear`` modules by hooks, but a layer here multiplies by factors that are bound for one forward pass. It also
stores both sides of each Kronecker factor in full. For B of the LM head that would be a vocabulary x vocabulary matrix.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from .._arguments import check_role, known_arguments
from .._errors import check_count, check_scale
from .._process.random_state import scoped_seed
from ..data.batch import evaluation_batches
from ..data.encoding import encode_data
from ..inference.evidence import scale_of_largest_evidence
from ..lora.factors import Factors
from ..posterior.posterior import Posterior
from ..prediction.collect import predict_from_outputs
from ..prediction.result import NumericPrediction, Prediction
from .factor_posterior import FactorPosterior, WeightNoise, as_function, check_room_for_factors, plain_factors
from .kfac import Eigen, kronecker_factors, output_directions, record

#: Number of prior scales that ``prior_scale="evidence"`` tries. Each one sums over all weights, which are many here.
NUM_SCALES = 601


@known_arguments
def laplace_lora(
    posterior: Posterior,
    train_data: Any,
    *,
    prior_scale: float | Literal["evidence"] = "evidence",
    rank: int = 10,
    exact_up_to: int = 256,
    linearized: bool = True,
    batch_size: int = 4,
    seed: int = 0,
) -> FactorPosterior:
    """Fit a normal posterior around a trained adapter, from the curvature of the training loss.

    For W each A and each B, q(W) = Normal(W_trained, (G (x) X + I / prior_scale^2)^-1). G and X are the Kronecker
    factors from :mod:`scalabl_pyro.baselines.kfac`. The cost is one pass over the data, with one backward pass per
    class.

    Args:
        posterior: Posterior of a trained adapter, such as ``baselines.map_lora(...).posterior``. Only its mean is used.
        train_data: Training rows.
        prior_scale: Standard deviation of the prior of each entry. ``"evidence"`` chooses the scale in [1e-3, 1e3] with
            the largest Laplace evidence.
        rank: Number of eigenvectors to keep of a Kronecker factor with more than ``exact_up_to`` dimensions.
        exact_up_to: Largest number of dimensions of a Kronecker factor that is stored in full.
        linearized: Whether predictions use outputs that are linear in A and B, as the approximation assumes. A draw is
            then one linear function. With False, the LLM runs with draws of A and B.
        batch_size: Rows per forward pass.
        seed: Seed of the randomized eigenvectors.

    Returns:
        A posterior of the factors. Its provenance holds ``prior_scale``.

    Raises:
        ValueError: The scale is not positive, or rows have no answers.

    References:
        Yang et al., Bayesian Low-Rank Adaptation for Large Language Models, ICLR 2024.

    Example:
        >>> posterior = scalabl_pyro.baselines.laplace_lora(point, train_data)
        >>> posterior.predict(test_data, num_draws=10).metrics()
    """
    check_role("posterior", posterior, "posterior", call="laplace_lora(posterior, train_data)")
    check_count(rank=rank, batch_size=batch_size)
    if isinstance(prior_scale, str):
        if prior_scale != "evidence":
            raise ValueError(f"prior_scale={prior_scale!r}: give a number, or 'evidence' to choose it.")
    else:
        check_scale(prior_scale=prior_scale)
    examples = encode_data(train_data, posterior.task.encode, need_target=True)
    factors = plain_factors(posterior)
    with scoped_seed(seed), torch.enable_grad():
        eigen = kronecker_factors(
            as_function(posterior, factors),
            posterior.task,
            examples,
            factors,
            rank=rank,
            exact_up_to=exact_up_to,
            batch_size=batch_size,
        )
    scale = best_prior_scale(eigen, factors) if isinstance(prior_scale, str) else float(prior_scale)
    noise = KroneckerNoise(tuple(eigen), scale, linearized)
    provenance = {"method": "Laplace-LoRA", "prior_scale": scale, "num_data": len(examples)}
    return FactorPosterior(posterior, noise, provenance)


@dataclass(frozen=True)
class KroneckerNoise(WeightNoise):
    """Normal noise on A and B with Kronecker-factored precision.

    Attributes:
        eigen: Eigenvectors and eigenvalues of the output side and the input side, for A and B of each layer in turn.
        prior_scale: Standard deviation of the prior.
        linearized: Whether predictions use outputs that are linear in the factors.

    Example:
        >>> noise = scalabl_pyro.baselines.laplace_lora(point, train_data, prior_scale=0.1).noise
        >>> assert isinstance(noise, scalabl_pyro.baselines.KroneckerNoise)
    """

    family: ClassVar[str] = "kronecker"

    eigen: tuple[tuple[Eigen, Eigen], ...]
    prior_scale: float
    linearized: bool = True

    def __repr__(self) -> str:
        layers = len(self.eigen) // 2
        return f"KroneckerNoise(layers={layers}, prior_scale={self.prior_scale:.4g}, linearized={self.linearized})"

    def deviations(self, factors: Factors, generator: Generator) -> Iterator[list[Tensor]]:
        """Yield draws of the noise of each factor without end."""
        like = [factor for pair in factors for factor in pair]
        while True:
            yield [
                correlate(torch.randn(f.shape, generator=generator, dtype=f.dtype), outer, inner, self.prior_scale)
                for f, (outer, inner) in zip(like, self.eigen, strict=True)
            ]

    def draws(self, factors: Factors, generator: Generator) -> Iterator[Factors]:
        """Yield factors with noise on A and B."""
        for noise in self.deviations(factors, generator):
            yield tuple((A + noise[2 * i].to(A), B + noise[2 * i + 1].to(B)) for i, (A, B) in enumerate(factors))

    def predict(
        self, center: Posterior, data: Any, *, num_draws: int, seed: int, batch_size: int, progress: bool
    ) -> Prediction | NumericPrediction:
        """Predict rows, with :func:`predict_linear` or with draws of the factors."""
        options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "progress": progress}
        if not self.linearized:
            return super().predict(center, data, num_draws=num_draws, **options)
        factors = plain_factors(center)
        check_room_for_factors(factors, num_draws)
        noise = self.deviations(factors, torch.Generator().manual_seed(seed))
        deltas = [next(noise) for _ in range(num_draws)]
        return predict_linear(center, factors, deltas, data, **options)

    def tensors(self) -> dict[str, Tensor]:
        """Return eigenvectors and eigenvalues by factor and side."""
        named: dict[str, Tensor] = {}
        for i, sides in enumerate(self.eigen):
            for side, (vectors, values) in zip(("out", "in"), sides, strict=True):
                named |= {f"{i}.{side}.vectors": vectors, f"{i}.{side}.values": values}
        return named

    def options(self) -> dict[str, Any]:
        """Return the scale of the prior, and how predictions are made."""
        return {"prior_scale": self.prior_scale, "linearized": self.linearized}

    @classmethod
    def from_saved(
        cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor], factors: Factors
    ) -> "KroneckerNoise":
        """Restore the noise."""
        eigen = []
        for i, factor in enumerate(f for pair in factors for f in pair):
            sides = []
            for side, dim in zip(("out", "in"), factor.shape, strict=True):
                vectors, values = tensors[f"{i}.{side}.vectors"], tensors[f"{i}.{side}.values"]
                if vectors.shape != (dim, len(values)) or not (values >= 0).all():
                    raise ValueError(f"The saved curvature of factor {i} does not fit it, or has a negative value.")
                sides.append((vectors, values))
            eigen.append((sides[0], sides[1]))
        return cls(tuple(eigen), **options)


def correlate(noise: Tensor, outer: Eigen, inner: Eigen, prior_scale: float) -> Tensor:
    """Turn standard normal ``noise`` (m, n) into a draw of Normal(0, (G (x) X + I / prior_scale^2)^-1).

    In a direction with eigenvalues g and x, the standard deviation is prior_scale / sqrt(1 + prior_scale^2 g x). In all
    other directions it is prior_scale.
    """
    (U, g), (V, x) = outer, inner
    shrunk = (1 + prior_scale**2 * torch.outer(g, x)).rsqrt() - 1
    return prior_scale * (noise + U @ (shrunk * (U.T @ noise @ V)) @ V.T)


def best_prior_scale(eigen: Sequence[tuple[Eigen, Eigen]], factors: Factors) -> float:
    """Return the scale in [1e-3, 1e3] of the largest Laplace evidence at these factors.

    The eigenvalues of a Kronecker product are the products g x of the eigenvalues of its two sides.
    """
    eigenvalues = torch.cat([torch.outer(g, x).flatten() for (_, g), (_, x) in eigen])
    squares = sum(float(factor.double().square().sum()) for pair in factors for factor in pair)
    return scale_of_largest_evidence(eigenvalues, squares, num_scales=NUM_SCALES)


def predict_linear(
    center: Posterior,
    factors: Factors,
    deltas: Sequence[Sequence[Tensor]],
    data: Any,
    *,
    seed: int = 0,
    batch_size: int = 4,
    progress: bool = False,
) -> Prediction | NumericPrediction:
    """Predict with outputs f(W) + J (W_s - W), which is one linear function per draw.

    One forward pass per batch and one backward pass per class serve all draws.

    Args:
        center: Posterior of the trained adapter.
        factors: Plain factors W of the adapter.
        deltas: Differences W_s - W of each draw, by factor.
        data: Rows for the task.
        seed: Seed of the simulated answers of a likelihood over numbers.
        batch_size: Rows per forward pass.
        progress: Whether to show a progress bar.
    """
    start = time.perf_counter()
    task, device = center.task, center.adapter.device
    function = as_function(center, factors)
    examples = encode_data(data, task.encode, need_target=False, split="test")
    task.check_llm(center.adapter, examples)
    stacked = [torch.stack([delta[i] for delta in deltas]) for i in range(2 * len(factors))]
    parts = []
    batches = list(evaluation_batches(examples, batch_size, task.pad_token_id))
    for cpu_batch in tqdm(batches, disable=not progress, desc="predict", unit="batch"):
        batch = cpu_batch.to(device)
        outputs, kept = record(function, task, batch, factors)
        draws = outputs.detach().repeat(len(deltas), 1, 1)
        for k in output_directions(task, batch, outputs):
            with torch.enable_grad():
                gradients = kept.gradients(outputs[:, k].sum())
            for i, gradient in enumerate(gradients):
                jacobian = torch.einsum("btm,btn->bmn", gradient.float(), kept.inputs[i].float())
                draws[:, :, k] += torch.einsum("smn,bmn->sb", stacked[i].to(jacobian), jacobian).to(draws)
        parts.append((batch, draws))
    with torch.no_grad():
        prediction = predict_from_outputs(task, examples, parts, seed=seed)
    return replace(prediction, seconds=time.perf_counter() - start)
