"""Leave out causal masks during a CUDA graph capture, as transformers does in an eager pass.

During a capture, transformers cannot read the values of tensors. It then assumes that rows are packed (several
sequences in one row), and builds a mask. With a mask, SDPA cannot use its flash kernel, and keys and values are
repeated for each query head. For a 7B model, this adds 10 % to the memory used beyond the weights. If the caller gives
no positions, rows are not packed, so there is nothing to read and the mask is not needed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import masking_utils
from transformers.utils import import_utils

from .._process.lock import LOCK

#: Names of the functions that tell whether tensors can be read, and that read whether rows are packed.
#: They have not changed since transformers 5.0.
NAMES = ("is_tracing", "find_packed_sequence_indices")


@contextmanager
def decided_as_in_eager_passes(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Let transformers leave out a mask during a capture if it would leave it out in an eager pass.

    Args:
        inputs: Inputs of the batch. If they contain positions or a padding mask, masks are built as usual.
    """
    known = {name: getattr(masking_utils, name) for name in NAMES if hasattr(masking_utils, name)}
    if len(known) < len(NAMES) or "position_ids" in inputs:
        yield
        return
    is_tracing, find_packed = (known[name] for name in NAMES)
    captures = import_utils.is_cuda_stream_capturing  # per thread: other threads may run other passes

    def is_tracing_unless_nothing_is_read(tensor: Any = None) -> bool:
        return is_tracing(tensor) and not (tensor is None and captures())

    def packed_unless_captured(position_ids: Any) -> Any:
        return None if captures() else find_packed(position_ids)

    plain = dict(zip(NAMES, (is_tracing_unless_nothing_is_read, packed_unless_captured), strict=True))
    with LOCK:
        try:
            for name, function in plain.items():
                setattr(masking_utils, name, function)
            yield
        finally:
            for name, function in known.items():
                setattr(masking_utils, name, function)
