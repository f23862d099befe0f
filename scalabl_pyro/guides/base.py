"""What every variational family offers: a Pyro program over the latents, and its center."""

import copy
from typing import Any

from torch import Tensor

from .._process.pyro_modes import Program
from ..model.bayesian_lora import BayesianLoRA


class Guide(Program):
    """A posterior family q over the latent sites of a prior, as a Pyro program.

    Subclasses write ``forward`` (sample every latent site, ``"s"`` at least, with event shape (D,)) and
    ``mean``. Parameters whose name contains ``scale`` get the learning rate of scales in :func:`scalabl_pyro.fit`,
    the others that of locations. See the how-to page *Own guide*.
    """

    #: Name under which a posterior of this family is saved and rebuilt; None needs the caller's help on loading.
    family: str | None = None
    #: Whether the sites may stand in a plate over rows, so that each example of a batch has its own draw.
    per_example: bool = True
    #: Whether the sites are independent of each other under q, which lets closed-form KLs of some sites be used.
    factorized: bool = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample the latent sites and return s, (..., D); the arguments of the model are ignored."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(*args, **kwargs).")

    def mean(self) -> dict[str, Tensor]:
        """The posterior mean (of skewed families the median) of each latent site."""
        raise NotImplementedError(f"{type(self).__name__} must define mean().")

    #: Whether draws of the family have a density, so that they can be weighted by p / q.
    has_density: bool = True

    def covariance(self) -> Tensor:
        """(D, D) covariance of s, of families that are normal.

        Raises:
            TypeError: another family.
        """
        raise TypeError(
            f"{type(self).__name__} is no normal family: it has draws, but no covariance in closed form. Fit a normal "
            "one ('normal', 'layer_covariance', 'lowrank', 'full_covariance'), or put one at the mean by laplace()."
        )

    def options(self) -> dict[str, Any]:
        """JSON-able options that rebuild the family beside its tensors."""
        return {}

    @classmethod
    def from_options(cls, options: dict[str, Any], blora: BayesianLoRA) -> "Guide":
        """The family that :meth:`options` describes, started anyhow: its tensors are filled afterwards."""
        raise NotImplementedError(f"{cls.__name__} must define from_options(options, blora).")

    def snapshot(self) -> "Guide":
        """A copy on the CPU that later training does not change."""
        return copy.deepcopy(self).cpu().requires_grad_(False).eval()
