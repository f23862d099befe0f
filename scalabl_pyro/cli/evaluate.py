"""The command ``evaluate``: predictions are compared with known answers, and a report says how good they are."""

from pathlib import Path

from ..data.rows import read_rows
from .loading import load_posterior
from .report import Report
from .report_files import check_report_name, write_report
from .terminal import say, say_json


def evaluate(
    path: Path,
    data: str,
    model: str,
    out: Path | None,
    num_draws: int,
    seed: int,
    batch_size: int,
    device: str,
    bootstrap: int,
    as_json: bool,
) -> int:
    """Print metrics, and write a report with pictures.

    Args:
        path: Directory of the saved posterior.
        data: File of the rows with answers.
        model: Base model.
        out: File of the report, ``.html`` or ``.md``; None writes none.
        num_draws: Number of draws.
        seed: Seed of the draws.
        batch_size: Rows per forward pass.
        device: Device of the model.
        bootstrap: Number of resamples behind the intervals.
        as_json: Whether to print JSON.

    Returns:
        0.

    Raises:
        ValueError: No row has an answer, or the name of the report has another ending.
    """
    check_report_name(out)
    rows = read_rows(data, split="test")
    posterior = load_posterior(path, model, device)
    found = posterior.predict(rows, num_draws=num_draws, seed=seed, batch_size=batch_size)
    report = Report.of(found, rows, source=data, posterior=str(path), bootstrap=bootstrap)
    if out is not None:
        write_report(report, out)
    if as_json:
        facts = {"rows": len(rows), "num_draws": num_draws, "seed": seed, "out": None if out is None else str(out)}
        say_json(facts | {"metrics": report.metrics.to_dict("index")})
    else:
        say(report.metrics.T.to_string(float_format=lambda value: f"{value:.3f}"))
        say("" if out is None else f"\nReport: {out}")
    return 0
