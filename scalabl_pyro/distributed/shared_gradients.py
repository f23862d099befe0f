"""The gradients of one step in one buffer, which several processes add up by one all_reduce.

The buffer keeps its place in memory, so a CUDA graph can write into it, and another one can read the sum from it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from ..data.batch import Batch
from .gloo_group import reaching
from .processes import Processes

#: Each gradient begins at a multiple of this many numbers, so that fused kernels read whole words of 16 bytes.
ALIGNMENT = 32
#: Types of sums, in the order of their precision. The code of a type is its position.
DTYPES = (torch.float32, torch.float64)


class SharedGradients:
    """The gradients of all trained parameters, and a few numbers beside them, as one tensor.

    A parameter that has a gradient in some processes gets their sum in all processes. A parameter that has a gradient
    in no process keeps none. Which gradients there are is known to the host. So it travels in the message of the hosts,
    and nobody reads it from a GPU.

    Args:
        parameters: Trained parameters, in the same order in all processes.
        processes: Processes that share each batch.

    Attributes:
        present: For each parameter 1 if it had a gradient when :meth:`pack` ran last, else 0.
    """

    def __init__(self, parameters: Sequence[Tensor], processes: Processes) -> None:
        self.parameters = list(parameters)
        self.processes = processes
        self.present = [0] * len(self.parameters)
        self._flat: Tensor | None = None
        self._terms = torch.empty(0)
        self._pieces: list[Tensor] = []
        self._sums: list[Tensor] = []

    def pack(self, terms: Tensor) -> None:
        """Copy ``terms`` and all gradients into the buffer, once there is one; it waits for no device.

        Args:
            terms: Numbers to sum with the gradients, (n,).
        """
        self.present = [int(p.grad is not None) for p in self.parameters]
        if self._flat is not None:
            self._fill(terms)

    @torch.no_grad()
    def _fill(self, terms: Tensor) -> None:
        if missing := [piece for piece, p in zip(self._pieces, self.parameters, strict=True) if p.grad is None]:
            torch._foreach_zero_(missing)
        self._terms.copy_(terms)
        own = [(p.grad, piece) for p, piece in zip(self.parameters, self._pieces, strict=True) if p.grad is not None]
        if own:
            torch._foreach_copy_([piece for _, piece in own], [grad.detach() for grad, _ in own])

    def agree(self, batch: Batch, signal: int, terms: Tensor) -> int:
        """Exchange the message of the hosts: all are at this step, with the same batch, and these gradients.

        The first message also settles the type of the buffer: that of the process with the most precise numbers.

        Args:
            batch: The joint batch.
            signal: Signal that this process has received; 0 for none.
            terms: What :meth:`pack` got. Only its type and its size are looked at, and its numbers if there was no
                buffer.

        Returns:
            The largest signal that any process has received; 0 for none.

        Raises:
            ValueError: The processes hold different batches.
            LostProcess: A process cannot be reached.
        """
        dtypes = {p.dtype for p in self.parameters} | {terms.dtype}
        code = 1 if torch.float64 in dtypes else 0
        signal, (code, *present) = self.processes.synchronize(batch, signal, [code, *self.present])
        if self._flat is None:
            self._allocate(terms, DTYPES[code])
            self._fill(terms)
        for parameter, total, is_there in zip(self.parameters, self._sums, present, strict=True):
            parameter.grad = total if is_there else None
        return signal

    def reduce(self) -> None:
        """Sum the buffer over all processes, after :meth:`agree`. On a GPU only the stream waits for it."""
        assert self._flat is not None
        with reaching():
            dist.all_reduce(self._flat, group=self.processes.group_of(self._flat))

    @torch.no_grad()
    def unpack(self) -> Tensor:
        """Bring the sums to the parameters, after :meth:`reduce`; it waits for no device.

        Returns:
            The sum of ``terms`` over processes, (n,).
        """
        for piece, total, parameter in zip(self._pieces, self._sums, self.parameters, strict=True):
            if total is not piece and parameter.grad is not None:
                total.copy_(piece)
        return self._terms.clone()

    def _allocate(self, terms: Tensor, dtype: torch.dtype) -> None:
        sizes = [terms.numel(), *(p.numel() for p in self.parameters)]
        padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        self._flat = torch.zeros(sum(padded), device=terms.device, dtype=dtype)
        first, *rest = [part[:size] for part, size in zip(self._flat.split(padded), sizes, strict=True)]
        self._terms = first
        self._pieces = [piece.view(p.shape) for piece, p in zip(rest, self.parameters, strict=True)]
        self._sums = [
            piece if _fits(piece, p) else torch.empty_like(p, requires_grad=False)
            for piece, p in zip(self._pieces, self.parameters, strict=True)
        ]


def _fits(piece: Tensor, parameter: Tensor) -> bool:
    """Whether a part of the buffer can be the gradient of a parameter itself."""
    own = (parameter.dtype, parameter.device, parameter.stride())
    return (piece.dtype, piece.device, piece.stride()) == own
