"""While a step is captured, transformers builds a causal mask that an eager pass leaves out.

It cannot read tensors then, so it assumes the worst: packed rows. With a mask SDPA has no flash kernel, and keys and
values are repeated for each query head: a tenth more memory above the weights of a 7B model. Where the caller gives no
positions, rows are not packed, and there is nothing to read.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import masking_utils
from transformers.utils import import_utils

from .._process.lock import LOCK

#: What asks whether tensors can be read, and what reads whether rows are packed; the same since transformers 5.0.
NAMES = ("is_tracing", "find_packed_sequence_indices")


@contextmanager
def decided_as_in_eager_passes(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Have transformers leave out masks in a capture where it would leave them out in an eager pass.

    Args:
        inputs: Inputs of the batch. If they hold positions or a padding mask, masks are built as usual.
    """
    known = {name: getattr(masking_utils, name) for name in NAMES if hasattr(masking_utils, name)}
    if len(known) < len(NAMES) or "position_ids" in inputs:
        yield
        return
    is_tracing, find_packed = (known[name] for name in NAMES)
    captures = import_utils.is_cuda_stream_capturing  # asks for this thread: others may be in passes of their own

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
