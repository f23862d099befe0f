"""The tokens with which an LLM writes labels after a prompt.

Prompt and label are tokenized together, because a tokenizer may join the end of the prompt and the label. Many
tokenizers join a space with the word after it, for instance: then the space belongs to the label's token.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

#: Marks that open where they stand after a space, and close elsewhere.
_MARKS = "\"'`*_$"


@dataclass(frozen=True)
class LabelTokens:
    """Tokens of labels after a prompt.

    Attributes:
        labels: The labels that are one token.
        ids: Token of each label.
        joined: Whitespace between prompt and label that the tokenizer joins to the label.
        refused: Reason for each other label.
    """

    labels: tuple[str, ...]
    ids: tuple[int, ...]
    joined: str
    refused: dict[str, str]


def find_label_tokens(
    tokenizer: PreTrainedTokenizerBase,
    tokens_of: Callable[[str], list[int]],
    before: str,
    labels: Sequence[str],
    *,
    after: str = "",
    space_first: bool,
) -> LabelTokens:
    """Find the token of each label in the tokenization of prompt and label together.

    The prompt's tokens are those before the label's token. The tokenizer decides whether whitespace at the end of
    ``before`` belongs to the prompt or to the label's token.

    Args:
        tokenizer: The tokenizer.
        tokens_of: Function that tokenizes a text as the task does.
        before: All text before the label.
        labels: The labels.
        after: Text that a chat template writes after the label.
        space_first: Whether the last character of ``before`` is a space that is not part of the prompt. If the
            tokenizer ignores spaces, this space is then left out.

    Returns:
        The labels that are one token, and the reasons why the others are not.

    Example:
        >>> from scalabl_pyro.tasks.label_tokens import find_label_tokens
        >>> tokens_of = lambda text: tokenizer(text).input_ids
        >>> find_label_tokens(tokenizer, tokens_of, "Answer: ", ["A", "B"], space_first=True).joined
        ' '
    """
    together = {label: tokens_of(before + label) for label in labels}
    spaces = len(before) - len(before.rstrip())
    cuts = [1, 0, *range(2, spaces + 1)] if space_first else list(range(spaces + 1))
    heads = {cut: tokens_of(before[: len(before) - cut]) for cut in cuts}
    known = {cut: [label for label in labels if together[label][:-1] == heads[cut]] for cut in cuts}
    # The labels must share one prompt. The cut that suits most labels from the first on wins; the first of equals.
    cut = max(cuts, key=lambda cut: len(list(takewhile(known[cut].__contains__, labels))))
    fits = known[cut]
    if not fits:  # a prompt may have other tokens where a text goes on, such as two line ends
        ends = {label: str(tokenizer.decode(together[label][-1:])).strip() for label in labels}
        exact = [label for label in labels if ends[label] == label.strip() and label]
        fits = [label for label in exact if together[label][:-1] == together[exact[0]][:-1]]
    refused = {}
    for label in labels:
        if label not in fits:
            refused[label] = _not_one_token(tokenizer, label, together[label], heads[cuts[0]])
        elif together[label][-1] == tokenizer.unk_token_id:
            refused[label] = f"The tokenizer does not know the label {label!r}: choose another."
        elif after and tokens_of(before + label + after)[: len(together[label])] != together[label]:
            refused[label] = (
                f"The tokenizer joins the label {label!r} and the text {after[:12]!r}, which the chat template writes "
                "after it. Use chat=False, or other labels."
            )
    one = tuple(label for label in labels if label not in refused)
    return LabelTokens(one, tuple(together[label][-1] for label in one), before[len(before) - cut :], refused)


def _not_one_token(tokenizer: Any, label: str, together: list[int], head: list[int]) -> str:
    same = next((i for i, pair in enumerate(zip(together, head, strict=False)) if pair[0] != pair[1]), len(head))
    pieces = tokenizer.convert_ids_to_tokens(together[same:])
    if same < len(head) and len(pieces) == 1:
        return (
            f"The tokenizer joins the end of the prompt and the label {label!r} to one token, {pieces[0]!r}. End the "
            "prompt with another character, such as ':'."
        )
    return (
        f"The label {label!r} is not one token after this prompt (it becomes {pieces}): choose labels of one token, "
        "such as A, B, C, or short words, or end the template otherwise."
    )


def check_end(tokenizer: PreTrainedTokenizerBase, tokens_of: Callable[[str], list[int]], before: str) -> None:
    """Check that a prompt does not end with an end-of-text token, after which an LLM begins another text.

    Args:
        tokenizer: The tokenizer.
        tokens_of: Function that tokenizes a text as the task does.
        before: All text before the label.

    Raises:
        ValueError: The text ends with such a token, or the tokenizer appends one.

    Example:
        >>> from scalabl_pyro.tasks.label_tokens import check_end
        >>> check_end(tokenizer, lambda text: tokenizer(text).input_ids, "Answer:")
    """
    last = tokens_of(before)[-1:]
    if not last:
        return
    own = tokenizer(before, add_special_tokens=False).input_ids[-1:]
    is_end = last[0] == tokenizer.eos_token_id
    if own != last and (is_end or last[0] in tokenizer.all_special_ids):
        raise ValueError(
            f"The tokenizer appends the end-of-text token {tokenizer.decode(last)!r} to prompts, so the LLM would "
            "predict what follows the end of a text: set tokenizer.add_eos_token = False. MultipleChoice needs a "
            "causal LM with its own tokenizer, not an encoder or an encoder-decoder such as T5."
        )
    if is_end:
        raise ValueError(
            f"The prompt ends with the end-of-text token {tokenizer.eos_token!r}, so the LLM would predict how another "
            "text begins. Use chat=False, or let tokenizer.chat_template begin the turn of the assistant."
        )


def separator(prompt: str, special_tokens: Sequence[str]) -> str:
    r"""Return what a writer puts between a prompt in plain text and the label: a space, or nothing.

    Nothing follows whitespace, an opening bracket, quote or tag, a special token, or a script without spaces.

    Args:
        prompt: The prompt.
        special_tokens: Texts of the special tokens.

    Example:
        >>> from scalabl_pyro.tasks.label_tokens import separator
        >>> [separator(prompt, ["<s>"]) for prompt in ("Answer:", "Answer: ", "Answer: (", "Answer:\n")]
        [' ', '', '', '']
    """
    is_tag = re.search(r"<[\w.:|-]+>$", prompt) is not None
    is_special = prompt.endswith(tuple(special_tokens))
    words = prompt.rstrip(_MARKS)
    opens_mark = words != prompt and _needs_no_space(words[-1:])
    return "" if _needs_no_space(prompt[-1:]) or opens_mark or is_tag or is_special else " "


def _needs_no_space(character: str) -> bool:
    """Whether a word follows the character without a space. The empty text stands for the start of a text."""
    if not character or character.isspace() or unicodedata.category(character) in ("Ps", "Pi"):
        return True
    is_wide = unicodedata.east_asian_width(character) in ("W", "F")  # Chinese and Japanese, but not Korean
    return is_wide and "HANGUL" not in unicodedata.name(character, "")
