"""Reads X and y as scikit-learn passes them: columns of texts, class labels, numbers."""

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import assert_all_finite, check_consistent_length, column_or_1d

from ..._errors import describe, nearest
from ..._values import is_missing, shown

Method = TypeVar("Method", bound=Callable[..., Any])

#: Largest number of text columns: a tokenizer takes one text or a pair.
MAX_COLUMNS = 2
#: Fields of a row, in the order of the text columns.
FIELDS = ("text", "text_pair")


class Texts(NamedTuple):
    """Columns of texts.

    Attributes:
        columns: One or two columns of N texts.
        names: Their names in the DataFrame that held them; None for other containers.
    """

    columns: list[list[str]]
    names: tuple[Any, ...] | None

    def rows(self, answers: Sequence[Any] | None = None) -> list[dict[str, Any]]:
        """Make one row per text or pair of texts, with the answer if there are answers."""
        made = [dict(zip(FIELDS, texts, strict=False)) for texts in zip(*self.columns, strict=True)]
        if answers is not None:
            made = [{**row, "label": answer} for row, answer in zip(made, answers, strict=True)]
        return made


def read_texts(X: Any, text_columns: Any) -> Texts:
    """Read X.

    Args:
        X: N texts in a list, array or Series; N pairs in an array with two columns; or a DataFrame.
        text_columns: Name of the column of a DataFrame that holds the text, or names of the two columns that hold a
            pair. None means all columns, of which there must be one.

    Raises:
        TypeError: X is a text or holds something else than texts.
        ValueError: X is empty, or a column is not there, or nothing says which column holds the text.
    """
    if isinstance(X, str | bytes):
        raise TypeError(f"X is {describe(X)}, expected a list of texts. For one text, pass [text].")
    if hasattr(X, "toarray") and hasattr(X, "nnz"):
        raise TypeError("X is a sparse matrix of numbers, expected texts. Pass the texts themselves, not features.")
    if hasattr(X, "columns") and hasattr(X, "shape"):
        names = _chosen(list(X.columns), text_columns)
        columns = [list(X[name]) for name in names]
    else:
        names, columns = None, _columns_of(X)
    if not columns[0]:
        raise ValueError("X has 0 sample(s), and a minimum of 1 is required: pass at least one text.")
    for place, column in enumerate(columns):
        where = f"X[{names[place]!r}]" if names is not None else "X"
        columns[place] = [_as_text(value, f"{where}, row {i}") for i, value in enumerate(column)]
    return Texts(columns, tuple(names) if names is not None else None)


def read_classes(y: Any) -> tuple[NDArray[Any], NDArray[np.integer]]:
    """Read class labels.

    Returns:
        Sorted classes, and the index of the class of each row.

    Raises:
        ValueError: y holds numbers that are not classes, missing labels, or one class only.
    """
    y = _one_column(y)
    check_classification_targets(y)
    classes, codes = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"y holds one class, {shown(classes[0].item())}: a classifier needs rows of two classes.")
    return classes, codes


def read_codes(y: Any, classes: NDArray[Any]) -> NDArray[np.integer]:
    """Return the index of the class of each row.

    Raises:
        ValueError: A label is not a class that was trained on.
    """
    y = _one_column(y)
    index = {label: i for i, label in enumerate(classes.tolist())}
    labels = y.tolist()
    if unknown := [label for label in labels if label not in index]:
        raise ValueError(f"y holds {shown(unknown[0])}, which is not one of the classes {classes.tolist()} of fit.")
    return np.asarray([index[label] for label in labels])


def read_numbers(y: Any) -> NDArray[np.float64]:
    """Read numbers.

    Raises:
        ValueError: y holds something else, or numbers that are not finite.
    """
    y = _one_column(y)
    if y.dtype.kind in "mM":
        raise ValueError(f"y holds dates or times ({y.dtype}): a regressor needs numbers, in a unit that you choose.")
    try:
        numbers = np.asarray(y, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"y holds {shown(y[0])}: a regressor needs one number per row.") from error
    assert_all_finite(numbers, input_name="y")
    return numbers


def check_lengths(texts: Texts, y: Any) -> None:
    """Raise ValueError unless there is one answer per text."""
    check_consistent_length(texts.columns[0], y)


def without_weights(method: Method) -> Method:
    """Make ``fit`` say what to do in place of ``sample_weight``, which its signature does not have.

    scikit-learn reads from the signature that the estimator takes no weights. So its own tools pass none.
    """

    @wraps(method)
    def call(self: Any, X: Any, y: Any = None, **options: Any) -> Any:
        if "sample_weight" in options:
            raise TypeError(
                f"{type(self).__name__}.fit() takes no sample_weight: the posterior counts each row once. Repeat rows, "
                "or leave rows out. score() and the metrics of scikit-learn take weights."
            )
        return method(self, X, y, **options)

    return call  # type: ignore[return-value]


def _chosen(available: list[Any], text_columns: Any) -> list[Any]:
    if text_columns is None:
        if len(available) == 1:
            return available
        raise ValueError(
            f"X has the columns {available}: name the column of the text, text_columns={available[0]!r} for instance, "
            "or the two columns of a pair of texts."
        )
    names = list(text_columns) if isinstance(text_columns, list | tuple) else [text_columns]
    if not 1 <= len(names) <= MAX_COLUMNS:
        raise ValueError(f"text_columns={text_columns!r}: name one column, or the two columns of a pair of texts.")
    for name in names:
        if name not in available:
            raise ValueError(f"X has no column {name!r}. {nearest(str(name), map(str, available))}")
        if available.count(name) > 1:
            raise ValueError(f"X has {available.count(name)} columns named {name!r}: give each column its own name.")
    return names


def _columns_of(X: Any) -> list[list[Any]]:
    """Columns of a list, array or Series."""
    if not isinstance(X, Iterable) and not hasattr(X, "__array__"):
        raise TypeError(f"X is {describe(X)}, expected a list, array or Series of texts, or a DataFrame.")
    if hasattr(X, "ndim"):
        array = np.asarray(X)
        if array.ndim == 2 and 1 <= array.shape[1] <= MAX_COLUMNS:
            return [list(column) for column in array.T]
        if array.ndim != 1:
            raise ValueError(f"X has shape {array.shape}, expected (N,) texts, or (N, 2) for pairs of texts.")
        return [list(array)]
    return [list(X)]


def _as_text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return str(value)
    if is_missing(value):
        raise ValueError(f"{where} has no text (it is {value}): fill it, or leave the row out.")
    raise TypeError(f"{where} is {describe(value)}, expected a str: X holds one text per row.")


def _one_column(y: Any) -> NDArray[Any]:
    if y is None:
        raise ValueError("The estimator requires y to be passed, but the target y is None.")
    values = column_or_1d(y, warn=True)
    if len(values) and (gap := [i for i, value in enumerate(values) if is_missing(value)]):
        raise ValueError(f"Input y contains NaN or None in row {gap[0]}: leave out rows without an answer.")
    return values
