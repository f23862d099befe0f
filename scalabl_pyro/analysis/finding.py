"""Findings of checks, and the diagnosis that sorts them and sums them up in a sentence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from .._display import Summarized, html_table
from ..metrics import Array

Severity = Literal["error", "warning", "note", "ok"]
"""Words for how bad a finding is, worst first."""

#: Checks that speak about the predictions themselves. All others speak about the uncertainties.
OF_PREDICTIONS = ("skill", "one_class", "loss_end")


@dataclass(frozen=True)
class Finding(Summarized):
    """Result of one check.

    Attributes:
        check: Name of the check.
        severity: ``"ok"``, ``"note"`` (worth knowing), ``"warning"`` or ``"error"``.
        value: Number that the finding rests on.
        threshold: Number that ``value`` is compared with; NaN where there is none.
        cause: What was found, as a clause.
        advice: Next step; empty where there is nothing to do.

    Example:
        >>> Finding("pareto_k", "ok", 0.2, 0.7, "q is close to the posterior.", "").severity
        'ok'
    """

    check: str
    severity: Severity
    value: float
    threshold: float
    cause: str
    advice: str

    def __str__(self) -> str:
        return f"{self.severity.upper():>7}  {self.sentence}"

    @property
    def sentence(self) -> str:
        """What was found, the figure, and the next step."""
        return f"{self.cause.removesuffix('.')} ({self.check} = {self.value:.3g}). {self.advice}".rstrip()

    def _summary(self) -> Mapping[str, object]:
        return {name: value for name, value in vars(self).items() if value != ""}


@dataclass(frozen=True, repr=False)
class Diagnosis(Summarized):
    """All findings about an inference, worst first.

    ``str()`` gives the :attr:`verdict`, then one line per finding: what was found, the figure, and the next step.

    Attributes:
        findings: Findings, worst first.

    Example:
        >>> print(as_diagnosis([Finding("pareto_k", "ok", 0.2, 0.7, "q is close to the posterior.", "")]))
        No check speaks against these predictions and their uncertainties.
             OK  q is close to the posterior (pareto_k = 0.2).
    """

    findings: tuple[Finding, ...]

    @property
    def severity(self) -> Severity:
        """Severity of the worst finding."""
        return self.findings[0].severity

    @property
    def verdict(self) -> str:
        """What the findings mean for the predictions and for their uncertainties, in a sentence each."""
        predictions = _sentence("Do not use the predictions", [f for f in self.findings if f.check in OF_PREDICTIONS])
        others = [f for f in self.findings if f.check not in OF_PREDICTIONS]
        found = [text for text in (predictions, _sentence("Do not trust the uncertainties", others)) if text]
        return " ".join(found) or "No check speaks against these predictions and their uncertainties."

    def to_frame(self) -> pd.DataFrame:
        """Make a table with one line per finding."""
        return pd.DataFrame([vars(finding) for finding in self.findings]).set_index("check")

    def __str__(self) -> str:
        return "\n".join([self.verdict, *map(str, self.findings)])

    def _summary(self) -> Mapping[str, object]:
        found = {s: [f.check for f in self.findings if f.severity == s] for s in get_args(Severity)}
        return {severity: ", ".join(checks) for severity, checks in found.items() if checks}

    def _repr_html_(self) -> str:
        """The verdict above the findings, one row each, for notebooks."""
        return html_table(f"Diagnosis. {self.verdict}", [(f.severity, f.sentence) for f in self.findings])


def as_diagnosis(findings: Sequence[Finding]) -> Diagnosis:
    """Sort findings by severity; a value that is NaN is an error, never ok."""
    order = get_args(Severity)
    unknown: dict[str, Any] = {
        "severity": "error",
        "cause": "could not be computed.",
        "advice": "Check the posterior and the data.",
    }
    honest = [replace(f, **unknown) if np.isnan(f.value) and f.severity == "ok" else f for f in findings]
    return Diagnosis(tuple(sorted(honest, key=lambda f: order.index(f.severity))))


def grade(value: float, *, warning: float, error: float) -> Severity:
    """Grade a value that should be small; NaN is an error."""
    if np.isnan(value) or value >= error:
        return "error"
    return "warning" if value >= warning else "ok"


def share(check: str, where: Array, good: str, bad: str, advice: str, *, limit: float) -> Finding:
    """Make a finding of the share of entries where something is wrong; more than ``limit`` is a warning."""
    value = float(np.mean(where))
    if value > limit:
        return Finding(check, "warning", value, limit, bad, advice)
    return Finding(check, "ok", value, limit, good, "")


def _sentence(start: str, findings: Sequence[Finding]) -> str:
    """Say the worst of some findings, sorted by severity; empty where none is a warning or an error."""
    serious = [f for f in findings if f.severity in ("error", "warning")]
    if not serious:
        return ""
    worst = serious[0]
    cause = worst.cause if worst.cause != "could not be computed." else f"{worst.check} could not be computed."
    return f"{start}{'' if worst.severity == 'error' else ' yet'}, because {cause}"
