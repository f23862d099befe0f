"""Find out by a probe whether a model looks ahead, so that padding on the right would change its logits.

A causal LM does not see padding that stands right of the token that is read. It needs no attention mask then. Encoders,
and decoders that are built from an encoder (RoBERTa without ``is_decoder=True``), see all tokens of a row.
"""

import contextvars
import inspect
import logging
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .._process.cuda_capture import is_capturing
from .sharding import is_sharded
from .train_mode import apart

logger = logging.getLogger(__name__)

#: Number of tokens that the probe reads, and number of tokens right of them.
READ, TAIL = 4, 2
#: Whether a module needs a mask, by module.
_KNOWN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def needs_mask(module: nn.Module, input_ids: Tensor) -> bool:
    """Tell whether padding on the right changes the logits of a module, so that it needs an attention mask.

    The first call for a module runs it on one short row with two different ends. Later calls return the same result.

    Args:
        module: A language model that takes ``input_ids``.
        input_ids: Tokens that the module knows, (rows, tokens). The probe consists of them.

    Returns:
        False for a causal LM. True for a module that looks ahead and obeys a mask. If these tokens do not show it,
        whether the module takes a mask.

    Raises:
        ValueError: The module looks ahead, and a mask does not hide the padding.

    Example:
        >>> from transformers import RobertaConfig, RobertaForCausalLM
        >>> config = RobertaConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
        >>> needs_mask(RobertaForCausalLM(config), torch.tensor([[3, 4, 5, 6]]))
        True
    """
    known = looks_ahead(module, input_ids)
    return _takes_mask(module) if known is None else known


def looks_ahead(module: nn.Module, input_ids: Tensor) -> bool | None:
    """Tell whether the logits of a token depend on the tokens after it.

    Args:
        module: A language model that takes ``input_ids``.
        input_ids: Tokens that the module knows, (rows, tokens). The probe consists of them.

    Returns:
        False for a causal LM, True for a module that looks ahead. None if these tokens do not show it, or if the module
        is split over several processes.

    Raises:
        ValueError: The module looks ahead, and a mask does not hide the padding.

    Example:
        >>> looks_ahead(AutoModelForCausalLM.from_pretrained("gpt2"), torch.tensor([[3, 4, 5, 6]]))
        False
    """
    known = _KNOWN.get(module)
    # In a module that is split, a pass of one process alone would wait for the others.
    if known is None and not is_sharded(module) and not is_capturing():
        # Latents and hidden states of the present pass are context variables. The probe uses and changes none of them.
        known = contextvars.Context().run(_probe, module, input_ids)
        if known is not None:
            _KNOWN[module] = known
    return known


@torch.no_grad()
def _probe(module: nn.Module, input_ids: Tensor) -> bool | None:
    """Return whether a module needs a mask, or None if these tokens do not show it."""
    tokens = input_ids.unique()
    row = tokens[:READ].repeat(READ)[:READ]
    ends = [torch.cat([row, token.expand(TAIL)]).unsqueeze(0) for token in (tokens[0], tokens[-1])]
    run = getattr(module, "_orig_mod", module)  # a compiled module would be compiled again for another shape
    with apart(module):
        plain = [_logits(run, ids) for ids in ends]
        scale = None if plain[0] is None else plain[0].abs().max()
        if len(tokens) == 1 or scale is None or not bool((scale > 0) & (scale < torch.inf)):
            return None
        eps = torch.finfo(plain[0].dtype).eps
        if bool((plain[0] - plain[1]).abs().max() <= 8 * eps * scale):
            return False
        mask = (torch.arange(READ + TAIL, device=row.device) < READ).long().unsqueeze(0)
        masked = [_logits(run, ids, attention_mask=mask) for ids in ends] if _takes_mask(run) else plain
    if not bool((masked[0] - masked[1]).abs().max() <= eps**0.5 * scale):
        raise ValueError(
            f"{type(run).__name__} looks ahead: the logits of a token depend on the tokens after it, and an attention "
            "mask does not hide padding. A prediction would depend on the other rows of its batch. Load a causal LM "
            "(AutoModelForCausalLM)."
        )
    logger.info("%s looks ahead, so its passes get an attention mask for the padding.", type(run).__name__)
    return True


def _logits(module: nn.Module, input_ids: Tensor, **inputs: Tensor) -> Any:
    """Return the logits of the tokens that the probe reads, or None if there is not one set of logits per token."""
    logits = getattr(module(input_ids=input_ids, **inputs), "logits", None)
    if not torch.is_tensor(logits) or logits.dim() != 3 or logits.shape[1] != input_ids.shape[1]:
        return None
    return logits[:, :READ]


def _takes_mask(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return "attention_mask" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
