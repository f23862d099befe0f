"""The state of a posterior: what training learned, its draws, and the densities of those draws."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from .._errors import check_choice
from .._process.pyro_modes import local_params
from ..analysis.psis import LogWeights
from ..data.encoding import encode
from ..data.rows import read_rows
from ..guides import Guide
from ..lora.adapter import Adapter
from ..lora.factors import Factors
from ..lora.forward import AdaptedLLM
from ..lora.subspace import Subspace
from ..model.bayesian_lora import BayesianLoRA
from ..model.log_likelihood import LogLikelihood
from ..prediction.draws import Draws, log_prior, sample
from ..prediction.quasi_monte_carlo import DESIGNS, quasi_monte_carlo_draws
from ..priors import Prior
from ..tasks import Task, copy_task

Result = TypeVar("Result")


@dataclass(frozen=True)
class PosteriorState:
    """A posterior of s with the point estimates it was learned with.

    Saving, diagnosis and export read a posterior through this class. :class:`~scalabl_pyro.Posterior` adds what users
    ask of it.

    Attributes:
        adapter: the LoRA layers inside the LLM.
        task: the likelihood, with its learned parameters.
        prior: the Pyro program that samples the latents.
        guide: the fitted family, on the CPU.
        factors: (A, B) of each layer.
        heads: trained heads by module path.
        provenance: how it came about (seed, steps, size of the data, versions).
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
        """Copy the present state of an LLM, a task and a guide."""
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
        """Which latent belongs to which layer."""
        return self.adapter.subspace

    def blora(self) -> BayesianLoRA:
        """The LLM as a Pyro program again, to train on or to unload."""
        return BayesianLoRA(self.adapter, prior=copy.deepcopy(self.prior).requires_grad_(True))

    def mean(self) -> Tensor:
        """(D,) posterior mean of s."""
        with torch.no_grad(), local_params():
            return self.guide.mean()["s"].detach().clone()

    def sample(self, num_draws: int, *, seed: int = 0, design: str = "independent") -> Draws:
        """Draw from the posterior; 0 draws give its mean as the only one.

        ``design="antithetic"`` or ``"sobol"`` spreads the draws of a normal guide more evenly, see
        :mod:`scalabl_pyro.prediction.quasi_monte_carlo`.

        Draws are made one by one on the CPU, so that draw i depends on the seed alone: not on how many are asked
        for, nor on the device of the LLM.

        Raises:
            ValueError: a negative number of draws.
        """
        if num_draws < 0:
            raise ValueError(f"num_draws={num_draws} must be 0 (the posterior mean) or more.")
        check_choice("design", design, DESIGNS)
        if design == "independent" or num_draws == 0:
            return sample(self.guide, num_draws, seed=seed)
        return self._in_local_mode(lambda: quasi_monte_carlo_draws(self.guide, num_draws, seed=seed, design=design))

    def llm(self) -> AdaptedLLM:
        """The LLM with this posterior's factors and heads, as a function of s."""
        device = self.adapter.device
        heads = {name: head.to(device) for name, head in self.heads.items()}
        factors = tuple(
            (A.to(live_A.device), B.to(live_B.device))
            for (A, B), (live_A, live_B) in zip(self.factors, self.adapter.factors(), strict=True)
        )
        return AdaptedLLM(self.adapter, factors=factors, heads=heads)

    def log_likelihood(self, data: Any, *, batch_size: int = 16, need_target: bool = True) -> LogLikelihood:
        """Log p(y | s) of all rows as a differentiable function of s (D,), nats: where inference of your own starts.

        Args:
            data: rows with answers.
            batch_size: rows a pass.
            need_target: whether each row must have an answer.
        """
        examples = encode(read_rows(data), self.task.encode, need_target=need_target)
        return LogLikelihood(self.llm(), self.task, examples, batch_size=batch_size)

    def log_weights(
        self, data: Any, *, num_draws: int = 200, num_data: int | None = None, seed: int = 0, batch_size: int = 16
    ) -> LogWeights:
        """Densities of draws under the joint model: what ELBO, k-hat and LOO are made of.

        Args:
            data: the training rows, or a random part of them.
            num_draws: S.
            num_data: size of the training set, if ``data`` is a part of it.
            seed: of the draws.
            batch_size: rows a pass.

        Raises:
            ValueError: ``num_data`` smaller than ``data``, rows without an answer.
        """
        likelihood = self.log_likelihood(data, batch_size=batch_size, need_target=True)
        if num_data is not None and num_data < likelihood.num_data:
            raise ValueError(
                f"num_data={num_data}, but data alone has {likelihood.num_data} rows: num_data is the size of the "
                "training set that data is a part of. Leave it out where data is all of it."
            )
        draws = self.sample(num_draws, seed=seed)
        return LogWeights(
            log_likelihood=likelihood.by_row(draws.s).numpy(),
            log_prior=self._in_local_mode(lambda: log_prior(self.prior, draws)).numpy(),
            log_q=None if draws.log_q is None else draws.log_q.numpy(),
            scale=1.0 if num_data is None else num_data / likelihood.num_data,
        )

    def describe(self) -> str:
        """Guide and prior in two words."""
        return f"{self.guide.options().get('class', type(self.guide).__name__)}, {self.prior}"

    def _in_local_mode(self, function: Callable[[], Result]) -> Result:
        """Run a function of guide or prior without touching Pyro's global store."""
        with torch.no_grad(), local_params():
            return function()
