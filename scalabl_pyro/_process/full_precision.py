"""Keeps autocast to the LLM: guides and densities compute in their own dtype."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch ``torch.autocast`` off inside the context, on all devices where it is on.

    Under autocast a guide with a matrix would round its draws to half precision.
    """
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
