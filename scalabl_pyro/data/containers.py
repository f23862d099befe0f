"""Containers of rows: lists, tables and data sets of several libraries become a list of dicts."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from .._errors import describe
from .._values import plain
from .batch import Batch
from .labels import ClassIndex
from .row_form import ANY_FORM, RowForm

TABLES = (("pandas", "DataFrame"), ("polars", "DataFrame"), ("pyarrow", "Table"))
EXPECTED = "Expected rows (a list of dicts, a DataFrame, a Dataset, the path of a .csv, .parquet or .jsonl file)"


def as_rows(source: Any, form: RowForm = ANY_FORM) -> list[Mapping[str, Any]]:
    """Return the rows of a container.

    A column of class names (``datasets.ClassLabel``) gives :class:`~scalabl_pyro.data.labels.ClassIndex`, so that a
    task can match its classes by name.

    Args:
        source: Iterable of dicts; dict of columns of one length; ``datasets.Dataset`` or ``IterableDataset``; pandas or
            polars DataFrame; pyarrow table; NumPy structured array; or any object with ``len`` and integer indices,
            such as a map-style torch Dataset.
        form: Fields of a row, for messages.

    Returns:
        The rows.

    Raises:
        TypeError: ``source`` is a single row, one column or text, several splits, or no container.
        ValueError: Columns have different lengths, or the same name.

    Example:
        >>> as_rows({"text": ["the sky", "grass"], "label": [1, 0]})
        [{'text': 'the sky', 'label': 1}, {'text': 'grass', 'label': 0}]
    """
    features = getattr(source, "features", None)
    if isinstance(source, Mapping):
        return _from_columns(source, form)
    if _is_a(source, "datasets", "Dataset", "IterableDataset") and isinstance(features, Mapping):
        return _named_classes(_without_format(source), features)
    if _is_a(source, "pandas", "DataFrame"):
        return _from_frame(source)
    if _is_a(source, "polars", "DataFrame"):
        return source.to_dicts()
    if _is_a(source, "pyarrow", "Table"):
        return source.to_pylist()
    if isinstance(source, np.ndarray) and source.dtype.names is not None:
        return [dict(zip(source.dtype.names, row.tolist(), strict=True)) for row in source.reshape(-1)]
    if isinstance(source, str | bytes | np.ndarray | torch.Tensor) or _is_a(source, "pandas", "Series", "Index"):
        raise TypeError(f"{EXPECTED}, got {describe(source)}, which has no named fields. {form.advice}".rstrip())
    if isinstance(source, Iterable):
        return _checked(list(source), form)
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        rows = _checked([source[i] for i in range(len(source))], form)
        while _is_a(source, "torch", "Subset"):
            source = source.dataset
        features = getattr(source, "features", None)
        return _named_classes(rows, features) if _is_a(source, "datasets", "Dataset") and features else rows
    raise TypeError(f"{EXPECTED}, got {describe(source)}. {form.advice}".rstrip())


def check_row(row: Any, i: int, form: RowForm = ANY_FORM) -> None:
    """Check that a row is a dict.

    Args:
        row: The row.
        i: Its number, for the message.
        form: Fields of a row, for the message.

    Raises:
        TypeError: It is not. The message says how to name the field of a text.
    """
    if isinstance(row, Mapping):
        return
    advice = "Pass the rows, not batches." if isinstance(row, Batch) else ""
    if isinstance(row, str | bytes):
        advice = f"For a list of texts, pass {form.from_texts}."
    raise TypeError(f"Row {i} is {describe(row)}; expected a dict {form.fields}. {advice}".rstrip())


def _checked(rows: list[Any], form: RowForm) -> list[Mapping[str, Any]]:
    for i, row in enumerate(rows):
        if not isinstance(row, Batch):  # who takes rows only says so when it encodes them
            check_row(row, i, form)
    return rows


def _from_columns(columns: Mapping[str, Any], form: RowForm) -> list[Mapping[str, Any]]:
    """Return the rows of a dict of columns."""
    if any(_is_a(value, "datasets", "Dataset", "IterableDataset") for value in columns.values()) or (
        columns and all(map(_is_split, columns.values()))
    ):
        splits = list(columns)
        raise TypeError(f"The data set holds the splits {splits}: choose one of them, data[{splits[0]!r}].")
    if not columns or not all(map(_is_column, columns.values())):
        fields = ", ".join(map(repr, columns))
        advice = f"A single row goes into a list: [row]. {form.advice}".rstrip()
        raise TypeError(f"{EXPECTED}, got a dict with the fields {fields}. {advice}")
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"A dict of columns gives rows, but its columns have different lengths: {lengths}.")
    return [dict(zip(columns, map(plain, values), strict=True)) for values in zip(*columns.values(), strict=True)]


def _from_frame(frame: Any) -> list[Mapping[str, Any]]:
    """Return the rows of a pandas DataFrame."""
    names = [str(column) for column in frame.columns]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(
            f"The DataFrame has several columns named {sorted(twice)[0]!r}: give each column its own name."
        )
    return [dict(zip(names, row, strict=True)) for row in frame.itertuples(index=False)]


def _is_split(value: Any) -> bool:
    """Whether a value of a dict holds rows rather than the values of one column."""
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(isinstance(row, Mapping) for row in value)
    return (
        _is_a(value, "pandas", "DataFrame") or _is_a(value, "polars", "DataFrame") or _is_a(value, "pyarrow", "Table")
    )


def _is_column(value: Any) -> bool:
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.ndim > 0
    return isinstance(value, list | tuple) or _is_a(value, "pandas", "Series") or _is_a(value, "datasets", "Column")


def _without_format(data: Any) -> Any:
    """Let a data set give Python values, unless the user set a transformation of their own."""
    format_type = (getattr(data, "format", None) or {}).get("type")
    return data.with_format(None) if format_type not in (None, "custom") else data


def _named_classes(data: Iterable[Mapping[str, Any]], features: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows, with the names of the classes at the indices of their columns."""
    names = {column: own for column, feature in features.items() if (own := _names_in(feature)) is not None}
    rows = list(data)
    if not names:
        return rows
    return [{**row, **{k: _with_names(row[k], own) for k, own in names.items() if k in row}} for row in rows]


def _names_in(feature: Any) -> Any:
    """Return the names of the classes in a column of a data set, also in a column of lists; None if there are none."""
    inner = feature[0] if isinstance(feature, list) and len(feature) == 1 else getattr(feature, "feature", feature)
    return inner.names if _is_a(inner, "datasets", "ClassLabel") else None


def _with_names(value: Any, names: Any) -> Any:
    if isinstance(value, list | tuple | np.ndarray) and np.ndim(value) > 0:
        return [_with_names(one, names) for one in value]
    index = plain(value)
    return ClassIndex(index, names) if type(index) is int else value


def _is_a(value: Any, package: str, *names: str) -> bool:
    """Whether a class of the value has one of these names in a package, which need not be installed."""
    return any(c.__name__ in names and c.__module__.split(".")[0] == package for c in type(value).__mro__)
