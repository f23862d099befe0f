"""The LoRA layers inside one module, and what a forward pass computes with them (torch and peft only).

That (s, and for a frozen posterior also A, B and trained heads) is bound for the duration of the pass in a context
variable, so that no draw is ever written into a shared module.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .factors import Factors, cast_stacked, compute_dtype, factors_of, map_stacked
from .subspace import Subspace


@dataclass(frozen=True)
class RowNoise:
    """What is added to A x of one layer, for each row of a pass: outputs * (matrix (inputs * x)).

    Row b computes with A + diag(outputs[b]) matrix diag(inputs[b]), and no (rows, r, in) is ever built: sign vectors
    give Flipout's pseudo-independent matrices (Wen et al., 2018), masks dropout.

    Attributes:
        matrix: (r, in).
        inputs: (rows, in), default ones.
        outputs: (rows, r), default ones.
    """

    matrix: Tensor
    inputs: Tensor | None = None
    outputs: Tensor | None = None


@dataclass(frozen=True)
class Bound:
    """What one forward pass of an adapter computes with."""

    factors: Factors  # gauge applied, in the dtype of each layer
    s: tuple[Tensor, ...]  # gamma * s of each layer, (r,) or (rows, r)
    positions: Tensor | None  # (rows,) the only token of each row that the output head sees
    heads: Mapping[str, nn.Module] | None  # replacements for the trained heads
    fan_out: tuple[torch.Size, int] | None  # (*draws, rows) that rows become at the first adapted block
    noise: Sequence[RowNoise] | None = None  # of each layer, added to A x


_SERIAL = itertools.count()
_BOUND: ContextVar[Mapping["Adapter", Bound | None]] = ContextVar(
    "scalabl_pyro_bound",
    default=MappingProxyType({}),
)
_UNBOUND = Bound((), (), None, None, None)


@dataclass
class Undo:
    """What attaching changed. Data rather than closures, so that a deep copy of a module undoes its own changes."""

    flags: list[tuple[nn.Parameter, bool]] = field(default_factory=list)  # requires_grad of the base
    replaced: dict[str, nn.Module] = field(default_factory=dict)  # base layers by path
    attributes: list[str] = field(default_factory=list)  # that PEFT left on the module
    weights: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # factors of a LoRA that was there before
    casts: list[tuple[LoraLayer, bool]] = field(default_factory=list)  # its cast_input_dtype_enabled
    hooks: list[RemovableHandle] = field(default_factory=list)
    forwards: list[tuple[nn.Module, Any]] = field(default_factory=list)  # blocks, and a forward of their own


class Adapter:
    """The LoRA layers inside one module, and the latents that flow through them.

    Args:
        module: the user's module, already carrying the layers.
        layers: PEFT LoRA layers in the order of ``subspace``.
        subspace: names, ranks and shapes of the layers.
        adapter_name: PEFT's name of the adapter.
        loc: (D,) the value of s outside of any draw.
        gauge: ``"unit_rows"`` computes with the rows of A at unit norm, ``"free"`` with A as it is.
            (s, A) -> (c s, A / c) and (s, B) -> (c s, B / c) leave the function unchanged; the first is fixed by
            unit rows, the second by a prior on B alone.
        heads: float32 copies of newly initialized heads, trained in full.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[LoraLayer],
        subspace: Subspace,
        *,
        adapter_name: str,
        loc: Tensor,
        gauge: str = "unit_rows",
        heads: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.module = module
        self.original = module  # what unload() returns: the PeftModel around the module, for instance
        self.layers = tuple(layers)
        self.subspace = subspace
        self.adapter_name = adapter_name
        self.loc = loc
        self.gauge = gauge
        self.heads = dict(heads or {})
        self.serial = next(_SERIAL)  # names it in Pyro's global store; an id() could be reused
        self.blocks: tuple[nn.Module, ...] = ()  # from the first adapted one on, where there is one stack of them
        self.shares_prefix = False  # whether hooks repeat the rows at the first adapted block
        self.has_fixed_prefix = False  # whether blocks lie below it, and nothing that is trained
        self.kept_fingerprint: dict[str, Any] | None = None  # of a base that lies in pieces on several processes
        self.is_attached = True
        self.undo = Undo()

    @property
    def device(self) -> torch.device:
        """Where the first layer lives; latents are drawn there."""
        return self.factors()[0][0].device

    def factors(self) -> Factors:
        """The trainable (A, B) of each layer: (r, in) and (out, r)."""
        return tuple(factors_of(layer, self.adapter_name) for layer in self.layers)

    def prepare(self, factors: Factors) -> Factors:
        """Apply the gauge and cast to the compute dtype of each layer.

        Layers of one shape are stacked, because a step with two small kernels a layer is bound by launches.
        """
        dtypes = [compute_dtype(layer, A) for layer, (A, _) in zip(self.layers, factors, strict=True)]
        rows = [A for A, _ in factors]
        if self.gauge == "unit_rows":
            rows = map_stacked(lambda A: F.normalize(A, dim=-1), rows)
        return tuple(zip(cast_stacked(rows, dtypes), cast_stacked([B for _, B in factors], dtypes), strict=True))

    @contextmanager
    def bind(
        self,
        s: Tensor,
        *,
        positions: Tensor | None = None,
        factors: Factors | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        fan_out: tuple[torch.Size, int] | None = None,
        noise: Sequence[RowNoise] | None = None,
    ) -> Iterator[None]:
        """Compute with the latents ``s`` (D,) or (rows, D) inside the context.

        Args:
            s: one latent vector for all rows of the input, or one a row.
            positions: (rows,) index of the token whose logits are wanted; the output head then sees one
                token a row, and (rows, tokens, vocabulary) is never built.
            factors: *prepared* factors of a frozen posterior; default: the module's own.
            heads: trained heads of a frozen posterior; default: the adapter's own.
            fan_out: (batch_shape, rows): the input has ``rows`` rows, which the first adapted block repeats to
                ``batch_shape``; ``s`` and ``positions`` are those of the repeated rows.
            noise: of each layer, added to A x (A in the adapter's gauge).
        """
        prepared = self.prepare(self.factors()) if factors is None else factors
        scaled = tuple(
            layer.scaling[self.adapter_name] * part.to(A.device)
            for layer, part, (A, _) in zip(self.layers, self.subspace.split(s), prepared, strict=True)
        )
        token = _BOUND.set({**_BOUND.get(), self: Bound(prepared, scaled, positions, heads, fan_out, noise)})
        try:
            yield
        finally:
            _BOUND.reset(token)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The untouched base model inside the context."""
        token = _BOUND.set({**_BOUND.get(), self: None})
        try:
            yield
        finally:
            _BOUND.reset(token)

    def bound_layer(self, index: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """(A, B, gamma * s) that layer ``index`` computes with now; None when the adapter is disabled."""
        bound = _BOUND.get().get(self, _UNBOUND)
        if bound is None:
            return None
        if bound is not _UNBOUND:
            return (*bound.factors[index], bound.s[index])
        layer = self.layers[index]
        A, B = self.factors()[index]
        A = F.normalize(A, dim=-1) if self.gauge == "unit_rows" else A
        s = self.subspace.split(self.loc)[index].to(A.device)
        return A, B, layer.scaling[self.adapter_name] * s

    def bound_noise(self, index: int) -> RowNoise | None:
        """What layer ``index`` adds to A x now."""
        bound = _BOUND.get().get(self)
        return None if bound is None or bound.noise is None else bound.noise[index]

    def check_attached(self) -> None:
        """Raise if the layers are gone, so that nobody takes the base model for the adapted one."""
        if not self.is_attached:
            raise RuntimeError(
                "This adapter was unloaded from its module. Load the posterior with from_pretrained(), or call "
                "bayesian_lora() again."
            )

    def unload(self) -> nn.Module:
        """Put the original module back, bit for bit, and return it."""
        self.is_attached = False
        undo, self.undo = self.undo, Undo()
        for handle in undo.hooks:
            handle.remove()
        for block, forward in undo.forwards:
            del block.forward
            if forward is not None:
                block.forward = forward
        for layer in self.layers:
            layer.lora_variant.pop(self.adapter_name, None)
        for layer, casts_input in undo.casts:
            layer.cast_input_dtype_enabled = casts_input
        for weight, data in undo.weights:
            weight.data = data
        for name, original in undo.replaced.items():
            self.module.set_submodule(name, original)
        for name in undo.attributes:
            delattr(self.module, name)
        for parameter, flag in undo.flags:
            parameter.requires_grad_(flag)
        return self.original

    def num_parameters(self) -> dict[str, int]:
        """Parameters added: ``lora`` (A and B), ``latents`` (D), ``variational`` (2 D, as the paper counts)."""
        lora = sum(A.numel() + B.numel() for A, B in self.factors())
        return {"lora": lora, "latents": self.subspace.dim, "variational": 2 * self.subspace.dim}

    # hooks -------------------------------------------------------------------------------------

    def positions(self) -> Tensor | None:
        """(rows,) the only token of each row that the current pass reads, see ``last_token``."""
        bound = _BOUND.get().get(self)
        return None if bound is None else bound.positions

    def fan_out(self) -> tuple[torch.Size, int] | None:
        """What rows become at the first adapted block of the current pass, see ``shared_prefix``."""
        bound = _BOUND.get().get(self)
        return None if bound is None else bound.fan_out

    def head(self, name: str) -> nn.Module | None:
        """The trained head that answers for module ``name`` in the current pass; None when disabled."""
        bound = _BOUND.get().get(self, _UNBOUND)
        if bound is None:
            return None
        return (bound.heads or self.heads)[name]
