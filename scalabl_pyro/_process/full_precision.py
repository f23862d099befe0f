"""Keeps autocast to the LLM: guides and densities compute in their own dtype."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch

#: Autocast that :func:`full_precision` switched off: kinds of devices, with the dtype of each.
_SWITCHED_OFF: ContextVar[tuple[tuple[str, torch.dtype], ...]] = ContextVar("_SWITCHED_OFF", default=())


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch ``torch.autocast`` off inside the context, on all devices where it is on.

    Under autocast a guide with a matrix would round its draws to half precision.
    """
    found = [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    token = _SWITCHED_OFF.set(tuple(found)) if found else None
    try:
        with ExitStack() as stack:
            for kind, _ in found:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        if token is not None:
            _SWITCHED_OFF.reset(token)


@contextmanager
def autocast_again() -> Iterator[None]:
    """Switch the autocast on again that :func:`full_precision` switched off around this context."""
    with ExitStack() as stack:
        for kind, dtype in _SWITCHED_OFF.get():
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        yield
