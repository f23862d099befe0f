"""Stein variational gradient descent as an objective of :func:`scalabl_pyro.fit`."""

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from ..data.batch import Batch
from ..guides.particles import ParticleGuide
from ..model.joint import TaskModel


class SteinObjective(nn.Module):
    """The average negative log joint of K particles. The gradient of the particles becomes the Stein direction.

    Factors, heads and task parameters follow the plain gradient: the average over the particles.

    Args:
        model: The joint model.
        guide: The particles.
    """

    #: The kernel of the particles reads its width on the host.
    stays_on_device = False

    def __init__(self, model: TaskModel, guide: ParticleGuide) -> None:
        super().__init__()
        self.model = model
        self.guide = guide

    def accumulate(self, batch: Batch, kl_weight: float | Tensor, *, share: float) -> Tensor:
        """Add ``share`` of the gradient of the loss to ``.grad``.

        Returns:
            (3,) Loss, NLL, and -log p(s) times its weight in the place of the KL. All are averages over particles, nats
            per example.
        """
        model, s = self.model, self.guide.particles.unsqueeze(1)
        likelihood = model.task(model.task.outputs(model.blora, batch, s), batch)
        nll = -likelihood.log_prob(batch.target).mean()
        divergence = -kl_weight * self._log_prior(s) / (len(s) * model.num_data)
        loss = nll + divergence - model.log_factor_prior() / model.num_data
        (loss * share).backward()
        return torch.stack([loss, nll.to(loss), divergence.to(loss)]).detach()

    def explain(self, batch: Batch) -> str:
        """Say why the loss of a batch is not finite."""
        return "at least one particle lies far from the data"

    def finish(self) -> None:
        """Replace the gradient of the particles by the Stein direction."""
        particles = self.guide.particles
        assert particles.grad is not None
        scale = len(particles) * self.model.num_data
        particles.grad = -self.guide.stein_gradient(-particles.grad * scale) / scale

    def _log_prior(self, s: Tensor) -> Tensor:
        with pyro.plate("particles", len(s), dim=-2):
            trace = poutine.trace(poutine.condition(self.model.blora.prior, data={"s": s})).get_trace()
        return torch.as_tensor(trace.log_prob_sum())
