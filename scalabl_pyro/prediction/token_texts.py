"""The text of single tokens: what each one adds to the text before it, and how characters without a shape are shown."""

import unicodedata
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

#: What tokenizers write for bytes that are not a whole character.
FRAGMENT = "\ufffd"
#: Most tokens that one character has: it has at most 4 bytes in UTF-8.
MAX_FRAGMENTS = 4

#: What stands for a token without a text, such as a part of a character.
EMPTY = "\u00b7"
#: Joiners shape the characters around them, as in Persian words and in emoji.
JOINERS = "\u200c\u200d"
#: Categories of characters without a shape: control, format, lone surrogates, separators of lines and paragraphs.
SHAPELESS = ("Cc", "Cf", "Cs", "Zl", "Zp")


def pieces_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], previous: Sequence[int]) -> list[str]:
    """Return the text of each token, so that all of them together are the text.

    A token is decoded behind the token before it, because many tokenizers drop the space of a token that stands alone.
    A character of several tokens belongs to the last of them, and the others have an empty text.

    Args:
        tokenizer: Tokenizer of the LLM.
        tokens: T token ids.
        previous: Token before each of them.
    """
    pieces: list[str] = []
    waiting: list[int] = []
    for place, token in enumerate(tokens):
        waiting.append(int(token))
        first = place + 1 - len(waiting)
        text = text_behind(tokenizer, int(previous[first]), waiting)
        is_whole = not text.endswith(FRAGMENT) or len(waiting) == MAX_FRAGMENTS or place == len(tokens) - 1
        pieces.append(text if is_whole else "")
        if is_whole:
            waiting = []
    return pieces


def tops_of(
    tokenizer: PreTrainedTokenizerBase, tokens: Iterable[Sequence[int]], previous: Sequence[int]
) -> list[list[str]]:
    """Return the texts of tokens that could stand at each place.

    Args:
        tokenizer: Tokenizer of the LLM.
        tokens: Token ids at each of T places.
        previous: Token before each place.
    """
    return [
        [text_behind(tokenizer, int(before), [int(token)]) for token in here]
        for here, before in zip(tokens, previous, strict=True)
    ]


def text_behind(tokenizer: PreTrainedTokenizerBase, before: int, tokens: Sequence[int]) -> str:
    """Return the text that tokens add behind another token.

    Args:
        tokenizer: Tokenizer of the LLM.
        before: Token before them.
        tokens: Token ids.
    """
    start, whole = (_decode(tokenizer, ids) for ids in ([before], [before, *tokens]))
    return whole[len(start) :] if whole.startswith(start) else _decode(tokenizer, tokens)


def visible(text: str) -> str:
    r"""Return a text whose characters can all be seen, and do not change the order of others.

    A line break becomes an arrow before the break, a tab becomes an arrow, and other characters without a shape become
    their code, such as ``<U+202E>``.

    Args:
        text: Any text, such as that of one token.

    Example:
        >>> visible("a\u202eb")
        'a<U+202E>b'
    """
    if not text:
        return EMPTY
    is_alone = all(c in JOINERS for c in text)
    return "".join(c if c in JOINERS and not is_alone else _shape(c) for c in text)


def _shape(character: str) -> str:
    if character in "\n\t":
        return "\u21b5\n" if character == "\n" else "\u21e5   "
    if unicodedata.category(character) in SHAPELESS:
        return f"<U+{ord(character):04X}>"
    return character


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))
