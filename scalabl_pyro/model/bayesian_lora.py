"""A Hugging Face LLM as a Pyro program: a function of the latents s, which it samples from their prior."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK, am_i_wrapped
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

from .._deprecated import renamed_arguments
from .._process.pyro_modes import KeepPlates, Program
from ..data.batch import Batch
from ..lora.adapter import Adapter, Gauge
from ..lora.attach import attach
from ..lora.forward import AdaptedLLM
from ..lora.memory import MemoryEstimate, estimate_memory
from ..lora.subspace import Subspace
from ..lora.targets import TargetModules, output_head
from ..priors import PriorLike, as_prior


@renamed_arguments(train_also="modules_to_save")
def bayesian_lora(
    module: nn.Module,
    *,
    r: int | None = None,
    lora_alpha: float | None = None,
    target_modules: TargetModules = None,
    layers_to_transform: int | Iterable[int] | None = None,
    lora_dropout: float = 0.0,
    prior: PriorLike = 1.0,
    gauge: Gauge = "unit_rows",
    modules_to_save: Sequence[str] | None = None,
    seed: int = 0,
) -> "BayesianLoRA":
    """Give a module LoRA adapters with a latent vector s inside each layer, y = W0 x + gamma B (s * A x).

    The module is changed in place (its linear layers are wrapped by PEFT) and its weights are frozen;
    ``blora.unload()`` puts it back bit for bit. A module that already carries a PEFT LoRA adapter keeps the
    function it computes: its factors are rewritten as B diag(s) A with orthonormal rows of A.

    Args:
        module: a Hugging Face causal LM or classifier, or any module with linear layers.
        r: rank of the factors, latents a layer (default 8).
        lora_alpha: gamma = lora_alpha / r (default 16).
        target_modules: path suffixes, a regular expression, ``"all-linear"``, a predicate ``(path, module)``, or
            None for the paper's choice: query and value projections and the LM head.
        layers_to_transform: adapt these blocks only; the upper half costs much less.
        lora_dropout: dropout on the input of A; 0 in the paper.
        prior: scale of Normal(0, scale), a Pyro distribution, a callable ``layer -> distribution``, or a
            :class:`~scalabl_pyro.priors.Prior`.
        gauge: ``"unit_rows"`` computes with rows of A at unit norm, which leaves s one partner, B, to trade its scale
            with; ``"free"`` leaves it two. Only with a prior on B too (``fit(factor_scale=...)``) has the scale of the
            prior of s a meaning of its own.
        modules_to_save: modules trained in full (point estimates) and saved; default: the new head of a Hugging Face
            classifier.
        seed: Seed of the initial factors. The global random state stays as it was.

    Returns:
        A PyroModule to call in place of the LLM.

    Raises:
        ValueError: targets that match nothing, a rank larger than a layer, a module wrapped twice.
        TypeError: a layer kind that cannot carry latents, a prior that is none.

    References:
        Samplawski et al., Scalable Bayesian Low-Rank Adaptation of Large Language Models via Stochastic
        Variational Subspace Inference, UAI 2025, section 3.
    """
    adapter = attach(
        module,
        r=r,
        lora_alpha=lora_alpha,
        target_modules=target_modules,
        layers_to_transform=layers_to_transform,
        lora_dropout=lora_dropout,
        gauge=gauge,
        modules_to_save=modules_to_save,
        seed=seed,
    )
    try:
        return BayesianLoRA(adapter, prior=prior)
    except (TypeError, ValueError):
        adapter.unload()
        raise


class BayesianLoRA(Program):
    """An LLM as a Pyro program over the D latents of its LoRA layers.

    Calling it samples the site ``"s"`` from the prior (or takes ``s=``), and runs the LLM with it. The base model
    is not a submodule: it never enters a trace, and ``parameters()`` are the trainable ones alone. Batches of draws
    are folded into the rows of the input, so ``Trace_ELBO(vectorize_particles=True)``,
    ``Predictive(parallel=True)`` and plates over rows work unchanged.

    Attributes:
        subspace: names, offsets and ranks of the layers.
        prior: the Pyro program that samples s.
    """

    def __init__(self, adapter: Adapter, *, prior: PriorLike = 1.0) -> None:
        super().__init__()
        self.adapter = adapter
        self.prior = as_prior(prior, adapter.subspace).to(adapter.device, adapter.loc.dtype)
        self.point_estimates = _point_estimates(adapter)
        self._adapted = AdaptedLLM(adapter)

    @property
    def llm(self) -> nn.Module:
        """The adapted module."""
        return self.adapter.module

    @property
    def subspace(self) -> Subspace:
        """Which latent belongs to which layer."""
        return self.adapter.subspace

    @property
    def device(self) -> torch.device:
        """Device of the first adapted layer, where s is sampled."""
        return self.adapter.device

    def forward(self, *args: Any, s: Tensor | None = None, positions: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the LLM with latents s, by default sampled from the prior; see ``AdaptedLLM``.

        Args:
            args: positional inputs of the LLM, rows first.
            s: (..., D) latents instead of the site ``"s"``.
            positions: (B,) the only token of each row whose logits are wanted.
            kwargs: keyword inputs of the LLM.

        Returns:
            What the LLM returns, its tensors with the broadcast batch shape of s and the rows in front.
        """
        self._register_with_pyro()
        s = self.sample_latents() if s is None else s
        return self._adapted(*args, s=s, positions=positions, **kwargs)

    def sample_latents(self) -> Tensor:
        """Sample s, (..., D), from the prior, or take it from the guide or from conditioned draws in a trace."""
        with KeepPlates():
            return self.prior()

    def init_loc(self, site: Mapping[str, Any]) -> Tensor:
        """``init_loc_fn`` for Pyro's AutoGuides: the paper's start for s, a prior draw for any other site."""
        if site["name"] == "s":
            return self.adapter.loc.to(self.device).expand(site["fn"].shape()).clone()
        return site["fn"].sample().detach()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The untouched base model inside the context."""
        with self.adapter.disabled():
            yield

    def unload(self) -> nn.Module:
        """Put the original module back, bit for bit, and return it."""
        return self.adapter.unload()

    def num_parameters(self) -> dict[str, int]:
        """Parameters added to the base model: ``lora`` (A and B), ``latents`` (D), ``variational`` (2 D)."""
        return self.adapter.num_parameters()

    def estimate_memory(
        self, batch: Batch | Mapping[str, Any], *, gradient_checkpointing: bool = False
    ) -> MemoryEstimate:
        """Bytes at the peak of a training step on ``batch`` (or on keyword inputs of the LLM); runs two rows."""
        inputs = batch.inputs if isinstance(batch, Batch) else batch
        positions = batch.last if isinstance(batch, Batch) and output_head(self.llm) is not None else None
        return estimate_memory(self.adapter, inputs, positions=positions, gradient_checkpointing=gradient_checkpointing)

    def __repr__(self) -> str:
        n = self.num_parameters()
        return (
            f"BayesianLoRA({type(self.llm).__name__}: {len(self.subspace)} layers, {n['latents']} latents, "
            f"{n['lora']} LoRA parameters, prior={self.prior})"
        )

    def move_own_tensors(self) -> None:
        """Bring prior and trained heads to where their layers are, after the LLM was moved by itself."""
        self.prior.to(self.device)
        for name, head in self.adapter.heads.items():
            head.to(next(self.llm.get_submodule(name).parameters()).device)

    def _apply(self, fn: Any, recurse: bool = True) -> "BayesianLoRA":
        self.llm._apply(fn)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> "BayesianLoRA":
        """Set the train mode of the LLM too."""
        self.llm.train(mode)
        return super().train(mode)

    def _register_with_pyro(self) -> None:
        """Tell stock SVI, which optimizes what is in Pyro's global store, about A, B and heads.

        ELBO modules (``Trace_ELBO()(model, guide)``) find them as ``parameters()``; there, a param site for each
        of hundreds of factors would only cost time.
        """
        if not am_i_wrapped():
            return
        if not pyro.settings.get("module_local_params"):
            pyro.module(f"scalabl_pyro.{self.adapter.serial}", cast(nn.Module, self._modules["point_estimates"]))
        elif any(isinstance(handler, TraceMessenger) and handler.param_only for handler in _PYRO_STACK):
            raise RuntimeError(
                "Stock SVI under module_local_params=True would train the guide, but not A and B. Use it in Pyro's "
                "default mode, or train with Trace_ELBO()(model, guide) and a torch optimizer."
            )


def _point_estimates(adapter: Adapter) -> nn.Module:
    """The trainable tensors of an adapter under names without dots: ``path/A``, ``path/B``, heads."""
    container = nn.ParameterDict()
    for layer, (A, B) in zip(adapter.subspace, adapter.factors(), strict=True):
        container[f"{layer.name}/A".replace(".", "/")] = A
        container[f"{layer.name}/B".replace(".", "/")] = B
    for name, head in adapter.heads.items():
        for key, parameter in head.named_parameters():
            container[f"{name}/{key}".replace(".", "/")] = parameter
    return container
