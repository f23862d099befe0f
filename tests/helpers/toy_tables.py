"""The tables of the tutorials at toy size, with commas, quotes and missing classes as real tables have them."""

from pathlib import Path

import pandas as pd
import tiny


def write(folder: Path) -> None:
    """Write the files that docs/tutorial_data.py writes, with notes that a tiny tokenizer knows."""
    right = pd.DataFrame([{"note": row["question"], "class": tiny.COLORS[row["answer"]]} for row in notes(30)])
    given = right.copy()
    given.loc[20:, "class"] = None
    given.to_csv(folder / "notes.csv", index=False)
    right[["class"]].to_csv(folder / "notes-key.csv", index=False)
    readers = right.assign(reader=["Ann", "Bob"] * 15)
    readers[["note", "reader", "class"]].to_csv(folder / "two-readers.csv", index=False)
    right.to_csv(folder / "two-readers-test.csv", index=False)


def notes(count: int) -> list[dict]:
    """Rows whose texts need the quotes of a CSV file."""
    marks = ["", ', "the sky" , is', "\nthe night"]
    return [{**row, "question": row["question"] + marks[i % 3]} for i, row in enumerate(tiny.question_rows(count))]
