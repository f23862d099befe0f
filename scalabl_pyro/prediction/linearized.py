"""Prediction with outputs that are linear in s around the posterior mean, so that no draw needs a pass of its own."""

import torch
from torch import Tensor

from ..data.batch import Batch
from ..model.derivatives import jacobian_of
from ..model.log_likelihood import LogLikelihood
from .collect import predict_batches
from .result import NumericPrediction, Prediction


def predict_linearized(
    likelihood: LogLikelihood, mean: Tensor, s: Tensor, *, seed: int
) -> Prediction | NumericPrediction:
    """Predict with outputs linear in s: f(x, s) = f(x, mean) + J (s - mean).

    For s ~ Normal(mean, V) the K outputs of a row are normal with covariance J V J'. Draw i is the same s for every
    row, so the outputs of all rows vary together as they do under the posterior.

    Args:
        likelihood: Log likelihood of the rows.
        mean: (D,) posterior mean.
        s: (S, D) posterior draws.
        seed: Seed of the simulated answers of a likelihood over numbers.

    Returns:
        Prediction of N rows under S draws.

    References:
        Immer et al., Improving predictions of Bayesian neural nets via local linearization, AISTATS 2021.
    """
    shift = (s - mean).double()

    def outputs_of(batch: Batch) -> Tensor:
        own, outputs = likelihood.with_own_s(batch, mean)
        every = torch.arange(outputs.shape[1], device=outputs.device)
        jacobian = jacobian_of(outputs, own, every).cpu().double()
        change = torch.einsum("bkd,sd->sbk", jacobian, shift)
        return outputs.detach().cpu() + change.to(outputs.dtype)

    return predict_batches(likelihood.passes, outputs_of, likelihood.task, likelihood.examples, seed=seed)
