"""Compare the function of a language model before and after a change: one short forward pass each."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from .outputs import first_of
from .sharding import is_sharded
from .targets import input_embeddings, is_encoder_decoder
from .train_mode import apart

logger = logging.getLogger(__name__)

#: Number of tokens of the pass.
LENGTH = 8


def probe_output(module: nn.Module, base: nn.Module, *, strict: bool = False) -> Tensor | None:
    """Return the output of a language model for one short row of tokens, or None if the module takes no tokens.

    Args:
        module: Module to call, such as a PeftModel.
        base: Base model inside it.
        strict: Whether an error of the module is raised; otherwise the output is None.
    """
    try:
        inputs = _probe_inputs(base)
        if inputs is None:
            return None
        with torch.no_grad(), apart(module):
            output = first_of(module(**inputs))
        return output if torch.is_tensor(output) and output.is_floating_point() else None
    except Exception:
        if strict:
            raise
        logger.debug("%s takes no row of tokens alone.", type(base).__name__, exc_info=True)
        return None


def check_same_output(before: Tensor | None, after: Tensor | None) -> None:
    """Raise ValueError if two outputs differ by more than rounding."""
    if before is None or after is None:
        return
    tolerance = 0.05 if before.dtype in (torch.bfloat16, torch.float16) else 1e-3
    scale = before.abs().max().float().item()
    change = (before.float() - after.float()).abs().max().item()
    if change > tolerance * max(scale, 1e-6):
        raise ValueError(
            f"Wrapping would change the function of this model: an output changed by {change:.3g}, and outputs are "
            f"up to {scale:.3g}. The model is as it was. Merge its adapters, or adapt the plain base model."
        )


def _probe_inputs(base: nn.Module) -> dict[str, Tensor] | None:
    """Return a row of different tokens that ends as a text ends; None for modules without token embeddings.

    The tokens are spread over the vocabulary. The first ones are often unused in training, and float32 then rounds a
    hundred times as much as for a text.
    """
    weight = getattr(input_embeddings(base), "weight", None)
    if weight is None or weight.is_meta or weight.dim() != 2 or is_sharded(base):
        return None
    config: Any = getattr(base, "config", None)
    special = {getattr(config, name, None) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    usable = [i for i in range(weight.shape[0]) if i not in special]
    step = max(len(usable) // (LENGTH + 1), 1)
    ids = usable[step::step][:LENGTH]
    eos = getattr(config, "eos_token_id", None)
    if is_encoder_decoder(base) and isinstance(eos, int):
        ids[-1] = eos
    row = torch.tensor([ids], device=weight.device)
    names = ("input_ids", "decoder_input_ids") if is_encoder_decoder(base) else ("input_ids",)
    return dict.fromkeys(names, row)
