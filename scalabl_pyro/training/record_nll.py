"""Records the NLL that a joint model observes while an ELBO runs it."""

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor


class RecordNLL(Messenger):
    """Record what the runs of the model inside it observed, such as one run per particle of an ELBO.

    Attributes:
        runs: Number of runs of the model.
        factor_prior: Log density of the MAP prior on A and B, nats.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self.factor_prior: Tensor | float = 0.0
        self._sum: Tensor | float = 0.0

    @property
    def value(self) -> Tensor | None:
        """Negative log likelihood, averaged over the runs, nats per example; None before the first run."""
        return self._sum / self.runs if torch.is_tensor(self._sum) else None

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == "label" and msg["is_observed"]:
            with torch.no_grad():
                self._sum = self._sum - msg["fn"].log_prob(msg["value"]).mean()
            self.runs += 1
        elif msg["name"] == "factor_prior":
            self.factor_prior = msg["fn"].log_factor.detach().mean()
