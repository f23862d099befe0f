"""The LoRA layers inside one module, and the latents that flow through them (torch and peft only)."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from .binding import UNBOUND, Bound, RowNoise, binding, bound_to
from .factors import Factors, cast_stacked, compute_dtype, factors_of, map_stacked
from .module_changes import ModuleChanges
from .shared_prefix import split_blocks
from .subspace import Subspace
from .targets import output_head

Gauge = Literal["unit_rows", "free"]
GAUGES: tuple[str, ...] = get_args(Gauge)
_SERIAL = itertools.count()


class Adapter:
    """The LoRA layers inside one module, and the latents that flow through them.

    Its attributes are set by the constructor. Later, only three methods change it: ``rest_at`` moves the resting
    point, ``keep_fingerprint`` remembers a fingerprint, and ``unload`` takes the layers away. What a forward pass
    computes with is bound by ``bind`` for that pass, and never stored here.

    Args:
        module: Module of the user, which already carries the layers.
        layers: PEFT LoRA layers, in the order of ``subspace``.
        subspace: Names, ranks and shapes of the layers.
        adapter_name: Name of the adapter in PEFT.
        loc: Resting point: the value of s outside of any draw, (D,).
        changes: Record of the changes to ``module``.
        gauge: ``"unit_rows"`` computes with the rows of A at unit norm, ``"free"`` with A as it is.
            (s, A) -> (c s, A / c) and (s, B) -> (c s, B / c) leave the function unchanged. Unit rows fix the first
            of these two freedoms, a prior on B alone fixes the second.
        heads: Float32 copies of newly initialized heads, which are trained in full, by module path.
        original: What ``unload`` returns, such as the PeftModel around ``module``; None means ``module``.

    Attributes:
        blocks: Transformer blocks from the first adapted one on; empty where the module has no single stack of them.
        blocks_below: Blocks below the first adapted one.
        serial: Number of this adapter in Pyro's global store. (An ``id()`` could be reused.)
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[LoraLayer],
        subspace: Subspace,
        *,
        adapter_name: str,
        loc: Tensor,
        changes: ModuleChanges,
        gauge: str = "unit_rows",
        heads: Mapping[str, nn.Module] | None = None,
        original: nn.Module | None = None,
    ) -> None:
        self.module = module
        self.layers = tuple(layers)
        self.subspace = subspace
        self.adapter_name = adapter_name
        self.gauge = gauge
        self.heads = dict(heads or {})
        self.serial = next(_SERIAL)
        below, adapted = split_blocks(module, subspace.names)
        self.blocks_below: tuple[nn.Module, ...] = tuple(below)
        self.blocks: tuple[nn.Module, ...] = tuple(adapted)
        self._original = module if original is None else original
        self._loc = loc
        self._changes = changes
        self._is_attached = True
        self._fingerprint: Mapping[str, Any] | None = None

    @property
    def device(self) -> torch.device:
        """Device of the first adapted layer, where latents are drawn."""
        return self.factors()[0][0].device

    @property
    def loc(self) -> Tensor:
        """Resting point: the value of s outside of any draw, (D,); ``rest_at`` moves it."""
        return self._loc

    @property
    def shares_prefix(self) -> bool:
        """Whether hooks repeat the rows for the draws at the first adapted block, see ``shared_prefix``.

        Models without an output head (classifiers) are left out: they pool by the rows of their input.
        """
        return bool(self.blocks_below) and output_head(self.module) is not None

    @property
    def has_fixed_prefix(self) -> bool:
        """Whether blocks lie below the first adapted one, and nothing that is trained."""
        head = output_head(self.module)
        return self.shares_prefix and all(self.module.get_submodule(name) is head for name in self.heads)

    @property
    def kept_fingerprint(self) -> Mapping[str, Any] | None:
        """Fingerprint of a base model that lies in pieces on several processes, once it was computed."""
        return self._fingerprint

    def keep_fingerprint(self, fingerprint: Mapping[str, Any]) -> None:
        """Remember the fingerprint of the base model, so that one process can save a posterior by itself."""
        self._fingerprint = fingerprint

    def factors(self) -> Factors:
        """The trainable (A, B) of each layer: (r, in) and (out, r)."""
        return tuple(factors_of(layer, self.adapter_name) for layer in self.layers)

    @torch.no_grad()
    def rest_at(
        self, loc: Tensor, *, factors: Factors | None = None, heads: Mapping[str, nn.Module] | None = None
    ) -> None:
        """Move the resting point, for calls of the module outside of any draw.

        Args:
            loc: New value of s, (D,).
            factors: Values that (A, B) of each layer get; None leaves them.
            heads: Modules whose state the trained heads get; None leaves them.
        """
        self._copy(factors or (), heads or {})
        self._loc = loc

    @contextmanager
    def resting_at(self, loc: Tensor, *, factors: Factors, heads: Mapping[str, nn.Module]) -> Iterator[None]:
        """Rest at given values, frozen, inside the context; everything is as before afterwards.

        Args:
            loc: Value of s inside the context, (D,).
            factors: Values of (A, B) of each layer inside the context.
            heads: Modules whose state the trained heads have inside the context.
        """
        trained = [p for pair in self.factors() for p in pair]
        trained += [p for head in self.heads.values() for p in head.parameters()]
        flags = [p.requires_grad for p in trained]
        values = [p.detach().clone() for p in trained]
        own_loc = self._loc
        try:
            self.rest_at(loc, factors=factors, heads=heads)
            for p in trained:
                p.requires_grad_(False)
            yield
        finally:
            self._loc = own_loc
            with torch.no_grad():
                for p, value, flag in zip(trained, values, flags, strict=True):
                    p.copy_(value)
                    p.requires_grad_(flag)

    def prepare(self, factors: Factors) -> Factors:
        """Apply the gauge, and cast to the compute dtype of each layer.

        Layers of one shape are stacked, because a step with two small kernels per layer is bound by launches.
        """
        dtypes = [compute_dtype(layer, A) for layer, (A, _) in zip(self.layers, factors, strict=True)]
        rows = [A for A, _ in factors]
        if self.gauge == "unit_rows":
            rows = map_stacked(lambda A: F.normalize(A, dim=-1), rows)
        return tuple(zip(cast_stacked(rows, dtypes), cast_stacked([B for _, B in factors], dtypes), strict=True))

    def bind(
        self,
        s: Tensor,
        *,
        positions: Tensor | None = None,
        factors: Factors | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        fan_out: tuple[torch.Size, int] | None = None,
        noise: Sequence[RowNoise] | None = None,
    ) -> AbstractContextManager[None]:
        """Compute with the latents ``s`` inside the context.

        Args:
            s: Latents, (D,) for all rows of the input, or (rows, D) for each row.
            positions: Index of the token of each row whose logits are wanted, (rows,). The output head then sees one
                token per row, and logits (rows, tokens, vocabulary) are never built.
            factors: *Prepared* factors of a frozen posterior; None means the module's own.
            heads: Trained heads of a frozen posterior; None means the adapter's own.
            fan_out: (batch_shape, rows): the input has ``rows`` rows, which the first adapted block repeats to
                ``batch_shape``. ``s`` and ``positions`` are those of the repeated rows.
            noise: Noise that each layer adds to A x (with A in the adapter's gauge).
        """
        prepared = self.prepare(self.factors()) if factors is None else factors
        scaled = tuple(
            layer.scaling[self.adapter_name] * part.to(A.device)
            for layer, part, (A, _) in zip(self.layers, self.subspace.split(s), prepared, strict=True)
        )
        return binding(self, Bound(prepared, scaled, positions, heads, fan_out, noise))

    def disabled(self) -> AbstractContextManager[None]:
        """Run the untouched base model inside the context."""
        return binding(self, None)

    def current_layer(self, index: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """(A, B, gamma * s) that layer ``index`` computes with now; None when the adapter is disabled."""
        bound = bound_to(self)
        if bound is None:
            return None
        if bound is not UNBOUND:
            return (*bound.factors[index], bound.s[index])
        layer = self.layers[index]
        A, B = self.factors()[index]
        A = F.normalize(A, dim=-1) if self.gauge == "unit_rows" else A
        s = self.subspace.split(self.loc)[index].to(A.device)
        return A, B, layer.scaling[self.adapter_name] * s

    def current_noise(self, index: int) -> RowNoise | None:
        """The noise that layer ``index`` adds to A x now."""
        bound = bound_to(self)
        return None if bound is None or bound.noise is None else bound.noise[index]

    def current_positions(self) -> Tensor | None:
        """The only token of each row that the present pass reads, (rows,); see ``last_token``."""
        bound = bound_to(self)
        return None if bound is None else bound.positions

    def current_fan_out(self) -> tuple[torch.Size, int] | None:
        """What the rows become at the first adapted block of the present pass; see ``shared_prefix``."""
        bound = bound_to(self)
        return None if bound is None else bound.fan_out

    def current_head(self, name: str) -> nn.Module | None:
        """The trained head that answers for module ``name`` in the present pass; None when disabled."""
        bound = bound_to(self)
        return None if bound is None else (bound.heads or self.heads)[name]

    def check_attached(self) -> None:
        """Raise if the layers are gone, so that nobody takes the base model for the adapted one."""
        if not self._is_attached:
            raise RuntimeError(
                "This adapter was unloaded from its module. Load the posterior with from_pretrained(), or call "
                "bayesian_lora() again."
            )

    def unload(self) -> nn.Module:
        """Put the original module back, bit for bit, and return it."""
        self._is_attached = False
        self._changes.revert()
        return self._original

    def num_parameters(self) -> dict[str, int]:
        """Parameters added: ``lora`` (A and B), ``latents`` (D), ``variational`` (2 D, as the paper counts)."""
        lora = sum(A.numel() + B.numel() for A, B in self.factors())
        return {"lora": lora, "latents": self.subspace.dim, "variational": 2 * self.subspace.dim}

    def _copy(self, factors: Factors, heads: Mapping[str, nn.Module]) -> None:
        for pair, values in zip(self.factors() if factors else (), factors, strict=True):
            for factor, value in zip(pair, values, strict=True):
                factor.copy_(value)
        for name, head in heads.items():
            self.heads[name].load_state_dict(head.state_dict())
