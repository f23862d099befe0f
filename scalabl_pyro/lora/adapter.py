"""The adapter: the LoRA layers of one module, and the latents that they compute with (torch and peft only)."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from .._display import Summarized
from .binding import UNBOUND, Bound, Readout, RowNoise, binding, bound_to
from .constants import jit_constants
from .factors import Factors, cast_stacked, compute_dtype, factors_of, map_stacked
from .in_use import check_active, check_in_place
from .module_changes import ModuleChanges
from .shared_prefix import split_blocks
from .start import Start
from .subspace import Subspace
from .targets import is_encoder_decoder, output_head

Gauge = Literal["unit_rows", "free"]
GAUGES: tuple[str, ...] = get_args(Gauge)
_SERIAL = itertools.count()
UNLOADED = (
    "The adapter was unloaded from its module: load the posterior with from_pretrained(), or call bayesian_lora()."
)


class Adapter(Summarized):
    """The LoRA layers of one module, and the latents that they compute with.

    The constructor sets all attributes. Later, only five methods change the adapter: ``rest_at`` moves the resting
    point, ``restart`` moves everything back to its start, ``keep_start`` sets that start, ``keep_fingerprint`` stores a
    fingerprint, and ``unload`` removes the layers. The method ``bind`` sets the latents of one forward pass.

    Args:
        module: Module of the user, which already contains the layers.
        layers: PEFT LoRA layers, in the order of ``subspace``.
        subspace: Names, ranks and shapes of the layers.
        adapter_name: Name of the adapter in PEFT.
        loc: Resting point, (D,): the value of s in passes that bind no draw.
        changes: Record of the changes to ``module``.
        gauge: ``"unit_rows"`` computes with the rows of A at unit norm, ``"free"`` with A as it is.
            Two changes leave the function of the model unchanged: (s, A) -> (c s, A / c) and (s, B) -> (c s, B / c).
            Unit rows remove the first freedom. A prior on B removes the second.
        heads: Float32 copies of newly initialized heads by module path. They are trained in full.
        base_tensors: Frozen tensors of the module that the checkpoint of the base model does not hold, by name.
        original: What ``unload`` returns, such as the PeftModel around ``module``; None means ``module``.

    Attributes:
        blocks: Blocks from the first adapted one on; empty unless the module has exactly one stack of blocks.
        blocks_below: Transformer blocks below the first adapted one.
        serial: Number of this adapter in Pyro's global store (Python could use an ``id()`` again).
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
        base_tensors: Mapping[str, Tensor] | None = None,
        original: nn.Module | None = None,
    ) -> None:
        self.module = module
        self.layers = tuple(layers)
        self.subspace = subspace
        self.adapter_name = adapter_name
        self.gauge = gauge
        self.heads = dict(heads or {})
        self.base_tensors = dict(base_tensors or {})
        self.serial = next(_SERIAL)
        below, adapted = split_blocks(module, subspace.names)
        self.blocks_below: tuple[nn.Module, ...] = tuple(below)
        self.blocks: tuple[nn.Module, ...] = tuple(adapted)
        self.original = module if original is None else original
        self._loc = loc
        self.changes = changes
        self._is_attached = True
        self._fingerprint: Mapping[str, Any] | None = None
        self.keep_start()

    @property
    def device(self) -> torch.device:
        """Device of the first adapted layer, where latents are drawn."""
        return self.factors()[0][0].device

    @property
    def loc(self) -> Tensor:
        """Resting point, (D,): the value of s in passes that bind no draw. ``rest_at`` moves it."""
        return self._loc

    @property
    def shares_prefix(self) -> bool:
        """Whether hooks repeat the rows once per draw at the first adapted block; see ``shared_prefix``.

        False for models without an output head (classifiers): they pool over tokens with the rows of their input,
        which are not repeated. False for encoder-decoders, whose decoder reads the rows of the encoder.
        """
        has_head = output_head(self.module) is not None
        return bool(self.blocks_below) and has_head and not is_encoder_decoder(self.module)

    @property
    def has_fixed_prefix(self) -> bool:
        """Whether draws share the blocks below the first adapted one, and training cannot change their outputs."""
        head = output_head(self.module)
        return self.shares_prefix and all(self.module.get_submodule(name) is head for name in self.heads)

    @property
    def kept_fingerprint(self) -> Mapping[str, Any] | None:
        """Fingerprint of a base model that is split over several processes; None before it was computed."""
        return self._fingerprint

    def keep_fingerprint(self, fingerprint: Mapping[str, Any]) -> None:
        """Store the fingerprint of the base model, so that one process can save a posterior without the others."""
        self._fingerprint = fingerprint

    def factors(self) -> Factors:
        """Return the trainable A (r, in) and B (out, r) of each layer."""
        return tuple(factors_of(layer, self.adapter_name) for layer in self.layers)

    @torch.no_grad()
    def rest_at(
        self, loc: Tensor, *, factors: Factors | None = None, heads: Mapping[str, nn.Module] | None = None
    ) -> None:
        """Move the resting point, where the module computes if no draw is bound.

        Args:
            loc: New value of s, (D,).
            factors: New values of (A, B) of each layer; None keeps the present values.
            heads: Modules whose state is copied to the trained heads, by path; None keeps the present state.
        """
        self._copy(factors or (), heads or {})
        self._loc = loc

    @contextmanager
    def resting_at(self, loc: Tensor, *, factors: Factors, heads: Mapping[str, nn.Module]) -> Iterator[None]:
        """Move the resting point inside the context, and freeze the factors and heads; then restore everything.

        Args:
            loc: Value of s inside the context, (D,).
            factors: Values of (A, B) of each layer inside the context.
            heads: Modules whose state the trained heads have inside the context, by path.
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

    def keep_start(self) -> None:
        """Take the present latents and factors as those that ``restart`` returns to. Heads start as in the module."""
        self._start = Start(self._loc, self.factors())

    def restart(self) -> None:
        """Put latents, factors and trained heads back to their start."""
        self._start.restore(self.factors(), self.heads, self.module)
        self._loc = self._start.loc

    def has_moved(self) -> bool:
        """Whether latents, factors or trained heads differ from their start."""
        return self._start.differs(self._loc, self.factors(), self.heads, self.module)

    def prepare(self, factors: Factors) -> Factors:
        """Apply the gauge to the factors, and cast them to the compute dtype of each layer.

        Args:
            factors: (A, B) of each layer.

        Returns:
            Prepared (A, B) of each layer.
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
        factors: Factors | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        **options: Any,
    ) -> AbstractContextManager[None]:
        """Compute with the latents ``s`` inside the context.

        Args:
            s: Latents: (D,) for all rows of the input together, or (rows, D) with one s per row.
            factors: Factors of a frozen posterior, as :meth:`prepare` returns them; None means those of the module.
            heads: Trained heads of a frozen posterior by path; None means those of the adapter.
            options: Other fields of :class:`~scalabl_pyro.lora.binding.Bound`, such as ``positions``. With ``fan_out``,
                the input has fewer rows, and ``s``, ``positions`` and ``readout`` belong to the repeated rows.
        """
        check_active(self.subspace.names, self.layers, self.adapter_name)
        if torch.jit.is_tracing():
            factors, heads = jit_constants(self.factors(), self.heads, self.prepare, factors=factors, heads=heads)
        prepared = self.prepare(self.factors()) if factors is None else factors
        scaled = tuple(
            layer.scaling[self.adapter_name] * part.to(A.device)
            for layer, part, (A, _) in zip(self.layers, self.subspace.split(s), prepared, strict=True)
        )
        return binding(self, Bound(prepared, scaled, heads=heads, **options))

    def disabled(self) -> AbstractContextManager[None]:
        """Run the untouched base model inside the context."""
        check_active(self.subspace.names, self.layers, self.adapter_name)
        return binding(self, None)

    def current_layer(self, index: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return (A, B, gamma * s) of layer ``index`` in the present pass; None if the adapter is disabled."""
        bound = bound_to(self)
        if bound is None:
            return None
        if bound is not UNBOUND:
            if bound.called is not None:
                bound.called.add(index)
            return (*bound.factors[index], bound.s[index])
        layer = self.layers[index]
        A, B = self.factors()[index]
        A = F.normalize(A, dim=-1) if self.gauge == "unit_rows" else A
        s = self.subspace.split(self.loc)[index].to(A.device)
        return A, B, layer.scaling[self.adapter_name] * s

    def current_noise(self, index: int) -> RowNoise | None:
        """Return the noise that layer ``index`` adds to A x in the present pass; None if there is none."""
        bound = bound_to(self)
        return None if bound is None or bound.noise is None else bound.noise[index]

    def current_positions(self) -> Tensor | None:
        """Return the index of the tokens that the present pass reads in each row; see ``read_tokens``."""
        bound = bound_to(self)
        return None if bound is None else bound.positions

    def current_readout(self) -> Readout | None:
        """Return what replaces the logits in the present pass; None if the head computes logits."""
        bound = bound_to(self)
        return None if bound is None else bound.readout

    def current_fan_out(self) -> tuple[torch.Size, int] | None:
        """Return the pair (batch_shape, rows) of the present pass, see ``bind``; None if rows are not repeated."""
        bound = bound_to(self)
        return None if bound is None else bound.fan_out

    def current_head(self, name: str) -> nn.Module | None:
        """Return the trained head that replaces module ``name`` in the present pass; None if disabled."""
        bound = bound_to(self)
        return None if bound is None else (bound.heads or self.heads)[name]

    def check_attached(self) -> None:
        """Raise a RuntimeError if the layers were removed, so that the base model is not used by mistake."""
        if not self._is_attached:
            raise RuntimeError(UNLOADED)

    def check_in_place(self) -> None:
        """Raise a RuntimeError if other code, such as ``unload()`` of PEFT, took the layers out of the module."""
        if self._is_attached:
            check_in_place(self.module, self.subspace.names, self.layers)

    def unload(self) -> nn.Module:
        """Restore the original module exactly, bit for bit, and return it. Nothing may use the module meanwhile."""
        self._is_attached = False
        self.changes.revert()
        return self.original

    def num_parameters(self) -> dict[str, int]:
        """Count the added parameters: ``lora`` (A and B), ``latents`` (D), ``variational`` (2 D, as in the paper)."""
        lora = sum(A.numel() + B.numel() for A, B in self.factors())
        return {"lora": lora, "latents": self.subspace.dim, "variational": 2 * self.subspace.dim}

    def _summary(self) -> dict[str, object]:
        return {**self.subspace._summary(), "gauge": self.gauge}

    def _copy(self, factors: Factors, heads: Mapping[str, nn.Module]) -> None:
        for pair, values in zip(self.factors() if factors else (), factors, strict=True):
            for factor, value in zip(pair, values, strict=True):
                factor.copy_(value)
        for name, head in heads.items():
            self.heads[name].load_state_dict(head.state_dict())
