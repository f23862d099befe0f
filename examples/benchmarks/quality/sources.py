"""Sources of the rows of the quality benchmark, and the prompt of each data set."""

from dataclasses import dataclass
from pathlib import Path

from _support.datasets import NEWS, R8_TOPICS, TREC, newsgroups, reuters_r8

from scalabl_pyro.data import read_rows


@dataclass(frozen=True)
class Source:
    """Source and prompt of a data set.

    Attributes:
        hub: Name and configuration on the Hugging Face hub.
        test: Hub split that is the test set here. Its labels are public.
        text: Template that makes the question from the fields of a hub row, for data sets that are not multiple choice.
        files: Stems of local files, ``STEM_train.jsonl`` and ``STEM_test.jsonl``.
        template: Prompt.
        labels: Answers, one token each. Empty: letters, with choices in the prompt. None: the choices of the rows.
        max_length: Longest prompt in tokens; longer questions lose their end. None: no question is cut.
        ood: Other data sets that get the question of this one.
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
    "trec": Source(template=TREC, labels=None, max_length=96, ood=("agnews",)),
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
        template=NEWS,
        labels=("world", "sports", "business", "technology"),
        max_length=128,
    ),
    "r8": Source(
        template=NEWS,
        labels=tuple(R8_TOPICS.values()),
        max_length=96,
        ood=("newsgroups",),
    ),
}


def source_of(name: str) -> Source:
    """Look up a data set in ``SOURCES``.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in SOURCES:
        raise ValueError(f"The data set {name!r} is unknown: use {', '.join(SOURCES)}, or name=train.jsonl,test.jsonl.")
    return SOURCES[name]


def rows_of(name: str, part: str, data_dir: Path | None) -> list[dict]:
    """Read rows from local files, a package, or the hub.

    Args:
        name: Key of ``SOURCES``.
        part: ``"train"`` or ``"test"``.
        data_dir: Folder that is searched first for local files, itself and one level below.

    Raises:
        ValueError: The rows exist only in local files, and there are none.
    """
    if name == "newsgroups":
        return newsgroups(count=10**6, seed=0)
    source = source_of(name)
    if data_dir is not None:
        for stem in (name, *source.files):
            file = f"{stem}_{part}.jsonl"
            if found := [*data_dir.glob(file), *data_dir.glob(f"*/{file}")]:
                return [dict(row) for row in read_rows(found[0])]
    if name == "r8":
        return reuters_r8(part, count=10**6, seed=0)
    if source.hub is None:
        raise ValueError(
            f"{name} is read from {name}_train.jsonl and {name}_test.jsonl: give their folder with --data-dir."
        )
    path, config = source.hub
    options = {"split": "train" if part == "train" else source.test} | ({} if config is None else {"name": config})
    rows = [dict(row) for row in read_rows(f"hf://{path}", **options)]
    if source.text is not None:
        choices = list(source.labels or ())
        rows = [{"question": source.text.format(**r), "choices": choices, "answer": r["label"]} for r in rows]
    return rows
