"""The ELBO of a task as something to differentiate, the choice of its estimator, and the reason when it is NaN.

elbo = E_q[ sum_n log p(y_n | x_n, s) ] - kl_weight * KL(q || p)         nats per data set, higher is better
loss = -elbo / N                                                         nats per example, lower is better
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import pyro
import torch
from pyro import poutine
from pyro.infer import (
    ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from .._errors import describe
from .._process.full_precision import full_precision
from .._values import number
from ..data.batch import Batch
from ..guides import Guide
from ..guides.checks import check_sites
from ..guides.closed_form_kl import closed_kl
from ..model.joint import TaskModel, latent_scope
from ..priors import Prior
from .device_elbo import device_loss, stays_on_device
from .record_nll import RecordNLL
from .scope import without_nan_warnings
from .score_function import LeaveOneOutELBO, is_reparametrized


class StepObjective(Protocol):
    """What one step needs: a loss that accumulates its gradients."""

    def accumulate(self, batch: Batch, kl_weight: float | Tensor, *, share: float) -> Tensor:
        """Add ``share`` of the gradient of the loss to ``.grad``; (3,) loss, NLL and weighted KL, nats per example."""

    def finish(self) -> None:
        """Complete the gradient after the last micro-batch of a step."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, as ``nn.Module`` does."""


class TrainingObjective(StepObjective, Protocol):
    """What a training minimizes: a module with a model and a guide that accumulates gradients of its loss."""

    @property
    def model(self) -> TaskModel:
        """The joint model."""

    @property
    def guide(self) -> nn.Module:
        """The guide."""

    @property
    def stays_on_device(self) -> bool:
        """Whether a step computes all its numbers on the device, as a CUDA graph demands."""

    def explain(self, batch: Batch) -> str:
        """Say why the loss of a batch is not finite."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Give all parameters by name, as ``nn.Module`` does."""

    def state_dict(self) -> dict[str, Any]:
        """Give all live tensors by name, as ``nn.Module`` does."""


class ScopedGuide(nn.Module):
    """A guide with the arguments and the scope (plate over rows, KL weight) of a :class:`TaskModel`.

    Args:
        guide: The guide.
        draws: ``"per_example"`` or ``"shared"``.
    """

    def __init__(self, guide: Guide, *, draws: str) -> None:
        super().__init__()
        self.guide = guide
        self.draws = draws

    def forward(self, batch: Batch, kl_weight: float | Tensor = 1.0) -> Any:
        """Sample the latent sites for a batch."""
        with full_precision(), latent_scope(batch, kl_weight, draws=self.draws):
            return self.guide()


class Objective(nn.Module):
    """An ELBO of one model and guide as something to differentiate.

    Args:
        elbo: Any Pyro ELBO.
        model: The joint model.
        guide: The guide in the scope of the model.
    """

    def __init__(self, elbo: ELBO, model: TaskModel, guide: ScopedGuide) -> None:
        super().__init__()
        self.elbo = elbo
        self.model = model
        self.guide = guide

    @property
    def stays_on_device(self) -> bool:
        """Whether a step computes all its numbers on the device, as a CUDA graph demands."""
        return stays_on_device(self.elbo)

    def accumulate(self, batch: Batch, kl_weight: float | Tensor, *, share: float) -> Tensor:
        """Add ``share`` of the gradient of the loss to ``.grad``.

        Returns:
            (3,) Loss, NLL, and KL times its weight, nats per example.
        """
        num_data = self.model.num_data
        with RecordNLL() as record, self._quiet(), full_precision():
            try:
                surrogate = self._differentiable(batch, kl_weight)
                if surrogate is None:
                    loss = self._own_backward(batch, kl_weight, factor=share / num_data) / num_data
                else:
                    loss = (surrogate / num_data).detach()
            except ValueError as error:
                if not _found_nan(error):
                    raise
                return torch.full((3,), float("nan"), device=batch.index.device)
        if surrogate is not None:
            (surrogate * (share / num_data)).backward()
        return self._terms(loss, record)

    def loss(self, batch: Batch, kl_weight: float | Tensor) -> tuple[Tensor, Tensor]:
        """Compute the loss for a caller that runs the backward pass itself.

        Returns:
            () Loss to differentiate, and (3,) loss, NLL, and KL times its weight, nats per example. All are NaN if
            an argument of a distribution is.

        Raises:
            TypeError: The estimator has no loss that can be differentiated.
        """
        with RecordNLL() as record, self._quiet(), full_precision():
            try:
                surrogate = self._differentiable(batch, kl_weight)
            except ValueError as error:
                if not _found_nan(error):
                    raise
                nan = torch.full((4,), float("nan"), device=batch.index.device)
                return nan[0], nan[1:]
        if surrogate is None:
            raise TypeError(f"{type(self.elbo).__name__} computes its own gradients: use Trace_ELBO instead.")
        loss = surrogate / self.model.num_data
        return loss, self._terms(loss.detach(), record)

    def _terms(self, loss: Tensor, record: RecordNLL) -> Tensor:
        """(3,) Loss, NLL and weighted KL, nats per example."""
        nll = record.value
        assert nll is not None
        weighted_kl = loss - nll + record.factor_prior / self.model.num_data
        return torch.stack([loss, nll.to(loss), weighted_kl])

    def finish(self) -> None:
        """Complete the gradient after the last micro-batch of a step; here it is complete already."""

    def explain(self, batch: Batch) -> str:
        """Say why the loss of a batch is not finite."""
        return explain_nonfinite(self.model, self.guide, batch)

    def _quiet(self) -> AbstractContextManager[None]:
        """Pyro warns of NaN where it validates, and in estimators of its own."""
        if self.stays_on_device and not pyro.settings.get("validate_poutine"):
            return nullcontext()
        return without_nan_warnings()

    def _differentiable(self, batch: Batch, kl_weight: float | Tensor) -> Tensor | None:
        """The negative ELBO to differentiate; None for RenyiELBO and TraceGraph_ELBO, which lack one."""
        if self.stays_on_device:
            loss = device_loss(self.elbo, self.model, self.guide, batch, kl_weight)
            if loss is not None:
                return loss
        if hasattr(self.elbo, "differentiable_loss"):
            return self.elbo.differentiable_loss(self.model, self.guide, batch, kl_weight)
        return None

    def _own_backward(self, batch: Batch, kl_weight: float | Tensor, *, factor: float) -> Tensor:
        parameters = [p for p in self.parameters() if p.requires_grad]
        before = [p.grad for p in parameters]
        self.zero_grad(set_to_none=True)
        loss = cast(Any, self.elbo).loss_and_grads(self.model, self.guide, batch, kl_weight)
        for parameter, old in zip(parameters, before, strict=True):
            new = None if parameter.grad is None else parameter.grad * factor
            parameter.grad = new if old is None else old if new is None else old + new
        return torch.as_tensor(float(loss), device=batch.index.device)


def _found_nan(error: ValueError) -> bool:
    """Whether Pyro's validation found NaN in an argument of a distribution, before we do."""
    return "invalid values" in str(error)


def allows_row_draws(elbo: ELBO) -> bool:
    """Whether an estimator is linear in log p - log q: an average over rows with their own draws is unbiased."""
    linear = (Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO)
    return isinstance(elbo, linear) and not isinstance(elbo, TraceTailAdaptive_ELBO)


def default_elbo(guide: Guide, prior: Prior) -> ELBO:
    """Choose the ELBO with closed-form KLs if guide and prior allow it, else ``Trace_ELBO``.

    With several sites the closed forms hold only if the sites are independent under q. Draws that carry no gradient
    need a baseline, see :class:`LeaveOneOutELBO`.
    """
    q, p = check_sites(guide, prior)
    if not is_reparametrized(q):
        return LeaveOneOutELBO(vectorize=guide.per_example)
    sites = list(p.stochastic_nodes)
    if set(q.stochastic_nodes) != set(sites):  # auxiliary sites: nothing is in closed form
        return Trace_ELBO()
    if len(sites) > 1 and not guide.factorized:
        return Trace_ELBO()
    are_closed = any(closed_kl(_site(q, name), _site(p, name)) is not None for name in sites)
    return TraceMeanField_ELBO() if are_closed else Trace_ELBO()


def elbo_for(elbo: ELBO | None, guide: Guide, prior: Prior) -> ELBO:
    """Check the guide against the prior and give the caller's estimator, or the default one.

    Raises:
        TypeError: ``elbo`` is not an ELBO.
        ValueError: The guide does not fit the prior.
    """
    if elbo is None:
        return default_elbo(guide, prior)
    if not isinstance(elbo, ELBO):
        raise TypeError(f"elbo={elbo!r}: expected an instance such as pyro.infer.Trace_ELBO().")
    check_sites(guide, prior)
    return elbo


def weight_at(kl_weight: float | Callable[[int], float], step: int) -> float:
    """Give the weight of the KL at a step.

    Raises:
        TypeError: The weight is not a number.
        ValueError: The weight is negative or not finite.
    """
    value = kl_weight(step) if callable(kl_weight) else kl_weight
    weight = number(value)
    if weight is None:
        given = f"kl_weight={value!r}" if value is kl_weight else f"kl_weight({step}) gives {describe(value)}"
        raise TypeError(
            f"{given}: expected a number, 0 or more, or a function from the step to it, such as "
            "lambda step: min(1, step / 100)."
        )
    if not 0 <= weight < float("inf"):
        raise ValueError(f"kl_weight={weight} at step {step}: expected a finite number, 0 or more. Use 1 for the ELBO.")
    return weight


@torch.no_grad()
def explain_nonfinite(model: TaskModel, guide: ScopedGuide, batch: Batch) -> str:
    """Say which site of guide or model is not finite on this batch."""
    with pyro.validation_enabled(False):
        q = poutine.trace(guide).get_trace(batch)
        for name in q.stochastic_nodes:
            if not torch.isfinite(_site(q, name)["value"]).all():
                return f"site {name!r} of the guide (its draws are not finite: lower the learning rates of the guide)"
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(batch)
        for name in (*p.stochastic_nodes, *p.observation_nodes):
            site = _site(p, name)
            rejected = ~torch.isfinite(site["fn"].log_prob(site["value"]))
            if rejected.any():
                rows = batch.index[rejected.nonzero()[:, -1].unique()].tolist() if rejected.dim() else "all"
                return f"site {name!r} of the model (log density not finite for examples {rows})"
    return "no single site (every log density is finite now; the sum or the gradient overflows)"


def _site(trace: Trace, name: str) -> dict[str, Any]:
    return cast(dict[str, Any], trace.nodes[name])
