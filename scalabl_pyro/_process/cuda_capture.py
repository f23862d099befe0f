"""Tells whether a CUDA graph is being captured, while nothing can be read from the GPU."""

import torch


def is_capturing() -> bool:
    """Tell whether the present stream records a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
