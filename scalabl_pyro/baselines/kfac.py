"""Kronecker factors of the Gauss-Newton matrix of LoRA factors, from the inputs and gradients of the layers.

A layer computes u = A x and y = W0 x + B h with h = gamma u. The curvature of A uses the inputs x and the gradients
with respect to u. The curvature of B uses the inputs h and the gradients with respect to y. It is the Kronecker product
of the mean of inputs inputs' and the sum of gradients gradients', over rows and tokens (Martens and Grosse, 2015; over
tokens the *expand* form of Eschenhagen et al., 2023).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical

from ..data.batch import Batch, Example, evaluation_batches
from ..lora.adapter import Adapter
from ..lora.factors import Factors
from ..lora.layers import SubspaceVariant
from ..lora.train_mode import sole_use
from ..model.derivatives import output_hessian
from ..tasks import Task
from .predictor import Function

#: Number of directions to keep between batches beyond the requested rank.
OVERSAMPLING = 10

Eigen = tuple[Tensor, Tensor]
"""Orthonormal eigenvectors (n, k) and their eigenvalues (k,). All other directions have eigenvalue 0."""


@dataclass
class Pass:
    """Recorded inputs and products of the 2 L factors in one forward pass. Layer l has A at 2 l and B at 2 l + 1.

    Attributes:
        inputs: Input (rows, tokens, n) of each factor.
        targets: Tensor (rows, ..., m) that the product of the factor ends up in, with a graph.
    """

    inputs: dict[int, Tensor] = field(default_factory=dict)
    targets: dict[int, Tensor] = field(default_factory=dict)

    def gradients(self, output: Tensor) -> list[Tensor]:
        """Return the gradient (rows, tokens, m) of the scalar ``output`` with respect to the target of each factor."""
        targets = [self.targets[i] for i in range(len(self.targets))]
        found = torch.autograd.grad(output, targets, retain_graph=True, allow_unused=True)
        return [_by_row(torch.zeros_like(t) if g is None else g) for g, t in zip(found, targets, strict=True)]


class RecordingVariant(SubspaceVariant):
    """A layer that computes with plain factors and records their inputs and products."""

    def __init__(self, adapter: Adapter, index: int, factors: tuple[Tensor, Tensor], kept: Pass) -> None:
        super().__init__(adapter, index)
        self.pair = factors
        self.kept = kept

    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Return W0 x + gamma B A x."""
        A, B = (factor.to(x.device, x.dtype) for factor in self.pair)
        u = F.linear(x, A)
        h = module.scaling[active_adapter] * u
        y = result + F.linear(h, B)
        for number, seen, target in ((2 * self.index, x, u), (2 * self.index + 1, h, y)):
            if number in self.kept.inputs:
                raise ValueError(
                    f"Layer {self.adapter.subspace.names[self.index]!r} runs more than once per forward pass: leave it "
                    "out of target_modules."
                )
            self.kept.inputs[number] = _by_row(seen.detach())
            self.kept.targets[number] = target
        return y


def record(function: Function, task: Task, batch: Batch, factors: Factors) -> tuple[Tensor, Pass]:
    """Return the outputs (B, K) of a batch with plain ``factors``, and the recorded pass."""
    llm, s = function
    with _recording(llm.adapter, factors) as kept:
        outputs = task.outputs(llm, batch, s.to(llm.adapter.device)).reshape(len(batch), -1)
    if len(kept.inputs) != 2 * len(factors):
        raise ValueError("Some adapted layers did not run in the forward pass: leave them out of target_modules.")
    for number, x in kept.inputs.items():
        if len(x) > len(batch) and len(x) % len(batch) == 0:
            raise ValueError(
                f"Kronecker factors need one sequence per row, but {type(task).__name__} reads {len(x)} sequences for "
                f"{len(batch)} rows, such as windows of a text or names of classes: use a task that reads one."
            )
        if len(x) != len(batch):
            raise ValueError(
                f"Layer {llm.adapter.subspace.names[number // 2]!r} sees {len(x)} rows where the batch has "
                f"{len(batch)}: it mixes or flattens the rows. Leave it out of target_modules."
            )
    return outputs, kept


@contextmanager
def _recording(adapter: Adapter, factors: Factors) -> Iterator[Pass]:
    kept, name = Pass(), adapter.adapter_name
    before = [layer.lora_variant[name] for layer in adapter.layers]
    with sole_use(adapter.module), torch.enable_grad():  # forward passes of other threads would be recorded too
        try:
            for index, layer in enumerate(adapter.layers):
                A, B = factors[index]
                own = (A.detach().clone().requires_grad_(True), B)  # so that the graph starts at the first layer
                layer.lora_variant[name] = RecordingVariant(adapter, index, own, kept)
            yield kept
        finally:
            for layer, variant in zip(adapter.layers, before, strict=True):
                layer.lora_variant[name] = variant


class SecondMoment:
    """The sum of v v' over many vectors v: exact for few dimensions, else its leading directions only.

    Args:
        dim: Length n of the vectors.
        rank: Number k of directions to keep.
        exact_up_to: Largest n for which the full matrix is stored.
    """

    def __init__(self, dim: int, *, rank: int, exact_up_to: int) -> None:
        self.dim = dim
        self.rank = rank
        self.is_exact = dim <= max(exact_up_to, rank)
        self.count = 0.0
        self._sum = torch.zeros(dim, dim, dtype=torch.float64) if self.is_exact else torch.zeros(0, dim)

    def add(self, vectors: Tensor) -> None:
        """Add the rows of ``vectors`` (M, n)."""
        if self.is_exact:
            vectors = vectors.double()
            self._sum = self._sum.to(vectors.device) + vectors.T @ vectors
            return
        # Stack rows whose second moment is the sum so far with the new rows, and keep the leading singular vectors.
        rows = torch.cat([self._sum.to(vectors.device), vectors.float()])
        wanted = min(self.rank + OVERSAMPLING, *rows.shape)
        if min(rows.shape) <= 4 * wanted:
            _, d, Vh = torch.linalg.svd(rows, full_matrices=False)
        else:
            _, d, V = torch.svd_lowrank(rows, q=wanted, niter=4)
            Vh = V.T
        self._sum = d[:wanted, None] * Vh[:wanted]

    def eigen(self) -> Eigen:
        """Return the leading eigenvectors and eigenvalues in float32 on the CPU."""
        if self.is_exact:
            values, vectors = torch.linalg.eigh(self._sum)
            return vectors.float().cpu(), values.clamp_min(0).float().cpu()
        _, d, Vh = torch.linalg.svd(self._sum, full_matrices=False)
        return Vh[: self.rank].T.contiguous().cpu(), d[: self.rank].square().cpu()


def kronecker_factors(
    function: Function,
    task: Task,
    examples: Sequence[Example],
    factors: Factors,
    *,
    rank: int,
    exact_up_to: int,
    batch_size: int,
) -> list[tuple[Eigen, Eigen]]:
    """Compute eigenvectors and eigenvalues of the output side and the input side of each of the 2 L factors.

    The Gauss-Newton matrix of a factor W (m, n) is approximately the Kronecker product of the two sides. So entry (i,
    j) of W in their bases has the curvature values_out[i] * values_in[j].
    """
    llm, _ = function
    task.check_use("A Kronecker-factored Laplace approximation")
    task.check_llm(llm.adapter, examples)
    sides = [side for A, B in factors for side in (A.shape, B.shape)]
    options = {"rank": rank, "exact_up_to": exact_up_to}
    moments = [(SecondMoment(m, **options), SecondMoment(n, **options)) for m, n in sides]
    tokens = torch.zeros(len(sides))
    for batch in evaluation_batches(examples, batch_size, task.pad_token_id):
        batch = batch.to(llm.adapter.device)
        outputs, kept = record(function, task, batch, factors)
        for number, (_, inner) in enumerate(moments):
            real = _real_tokens(kept.inputs[number], batch)
            inner.add(real)
            tokens[number] += len(real)
        # The Hessian of the loss with respect to the outputs is root' root: one backward pass per row of the root.
        values, vectors = torch.linalg.eigh(output_hessian(task, batch, outputs.detach()).double())
        root = (vectors * values.clamp_min(0).sqrt().unsqueeze(1)).transpose(1, 2).to(outputs.dtype)
        used = root.abs().amax(dim=(0, 2)) > 1e-6 * root.abs().amax()
        for k in used.nonzero()[:, 0].tolist():
            for (outer, _), g in zip(moments, kept.gradients((root[:, k] * outputs).sum()), strict=True):
                outer.add(g.flatten(0, 1))
    eigen = []
    for (outer, inner), count in zip(moments, tokens.tolist(), strict=True):
        vectors, values = inner.eigen()
        eigen.append((outer.eigen(), (vectors, values / count)))
    return eigen


def output_directions(task: Task, batch: Batch, outputs: Tensor) -> list[int]:
    """Return the outputs to differentiate: for a categorical likelihood, the classes that some row has."""
    likelihood = task.likelihood(outputs.detach(), batch)
    if isinstance(likelihood, Categorical):
        return (likelihood.probs > 0).any(0).nonzero()[:, 0].tolist()
    return list(range(outputs.shape[1]))


def _real_tokens(inputs: Tensor, batch: Batch) -> Tensor:
    """Return the inputs (M, n) at tokens that are not padding."""
    mask = batch.inputs.get("attention_mask")
    if mask is None or mask.shape[:2] != inputs.shape[:2]:
        return inputs.flatten(0, 1)
    return inputs[mask.bool()]


def _by_row(x: Tensor) -> Tensor:
    """Reshape (rows, ..., n) to (rows, tokens, n)."""
    return x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
