"""The inputs of the decoder of an encoder-decoder: the completion, shifted to the right."""

from typing import Any

import torch
from torch import Tensor, nn

from ..lora.token_log_probs import NO_TOKEN


def decoder_inputs(module: nn.Module, tokens: Tensor, pad_token_id: int) -> Tensor:
    """Return what the decoder reads while it predicts the tokens: a start token, and each token but the last.

    The model shifts its labels itself in training, and its own method is used where it has one.

    Args:
        module: An encoder-decoder of Hugging Face.
        tokens: Tokens to predict, (B, T), with ``NO_TOKEN`` behind them.
        pad_token_id: Token for the places behind them.

    Raises:
        ValueError: The configuration of the model has no start token.

    Example:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> t5 = T5ForConditionalGeneration(T5Config(num_layers=1, d_model=8, d_ff=8, num_heads=1, vocab_size=9))
        >>> decoder_inputs(t5, torch.tensor([[5, 6, 1]]), 0)
        tensor([[0, 5, 6]])
    """
    own: Any = getattr(module, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        shifted: Tensor = own(tokens)
        return shifted
    start = getattr(getattr(module, "config", None), "decoder_start_token_id", None)
    if start is None:
        raise ValueError(
            f"{type(module).__name__} has no start token of the decoder: set model.config.decoder_start_token_id."
        )
    first = tokens.new_full((len(tokens), 1), start)
    return torch.cat([first, tokens[:, :-1].masked_fill(tokens[:, :-1] == NO_TOKEN, pad_token_id)], dim=1)
