"""The schedule by which BLoB and the released ScalaBL weigh the KL of each batch (Wang et al., 2024, section 3.3)."""

import math
from dataclasses import dataclass

from .._errors import check_positive


@dataclass(frozen=True)
class KLReweighting:
    """Weights pi_i = 2^i / (2^(M+1) - 1), i = 1..M, again and again; they sum to nearly 1 over M steps.

    M = int(100 N^(pi / gamma) / batch_size), which is not the number of batches of an epoch (N / batch_size). Only the
    last ten or so of M steps have a weight worth the name, and one M-th of the KL a step is more than the ELBO's N-th.

    Calling it gives the weight in the unit of :func:`scalabl_pyro.fit`, whose loss is NLL + kl_weight * KL / N:
    ``fit(..., kl_weight=KLReweighting(num_data=N, batch_size=16))``.

    Attributes:
        num_data: N, rows of the training set.
        batch_size: rows a step.
        gamma: 8 in the released code.
    """

    num_data: int
    batch_size: int
    gamma: float = 8.0

    def __post_init__(self) -> None:
        check_positive(num_data=self.num_data, batch_size=self.batch_size, gamma=self.gamma)

    @property
    def period(self) -> int:
        """M, at least 1."""
        return max(int(100 * self.num_data ** (math.pi / self.gamma) / self.batch_size), 1)

    def share(self, step: int) -> float:
        """pi_i of step ``step``, counted from 0."""
        i = step % self.period + 1
        return math.exp2(i - self.period - 1) / (1 - math.exp2(-self.period - 1))

    def __call__(self, step: int) -> float:
        """N pi_i."""
        return self.num_data * self.share(step)
