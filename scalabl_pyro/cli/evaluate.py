"""The command ``evaluate``: predictions are compared with known answers, and a report says how good they are."""

from pathlib import Path
from typing import Any

from .loading import predict_table
from .report import Report
from .report_files import ENDINGS, write_report
from .tables import check_name
from .terminal import say, say_json


def evaluate(out: Path | None, bootstrap: int, review_above: float | None, as_json: bool, **how: Any) -> int:
    """Print metrics and a verdict, and write a report with pictures.

    Args:
        out: File of the report, ``.html`` or ``.md``; None writes none.
        bootstrap: Number of resamples behind the intervals.
        review_above: Limit of the doubt above which a row needs a review.
        as_json: Whether to print JSON.
        how: Arguments of :func:`~scalabl_pyro.cli.loading.predict_table`, for rows with answers.

    Returns:
        0.

    Raises:
        ValueError: No row has an answer, the limit is out of range, or the name of the report has another ending.
    """
    check_name(out, ENDINGS)
    rows, found = predict_table(**how, progress=not as_json)
    names = {"source": how["data"], "posterior": str(how["path"])}
    report = Report.of(found, rows, **names, bootstrap=bootstrap, review_above=review_above)
    if out is not None:
        write_report(report, out)
    if as_json:
        facts = {"rows": len(rows), "num_draws": how["num_draws"], "seed": how["seed"]}
        facts |= {"out": None if out is None else str(out), "in_short": list(report.in_short)}
        say_json(facts | {"metrics": report.metrics.to_dict("index")})
    else:
        say(report.metrics.T.to_string(float_format=lambda value: f"{value:.3f}"))
        say("\n" + "\n".join(report.in_short))
        say("" if out is None else f"\nReport: {out}")
    return 0
