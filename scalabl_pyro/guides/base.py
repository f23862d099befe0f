"""The base class of all guides: a Pyro program over the latents, with its draws, densities and mean."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from .._display import Summarized
from .._errors import check_count
from .._process.memory import check_memory
from .._process.pyro_modes import Program, local_params
from .._process.random_state import Stream
from ..model.bayesian_lora import BayesianLoRA

#: Largest number of draws whose single tensors are in memory at once, before they are joined.
PART = 1024


class Guide(Summarized, Program):
    """A posterior family q over the latent sites of a prior, as a Pyro program.

    Subclasses define two methods: ``forward`` samples every latent site (at least ``"s"``, with event shape (D,)),
    and ``mean`` gives the center of each site. All other methods have a default that traces ``forward``. In
    :func:`scalabl_pyro.fit`, parameters whose name contains ``scale`` get the learning rate ``lr_scale``; the others
    get ``lr_loc``. See the page *Own guide*.

    Attributes:
        family: Name under which a posterior of this family is saved. None means that the caller must pass ``guide=``
            to :meth:`scalabl_pyro.Posterior.from_pretrained`.
        per_example: Whether the sites may stand in a plate over rows, so that each row of a batch has its own draw.
        factorized: Whether the sites are independent of each other under q. Then the KL of some sites can be in
            closed form while the KL of others is estimated.
        has_density: Whether draws have a density under q, so that they can be weighted by p / q.
        is_point: Whether all draws of s are the same, so that one draw stands for all of them.
        scores_any_value: Whether :meth:`log_prob` can score values that the guide did not draw itself. A guide with
            auxiliary sites cannot.
        method: How :func:`scalabl_pyro.fit` trains the family: ``"SVI"`` maximizes an ELBO, ``"SVGD"`` moves
            the particles of a :class:`ParticleGuide`. It becomes ``method`` in the provenance of a posterior.

    Example:
        >>> import pyro, torch
        >>> from pyro import distributions as dist
        >>> class UnitNormal(scalabl_pyro.guides.Guide):
        ...     def __init__(self, blora):
        ...         super().__init__()
        ...         self.loc = torch.nn.Parameter(blora.adapter.loc.clone())
        ...     def forward(self, *args, **kwargs):
        ...         return pyro.sample("s", dist.Normal(self.loc, 1.0).to_event(1))
        ...     def mean(self):
        ...         return {"s": self.loc}
        >>> UnitNormal(blora).sample(3, seed=0)["s"].shape == (3, blora.subspace.dim)
        True
    """

    family: str | None = None
    per_example: bool = True
    factorized: bool = False
    has_density: bool = True
    is_point: bool = False
    scores_any_value: bool = True
    method: Literal["SVI", "SVGD"] = "SVI"

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample the latent sites and return s, (..., D). The arguments of the model are ignored."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(*args, **kwargs).")

    def mean(self) -> dict[str, Tensor]:
        """Return the posterior mean of each latent site, or the median where the family is skewed."""
        raise NotImplementedError(f"{type(self).__name__} must define mean().")

    def sample(self, num_draws: int, *, seed: int) -> dict[str, Tensor]:
        """Draw from the guide; draw i depends on ``seed`` and i alone.

        Args:
            num_draws: Number S of draws, 1 or more.
            seed: Seed of the draws. The global random state stays as it is.

        Returns:
            Draws by site, each (S, ...).
        """
        return self.sample_and_log_prob(num_draws, seed=seed)[0]

    def sample_and_log_prob(self, num_draws: int, *, seed: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """Draw as :meth:`sample` does, and give the log density of each draw.

        The density comes from the trace of the draw itself: a flow knows it then without inverting its transforms.

        Args:
            num_draws: Number S of draws, 1 or more.
            seed: Seed of the draws. The global random state stays as it is.

        Returns:
            Draws by site, each (S, ...), and their log densities (S,), or None where the family has no density.
        """
        check_count(num_draws=num_draws)
        parts = list(self._traced_parts(num_draws, size=PART, seed=seed, need_density=self.has_density))
        sites = {name: _join([part[name] for part, _ in parts]) for name in parts[0][0]}
        if not self.has_density:
            return sites, None
        with torch.no_grad(), local_params(), pyro.validation_enabled(False):
            return sites, self._log_density(_join([own for _, own in parts]), sites)

    def sample_in_parts(self, num_draws: int, *, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
        """Draw as :meth:`sample` does, a part at a time, so that all draws need not be in memory at once.

        Draws of a family with its own :meth:`sample_and_log_prob` are all made before the first part.

        Args:
            num_draws: Number S of draws, 1 or more.
            size: Number P of draws per part. The last part may have fewer.
            seed: Seed of the draws.

        Yields:
            Draws by site, each (P, ...). Together they are the draws of :meth:`sample`.

        Raises:
            ValueError: All draws must be made at once, and they do not fit into memory.
        """
        check_count(num_draws=num_draws, size=size)
        if type(self).sample_and_log_prob is Guide.sample_and_log_prob:
            for sites, _ in self._traced_parts(num_draws, size=size, seed=seed, need_density=False):
                yield sites
            return
        one = self.sample(1, seed=seed)
        needed = num_draws * sum(value.nbytes for value in one.values())
        advice = f"Ask for fewer draws, or define {type(self).__name__}.sample_in_parts()."
        check_memory(f"{num_draws:,} draws of {type(self).__name__}, which makes them all at once,", needed, advice)
        whole = self.sample(num_draws, seed=seed)
        for start in range(0, num_draws, size):
            yield {name: value[start : start + size] for name, value in whole.items()}

    def _traced_parts(
        self, num_draws: int, *, size: int, seed: int, need_density: bool
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Draws by site, each (P, ...), and their log densities (P,), or (0,) if they are not needed."""
        noise = Stream(seed)
        for start in range(0, num_draws, size):
            draws, own = [], []
            # Unvalidated: a draw that is NaN gets a density that is NaN, which diagnose() reports.
            with torch.no_grad(), local_params(), noise.use(), pyro.validation_enabled(False):
                for _ in range(min(size, num_draws - start)):
                    trace: Any = poutine.trace(self).get_trace()
                    draws.append(_latent_values(trace))
                    own += [_log_prob_sum(trace)] if need_density else []
            sites = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
            yield sites, torch.stack(own) if own else torch.empty(0)

    def log_prob(self, sites: Mapping[str, Tensor]) -> Tensor:
        """Give the log density of values of all latent sites.

        Args:
            sites: Values by site, each (S, ...).

        Returns:
            Log densities (S,), in nats.

        Raises:
            TypeError: The family has no density, or knows the density of its own draws only.
        """
        if not self.has_density:
            raise TypeError(f"{type(self).__name__} has no density: its draws are points.")
        values = []
        with local_params():
            for i in range(len(sites["s"])):
                one = {name: value[i] for name, value in sites.items()}
                trace: Any = poutine.trace(poutine.condition(self, data=one)).get_trace()
                if not self.scores_any_value or set(trace.stochastic_nodes) - set(sites):
                    raise TypeError(
                        f"{type(self).__name__} samples auxiliary sites, so it knows the density of its own draws "
                        "only: use sample_and_log_prob()."
                    )
                values.append(_log_prob_sum(trace))
        return torch.stack(values)

    def covariance(self) -> Tensor:
        """Return the (D, D) covariance of s, which normal families have.

        Raises:
            TypeError: The family is not normal.
        """
        raise TypeError(
            f"{type(self).__name__} is not a normal family, so it has no covariance in closed form. Fit a normal guide "
            "('normal', 'layer_covariance', 'lowrank', 'full_covariance'), or put a normal at the mean by laplace()."
        )

    def location(self) -> nn.Parameter | None:
        """Return the parameter (D,) that says where s lies on the real line; None if the family has no such one."""
        loc = getattr(self, "loc", None)
        return loc if isinstance(loc, nn.Parameter) else None

    def chains(self) -> dict[str, Tensor] | None:
        """Return the MCMC chains that the guide holds, (chains, draws, ...) by site; None if it holds none."""
        return None

    def statistics(self) -> dict[str, Tensor]:
        """Return what an MCMC sampler recorded of each draw, (chains, draws) by name; empty if there is nothing."""
        return {}

    def component_list(self) -> list["Guide"]:
        """Return the guides that the family is a mixture of; an empty list if it is not a mixture."""
        return []

    def options(self) -> dict[str, Any]:
        """Return the options, for JSON, that rebuild the family beside its tensors."""
        return {}

    @classmethod
    def from_options(cls, options: dict[str, Any], blora: BayesianLoRA) -> "Guide":
        """Rebuild the family from :meth:`options`. Its tensors have any values; the caller fills them afterwards."""
        raise NotImplementedError(f"{cls.__name__} must define from_options(options, blora).")

    def snapshot(self) -> "Guide":
        """Return a copy on the CPU that later training does not change."""
        return copy.deepcopy(self).cpu().requires_grad_(False).eval()

    def _summary(self) -> dict[str, object]:
        """Number of latents, where a parameter tells it without a draw, and the options."""
        loc = self.location()
        return ({} if loc is None else {"dim": loc.numel()}) | self.options()

    def _log_density(self, own: Tensor, sites: Mapping[str, Tensor]) -> Tensor:
        """Log densities (S,) of the guide's own draws, given those of their traces."""
        return own


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _log_prob_sum(trace: Any) -> Tensor:
    return torch.as_tensor(trace.log_prob_sum())


def _latent_values(trace: Any) -> dict[str, Tensor]:
    """Values of the latent sites of a guide's trace, without auxiliary sites."""
    names = [n for n in trace.stochastic_nodes if not trace.nodes[n]["infer"].get("is_auxiliary")]
    return {name: trace.nodes[name]["value"].detach() for name in names}
