"""Breaks a text of tokens into lines of equally wide cells, so that each token has a place."""

import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..prediction.token_texts import visible


class Part(NamedTuple):
    """A part of a token that stands on one line.

    Attributes:
        token: Number of the token.
        line: Number of the line.
        column: First cell on the line.
        width: Number of cells.
        text: The characters.
    """

    token: int
    line: int
    column: int
    width: int
    text: str


class Cell(NamedTuple):
    """A character, the number of its token, and its width in cells."""

    token: int
    character: str
    width: int


def wrapped(pieces: Sequence[str], columns: int) -> list[Part]:
    """Return the parts of all tokens, line by line. Lines break at spaces; longer words break anywhere.

    Args:
        pieces: Texts of the tokens.
        columns: Number of cells per line.
    """
    line, column = 0, 0
    placed: list[tuple[int, int, Cell]] = []
    for word in _words(pieces):
        if column and column + sum(cell.width for cell in word) > columns:
            line, column = line + 1, 0
            word = _without_space(word)
        for cell in word:
            if cell.character != "\n" and column + cell.width > columns:
                line, column = line + 1, 0
            placed.append((line, column, cell))
            column += cell.width
            if cell.character == "\n":
                line, column = line + 1, 0
    parts = itertools.groupby(placed, key=lambda found: (found[2].token, found[0]))
    return [_part(token, line, list(found)) for (token, line), found in parts]


def _words(pieces: Sequence[str]) -> Iterator[list[Cell]]:
    """Yield the cells of each word, with the spaces before it."""
    word: list[Cell] = []
    for token, piece in enumerate(pieces):
        for character in visible(piece):
            cell = Cell(token, character, _width(character))
            if word and _may_break(word[-1], cell):
                yield word
                word = []
            word.append(cell)
    if word:
        yield word


def _may_break(last: Cell, cell: Cell) -> bool:
    """Tell whether a line may end between two characters: before a space, after a break, around wide characters."""
    if cell.character == "\n" or cell.width == 0:
        return False
    is_gap = cell.character.isspace() and not last.character.isspace()
    return last.character == "\n" or is_gap or 2 in (last.width, cell.width)


def _without_space(word: list[Cell]) -> list[Cell]:
    """Drop the space before a word that starts a line, unless it is a token of its own."""
    if len(word) > 1 and word[0].character == " " and word[0].token == word[1].token:
        return word[1:]
    return word


def _width(character: str) -> int:
    if character == "\n" or unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _part(token: int, line: int, found: list[tuple[int, int, Cell]]) -> Part:
    cells = [cell for _, _, cell in found]
    text = "".join(cell.character for cell in cells).rstrip("\n")
    return Part(token, line, found[0][1], sum(cell.width for cell in cells), text)
