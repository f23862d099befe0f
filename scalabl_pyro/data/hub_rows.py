"""Rows of well-known multiple-choice data sets of the Hugging Face hub in one form: question, choices, answer."""

from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]


def as_question(row: Row) -> Row:
    """``row`` as ``{"question", "choices": [str, ...], "answer": int or None}`` where its schema is a known one.

    Known are OpenBookQA and ARC (``choices`` with texts and labels, ``answerKey``), WinoGrande (``sentence``,
    ``option1``, ``option2``), BoolQ (a boolean ``answer``, a ``passage``), and MMLU, which has the form already. Any
    other row is returned as it is.
    """
    choices = row.get("choices")
    if isinstance(choices, Mapping) and {"text", "label"} <= set(choices):
        labels, key = list(choices["label"]), row.get("answerKey")
        question = row.get("question_stem", row.get("question"))
        return _question(row, question, list(choices["text"]), labels.index(key) if key in labels else None)
    if {"sentence", "option1", "option2"} <= set(row):
        answer = int(row["answer"]) - 1 if row.get("answer") in ("1", "2") else None
        return _question(row, row["sentence"], [row["option1"], row["option2"]], answer)
    if isinstance(row.get("answer"), bool) and "passage" in row:
        question = f"{row['passage']}\n{row['question'].capitalize().rstrip('?')}?"
        return _question(row, question, ["yes", "no"], 0 if row["answer"] else 1)
    return row


def _question(row: Row, question: Any, choices: list[str], answer: int | None) -> Row:
    known = {"question": question, "choices": choices, "answer": answer}
    return {**({"id": row["id"]} if "id" in row else {}), **known}
