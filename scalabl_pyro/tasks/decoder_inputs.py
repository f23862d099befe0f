"""The inputs of the decoder of an encoder-decoder: the completion, shifted to the right."""

from typing import Any

import torch
from torch import Tensor, nn

from ..lora.token_log_probs import NO_TOKEN


def decoder_inputs(module: nn.Module, tokens: Tensor, pad_token_id: int) -> Tensor:
    """Return what the decoder reads while it predicts the tokens: a start token, and each token but the last.

    It is the shift that the model itself does with its labels in training. But mBART and PLBART move the last label to
    the front, where the decoder would see it: here each decoder begins with its start token, as in generation.

    Args:
        module: An encoder-decoder of Hugging Face.
        tokens: Tokens to predict, (B, T), with ``NO_TOKEN`` behind them.
        pad_token_id: Token for the places behind them.

    Raises:
        ValueError: The model has no start token.

    Example:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> t5 = T5ForConditionalGeneration(T5Config(num_layers=1, d_model=8, d_ff=8, num_heads=1, vocab_size=9))
        >>> decoder_inputs(t5, torch.tensor([[5, 6, 1]]), 0)
        tensor([[0, 5, 6]])
    """
    first = tokens.new_full((len(tokens), 1), start_token(module))
    return torch.cat([first, tokens[:, :-1].masked_fill(tokens[:, :-1] == NO_TOKEN, pad_token_id)], dim=1)


def start_token(module: nn.Module) -> int:
    """Return the token with which the decoder of an encoder-decoder begins, in training and in generation.

    Args:
        module: An encoder-decoder of Hugging Face.

    Raises:
        ValueError: The model has no start token.

    Example:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> start_token(T5ForConditionalGeneration(T5Config(num_layers=1, d_model=8, d_ff=8, num_heads=1)))
        0
    """
    for place in ("config", "generation_config"):
        config: Any = getattr(module, place, None)
        start = getattr(config, "decoder_start_token_id", None)
        if start is None and hasattr(config, "get_text_config"):
            start = getattr(config.get_text_config(decoder=True), "decoder_start_token_id", None)
        if start is not None:
            return int(start)
    raise ValueError(
        f"{type(module).__name__} has no start token of the decoder: set model.config.decoder_start_token_id."
    )
