"""Sentences with an opinion, rated by people (Hutto and Gilbert, ICWSM 2014), from the archive of vaderSentiment.

``make install`` downloads the archive (MIT license). It holds sentences of movie reviews, product reviews and newspaper
editorials; 15 to 20 people rated each from -4 (extremely negative) to 4 (extremely positive).
"""

import functools
import io
import random
import sys
import tarfile
from pathlib import Path

from .datasets import pick

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
CHOICES = ["negative", "positive"]
#: Prompt that asks for the opinion of a sentence.
OPINION = "Review: {question}\nOpinion:"
#: Sentences with a mean rating between these are left out: people do not agree on their sign.
UNCLEAR = 0.5
#: Every fourth sentence of the movie reviews is a test row.
TEST_EVERY = 4


def movie_reviews(split: str, *, count: int, seed: int) -> list[dict]:
    """Read sentences of movie reviews as rows of ``MultipleChoice``, about as many negative as positive ones.

    Args:
        split: ``"train"`` or ``"test"``.
        count: Number of sentences.
        seed: Seed of the choice of sentences.
    """
    rated = _rated("movieReviewSnippets")
    order = random.Random(0).sample(range(len(rated)), len(rated))  # the split is the same for all seeds
    kept = [rated[i] for k, i in enumerate(order) if (k % TEST_EVERY == 0) == (split == "test")]
    return pick([_row(text, score) for text, score in kept if abs(score) >= UNCLEAR], count, seed, balance="answer")


def product_reviews(*, count: int, seed: int) -> list[dict]:
    """Read sentences of product reviews: the same question about another kind of text."""
    rated = [(text, score) for text, score in _rated("amazonReviewSnippets") if abs(score) >= UNCLEAR]
    return pick([_row(text, score) for text, score in rated], count, seed, balance="answer")


def neutral_sentences(*, count: int, seed: int) -> list[dict]:
    """Read newspaper sentences that people rated as neutral (a mean within 0.25 of 0). They have no right answer."""
    texts = [text for text, score in _rated("nytEditorialSnippets") if abs(score) <= 0.25]
    return pick([{"question": text, "choices": CHOICES} for text in texts], count, seed)


def _row(text: str, score: float) -> dict:
    return {"question": text, "choices": CHOICES, "answer": int(score > 0), "rating": score}


def _rated(name: str) -> list[tuple[str, float]]:
    """Read (text, mean rating) of each distinct sentence of a file."""
    path = Path(sys.prefix) / "assets" / ARCHIVE
    if not path.exists():
        raise SystemExit(f"{path} is missing: run `make demo`, which downloads it.")
    text = _read(path, name)
    lines = [line.split("\t", 2) for line in text.splitlines() if line.count("\t") >= 2]
    return list({sentence.strip(): float(score) for _, score, sentence in lines}.items())


@functools.cache  # Unpacking takes a part of a second, and each kind of sentence is asked for several times.
def _read(path: Path, name: str) -> str:
    with tarfile.open(path) as outer:
        inner = io.BytesIO(outer.extractfile(INNER).read())
    with tarfile.open(fileobj=inner) as archive:
        content = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt").read()
    return content.decode("utf-8", errors="replace")
