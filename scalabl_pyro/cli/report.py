"""What a report says about predictions of rows with answers: tables, pictures, and the rows to look at."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import metrics, plots
from .._version import __version__
from ..prediction.label_sets import LabelSetPrediction
from ..prediction.result import NumericPrediction, Prediction
from .report_verdict import are_right, verdict
from .report_words import COLUMNS
from .tables import beside

Tables = dict[str, tuple[str, pd.DataFrame]]
Pictures = dict[str, tuple[str, bytes]]
#: Number of rows in each list of rows to look at.
SHOWN = 20


@dataclass(frozen=True)
class Report:
    """What a report shows.

    Attributes:
        facts: What was predicted with what.
        in_short: Sentences that say how good the predictions are.
        metrics: Metrics, with the row ``value`` and the intervals ``low`` and ``high``.
        tables: Further tables by their title, with a sentence each.
        pictures: Pictures as PNG by their title, with a sentence each.
    """

    facts: Mapping[str, object]
    in_short: Sequence[str]
    metrics: pd.DataFrame
    tables: Tables
    pictures: Pictures

    @classmethod
    def of(
        cls,
        prediction: Any,
        rows: Sequence[Mapping[str, Any]],
        *,
        source: str,
        posterior: str,
        bootstrap: int,
        review_above: float | None = None,
    ) -> "Report":
        """Make the report of a prediction.

        Args:
            prediction: Prediction of N rows.
            rows: The N rows.
            source: Name of the file of the rows.
            posterior: Name of the posterior.
            bootstrap: Number of resamples behind the intervals.
            review_above: Limit of the doubt above which a row needs a review; None marks no rows.

        Raises:
            ValueError: No row has an answer, or the limit is out of range.
        """
        known = prediction.is_answered
        answered = prediction.with_answers()
        table = beside(
            [row for row, is_known in zip(rows, known, strict=True) if is_known],
            answered.to_frame(review_above=review_above),
        )
        facts = {
            "rows": source,
            "number of rows with answers": int(known.sum()),
            "posterior": posterior,
            "draws": answered.num_draws or "the mean of s",
            **({} if review_above is None else {"a person reads rows with a doubt above": f"{review_above:g}"}),
            "library": f"scalabl_pyro {__version__}",
        }
        found = answered.metrics(bootstrap=bootstrap)
        in_short = verdict(answered, table, found, review_above=review_above)
        tables, pictures = next(make for kind, make in PARTS.items() if isinstance(prediction, kind))(answered, table)
        meaning = [(name, words) for name, words in COLUMNS.items() if any(name in t for _, t in tables.values())]
        tables["What the columns mean"] = ("", pd.DataFrame(meaning, columns=["column", "meaning"]))
        return cls(facts, in_short, found, tables, pictures)


def _of_classes(found: Prediction, table: pd.DataFrame) -> tuple[Tables, Pictures]:
    target: Any = found.target
    per_class = metrics.report_by_class(found.probs, target, classes=found.classes)
    counts = metrics.confusion_matrix(found.probs, target, classes=found.classes)
    by_doubt = table.sort_values("probability")
    wrong = table[~are_right(table)].sort_values("probability", ascending=False)
    tables = {
        "Each class": ("Precision: how many of the rows with this prediction are right. Recall: how many of the rows "
                       "with this label are found.", per_class.reset_index()),
        "Confusion": ("A line is the label, a column the prediction.", counts.reset_index()),
        "Mistakes, the surest first": ("Wrong predictions with the largest probability. The label may be wrong.",
                                       wrong.head(SHOWN)),
        "Most doubtful rows": ("Rows with the smallest probability of their prediction.", by_doubt.head(SHOWN)),
    }  # fmt: skip
    pictures = {
        "Reliability": ("Points on the diagonal: the model is as often right as it says.",
                        _picture(lambda ax: plots.reliability(found, ax=ax))),
        "Selective prediction": ("If only the most certain rows are answered (coverage), this share of them is "
                                 "wrong (risk).", _picture(lambda ax: plots.risk_coverage(found, ax=ax))),
    }  # fmt: skip
    return tables, pictures


def _of_numbers(found: NumericPrediction, table: pd.DataFrame) -> tuple[Tables, Pictures]:
    off = table.assign(sds_off=(table["target"] - table["prediction"]).abs() / table["sd"])
    tables = {
        "Surprising rows": ("Rows whose answer is the largest number of standard deviations away.",
                            off.sort_values("sds_off", ascending=False).head(SHOWN)),
        "Most doubtful rows": ("Rows with the largest standard deviation.",
                               table.sort_values("sd", ascending=False).head(SHOWN)),
    }  # fmt: skip

    def draw(ax: Axes) -> None:
        ax.errorbar(table["prediction"], table["target"], xerr=table["sd"], fmt="o", ms=3, lw=0.8, alpha=0.6)
        ends = [table[["prediction", "target"]].min().min(), table[["prediction", "target"]].max().max()]
        ax.plot(ends, ends, color="black", lw=0.8)
        ax.set_xlabel("prediction, ± one standard deviation")
        ax.set_ylabel("answer")

    return tables, {"Predictions and answers": ("On the line, both are equal.", _picture(draw))}


def _of_label_sets(found: LabelSetPrediction, table: pd.DataFrame) -> tuple[Tables, Pictures]:
    by_doubt = table.sort_values("probability")
    wrong = table[~are_right(table)]
    return {
        "Mistakes, the surest first": ("Wrong sets of labels with the largest probability. The labels may be wrong.",
                                       wrong.sort_values("probability", ascending=False).head(SHOWN)),
        "Most doubtful rows": ("Rows with the smallest probability of their set of labels.", by_doubt.head(SHOWN)),
    }, {}  # fmt: skip


#: What makes tables and pictures, by the kind of prediction.
PARTS: dict[type, Callable[[Any, pd.DataFrame], tuple[Tables, Pictures]]] = {
    Prediction: _of_classes,
    NumericPrediction: _of_numbers,
    LabelSetPrediction: _of_label_sets,
}


def _picture(draw: Callable[[Axes], Any]) -> bytes:
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")  # not of pyplot: no window, no state
    draw(figure.subplots())
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()
