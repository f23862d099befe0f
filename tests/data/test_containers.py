"""Containers of rows: each kind gives the same rows, or is refused by its name with what to pass instead."""

import collections
import doctest

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, List, Value

import scalabl_pyro as sp
from scalabl_pyro.data import containers, read_rows

ROWS = [{"text": "the sky", "label": 1}, {"text": "grass", "label": 0}]
COLUMNS = {"text": ["the sky", "grass"], "label": [1, 0]}


class MapStyle(torch.utils.data.Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        return ROWS[i]


class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(ROWS)


STRUCTURED = np.array([("the sky", 1), ("grass", 0)], dtype=[("text", "U10"), ("label", "i8")])
CONTAINERS = {
    "list": lambda: ROWS,
    "tuple": lambda: tuple(ROWS),
    "generator": lambda: (row for row in ROWS),
    "deque": lambda: collections.deque(ROWS),
    "rows of other mappings": lambda: [collections.UserDict(row) for row in ROWS],
    "DataFrame": lambda: pd.DataFrame(ROWS),
    "DataFrame with an index": lambda: pd.DataFrame(ROWS, index=[7, 7]),
    "table": lambda: pa.Table.from_pylist(ROWS),
    "dict of lists": lambda: COLUMNS,
    "dict of arrays": lambda: {k: np.array(v) for k, v in COLUMNS.items()},
    "dict of Series": lambda: dict(pd.DataFrame(ROWS)),
    "dict with a tensor": lambda: {**COLUMNS, "label": torch.tensor([1, 0])},
    "structured array": lambda: STRUCTURED,
    "record array": lambda: STRUCTURED.view(np.recarray),
    "Dataset": lambda: Dataset.from_list(ROWS),
    "slice of a Dataset": lambda: Dataset.from_list(ROWS)[:2],
    "torch Dataset of datasets": lambda: Dataset.from_list(ROWS).with_format("torch"),
    "numpy Dataset of datasets": lambda: Dataset.from_list(ROWS).with_format("numpy"),
    "IterableDataset": lambda: IterableDataset.from_generator(lambda: iter(ROWS)),
    "map-style torch Dataset": MapStyle,
    "iterable torch Dataset": Streamed,
    "Subset": lambda: torch.utils.data.Subset(MapStyle(), [0, 1]),
    "ConcatDataset": lambda: torch.utils.data.ConcatDataset([MapStyle()]),
}


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_a_container_gives_its_rows(make):
    rows = read_rows(make())
    assert [dict(row) for row in rows] == ROWS
    assert {type(value) for row in rows for value in row.values()} == {str, int}


@pytest.fixture(scope="module")
def posterior():
    blora = sp.bayesian_lora(tiny.classifier(num_labels=2), r=2)
    task = sp.SequenceClassification(tiny.tokenizer(), classes=["no", "yes"])
    return sp.fit(blora, task, pd.DataFrame(ROWS), num_steps=1, progress=False).posterior


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_a_container_is_predicted_as_its_rows_are(posterior, make):
    expected, found = (posterior.predict(data, num_draws=2) for data in (ROWS, make()))
    np.testing.assert_array_equal(found.log_probs, expected.log_probs)
    assert found.target.tolist() == [1, 0]


def test_a_user_s_own_transformation_of_a_data_set_is_kept():
    data = Dataset.from_list(ROWS).with_transform(lambda batch: {**batch, "text": ["new"] * len(batch["text"])})
    assert [row["text"] for row in read_rows(data)] == ["new", "new"]


def test_a_subset_and_lists_keep_the_names_of_classes():
    names = ClassLabel(names=["no", "yes"])
    features = Features({"text": Value("string"), "label": names, "labels": List(names)})
    columns = {"text": ["a", "b", "c"], "label": [0, 1, -1], "labels": [[1], [], [0, 1]]}
    data = Dataset.from_dict(columns, features=features)
    subset = torch.utils.data.Subset(torch.utils.data.Subset(data, [2, 1, 0]), [1, 0])
    for rows in (read_rows(data.select([1, 2])), read_rows(subset)):
        assert [row["text"] for row in rows] == ["b", "c"]
        assert [(row["label"], row["label"].name) for row in rows] == [(1, "yes"), (-1, None)]
        assert [[label.name for label in row["labels"]] for row in rows] == [[], ["no", "yes"]]
    task = sp.tasks.MultiLabelClassification(tiny.tokenizer(), classes=["yes", "no"])
    assert [task.encode({**row, "text": "the sky"}).target for row in read_rows(data)] == [(1, 0), (0, 0), (1, 1)]


def test_a_single_column_of_dicts_is_a_column():
    rows = read_rows({"choices": [{"text": ["a"]}, {"text": ["b"]}], "label": [1, 0]})
    assert rows == [{"choices": {"text": ["a"]}, "label": 1}, {"choices": {"text": ["b"]}, "label": 0}]


def test_gaps_of_a_data_frame_are_missing_values(posterior):
    frame = pd.DataFrame([{"text": "the sky", "label": None}, ROWS[1]])
    frame["other"] = frame["label"].astype("Int64")
    prediction = posterior.predict(frame, num_draws=2)
    np.testing.assert_array_equal(
        prediction.log_probs, posterior.predict([dict(ROWS[0], label=None), ROWS[1]], num_draws=2).log_probs
    )


REFUSED = {
    "single row": (ROWS[0], r"fields 'text', 'label'\. A single row goes into a list: \[row\]"),
    "question": (tiny.question_rows(1)[0], r"A single row"),
    "splits": (DatasetDict(train=Dataset.from_list(ROWS)), r"splits \['train'\].*data\['train'\]"),
    "splits of a stream": (
        IterableDatasetDict({"train": IterableDataset.from_generator(lambda: iter(ROWS))}),
        r"splits \['train'\].*data\['train'\]",
    ),
    "splits as lists": ({"train": ROWS, "test": ROWS}, r"splits \['train', 'test'\].*data\['train'\]"),
    "splits as tables": ({"train": pd.DataFrame(ROWS)}, r"splits \['train'\].*data\['train'\]"),
    "list of texts": (["the sky", "grass"], r"Row 0 is a str .*; expected a dict.*pass \[\{'text': text\}"),
    "column of texts": (pd.Series(["the sky"]), r"got a Series, which has no named fields"),
    "column of a Dataset": (Dataset.from_list(ROWS)["text"], r"Row 0 is a str"),
    "array of texts": (np.array(["the sky"]), r"got a ndarray, which has no named fields"),
    "tensor": (torch.zeros(3), r"got a Tensor, which has no named fields"),
    "bytes": (b"the sky", r"got a bytes"),
    "number": (3, r"got an int \(3\)"),
    "None": (None, r"got None"),
    "tuples": ([("the sky", 1)], r"Row 0 is a tuple.*; expected a dict"),
    "Series as rows": ([pd.Series(ROWS[0])], r"Row 0 is a Series"),
    "lengths": ({"text": ["a", "b"], "label": [1]}, r"different lengths: \{'text': 2, 'label': 1\}"),
    "twice": (pd.DataFrame([["a", "b"]], columns=["text", "text"]), r"several columns named 'text'"),
}


@pytest.mark.parametrize(("source", "message"), REFUSED.values(), ids=REFUSED)
def test_what_holds_no_rows_is_refused_by_its_name(posterior, source, message):
    with pytest.raises((TypeError, ValueError), match=message):
        read_rows(source)
    with pytest.raises((TypeError, ValueError), match=message):
        posterior.predict(source)
    blora, task = posterior.blora(), posterior.task
    with pytest.raises((TypeError, ValueError), match=message):
        sp.fit(blora, task, source, num_steps=1, progress=False)


def test_examples_of_docstrings_run():
    result = doctest.testmod(containers)
    assert result.attempted and not result.failed
