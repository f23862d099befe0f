"""The text of single tokens: what each one adds to the text before it, and how characters without a shape are shown."""

import unicodedata
from collections.abc import Iterable

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


class TokenTexts:
    """Texts of the tokens of a tokenizer, as they stand behind other tokens.

    Many tokenizers drop the space of a token that stands alone. So each token is decoded behind a letter, whose text is
    cut off. Each text is decoded once.

    Args:
        tokenizer: Tokenizer of the LLM.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._letter: list[int] = list(tokenizer("a", add_special_tokens=False).input_ids)[-1:]
        self._start = self._decode(self._letter)
        self._known: dict[int, str] = {}

    def of(self, token: int) -> str:
        """Return the text of a token.

        Args:
            token: Its id.
        """
        if token not in self._known:
            self._known[token] = self._behind([token])
        return self._known[token]

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        """Return the text of each token, so that all of them together are the text.

        A character of several tokens belongs to the last of them, and the others have an empty text.

        Args:
            tokens: T token ids.
        """
        ids = [int(token) for token in tokens]
        pieces: list[str] = []
        waiting: list[int] = []
        for place, token in enumerate(ids):
            waiting.append(token)
            text = self.of(token) if len(waiting) == 1 else self._behind(waiting)
            is_last = len(waiting) == MAX_FRAGMENTS or place == len(ids) - 1
            is_whole = is_last or not text.endswith(FRAGMENT)
            pieces.append(text if is_whole else "")
            if is_whole:
                waiting = []
        return pieces

    def _behind(self, tokens: list[int]) -> str:
        whole = self._decode([*self._letter, *tokens])
        return whole[len(self._start) :] if whole.startswith(self._start) else self._decode(tokens)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


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
