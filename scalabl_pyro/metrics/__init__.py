"""Accuracy, calibration and uncertainty metrics: pure functions of probabilities (N, C) and labels (N,).

Every function refuses shapes that do not fit, logits, percentages, NaN, and labels outside of the classes.
Proportions and errors lie in [0, 1]; log losses are in nats. Accuracy and AUROC come from torchmetrics. Its calibration
error is not used: it gives p = 1 a bin of its own, and reads all rows as logits when rounding lifts one value above 1.

Example:
    >>> probs, labels = np.array([[0.8, 0.2], [0.4, 0.6]]), np.array([0, 0])
    >>> accuracy(probs, labels), round(nll(probs, labels), 3), round(brier(probs, labels), 2)
    (0.5, 0.57, 0.4)
"""

from .arrays import Array as Array
from .arrays import Labels as Labels
from .by_class import confusion_matrix, report_by_class
from .calibration import Bins as Bins
from .calibration import adaptive_ece, ece, reliability
from .intervals import check_level as check_level
from .scores import accuracy, brier, entropy, nll
from .selection import (
    ConfidentMistakes,
    aurc,
    auroc,
    confident_mistakes,
    error_auroc,
    ood_auroc,
    risk_coverage,
)
from .tables import CLASSIFICATION as CLASSIFICATION
from .tables import classification_report, report

__all__ = [
    "ConfidentMistakes",
    "accuracy",
    "adaptive_ece",
    "aurc",
    "auroc",
    "brier",
    "classification_report",
    "confident_mistakes",
    "confusion_matrix",
    "ece",
    "entropy",
    "error_auroc",
    "nll",
    "ood_auroc",
    "reliability",
    "report",
    "report_by_class",
    "risk_coverage",
]
