"""Training with noise on the factors: each row of a batch computes with factors of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..lora.binding import RowNoise
from ..lora.forward import num_rows
from ..model.bayesian_lora import BayesianLoRA


class NoisyLoRA(BayesianLoRA):
    """An adapted LLM whose layers compute with noisy A; subclasses define the noise of a pass."""

    def row_noise(self, s: Tensor, rows: int) -> Sequence[RowNoise]:
        """Noise of each layer for a pass of ``rows`` rows, given the value of the site ``"s"``."""
        raise NotImplementedError(f"{type(self).__name__} must define row_noise(s, rows).")

    def forward(self, *args: Any, s: Tensor | None = None, positions: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the LLM with s = 1 and noise in each layer, see :class:`~scalabl_pyro.BayesianLoRA`."""
        s = self.sample_latents() if s is None else s
        if s.shape[:-1].numel() != 1:
            raise ValueError(
                f"The site 's' has shape {tuple(s.shape)}: rows share one draw here, which their own signs or masks "
                "make different. Use an ELBO without vectorized particles, and draws='shared'."
            )
        ones = torch.ones(self.subspace.dim, device=self.device, dtype=self.adapter.loc.dtype)
        noise = self.row_noise(s.reshape(-1), num_rows(args, kwargs))
        return self._adapted(*args, s=ones, positions=positions, noise=noise, **kwargs)
