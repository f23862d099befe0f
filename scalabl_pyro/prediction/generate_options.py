"""Options of ``generate`` of transformers: those of this library, and those that a model's configuration asks for."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from .._errors import check_count, check_flag
from .._values import integer

#: Options that change neither the probabilities of the tokens nor their choice at random.
HARMLESS = {
    "max_new_tokens",
    "do_sample",
    "stop_strings",
    "eos_token_id",
    "use_cache",
    "cache_implementation",
    "prefill_chunk_size",
    "streamer",
}
#: Options that this library sets itself, with what to do instead.
RESERVED = {
    **dict.fromkeys(
        ("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "labels"),
        "it follows from the prompts. Leave it out.",
    ),
    **dict.fromkeys(
        ("decoder_input_ids", "decoder_attention_mask", "encoder_outputs", "logits_to_keep"),
        "it follows from the prompts. Leave it out.",
    ),
    **dict.fromkeys(
        ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
        "the result holds the scores of the texts. Leave it out.",
    ),
    "num_return_sequences": "use num_samples for the number of texts.",
    "generation_config": "give its options by name, such as do_sample=True, temperature=0.7.",
    "max_length": "use max_new_tokens for the length of a text, and max_length of the task to cut prompts.",
    "tokenizer": "the tokenizer of the task is used. Leave it out.",
    "pad_token_id": "the pad token of the tokenizer is used. Leave it out.",
    "decoder_start_token_id": "texts begin as in training. Set model.config.decoder_start_token_id before training.",
}
#: Options that run the model in another way than one pass per token.
SEVERAL_PASSES = (
    "guidance_scale",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "prefill_chunk_size",
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "custom_generate",
)
#: Values without an effect, where None is not such a value.
NEUTRAL: dict[str, Any] = {
    "min_length": 0,
    "do_sample": False,
    "num_beams": 1,
    "early_stopping": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
    "output_scores": False,
    "return_dict_in_generate": False,
    "remove_invalid_values": False,
}
#: Options of a model's own configuration that stay: its special tokens, and how keys and values are kept.
OF_MODEL = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "compile_config",
    "disable_compile",
}
#: Pure sampling, where the defaults of transformers cut improbable tokens.
PURE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


def check_options(decode: str, num_samples: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options that this library must know; transformers checks the others.

    Args:
        decode: What writes a text.
        num_samples: Number of texts per prompt or draw.
        options: Options of ``generate`` of transformers.

    Returns:
        The options as Python values.

    Raises:
        TypeError, ValueError: An option is set by this library, has a wrong value, or does not go with ``decode``.
    """
    given = dict(options)
    for name in given:
        if name in RESERVED:
            raise ValueError(f"{name}: {RESERVED[name]}")
    if "do_sample" in given:
        check_flag(do_sample=given["do_sample"])
    if "num_beams" in given:
        check_count(num_beams=given["num_beams"])
        given["num_beams"] = integer(given["num_beams"])
    if "eos_token_id" in given:
        given["eos_token_id"] = sorted(set(flat_tokens(given["eos_token_id"])))
    if "stop_strings" in given:
        given["stop_strings"] = _stop_strings(given["stop_strings"])
    if num_samples > 1 and not given.get("do_sample") and given.get("num_beams", 1) < num_samples:
        raise ValueError(
            f"num_samples={num_samples} without do_sample=True would give the same text {num_samples} times: pass "
            f"do_sample=True, or num_beams={num_samples} or more."
        )
    if num_samples > given.get("num_beams", 1) > 1:
        raise ValueError(
            f"num_samples={num_samples} is more than num_beams={given['num_beams']}: a beam search has one text per "
            "beam. Use more beams, or leave num_beams out."
        )
    if decode == "mixture" and (several := [n for n in SEVERAL_PASSES if given.get(n) is not None]):
        raise ValueError(
            f"decode='mixture' does not work with {several[0]}, which runs the model in another way than once per "
            "token: leave it out, or use decode='draws'."
        )
    return given


def without_own_options(module: Any) -> dict[str, Any]:
    """Return options that undo what the generation configuration of a model says of the choice of tokens.

    The files of many models ask for sampling, beams, penalties or forced tokens. Texts would then come from another
    distribution than that of the draws.

    Args:
        module: A language model of transformers.
    """
    plain = GenerationConfig()
    own = module.generation_config.to_dict()
    names = [name for name, value in own.items() if value is not None and hasattr(plain, name)]
    return {n: NEUTRAL.get(n, getattr(plain, n)) for n in names if n not in OF_MODEL and not n.startswith("_")}


def is_neutral(name: str, value: Any) -> bool:
    """Tell whether an option of ``generate`` has a value that changes nothing in pure sampling.

    Args:
        name: Name of the option.
        value: Its value.

    Example:
        >>> is_neutral("temperature", 1.0), is_neutral("top_k", 50)
        (True, False)
    """
    plain = {**NEUTRAL, **PURE}
    return value is None or (isinstance(value, int | float) and name in plain and bool(value == plain[name]))


def flat_tokens(tokens: Any) -> list[int]:
    """Return the tokens of nested lists, arrays or tensors, without None.

    Args:
        tokens: A token, tokens, or None.

    Raises:
        TypeError: Something in it is not a token.

    Example:
        >>> flat_tokens([2, None, [3]])
        [2, 3]
    """
    if tokens is None:
        return []
    if isinstance(tokens, torch.Tensor | np.ndarray):
        tokens = tokens.tolist()
    if isinstance(tokens, list | tuple | set | frozenset):
        return [token for part in tokens for token in flat_tokens(part)]
    token = integer(tokens)
    if token is None or token < 0:
        raise TypeError(f"eos_token_id={tokens!r} is no token: give the number of a token, or a list of them.")
    return [token]


def _stop_strings(given: Any) -> list[str]:
    stops = [given] if isinstance(given, str) else list(given or []) if isinstance(given, list | tuple | None) else None
    if stops is None or any(not isinstance(stop, str) or not stop for stop in stops):
        raise ValueError(f"stop_strings={given!r}: give a text, or a list of texts, and none of them empty.")
    return stops
