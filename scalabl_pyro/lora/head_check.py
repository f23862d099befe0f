"""Find out by a probe whether a model returns what its output head returns, so that a readout may replace the logits.

Some models change the logits after the head: Gemma 2 caps them, Cohere and Granite scale them. A readout of log
probabilities would be changed too. Their logits must be computed before their log probabilities.
"""

import contextvars
import logging
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .._process.cuda_capture import is_capturing
from .adapter import Adapter
from .binding import Readout
from .outputs import first_of
from .token_log_probs import TokenLogProbs, log_probs_of
from .train_mode import apart

logger = logging.getLogger(__name__)

#: Number of tokens that the probe reads.
READ = 4
#: Whether the head is the last step of a module, by module.
_KNOWN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class _Recording:
    """Readout that returns the logits of the head unchanged, and keeps them."""

    def __init__(self) -> None:
        self.logits: Tensor | None = None

    def __call__(self, head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        self.logits = head(hidden)
        return self.logits.clone()

    def repeat(self, batch_shape: torch.Size, rows: int) -> "_Recording":
        return self


def ends_with_head(adapter: Adapter, inputs: Mapping[str, Tensor]) -> bool:
    """Tell whether the logits of a module are the output of its head, without a change.

    The first call for a module runs it twice on one short row. Later calls return the same result.

    Args:
        adapter: Adapter inside the module.
        inputs: Inputs that the module knows. The probe consists of the first tokens of the first row.
    """
    module = adapter.module
    if module in _KNOWN:
        return _KNOWN[module]
    if is_capturing():
        return False
    # Latents and hidden states of the present pass are context variables. The probe uses and changes none of them.
    _KNOWN[module] = contextvars.Context().run(_probe, adapter, inputs)
    if not _KNOWN[module]:
        logger.info(
            "%s changes its logits after the head, so the logits of all completion tokens are computed at once. A "
            "training step takes more memory.",
            type(module).__name__,
        )
    return _KNOWN[module]


@torch.no_grad()
def _probe(adapter: Adapter, inputs: Mapping[str, Tensor]) -> bool:
    row: dict[str, Any] = {name: value[:1, :READ] for name, value in inputs.items()}
    tokens = row.get("decoder_input_ids", row["input_ids"])
    positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)

    def run(readout: Readout) -> Any:
        with adapter.bind(adapter.loc, positions=positions, readout=readout):
            return first_of(adapter.module(**row))

    record = _Recording()
    with apart(adapter.module):
        logits = run(record)
        # A small change counts too: a cap on the logits is small where they are small. The dtype may change.
        if record.logits is None or logits.shape != record.logits.shape:
            return False
        if not torch.equal(logits, record.logits.to(logits)):
            return False
        found = run(TokenLogProbs(tokens))
    expected = log_probs_of(logits, tokens)
    return bool(found.shape == (*expected.shape, 1)) and torch.allclose(found[..., 0].to(expected), expected, rtol=1e-3)
