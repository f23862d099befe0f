"""Probe what ``generate`` of a model computes: whether it is what a plain pass computes, and whether padding is seen.

Texts are written by ``generate`` and scored by plain passes, so both must compute the same. Some models ignore the mask
of padding left of a prompt, or get NaN from it (BLOOM and Gemma 2 in float64). In some, ``generate`` counts the
positions in another way than a pass (RoBERTa), or mixes the rows of a batch (RWKV).
"""

import contextvars
import logging
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .._process.cuda_capture import is_capturing
from ..lora.outputs import first_of
from ..lora.sharding import is_sharded
from ..lora.train_mode import apart
from .generate_options import without_own_options

logger = logging.getLogger(__name__)

#: Number of tokens of the prompt, of padding left of it, and of tokens that are written.
READ, PADDING, WRITTEN = 4, 3, 2
#: Results of the probe by module, and by its dtype, its attention, and the number of tokens of padding.
_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], bool]] = WeakKeyDictionary()


def takes_padding(module: nn.Module, prompt: list[int], pad: int) -> bool:
    """Tell whether padding left of a prompt, and a mask that hides it, change nothing of a text.

    The first call for a module runs it on two short rows. Later calls return the same result.

    Args:
        module: A causal LM.
        prompt: Tokens that it knows.
        pad: Token for the padding.
    """
    same = _known(module, prompt, padding=PADDING, pad=pad)
    if not same:
        logger.info(
            "Padding left of a prompt changes the logits of %s, so each batch has prompts of one length only.",
            type(module).__name__,
        )
    return same


def warn_of_other_logits(module: nn.Module, prompt: list[int], pad: int, start: int | None = None) -> None:
    """Log a warning if ``generate`` computes other logits than a plain pass, in which texts are scored.

    Args:
        module: A language model.
        prompt: Tokens that it knows.
        pad: Token for padding, which the probe does not use.
        start: Start token of the decoder of an encoder-decoder; None for a causal LM.
    """
    if not _known(module, prompt, padding=0, pad=pad, start=start):
        logger.warning(
            "generate of %s computes other logits than its forward pass, which learned and which scores texts. So "
            "texts are not drawn from the probabilities that they are scored with.",
            type(module).__name__,
        )


def _known(module: Any, prompt: list[int], *, padding: int, pad: int, start: int | None = None) -> bool:
    if is_sharded(module) or is_capturing():  # a pass of one process alone would wait for the others
        return True
    attention = getattr(getattr(module, "config", None), "_attn_implementation", None)
    key = (next(module.parameters()).dtype, attention, padding)
    known = _KNOWN.setdefault(module, {})
    if key not in known:
        # Latents of the present pass are context variables. The probe uses and changes none of them.
        known[key] = contextvars.Context().run(_probe, module, prompt, padding=padding, pad=pad, start=start)
    return known[key]


@torch.no_grad()
def _probe(module: Any, prompt: list[int], *, padding: int, pad: int, start: int | None = None) -> bool:
    """Return whether ``generate`` gives the logits of plain passes over the same tokens."""
    device = next(module.parameters()).device
    row = (sorted(set(prompt)) * READ)[:READ]
    rows = [[pad] * padding + row, [row[0]] * padding + row[::-1]]  # the other row has no padding
    ids = torch.tensor(rows, device=device)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    options = {**without_own_options(module), "do_sample": False, "num_beams": 1, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": pad}
    if start is not None:
        options["decoder_start_token_id"] = start
    with apart(module):
        found = module.generate(input_ids=ids, attention_mask=mask, max_new_tokens=WRITTEN, **options)
        written = found.sequences[0, -WRITTEN:].tolist()
        for step in range(WRITTEN):
            inputs = [row + written[:step]] if start is None else [row]
            given = {"input_ids": torch.tensor(inputs, device=device)}
            if start is not None:
                given["decoder_input_ids"] = torch.tensor([[start, *written[:step]]], device=device)
            if not _close(first_of(module(**given))[0, -1], found.logits[step][0]):
                return False
    return True


def _close(expected: Tensor, found: Tensor) -> bool:
    """Whether logits are equal up to rounding."""
    scale = float(expected.abs().max())
    eps = max(torch.finfo(expected.dtype).eps, torch.finfo(torch.float32).eps)  # generate rounds logits to float32
    return bool((expected.float() - found.float()).abs().max() <= eps**0.5 * scale)
