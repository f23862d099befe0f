"""One forward pass of an adapted LLM for any batch of draws: draws are folded into the rows of the input."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .binding import RowNoise
from .factors import Factors
from .shared_prefix import repeat_rows


class LatentLLM(Protocol):
    """Anything that runs an LLM with given latents: :class:`AdaptedLLM`, :class:`~scalabl_pyro.BayesianLoRA`."""

    @property
    def llm(self) -> nn.Module:
        """The adapted module."""

    def __call__(self, *args: Any, s: Tensor, positions: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the LLM with latents s, (..., D)."""


class AdaptedLLM:
    """An LLM as a function of its input and of the latents s.

    Args:
        adapter: the LoRA layers inside the LLM.
        factors: (A, B) of a frozen posterior; default: the layers' own, trainable ones.
        heads: trained heads of a frozen posterior; default: the adapter's own.
    """

    def __init__(
        self, adapter: Adapter, *, factors: Factors | None = None, heads: Mapping[str, nn.Module] | None = None
    ) -> None:
        self.adapter = adapter
        self.heads = heads
        self.factors = None if factors is None else adapter.prepare(factors)
        self._repeats_inputs = False  # whether a pass showed that hooks cannot repeat the rows of this module
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
        noise: Sequence[RowNoise] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the LLM with latents s.

        Args:
            args: positional inputs of the LLM, rows first.
            s: (..., D). Its batch dimensions broadcast against the B rows as in Pyro: (D,) and (1, D) are one draw
                for all rows, (B, D) one a row, (P, 1, D) P draws of all rows.
            positions: (B,) the only token of each row whose logits are wanted.
            noise: Noise of each layer, for the B rows. With it, s must be one draw, or one draw per row.
            kwargs: keyword inputs of the LLM; tensors with B rows are repeated for each draw.

        Returns:
            What the LLM returns, its tensors with shape (*batch, ...), where batch is the broadcast shape above.

        Raises:
            ValueError: an empty batch, or draws whose shape does not fit the rows.
        """
        self.adapter.check_attached()
        rows = num_rows(args, kwargs)
        batch_shape = _broadcast(s, rows)
        if s.shape[:-1].numel() == 1:
            s = s.reshape(-1)
        else:
            s = s.expand(*batch_shape, s.shape[-1]).reshape(-1, s.shape[-1])
        if self._takes_use_cache:
            kwargs.setdefault("use_cache", False)  # keys and values of past tokens serve generation only
        if batch_shape == (rows,):
            return self._run(args, kwargs, s, positions, noise=noise)
        if noise is not None:
            raise ValueError(f"s has shape {tuple(s.shape)}: noise of each row goes with one draw of s, or one a row.")
        positions = repeat_rows(positions, batch_shape, rows)
        if self.adapter.shares_prefix and not self._repeats_inputs and batch_shape.numel() > rows:
            output = self._run(args, kwargs, s, positions, fan_out=(batch_shape, rows))
            if _leading(output) == batch_shape.numel():
                return _unfold_rows(output, batch_shape)
            self._repeats_inputs = True  # the module counts rows behind the blocks by its input
        output = self._run(repeat_rows(args, batch_shape, rows), repeat_rows(kwargs, batch_shape, rows), s, positions)
        return _unfold_rows(output, batch_shape)

    def _run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        s: Tensor,
        positions: Tensor | None,
        **bound: Any,
    ) -> Any:
        with self.adapter.bind(s, positions=positions, factors=self.factors, heads=self.heads, **bound):
            return self.llm(*args, **kwargs)


def num_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """B, the rows of the first tensor among the inputs of an LLM."""
    for x in (*args, *kwargs.values()):
        if torch.is_tensor(x) and x.dim() > 0:
            if x.shape[0] == 0:
                raise ValueError("The batch is empty: it has 0 rows.")
            return x.shape[0]
    raise ValueError("Call it with at least one tensor whose first dimension is the rows, such as input_ids=...")


def _broadcast(s: Tensor, rows: int) -> torch.Size:
    try:
        return torch.broadcast_shapes(s.shape[:-1], (rows,))
    except RuntimeError:
        raise ValueError(
            f"s has shape {tuple(s.shape)} and the batch {rows} rows: the dimension before the last must be 1 (one "
            f"draw for all rows) or {rows} (one a row). Draws belong to a plate left of the data, as in (P, 1, D)."
        ) from None


def _leading(output: Any) -> int:
    """Rows of the first tensor of an output: the tensor itself, or the logits of a Hugging Face output."""
    if isinstance(output, Mapping):
        output = output.get("logits", next(iter(output.values())))
    while isinstance(output, tuple | list):
        output = output[0]
    return output.shape[0]


def _unfold_rows(x: Any, batch_shape: torch.Size) -> Any:
    """(rows of all draws, ...) back to (*batch_shape, ...), in tensors, tuples and Hugging Face outputs."""
    if torch.is_tensor(x) and x.dim() > 0 and x.shape[0] == batch_shape.numel():
        return x.unflatten(0, batch_shape)
    if isinstance(x, Mapping):
        for key, value in x.items():
            x[key] = _unfold_rows(value, batch_shape)  # type: ignore[index]  # ModelOutput is a mutable mapping
        return x
    if isinstance(x, tuple | list):
        return type(x)(_unfold_rows(v, batch_shape) for v in x)
    return x
