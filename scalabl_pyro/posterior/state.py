"""State of a posterior: what training learned, its draws, and the densities of those draws."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from .._arguments import known_arguments_of_methods
from .._display import Summarized
from .._errors import check_choice, check_count
from .._process.pyro_modes import local_params
from ..analysis.psis import LogWeights
from ..data.encoding import encode_data
from ..data.rows import rows_for
from ..guides import Guide
from ..lora.adapter import Adapter
from ..lora.factors import Factors
from ..lora.forward import AdaptedLLM
from ..lora.subspace import Subspace
from ..model.bayesian_lora import BayesianLoRA
from ..model.log_likelihood import LogLikelihood
from ..prediction.draws import Draws, log_prior, sample, sample_in_parts
from ..prediction.quasi_monte_carlo import DESIGNS, Design, quasi_monte_carlo_draws, quasi_monte_carlo_parts
from ..prediction.room import COPIES, check_room
from ..priors import Prior
from ..tasks import Task, copy_task

Result = TypeVar("Result")


@known_arguments_of_methods
@dataclass(frozen=True, repr=False)
class PosteriorState(Summarized):
    """The posterior of s, and the point estimates that were learned together with it.

    Saving, diagnosis and export read a posterior through this class. :class:`~scalabl_pyro.Posterior` adds the methods
    for users.

    Attributes:
        adapter: LoRA layers inside the LLM.
        task: Task with its learned parameters; it defines the likelihood.
        prior: Pyro program that samples the latents.
        guide: Fitted family, on the CPU.
        factors: Factors (A, B) of each layer.
        heads: Trained heads by module path.
        provenance: Record of the training: ``options`` and ``rates``, ``data`` (number of rows, SHA-256 of their tokens
            and answers), ``versions``, ``start`` (``"fresh"`` or ``"continued"``), number of steps, seconds.
    """

    adapter: Adapter
    task: Task
    prior: Prior
    guide: Guide
    factors: Factors
    heads: Mapping[str, nn.Module] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def capture(cls, blora: BayesianLoRA, task: Task, guide: Guide, *, provenance: Mapping[str, Any]) -> Self:
        """Copy the present state of an LLM, a task and a guide.

        Args:
            blora: Adapted LLM.
            task: Task that defines the likelihood.
            guide: Fitted guide.
            provenance: Record of the training.

        Example:
            >>> frozen = Posterior.capture(blora, task, guide, provenance={"num_data": 64})
        """
        return cls(
            adapter=blora.adapter,
            task=copy_task(task).requires_grad_(False),
            prior=copy.deepcopy(blora.prior).cpu().requires_grad_(False),
            guide=guide.snapshot(),
            factors=tuple((A.detach().clone(), B.detach().clone()) for A, B in blora.adapter.factors()),
            heads={name: copy.deepcopy(head).requires_grad_(False) for name, head in blora.adapter.heads.items()},
            provenance=dict(provenance),
        )

    @property
    def subspace(self) -> Subspace:
        """Subspace that assigns the entries of s to the adapted layers."""
        return self.adapter.subspace

    def blora(self) -> BayesianLoRA:
        """Make the LLM a Pyro program again, to train further or to unload."""
        return BayesianLoRA(self.adapter, prior=copy.deepcopy(self.prior).requires_grad_(True))

    def mean(self) -> Tensor:
        """Return the posterior mean of s, (D,), on the CPU."""
        with torch.no_grad(), local_params():
            return self.guide.mean()["s"].detach().clone()

    def sample(self, num_draws: int, *, seed: int = 0, design: Design = "independent") -> Draws:
        """Draw from the posterior.

        Draws are made one by one on the CPU. Draw i depends on the seed alone, not on the number of draws, nor on the
        device of the LLM.

        Args:
            num_draws: Number S of draws; 0 gives the posterior mean as the only draw.
            seed: Seed of the draws.
            design: How draws relate to each other: ``"antithetic"`` or ``"sobol"`` spreads the draws of a normal guide
                more evenly; see :mod:`scalabl_pyro.prediction.quasi_monte_carlo`.

        Returns:
            S draws of all latent sites, with their log densities.

        Raises:
            ValueError: If ``num_draws`` is not a whole number from 0 on, if the design is unknown, or if the draws do
                not fit into memory.
            TypeError: If the design needs a normal guide and this one is not.

        Example:
            >>> posterior.sample(3, seed=0).s.shape  # (3, D)
        """
        check_count(num_draws=num_draws, least=0)
        check_choice("design", design, DESIGNS)
        check_room(self.guide, num_draws)
        if design == "independent" or num_draws == 0:
            return sample(self.guide, num_draws, seed=seed)
        return self._in_local_mode(lambda: quasi_monte_carlo_draws(self.guide, num_draws, seed=seed, design=design))

    def sample_in_parts(
        self, num_draws: int, *, size: int = 1024, seed: int = 0, design: Design = "independent"
    ) -> Iterator[Draws]:
        """Draw from the posterior in parts, so that all draws need not be in memory at once.

        Args:
            num_draws: Number S of draws; 0 gives the posterior mean as the only draw.
            size: Number of draws per part. The last part may have fewer.
            seed: Seed of the draws.
            design: How draws relate to each other; see :meth:`sample`.

        Returns:
            Iterator over parts. Together they are the draws of :meth:`sample`. They have no log densities, except in
            the designs ``"antithetic"`` and ``"sobol"``.

        Raises:
            ValueError: If a number is not a whole number in its range, or if the design is unknown.
            TypeError: If the design needs a normal guide and this one is not.

        Example:
            >>> sum(len(part) for part in posterior.sample_in_parts(10, size=4))
            10
        """
        check_count(num_draws=num_draws, least=0)
        check_count(size=size)
        check_choice("design", design, DESIGNS)
        if design == "independent" or num_draws == 0:
            return sample_in_parts(self.guide, num_draws, size=size, seed=seed)
        parts = quasi_monte_carlo_parts(self.guide, num_draws, size=size, seed=seed, design=design)
        return iter(lambda: self._in_local_mode(lambda: next(parts, None)), None)

    def llm(self) -> AdaptedLLM:
        """Make a function of s from the LLM with the factors and heads of this posterior."""
        device = self.adapter.device
        heads = {name: head.to(device) for name, head in self.heads.items()}
        factors = tuple(
            (A.to(live_A.device), B.to(live_B.device))
            for (A, B), (live_A, live_B) in zip(self.factors, self.adapter.factors(), strict=True)
        )
        return AdaptedLLM(self.adapter, factors=factors, heads=heads)

    def log_likelihood(self, data: Any, *, batch_size: int = 16, need_target: bool = True) -> LogLikelihood:
        """Make log p(y | s) of all rows, in nats, a differentiable function of s: the start of your own inference.

        Args:
            data: Rows with answers.
            batch_size: Number of rows per forward pass.
            need_target: Whether each row must have an answer.

        Returns:
            Function of s (D,).

        Raises:
            ValueError: If ``batch_size`` is not a whole number from 1 on, or if a row has no answer.

        Example:
            >>> value = posterior.log_likelihood(train_data)(posterior.mean())
        """
        examples = encode_data(data, self.task.encode, need_target=need_target)
        return LogLikelihood(self.llm(), self.task, examples, batch_size=batch_size)

    def log_weights(
        self, data: Any, *, num_draws: int = 200, num_data: int | None = None, seed: int = 0, batch_size: int = 16
    ) -> LogWeights:
        """Compute densities of draws under the joint model, from which ELBO, k-hat and LOO follow.

        Args:
            data: Training rows, or a random part of them.
            num_draws: Number S of draws; 0 for the posterior mean.
            num_data: Size of the training set, if ``data`` is a part of it.
            seed: Seed of the draws.
            batch_size: Number of rows per forward pass.

        Returns:
            Densities of S draws, nats.

        Raises:
            ValueError: If ``num_data`` is smaller than ``data``, if a row has no answer, or if a number is not a whole
                number.

        Example:
            >>> elbo = posterior.log_weights(train_data).elbo()  # nats per data set
        """
        check_count(num_draws=num_draws, least=0)
        data = rows_for(self.task.encode, data)
        check_room_for_densities(self, len(data), num_draws)
        draws = self.sample(num_draws, seed=seed)
        return densities_of(self, draws, data, num_data=num_data, batch_size=batch_size)

    def describe(self) -> str:
        """Return the names of guide and prior."""
        return f"{self.guide.options().get('class', type(self.guide).__name__)}, {self.prior}"

    def _summary(self) -> Mapping[str, object]:
        facts: dict[str, object] = {
            "guide": self.guide.options().get("class", type(self.guide).__name__),
            "prior": self.prior,
            "task": type(self.task).__name__,
            "latents": self.subspace.dim,
            "layers": len(self.subspace),
        }
        known = {name: self.provenance[name] for name in ("method", "num_data", "seed") if name in self.provenance}
        return facts | known

    def _in_local_mode(self, function: Callable[[], Result]) -> Result:
        """Run a function of guide or prior without touching Pyro's global store."""
        with torch.no_grad(), local_params():
            return function()


def check_room_for_densities(posterior: PosteriorState, num_rows: int, num_draws: int) -> None:
    """Check that draws and their log likelihoods of each row fit into memory; see :func:`densities_of`."""
    per_draw = COPIES * num_rows * posterior.mean().element_size()
    kept = f" and their log likelihoods of {num_rows:,} rows"
    check_room(posterior.guide, num_draws, per_draw=per_draw, kept=kept)


def densities_of(
    posterior: PosteriorState, draws: Draws, data: Any, *, num_data: int | None, batch_size: int
) -> LogWeights:
    """Compute the densities of given draws; see :meth:`PosteriorState.log_weights`."""
    if num_data is not None:
        check_count(num_data=num_data)
    likelihood = posterior.log_likelihood(data, batch_size=batch_size, need_target=True)
    if num_data is not None and num_data < likelihood.num_data:
        raise ValueError(
            f"num_data={num_data}, but data alone has {likelihood.num_data} rows: num_data is the size of the "
            "training set that data is a part of. Leave it out where data is the whole training set."
        )
    with torch.no_grad(), local_params():
        prior = log_prior(posterior.prior, draws)
    return LogWeights(
        log_likelihood=likelihood.by_row(draws.s).numpy(),
        log_prior=prior.numpy(),
        log_q=None if draws.log_q is None else draws.log_q.numpy(),
        scale=1.0 if num_data is None else num_data / likelihood.num_data,
    )
