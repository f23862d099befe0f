"""What predictions that keep each draw have in common: the number of draws, and their mixture."""

from typing import TYPE_CHECKING, Any, ClassVar

from ..metrics import Array
from .answered import NO_ANSWERS
from .mixture import log_mean_exp


class FromDraws:
    """Part of a prediction of N rows under S draws.

    Its first array in ``PER_DRAW`` has the length S. Subclasses define ``is_mean`` and ``target``.
    """

    PER_DRAW: ClassVar[tuple[str, ...]]
    is_mean: bool
    target: Any

    if TYPE_CHECKING:

        @property
        def log_likelihood(self) -> Array:
            """(S, N) log probability or density of the target under each draw, nats."""
            ...

    @property
    def num_draws(self) -> int:
        """Number S of draws; 0 for the posterior mean."""
        return 0 if self.is_mean else len(getattr(self, self.PER_DRAW[0]))

    @property
    def log_mixture(self) -> Array | None:
        """(N,) log probability or density of the target under the mixture of the draws, nats.

        NaN where a row has no answer; None if no row has one.
        """
        return None if self.target is None else log_mean_exp(self.log_likelihood)


class FromDensities(FromDraws):
    """Part of a prediction that holds the log density of each answer under each draw, ``log_density``."""

    log_density: Array | None

    @property
    def log_likelihood(self) -> Array:
        """(S, N) log probability or density of the target under each draw, nats; NaN where a row has no answer."""
        if self.log_density is None:
            raise ValueError(NO_ANSWERS)
        return self.log_density
