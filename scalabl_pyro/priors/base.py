"""What every prior is: a Pyro program that samples s."""

from typing import Any

import torch
from torch import Tensor

from .._process.pyro_modes import Program
from ..lora.subspace import Subspace


class Prior(Program):
    """A Pyro program that samples the site ``"s"``, the vector of all D latents.

    Subclass it and write ``forward`` for a prior with latents or parameters of its own; the site's event shape must be
    (D,): ``pyro.sample("s", dist.Normal(...).to_event(1))``. Draws may stand in a plate, so shapes carry batch
    dimensions on the left. See the how-to page *Own prior*.
    """

    #: Name under which a prior of this family is saved and rebuilt; None needs the caller's help on loading.
    family: str | None = None

    def setup(self, subspace: Subspace) -> None:
        """Learn which latents there are; called once, before the first draw."""

    def forward(self) -> Tensor:
        """Sample every latent site and return s, (..., D)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(), which samples the site 's'.")

    def options(self) -> dict[str, Any]:
        """JSON-able constructor arguments that rebuild the family beside its tensors."""
        return {}


def layer_of_latent(subspace: Subspace) -> Tensor:
    """(D,) index of the layer that each latent belongs to."""
    return torch.repeat_interleave(torch.arange(len(subspace)), torch.tensor(subspace.ranks))
