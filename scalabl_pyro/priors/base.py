"""The base class of all priors: a Pyro program that samples s."""

from typing import Any

import torch
from torch import Tensor

from .._process.pyro_modes import Program
from ..lora.subspace import Subspace


class Prior(Program):
    """A Pyro program that samples the site ``"s"``, the vector of all D latents.

    Subclass it for a prior with latents or parameters of its own, and define ``forward``. The event shape of the site
    must be (D,): ``pyro.sample("s", dist.Normal(...).to_event(1))``. Draws may be in a plate, so batch dimensions come
    on the left of all shapes. See the page *Own prior*.

    Attributes:
        family: Name under which a prior of this family is saved. None means that the caller must pass ``prior=`` to
            :meth:`scalabl_pyro.Posterior.from_pretrained`.

    Example:
        >>> import pyro, torch
        >>> class Shifted(scalabl_pyro.priors.Prior):
        ...     def setup(self, subspace):
        ...         self.register_buffer("loc", torch.full((subspace.dim,), 0.5))
        ...     def forward(self):
        ...         return pyro.sample("s", pyro.distributions.Normal(self.loc, 1.0).to_event(1))
        >>> scalabl_pyro.priors.as_prior(Shifted(), blora.subspace)
        Shifted()
    """

    family: str | None = None

    def setup(self, subspace: Subspace) -> None:
        """Prepare for these latents. It is called once, before the first draw."""

    def forward(self) -> Tensor:
        """Sample every latent site and return s, (..., D)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(), which samples the site 's'.")

    def options(self) -> dict[str, Any]:
        """Return the constructor arguments, for JSON, that rebuild the family beside its tensors."""
        return {}


def layer_of_latent(subspace: Subspace) -> Tensor:
    """Return the index (D,) of the layer that each latent belongs to."""
    return torch.repeat_interleave(torch.arange(len(subspace)), torch.tensor(subspace.ranks))
