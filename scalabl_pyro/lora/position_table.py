"""The longest input that a model with a table of positions can read.

GPT-2, BERT and OPT, among others, look up each position in a table. Behind its end, torch raises an IndexError on a
CPU, and a GPU cannot be used any more. Models with rotary or relative positions have no such end.
"""

from torch import nn

from .targets import text_config

#: A table has as many rows as the model has positions, and a few more in some families (OPT and BART: 2).
SPARE_ROWS = 8


def trained_positions(module: nn.Module) -> int | None:
    """Return the number of positions that the configuration of a model names, or None if it names none.

    Args:
        module: A language model or classifier.
    """
    config = text_config(module)
    name = "max_seq_len" if getattr(config, "model_type", "") == "mpt" else "max_position_embeddings"
    positions = getattr(config, name, None)
    return positions if isinstance(positions, int) and positions > 0 else None


def position_limit(module: nn.Module) -> int | None:
    """Return the largest number of tokens for which a model has positions in a table, or None if it has no table.

    Args:
        module: A language model or classifier.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> position_limit(GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, n_positions=64, vocab_size=9)))
        64
    """
    named = trained_positions(module)
    if named is None:
        return None
    limits = [named] if getattr(module.config, "model_type", "") == "mpt" else []  # its biases end there
    for path, part in module.named_modules():
        if isinstance(part, nn.Embedding) and _is_position(path) and 0 <= part.num_embeddings - named <= SPARE_ROWS:
            padding = part.padding_idx  # RoBERTa counts from the position after that of its padding
            skipped = padding + 1 if padding is not None and padding < SPARE_ROWS else 0
            limits.append(min(named, part.num_embeddings - skipped))
    for path, table in module.named_buffers():
        if _is_position(path) and table.dim() == 2 and 0 <= len(table) - named <= SPARE_ROWS:
            limits.append(named)
    return min(limits, default=None)


def _is_position(path: str) -> bool:
    """Whether a module or buffer holds absolute positions, by its name."""
    name = path.rpartition(".")[2]
    return ("pos" in name or name == "wpe") and "rel" not in name
