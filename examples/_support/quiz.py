"""Questions with short answers, from the quiz files of the Debian package bsdgames."""

import itertools
import re
import string
from pathlib import Path

#: Folder in which the package puts its files.
QUIZ = Path("/usr/share/games/bsdgames/quiz")
#: Question, and the column of its subject and of its answer, by file.
TOPICS = {
    **dict.fromkeys(("africa", "america", "asia", "europe"), ("What is the capital of {}?", 0, 1)),
    "province": ("What is the capital of the province {}?", 0, 1),
    "state": ("What is the capital of the state {}?", 0, 1),
    "babies": ("What is a young {} called?", 1, 0),
    "collectives": ("What is a group of {} called?", 0, 1),
    "elements": ("Which chemical element has the symbol {}?", 0, 3),
    "greek": ("What does the Greek root {} mean?", 0, 1),
    "posneg": ("What is the opposite of {}?", 0, 1),
    "sexes": ("What is the female form of {}?", 0, 1),
}


def quiz_rows(folder: Path = QUIZ) -> list[dict]:
    """Read the questions as rows of ``Completion``: ``prompt``, ``completion``, and all ``accepted`` answers.

    Args:
        folder: Folder of the quiz files.

    Raises:
        SystemExit: The folder does not exist.
    """
    if not folder.is_dir():
        raise SystemExit(f"{folder} does not exist: install the Debian package bsdgames, or pass --quiz FOLDER.")
    rows = []
    for topic, (question, subject, answer) in TOPICS.items():
        for line in (folder / topic).read_text("latin-1").replace("\\\n", "").splitlines():
            fields = line.split(":")
            if len(fields) <= max(subject, answer) or not fields[answer].strip():
                continue
            # A backspace writes an accent over a letter. Other forms are used, or the row is left out.
            accepted, subjects = ([v for v in variants(fields[i]) if "\b" not in v] for i in (answer, subject))
            if not accepted or not subjects:
                continue
            prompt = f"Question: {question.format(subjects[0])}\nAnswer:"
            rows.append({"topic": topic, "prompt": prompt, "completion": f" {accepted[0]}", "accepted": accepted})
    return rows


def is_right(answer: str, row: dict) -> bool:
    """Tell whether an answer is one of the accepted ones, but for case, articles and punctuation."""
    return plain(answer) in {plain(accepted) for accepted in row["accepted"]}


def plain(text: str) -> str:
    """Return a text in small letters, without articles and punctuation."""
    words = text.lower().translate(str.maketrans("", "", string.punctuation)).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def variants(pattern: str) -> list[str]:
    """Expand a pattern: ``{x}`` may be left out, ``|`` separates alternatives, ``[x|y]`` groups them.

    >>> variants("{the }sparrow|bird")
    ['the sparrow', 'sparrow', 'bird']
    """
    found, rest = _alternatives(pattern, 0)
    assert rest == len(pattern), pattern
    return list(dict.fromkeys(re.sub(r"\s+", " ", text).strip() for text in found if text.strip()))


def _alternatives(pattern: str, place: int) -> tuple[list[str], int]:
    """Expand from a place to the end of its group; return the texts and the place behind them."""
    found: list[str] = []
    parts: list[list[str]] = []
    while place < len(pattern) and pattern[place] not in "}]":
        char = pattern[place]
        if char in "{[":
            inner, place = _alternatives(pattern, place + 1)
            parts.append([*inner, ""] if char == "{" else inner)
        elif char == "|":
            found += ["".join(texts) for texts in itertools.product(*parts)]
            parts = []
        else:
            parts.append([char])
        place += 1
    return found + ["".join(texts) for texts in itertools.product(*parts)], place
