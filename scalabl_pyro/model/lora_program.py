"""A Hugging Face LLM as a Pyro program: it samples the latents s from their prior, and runs the LLM with them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pyro
import torch
from pyro.ops.provenance import get_provenance
from pyro.params import param_with_module_name
from pyro.poutine.runtime import _PYRO_STACK, am_i_wrapped
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

from .._arguments import known_arguments
from .._display import html_table
from .._process.pyro_modes import KeepPlates, Program, check_particle_dimension
from ..data.batch import Batch
from ..data.rows import Row
from ..lora.adapter import Adapter
from ..lora.binding import Readout
from ..lora.forward import AdaptedLLM
from ..lora.memory import MemoryEstimate
from ..lora.pass_checks import EffectCheck
from ..lora.subspace import Subspace
from ..lora.uses import not_in_use
from ..priors import PriorLike, as_prior
from ..priors.supports import start_inside
from ..tasks import Task
from .provenance import run_with_provenance
from .step_memory import estimate_any


class BayesianLoRA(Program):
    """An LLM as a Pyro program over the D latents of its LoRA layers.

    A call samples the site ``"s"`` from the prior (or takes ``s=``), and runs the LLM with it. The base model is not a
    submodule: it never enters a trace, and ``parameters()`` gives the trainable parameters only. Batches of draws are
    folded into the rows of the input, so ``Trace_ELBO(vectorize_particles=True)``, ``Predictive(parallel=True)`` and
    plates over rows work unchanged.

    Args:
        adapter: The LoRA layers inside the LLM.
        prior: Prior of s, see :func:`bayesian_lora`.

    Attributes:
        prior: Pyro program that samples s.

    Example:
        >>> import torch, scalabl_pyro
        >>> blora = scalabl_pyro.bayesian_lora(torch.nn.Sequential(torch.nn.Linear(4, 3)), r=2)
        >>> draws = torch.randn(10, 1, blora.subspace.dim)  # 10 draws for all rows
        >>> tuple(blora(torch.ones(5, 4), s=draws).shape)
        (10, 5, 3)
    """

    #: Whether a pass adds noise of its own, besides that of s. Then one pass takes one draw of s.
    adds_noise = False

    def __init__(self, adapter: Adapter, *, prior: PriorLike = 1.0) -> None:
        super().__init__()
        self.adapter = adapter
        self.prior = as_prior(prior, adapter.subspace).to(adapter.device, adapter.loc.dtype)
        self.point_estimates = _point_estimates(adapter)
        self._adapted = AdaptedLLM(adapter, effect_check=EffectCheck(adapter))

    @property
    def llm(self) -> nn.Module:
        """The adapted module."""
        return self.adapter.module

    @property
    def subspace(self) -> Subspace:
        """Names, ranks and offsets of the layers in the vector s."""
        return self.adapter.subspace

    @property
    def device(self) -> torch.device:
        """Device of the first adapted layer, where s is sampled."""
        return self.adapter.device

    def forward(
        self,
        *args: Any,
        s: Tensor | None = None,
        positions: Tensor | None = None,
        readout: Readout | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the LLM with latents s; see :class:`~scalabl_pyro.lora.forward.AdaptedLLM`.

        Args:
            args: Positional inputs of the LLM; tensors have the B rows as their first dimension.
            s: Latents, (..., D); None samples the site ``"s"`` from the prior.
            positions: Index of the only token of each row whose logits are wanted, (B,), or of T tokens per row,
                (B, T); None means all tokens.
            readout: What the output head computes in the place of logits; None means logits.
            kwargs: Keyword inputs of the LLM.

        Returns:
            What the LLM returns. Its tensors begin with the batch shape of s (all dimensions but the last), broadcast
            against the rows: s of shape (10, 1, D) gives tensors (10, B, ...).

        Example:
            >>> import torch, scalabl_pyro
            >>> blora = scalabl_pyro.bayesian_lora(torch.nn.Sequential(torch.nn.Linear(4, 3)), r=2)
            >>> s = torch.zeros(blora.subspace.dim)
            >>> tuple(blora(torch.ones(5, 4), s=s).shape)
            (5, 3)
        """
        origins = self._register_with_pyro()
        s = self.sample_latents() if s is None else s
        if s.dim() > 1:
            check_particle_dimension()
        own = {"s": s, "positions": positions, "readout": readout}
        return run_with_provenance(self._adapted, *args, origins=origins, **own, **kwargs)

    def sample_latents(self) -> Tensor:
        """Sample s from the prior; inside a Pyro handler, take it from the guide or from conditioned draws.

        Returns:
            Latents, (..., D), with the plates of the site in front.

        Example:
            >>> import torch, scalabl_pyro
            >>> blora = scalabl_pyro.bayesian_lora(torch.nn.Sequential(torch.nn.Linear(4, 3)), r=2)
            >>> tuple(blora.sample_latents().shape)
            (2,)
        """
        with KeepPlates():
            return self.prior()

    def init_loc(self, site: Mapping[str, Any]) -> Tensor:
        """Choose where a site starts, as ``init_loc_fn`` of Pyro's AutoGuides.

        Args:
            site: Pyro's record of the site.

        Returns:
            The paper's initial value for the site ``"s"``, also under a scope such as ``"a/s"``; a draw from the prior
            for any other site. Initial values outside of the support of the prior are replaced by its median.

        Example:
            >>> import torch, scalabl_pyro
            >>> from pyro.infer.autoguide import AutoNormal
            >>> blora = scalabl_pyro.bayesian_lora(torch.nn.Sequential(torch.nn.Linear(4, 3)), r=2)
            >>> guide = AutoNormal(blora.prior, init_loc_fn=blora.init_loc)
        """
        fn = site["fn"]
        if site["name"].rsplit("/", 1)[-1] == "s" and fn.event_shape == (self.subspace.dim,):
            return start_inside(fn, self.adapter.loc.to(self.device).expand(fn.shape())).clone()
        return fn.sample().detach()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the untouched base model inside the context.

        Example:
            >>> import torch, scalabl_pyro
            >>> net, x = torch.nn.Sequential(torch.nn.Linear(4, 3)), torch.ones(5, 4)
            >>> before = net(x)
            >>> blora = scalabl_pyro.bayesian_lora(net, r=2)
            >>> with blora.disabled():
            ...     torch.equal(net(x), before)
            True
        """
        with self.adapter.disabled():
            yield

    def unload(self) -> nn.Module:
        """Put the original module back, bit for bit, and return it.

        Raises:
            RuntimeError: A prediction, a training or an open context uses the module, in this thread or another.

        Example:
            >>> import torch, scalabl_pyro
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3))
            >>> blora = scalabl_pyro.bayesian_lora(net, r=2)
            >>> blora.unload() is net
            True
        """
        with not_in_use(self.llm):
            return self.adapter.unload()

    def num_parameters(self) -> dict[str, int]:
        """Count the parameters added to the base model.

        Returns:
            ``lora`` (entries of A and B), ``latents`` (D), and ``variational`` (2 D: a loc and a scale per latent).

        Example:
            >>> import torch, scalabl_pyro
            >>> blora = scalabl_pyro.bayesian_lora(torch.nn.Sequential(torch.nn.Linear(4, 3)), r=2)
            >>> blora.num_parameters()
            {'lora': 14, 'latents': 2, 'variational': 4}
        """
        return self.adapter.num_parameters()

    @known_arguments
    def estimate_memory(
        self,
        batch: Batch | Mapping[str, Any] | Sequence[Row],
        *,
        task: Task | None = None,
        gradient_checkpointing: bool = False,
    ) -> MemoryEstimate:
        """Estimate the bytes at the peak of a training step; runs forward passes of a few rows.

        Args:
            batch: Batch of a task, or keyword inputs of the LLM. With ``task``, also the rows of one batch.
            task: Task of the training, which batches of completions need.
            gradient_checkpointing: Whether blocks run again in the backward pass.

        Raises:
            ValueError: The rows have no answers, or a batch of completions has no task.

        Example:
            >>> import torch, scalabl_pyro
            >>> blora = scalabl_pyro.bayesian_lora(torch.nn.Sequential(torch.nn.Linear(4, 3)), r=2)
            >>> blora.estimate_memory({"input": torch.ones(8, 6, 4)}).trained
            280
        """
        return estimate_any(self.adapter, batch, task, gradient_checkpointing=gradient_checkpointing)

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
        n = self.num_parameters()
        facts = {"LLM": type(self.llm).__name__, "layers": len(self.subspace), "latents": n["latents"]}
        return html_table("BayesianLoRA", [*facts.items(), ("LoRA parameters", n["lora"]), ("prior", self.prior)])

    def __repr__(self) -> str:
        n = self.num_parameters()
        size = f"{len(self.subspace)} layers, {n['latents']} latents, {n['lora']} LoRA parameters"
        return f"BayesianLoRA({type(self.llm).__name__}: {size}, prior={self.prior})"

    def move_own_tensors(self) -> None:
        """Move the prior and the trained heads to the devices of their layers, after the LLM alone was moved.

        Example:
            >>> import torch, scalabl_pyro
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3))
            >>> blora = scalabl_pyro.bayesian_lora(net, r=2)
            >>> _ = net.to("cpu")
            >>> blora.move_own_tensors()
        """
        self.prior.to(self.device)
        for name, head in self.adapter.heads.items():
            head.to(next(self.llm.get_submodule(name).parameters()).device)

    def _apply(self, fn: Any, recurse: bool = True) -> "BayesianLoRA":
        self.llm._apply(fn)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> "BayesianLoRA":
        """Set the train mode of this module and of the LLM.

        Example:
            >>> import torch, scalabl_pyro
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3))
            >>> _ = scalabl_pyro.bayesian_lora(net, r=2).train(False)
            >>> net.training
            False
        """
        self.llm.train(mode)
        return super().train(mode)

    def _register_with_pyro(self) -> frozenset[str]:
        """Register A, B and the heads in Pyro's global store, because stock SVI optimizes what lies there.

        ELBO modules (``Trace_ELBO()(model, guide)``) find them as ``parameters()``. With those, a param site for each
        of the hundreds of factors would only cost time.

        Returns:
            Names of the params where Pyro tracks what depends on what; else an empty set.
        """
        if not am_i_wrapped():
            return frozenset()
        if not pyro.settings.get("module_local_params"):
            module, name = cast(nn.Module, self._modules["point_estimates"]), f"scalabl_pyro.{self.adapter.serial}"
            trained = [(key, value) for key, value in module.named_parameters() if value.requires_grad]
            return get_provenance([pyro.param(param_with_module_name(name, key), value) for key, value in trained])
        if any(isinstance(handler, TraceMessenger) and handler.param_only for handler in _PYRO_STACK):
            raise RuntimeError(
                "Stock SVI under module_local_params=True would train the guide, but not A and B. Use it in Pyro's "
                "default mode, or train with Trace_ELBO()(model, guide) and a torch optimizer."
            )
        return frozenset()


def _point_estimates(adapter: Adapter) -> nn.Module:
    """The trainable tensors of an adapter, under names without dots: ``path/A``, ``path/B``, heads."""
    container = nn.ParameterDict()
    for layer, (A, B) in zip(adapter.subspace, adapter.factors(), strict=True):
        container[f"{layer.name}/A".replace(".", "/")] = A
        container[f"{layer.name}/B".replace(".", "/")] = B
    for name, head in adapter.heads.items():
        for key, parameter in head.named_parameters():
            container[f"{name}/{key}".replace(".", "/")] = parameter
    return container
