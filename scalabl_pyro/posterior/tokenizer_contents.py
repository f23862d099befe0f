"""What the JSON files of a tokenizer may hold: the tokenizers library takes much memory for some small contents.

Measured with tokenizers 0.23: 90 bytes and 1 microsecond per character of added tokens, 340 bytes per node of the tree
of a Unigram vocabulary, and 130 microseconds per character of some regular expressions.
"""

import base64
import binascii
from collections.abc import Iterator
from typing import Any

from .._errors import MAX_SHOWN

SPECIAL_TOKENS, EXTRA = "special_tokens_map.json", "extra_special_tokens"
#: Options of an added token, and two more keys that files have. The tokenizers library prints the name of every other
#: option to the standard output, so a file could write lines there.
TOKEN_OPTIONS = {"content", "lstrip", "normalized", "rstrip", "single_word", "special", "id", "__type"}
#: Largest number of characters of all added tokens, and of all texts of a file that may become special tokens. 130,000
#: added tokens of 10 characters have 1.3 million.
MAX_ADDED = 2**21
#: Largest number of nodes in the tree of a Unigram vocabulary, and of bytes in its pieces. 250,000 pieces have up to 1
#: million nodes and 3 million bytes.
MAX_NODES, MAX_PIECES = 2**21, 2**24
#: Largest number of characters of all regular expressions together. Real ones have about 1,000.
MAX_REGEX = 2**14
#: Entries with long texts that are not tokens.
NOT_TOKENS = ("chat_template", "response_schema")


def check_vocabulary(name: str, content: Any) -> None:
    """Check a file with a vocabulary.

    Args:
        name: Name of the file.
        content: Its parsed JSON.

    Raises:
        ValueError: Tokens, pieces, regular expressions or a table would take much memory or time.
    """
    if not isinstance(content, dict):
        return
    check_added_tokens(name, content)
    _check_size(
        name, "characters of added tokens", sum(map(_characters, _entries(content.get("added_tokens")))), MAX_ADDED
    )
    model = content.get("model")
    pieces = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(pieces, list):
        _check_pieces(name, [p[0].encode() for p in pieces if isinstance(p, list) and p and isinstance(p[0], str)])
    steps = {key: value for key, value in content.items() if key not in ("model", "added_tokens")}
    _check_size(name, "characters of regular expressions", sum(map(len, _texts(steps, "Regex"))), MAX_REGEX)
    for table in _texts(steps, "precompiled_charsmap"):
        _check_table(name, table)


def check_small_file(name: str, content: Any) -> None:
    """Check a JSON file without a vocabulary: texts in it may become tokens.

    Raises:
        ValueError: An added token has an unknown option, or the texts would take much memory.
    """
    check_added_tokens(name, content)
    if isinstance(content, dict):
        tokens = {key: value for key, value in content.items() if key not in NOT_TOKENS}
        keys = sum(map(len, tokens)) if name == "added_tokens.json" else 0
        _check_size(name, "characters of tokens", _characters(tokens) + keys, MAX_ADDED)


def check_added_tokens(name: str, content: Any) -> None:
    """Check that added tokens have no options but those that the tokenizers library knows."""
    for token in _added_tokens(name, content):
        if unknown := sorted(set(token) - TOKEN_OPTIONS):
            raise ValueError(
                f"{name} has an added token with an unknown option, {unknown[0][:MAX_SHOWN]!r}. Known: "
                f"{', '.join(sorted(TOKEN_OPTIONS))}"
            )


def _added_tokens(name: str, content: Any) -> Iterator[dict[str, Any]]:
    """The objects of a file that transformers makes added tokens of."""
    if not isinstance(content, dict):
        return
    if name == SPECIAL_TOKENS:
        found = [value for key, value in content.items() if key != EXTRA] + _entries(content.get(EXTRA))
    else:
        found = _entries(content.get("added_tokens")) + _entries(content.get("added_tokens_decoder"))
    yield from (token for token in found if isinstance(token, dict))
    if name != "tokenizer.json":
        yield from _typed(content)


def _typed(value: Any) -> Iterator[dict[str, Any]]:
    """Objects at any depth that say that they are added tokens."""
    if isinstance(value, dict) and value.get("__type") == "AddedToken":
        yield value
    for inner in _entries(value):
        yield from _typed(inner)


def _check_pieces(name: str, pieces: list[bytes]) -> None:
    """Check the size of the tree whose paths are the pieces of a Unigram vocabulary, a node per byte."""
    total = sum(map(len, pieces))
    if total <= MAX_NODES:
        return
    _check_size(name, "bytes of pieces", total, MAX_PIECES)
    nodes, before = 0, b""
    for piece in sorted(pieces):
        shared = next(
            (i for i, (a, b) in enumerate(zip(before, piece, strict=False)) if a != b), min(len(before), len(piece))
        )
        nodes, before = nodes + len(piece) - shared, piece
    _check_size(name, "nodes in the tree of its pieces", nodes, MAX_NODES)


def _check_table(name: str, table: str) -> None:
    """Check that a table of characters is not shorter than its first number says: that much memory would be taken."""
    try:
        data = base64.b64decode(table, validate=True)
    except (binascii.Error, ValueError):
        return  # the tokenizers library refuses it
    if int.from_bytes(data[:4], "little") > len(data):
        raise ValueError(f"{name} has a precompiled_charsmap that is shorter than it says")


def _check_size(name: str, what: str, found: int, limit: int) -> None:
    if found > limit:
        raise ValueError(f"{name} has {found:,} {what}, more than the {limit:,} that are allowed here")


def _characters(value: Any) -> int:
    """Number of characters of all texts at any depth, keys aside."""
    return len(value) if isinstance(value, str) else sum(map(_characters, _entries(value)))


def _texts(value: Any, key: str) -> Iterator[str]:
    """All texts under a key, at any depth."""
    if isinstance(value, dict) and isinstance(value.get(key), str):
        yield value[key]
    for inner in _entries(value):
        yield from _texts(inner, key)


def _entries(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
