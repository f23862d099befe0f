"""Prediction with outputs that are linear in s around the posterior mean, so that no draw needs a pass of its own."""

import torch
from torch import Tensor

from ..data.batch import Batch
from ..model.derivatives import jacobian_of
from ..model.log_likelihood import LogLikelihood
from .predict import predict_from_outputs
from .result import NumericPrediction, Prediction


def predict_linearized(
    likelihood: LogLikelihood, mean: Tensor, s: Tensor, *, seed: int
) -> Prediction | NumericPrediction:
    """Predict with outputs linear in s: f(x, s) = f(x, mean) + J (s - mean), so that no draw needs a pass of its own.

    For s ~ Normal(mean, V) the K outputs of a row are normal with covariance J V J'. Draw i is the same s for every
    row, so that the outputs of all rows vary together as they do under the posterior.

    Args:
        likelihood: of the rows.
        mean: (D,) of the posterior.
        s: (S, D) draws of it.
        seed: of the simulated answers of a likelihood over numbers.

    References:
        Immer et al., Improving predictions of Bayesian neural nets via local linearization, AISTATS 2021.
    """
    shift = (s - mean).double()
    parts: list[tuple[Batch, Tensor]] = []
    for batch, own, outputs in likelihood.rows_with_own_s(mean):
        every = torch.arange(outputs.shape[1], device=outputs.device)
        jacobian = jacobian_of(outputs, own, every).cpu().double()
        change = torch.einsum("bkd,sd->sbk", jacobian, shift)
        parts.append((batch, outputs.detach().cpu() + change.to(outputs.dtype)))
    return predict_from_outputs(likelihood.task, likelihood.examples, parts, seed=seed)
