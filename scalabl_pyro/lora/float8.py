"""Frozen linear layers that multiply in 8-bit floats, forward and for the gradient of their input.

The weight W (N, K) is kept as codes with a scale per row: W = diag(w) C. For an input x, whose rows are converted too,

    x ~ diag(a) X,           y  = diag(a) (X C') diag(w) + bias
    g diag(w) ~ diag(b) G,   dx = diag(b) (G C)

where g is the gradient of y. w goes into g before g is converted. So both products use the same codes, and dx is the
gradient of what the forward pass computes, up to the rounding of g. Tensor cores want both factors of a product in
8-bit floats along the dimension that is summed. The second product therefore reads a transposed copy of C.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .float8_device import check_device
from .float8_inputs import quantize_input
from .float8_rows import FLOAT8, quantize_rows, quantize_weight, transpose

BasePrecision = Literal["original", "float8", "float8-compact"]
"""Precision of the products with frozen weights. ``"float8-compact"`` keeps no transposed copy of the codes."""
BASE_PRECISIONS: tuple[str, ...] = get_args(BasePrecision)

#: Whether float8 layers compute with their original weights in this context.
_ORIGINAL: ContextVar[bool] = ContextVar("original_weights", default=False)


class Float8Linear(nn.Linear):
    """Frozen linear layer whose products run in 8-bit floats.

    Codes and scales are buffers of integer types, so that ``module.to(dtype)`` does not round them.

    Args:
        linear: Layer to stand for. It stays as it is, and its bias is shared.
        keep_transposed: Whether a transposed copy of the codes is kept for the gradient of the input. Otherwise each
            backward pass makes one, for the time of one product.
        keep_original: Whether the layer holds ``linear``, for :meth:`restored`.

    Attributes:
        original: ``linear``, which is not a submodule; None if it was not kept.

    Example:
        >>> layer = Float8Linear(torch.nn.Linear(16, 32))
        >>> tuple(layer(torch.ones(2, 16)).shape)
        (2, 32)
    """

    codes: Tensor
    bits: Tensor
    ones: Tensor
    transposed: Tensor | None
    like: Tensor

    def __init__(self, linear: nn.Linear, *, keep_transposed: bool = True, keep_original: bool = True) -> None:
        nn.Module.__init__(self)  # that of nn.Linear would make a weight
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self._held = (linear,) if keep_original else ()
        self.register_parameter("bias", linear.bias)
        with torch.no_grad():
            codes, scales = quantize_weight(linear.weight.detach())
        self.register_buffer("codes", codes.view(torch.uint8))
        self.register_buffer("bits", scales.view(torch.int32))
        self.register_buffer("ones", scales.new_ones(1, linear.in_features).view(torch.int32))
        self.register_buffer("transposed", transpose(codes) if keep_transposed else None)
        self.register_buffer("like", linear.weight.new_empty(0))  # follows module.to(device, dtype)
        self.train(linear.training)

    @property
    def original(self) -> nn.Linear | None:
        """Layer that this one stands for; None if it was not kept."""
        return self._held[0] if self._held else None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weight that this layer stands for."""
        return self.like.dtype

    @property
    def scales(self) -> Tensor:
        """Scale of each row of the weight, (N, 1) in float32."""
        return self.bits.view(torch.float32)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter in nn.Linear
        """The weight that the layer multiplies with, (N, K), computed at each access: for code that reads it."""
        return (self.codes.view(FLOAT8).float() * self.scales).to(self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return the product with the weight, plus the bias, in the dtype of the input.

        Args:
            input: Activations, (..., K).

        Returns:
            Activations, (..., N).
        """
        if _ORIGINAL.get() and self.original is not None:
            weight = self.original.weight.detach().to(input.device, input.dtype)
            return F.linear(input, weight, None if self.bias is None else self.bias.to(input.dtype))
        check_device(input.device)
        output: Tensor = _Product.apply(input, *quantize_input(input), self)
        return output

    def move_original(self, device: torch.device) -> None:
        """Move the weight of the original layer to another device, such as that of the host."""
        if self.original is not None and not self.original.weight.is_meta:
            self.original.weight.data = self.original.weight.data.to(device)

    def restored(self) -> nn.Linear:
        """Return the original layer, with its weight on the device and in the dtype of this layer.

        Raises:
            RuntimeError: It was not kept.
        """
        original = self.original
        if original is None:
            raise RuntimeError("The weights in their original precision were not kept.")
        original.weight.data = original.weight.data.to(device=self.like.device, dtype=self.dtype)
        return original.train(self.training)

    def product(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Multiply converted rows (M, K) with the weight, and add the bias: (M, N)."""
        return _multiply(codes, scales, self.codes, self.scales.view(1, -1), dtype, self.bias)

    def product_of_gradient(self, g: Tensor) -> Tensor:
        """Multiply the gradient of the output, (M, N), with the transposed weight: the gradient of the input, (M, K).

        The scales of the weight go into the gradient before it is converted.
        """
        codes, scales = quantize_rows(g, self.scales.view(-1))
        other = transpose(self.codes) if self.transposed is None else self.transposed
        return _multiply(codes, scales, other, self.ones.view(torch.float32), g.dtype)

    def extra_repr(self) -> str:
        """Sizes, and whether a transposed copy is kept."""
        return f"{super().extra_repr()}, keep_transposed={self.transposed is not None}"


class _Product(torch.autograd.Function):
    """y = W x + bias with frozen W and bias. Nothing of the size of x is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, layer: Float8Linear) -> Tensor:
        ctx.layer = layer
        shape = (*x.shape[:-1], layer.out_features)
        return layer.product(codes, scales, x.dtype).view(shape) if x.numel() else x.new_zeros(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        layer: Float8Linear = ctx.layer
        shape = (*g.shape[:-1], layer.in_features)
        if not g.numel():  # an expert without rows
            return g.new_zeros(shape), None, None, None
        return layer.product_of_gradient(g.reshape(-1, g.shape[-1])).view(shape), None, None, None


def _multiply(
    a: Tensor, rows: Tensor, b: Tensor, columns: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """Return diag(rows) (a b') diag(columns) + bias.

    On a CUDA device tensor cores multiply. They sum in float32 and return bfloat16. Elsewhere the codes are multiplied
    as float32, which is exact up to the rounding of the sums, and slow.

    Args:
        a: Codes, (M, K).
        rows: Scale of each row of ``a``, (M, 1).
        b: Codes as bytes, (N, K).
        columns: Scale of each row of ``b``, (1, N).
        dtype: Type of the result.
        bias: Added to each row, (N,); None means 0.
    """
    other = b.view(FLOAT8).t()
    if not a.is_cuda:
        product = (a.float() @ other.float()) * rows * columns
        return (product if bias is None else product + bias.float()).to(dtype)
    fused = bias if bias is not None and bias.dtype == torch.bfloat16 else None
    product = torch._scaled_mm(a, other, rows, columns, bias=fused, out_dtype=torch.bfloat16, use_fast_accum=True).to(
        dtype
    )
    return product if bias is None or fused is not None else product + bias.to(dtype)


@contextmanager
def original_weights() -> Iterator[None]:
    """Let float8 layers compute with their original weights inside the context, which reads them from host memory."""
    token = _ORIGINAL.set(True)
    try:
        yield
    finally:
        _ORIGINAL.reset(token)


def float8_layers(module: nn.Module) -> list[Float8Linear]:
    """Return the layers of a module that multiply in 8-bit floats."""
    return [m for m in module.modules() if isinstance(m, Float8Linear)]


def precision_of(module: nn.Module) -> BasePrecision:
    """Return the precision in which the linear layers of a module compute, from the layers that it holds."""
    layers = float8_layers(module)
    if not layers:
        return "original"
    return "float8-compact" if any(layer.transposed is None for layer in layers) else "float8"


def original_weight(layer: nn.Module) -> Tensor | None:
    """Return the weight of a layer in its original precision; None if it has none, or if it was not kept."""
    if isinstance(layer, Float8Linear):
        return None if layer.original is None else layer.original.weight
    weight: Any = getattr(layer, "weight", None)
    return weight
