"""Write the tables that tutorials and start page read. They are made from texts in Python packages.

    python docs/tutorial_data.py [FOLDER]    # default: the present folder

- ``notes.csv``: columns note and class. Some classes are missing, and some are wrong on purpose.
- ``notes-key.csv``: the right class of each note of ``notes.csv``.
- ``two-readers.csv``: columns note, reader and class. One of the two readers makes a systematic mistake.
- ``two-readers-test.csv``: columns note and class, all right.
- ``reviews.csv``: columns review and kind (complaint or praise), sentences of product reviews; ``new.csv``: reviews
  without a kind. They come from the source archive of the package vaderSentiment.
- ``train.jsonl`` and ``test.jsonl``: rows of the start page, with question, choices and answer.
"""

import json
import random
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from _support.datasets import R8_TOPICS, distinct, pick, reuters_r8
from _support.models import smollm2
from _support.opinions import product_reviews
from transformers import AutoModelForCausalLM, LlamaConfig

#: Notes with a class, notes without one, and how many of the classes are made wrong.
LABELED, OPEN, WRONG = 300, 100, 15
#: Topics of the second pair of tables, and the share of notes on ships that Bob calls oil.
TOPICS, MISTAKE = ("crude", "ship", "trade"), 0.8
#: Product reviews with a kind, and without one.
REVIEWS, NEW_REVIEWS = 460, 60
#: Rows of the start page, and how many words each question keeps.
START, WORDS = {"train": 150, "test": 80}, 25


def write_notes(folder: Path) -> None:
    """Write ``notes.csv`` and ``notes-key.csv``."""
    rows = pick(distinct(reuters_r8("train", count=10**6, seed=0)), LABELED + OPEN, 0, balance="answer")
    generator = random.Random(0)
    generator.shuffle(rows)
    words = list(R8_TOPICS.values())
    right = [words[row["answer"]] for row in rows]
    given: list[str | None] = list(right)
    for i in generator.sample(range(LABELED), WRONG):
        given[i] = generator.choice([word for word in words if word != right[i]])
    given[LABELED:] = [None] * OPEN
    table = pd.DataFrame({"note": [row["question"].strip() for row in rows], "class": given, "right": right})
    table = table.sample(frac=1, random_state=0)
    table[["note", "class"]].to_csv(folder / "notes.csv", index=False)
    table[["right"]].rename(columns={"right": "class"}).to_csv(folder / "notes-key.csv", index=False)


def write_readers(folder: Path) -> None:
    """Write ``two-readers.csv`` and ``two-readers-test.csv``."""
    generator = random.Random(0)
    words = [R8_TOPICS[topic] for topic in TOPICS]
    train = reuters_r8("train", count=300, seed=0, topics=TOPICS)
    lines = []
    for row in train:
        reader = "Ann" if generator.random() < 1 / 3 else "Bob"
        word = words[row["answer"]]
        if reader == "Bob" and word == "ship" and generator.random() < MISTAKE:
            word = "oil"
        lines.append({"note": row["question"].strip(), "reader": reader, "class": word})
    pd.DataFrame(lines).sample(frac=1, random_state=0).to_csv(folder / "two-readers.csv", index=False)
    test = reuters_r8("test", count=60, seed=0, topics=TOPICS)
    right = [{"note": row["question"].strip(), "class": words[row["answer"]]} for row in test]
    pd.DataFrame(right).to_csv(folder / "two-readers-test.csv", index=False)


def write_reviews(folder: Path) -> None:
    """Write ``reviews.csv`` and ``new.csv``: as many complaints as praise."""
    rows = product_reviews(count=REVIEWS + NEW_REVIEWS, seed=0)
    lines = [{"review": row["question"], "kind": ("complaint", "praise")[row["answer"]]} for row in rows]
    table = pd.DataFrame(lines).sample(frac=1, random_state=0)
    table[:REVIEWS].to_csv(folder / "reviews.csv", index=False)
    table[["review"]][REVIEWS:].to_csv(folder / "new.csv", index=False)


def write_model(folder: Path, name: str) -> None:
    """Write SmolLM2 into a folder with its name on the hub. Beside this folder, the name loads it without the hub."""
    llm, tokenizer = smollm2()
    settings = {key: value for key, value in llm.config.to_dict().items() if key != "quantization_config"}
    plain = AutoModelForCausalLM.from_config(LlamaConfig(**settings))  # one of a GGUF file cannot be saved
    plain.load_state_dict(llm.state_dict())
    plain.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)


def write_questions(folder: Path) -> None:
    """Write ``train.jsonl`` and ``test.jsonl``: the first words of Reuters articles, all 8 topics equally often."""
    for split, count in START.items():
        rows = reuters_r8(split, count=count, seed=0)
        lines = [{**row, "question": " ".join(row["question"].split()[:WORDS])} for row in rows]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    target.mkdir(parents=True, exist_ok=True)
    write_notes(target)
    write_readers(target)
    write_questions(target)
    write_reviews(target)
