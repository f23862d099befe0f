"""Run an adapted LLM once for any batch of draws. The input's rows are repeated for each draw."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .binding import Readout, RowNoise
from .factors import Factors
from .outputs import first_of, map_tensors
from .pass_checks import EffectCheck, RowCheck
from .shared_prefix import first_row, repeat_rows
from .train_mode import apart


class LatentLLM(Protocol):
    """Interface for running an LLM with given latents: :class:`AdaptedLLM`, :class:`~scalabl_pyro.BayesianLoRA`."""

    @property
    def llm(self) -> nn.Module:
        """The adapted module."""

    @property
    def adapter(self) -> Adapter:
        """The LoRA layers in it."""

    def __call__(
        self, *args: Any, s: Tensor, positions: Tensor | None = None, readout: Readout | None = None, **kwargs: Any
    ) -> Any:
        """Run the LLM with latents ``s`` of shape (..., D)."""


class AdaptedLLM:
    """An LLM as a function of its input and the latents s.

    Args:
        adapter: Adapter that holds the LLM's LoRA layers.
        factors: Pair (A, B) per layer from a frozen posterior. None uses the layers' own trainable factors.
        heads: Trained heads of a frozen posterior. None uses the adapter's own heads.
        effect_check: Check of the first pass that the LLM calls every adapted layer. None checks nothing.
    """

    def __init__(
        self,
        adapter: Adapter,
        *,
        factors: Factors | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        effect_check: EffectCheck | None = None,
    ) -> None:
        adapter.check_in_place()
        self.adapter = adapter
        self.heads = heads
        self.factors = None if factors is None else adapter.prepare(factors)
        self._effect_check = effect_check
        self._row_check = RowCheck()
        self._repeats_inputs = False  # True once a pass shows that hooks cannot repeat this module's rows
        self._takes_use_cache = "use_cache" in inspect.signature(adapter.module.forward).parameters

    @property
    def llm(self) -> nn.Module:
        """The adapted module."""
        return self.adapter.module

    def __call__(
        self,
        *args: Any,
        s: Tensor,
        positions: Tensor | None = None,
        readout: Readout | None = None,
        noise: Sequence[RowNoise] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the LLM with latents s.

        Args:
            args: Positional inputs of the LLM. The first dimension of each tensor is the rows.
            s: Latents, shape (..., D). Their batch dimensions broadcast against the B rows as in Pyro: (D,) and
                (1, D) are one draw for all rows, (B, D) is one draw per row, (P, 1, D) is P draws for all rows.
            positions: Position of the token whose logits are computed, per row, shape (B,), or of T tokens per row,
                (B, T). None computes all logits.
            readout: What the output head computes in the place of logits, for the B rows.
            noise: Noise per layer for the B rows. With noise, ``s`` must be one draw, or one draw per row.
            kwargs: Keyword inputs of the LLM. Tensors with B rows are repeated for each draw.

        Returns:
            The LLM's output. Its tensors have shape (*batch, ...), where batch is the shape after broadcasting.

        Raises:
            ValueError: If the batch is empty, the shape of ``s`` does not fit the rows, the output is one loss for
                several draws, or the LLM compares rows with each other and they have different draws.
            RuntimeError: If the LLM bypasses adapted layers, see :class:`~scalabl_pyro.lora.pass_checks.EffectCheck`.
        """
        self.adapter.check_attached()
        rows = num_rows(args, kwargs)
        batch_shape = _broadcast(s, rows)
        if s.shape[:-1].numel() == 1:
            s = s.reshape(-1)
        else:
            _refuse_labels(kwargs)
            s = s.expand(*batch_shape, s.shape[-1]).reshape(-1, s.shape[-1])
        if self._takes_use_cache:
            kwargs.setdefault("use_cache", False)  # only generation needs the keys and values of past tokens
        if s.dim() > 1:
            one_row = self._one_row(args, kwargs, s[:1], rows)
            self._row_check.check_order(self.llm, (args, kwargs), (rows, len(s)), one_row)
        if batch_shape == (rows,):
            output = self._run(args, kwargs, s, positions, noise=noise, readout=readout)
            self._check_rows(output, args, kwargs, s, rows)
            return output
        if noise is not None:
            raise ValueError(
                f"s has shape {tuple(s.shape)}. Noise per row allows only one draw of s for all rows, or one draw per "
                "row. Pass s with shape (D,) or (rows, D)."
            )
        repeated = None if readout is None else readout.repeat(batch_shape, rows)
        output = self._run_folded(args, kwargs, s, positions, repeated, batch_shape=batch_shape, rows=rows)
        self._check_rows(output, args, kwargs, s, rows)
        return _unfold_rows(output, batch_shape)

    def _run_folded(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        s: Tensor,
        positions: Tensor | None,
        readout: Readout | None,
        *,
        batch_shape: torch.Size,
        rows: int,
    ) -> Any:
        """Run the LLM on the rows of the input, repeated to ``batch_shape``."""
        positions = repeat_rows(positions, batch_shape, rows)
        if self.adapter.shares_prefix and not self._repeats_inputs and batch_shape.numel() > rows:
            output = self._run(args, kwargs, s, positions, readout=readout, fan_out=(batch_shape, rows))
            if len(first_of(output)) == batch_shape.numel():
                return output
            self._repeats_inputs = True  # after its blocks, this module takes the number of rows from its input
        args, kwargs = repeat_rows(args, batch_shape, rows), repeat_rows(kwargs, batch_shape, rows)
        return self._run(args, kwargs, s, positions, readout=readout)

    def _check_rows(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any], s: Tensor, rows: int) -> None:
        """Check that rows with different draws do not mix."""
        if s.dim() > 1:
            self._row_check(output, len(s), self._one_row(args, kwargs, s[0], rows))

    def _one_row(self, args: tuple[Any, ...], kwargs: dict[str, Any], s: Tensor, rows: int) -> Callable[[], Any]:
        """Return a function that runs the LLM on the first row alone."""

        def run() -> Any:
            with apart(self.llm), torch.no_grad():
                return self._bound(first_row(args, rows), first_row(kwargs, rows), s, None)

        return run

    def _run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        s: Tensor,
        positions: Tensor | None,
        **bound: Any,
    ) -> Any:
        """Run the LLM, and check the first pass."""
        check = self._effect_check
        if check is None:
            return self._bound(args, kwargs, s, positions, **bound)
        called = check.begin()
        output = self._bound(args, kwargs, s, positions, called=called, **bound)
        check.finish(called, lambda: self._bound(args, kwargs, s.detach(), positions, **bound))
        return output

    def _bound(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], s: Tensor, positions: Tensor | None, **bound: Any
    ) -> Any:
        if torch.is_autocast_enabled(s.device.type):
            torch.clear_autocast_cache()  # which would keep factors and heads as they were before an optimizer step
        with self.adapter.bind(s, positions=positions, factors=self.factors, heads=self.heads, **bound):
            output = self.llm(*args, **kwargs)
        if s.dim() > 1:
            _refuse_one_number(output)
        return output


def num_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return B, the number of rows in the first tensor among an LLM's inputs."""
    for x in (*args, *kwargs.values()):
        if torch.is_tensor(x) and x.dim() > 0:
            if x.shape[0] == 0:
                raise ValueError("The batch is empty: it has 0 rows. Pass at least one row.")
            return x.shape[0]
    raise ValueError(
        "The inputs contain no tensor with rows. Pass at least one tensor whose first dimension is the rows, "
        "as in input_ids=..."
    )


def _broadcast(s: Tensor, rows: int) -> torch.Size:
    try:
        return torch.broadcast_shapes(s.shape[:-1], (rows,))
    except RuntimeError:
        raise ValueError(
            f"s has shape {tuple(s.shape)} and the batch has {rows} rows. The second-to-last dimension of s must be 1 "
            f"(one draw for all rows) or {rows} (one draw per row). For P draws of all rows, give s the shape "
            "(P, 1, D)."
        ) from None


def _unfold_rows(x: Any, batch_shape: torch.Size) -> Any:
    """Reshape (rows for all draws, ...) to (*batch_shape, ...) in tensors, tuples and Hugging Face outputs."""

    def unfold(t: Tensor) -> Tensor:
        return t.unflatten(0, batch_shape) if t.dim() > 0 and t.shape[0] == batch_shape.numel() else t

    return map_tensors(x, unfold)


def _refuse_labels(kwargs: Mapping[str, Any]) -> None:
    """Refuse labels beside several draws, before the pass: Hugging Face models average their loss over all rows."""
    for name, value in kwargs.items():
        if "label" in name and value is not None:
            raise ValueError(_one_loss(f"{name}="))


def _refuse_one_number(output: Any) -> None:
    """Refuse an output that is one number for all draws, such as the loss of a model that got its answers."""
    first = output
    if isinstance(output, Mapping):
        first = output.get("loss", next(iter(output.values()), None))
    elif isinstance(output, tuple | list) and output:
        first = output[0]
    if torch.is_tensor(first) and first.dim() == 0:
        raise ValueError(_one_loss("The model"))


def _one_loss(what: str) -> str:
    return (
        f"{what} gives one loss for several draws of s, averaged over all their rows, but each draw needs a likelihood "
        "of its own. Leave the labels out and compute the likelihood from the logits, as in "
        "pyro.sample('label', dist.Categorical(logits=...), obs=labels)."
    )
