"""What happens to each class: the confusion matrix, and precision and recall per class."""

from collections.abc import Sequence

import pandas as pd
import torch

from .._arguments import known_arguments
from .._probabilities import as_probabilities
from .arrays import Array, Labels


@known_arguments
def confusion_matrix(probs: Array, labels: Labels, *, classes: Sequence[object] | None = None) -> pd.DataFrame:
    """Count the rows of each class by the class that was predicted.

    Args:
        probs: (N, C) probabilities.
        labels: (N,) class indices.
        classes: Names of the C classes; None for their indices.

    Returns:
        (C, C) numbers of rows. A line is the class of the label, a column the most probable class.

    Raises:
        ValueError: Shapes, probabilities, labels or the number of names are wrong.

    Example:
        >>> import numpy as np
        >>> from scalabl_pyro.metrics import confusion_matrix
        >>> table = confusion_matrix(np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([0, 1]), classes=("oil", "trade"))
        >>> table.loc["trade"].to_dict()
        {'oil': 1, 'trade': 0}
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    probs, labels = as_probabilities(probs, labels)
    names = _names(classes, probs.shape[1])
    predicted, target = torch.as_tensor(probs.argmax(1)), torch.tensor(labels)  # a copy: it may be read-only
    counts = multiclass_confusion_matrix(predicted, target, num_classes=len(names)).numpy()
    return pd.DataFrame(counts, index=pd.Index(names, name="label"), columns=pd.Index(names, name="predicted"))


@known_arguments
def report_by_class(probs: Array, labels: Labels, *, classes: Sequence[object] | None = None) -> pd.DataFrame:
    """Compute precision and recall of each class.

    Args:
        probs: (N, C) probabilities.
        labels: (N,) class indices.
        classes: Names of the C classes; None for their indices.

    Returns:
        A line per class: ``rows`` (with this label), ``predicted`` (rows with this prediction), ``precision`` (share
        of right rows among the predicted ones), ``recall`` (share of right rows among those with this label), and
        ``f1``, their harmonic mean. A share of no rows is NaN.

    Raises:
        ValueError: Shapes, probabilities, labels or the number of names are wrong.

    Example:
        >>> import numpy as np
        >>> from scalabl_pyro.metrics import report_by_class
        >>> table = report_by_class(np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([0, 1]))
        >>> table.loc[0, ["precision", "recall"]].tolist()
        [0.5, 1.0]
    """
    counts = confusion_matrix(probs, labels, classes=classes)
    matrix = counts.to_numpy().astype(float)
    right, rows, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    table = pd.DataFrame({"rows": rows.astype(int), "predicted": predicted.astype(int)})
    table["precision"] = pd.Series(right) / table["predicted"].where(predicted > 0)
    table["recall"] = pd.Series(right) / table["rows"].where(rows > 0)
    table["f1"] = 2 * pd.Series(right) / (table["rows"] + table["predicted"]).where(rows + predicted > 0)
    return table.set_index(pd.Index(counts.index, name="class"))


def _names(classes: Sequence[object] | None, count: int) -> list[object]:
    names: list[object] = list(range(count) if classes is None else classes)
    if len(names) != count:
        raise ValueError(f"classes has {len(names)} names, but the probabilities have {count} classes.")
    return names
