"""What a training returns: the frozen posterior and its history, or an error that holds them."""

import textwrap
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import nn

from .._display import html_table
from ..guides import Guide
from ..lora.adapter import Adapter
from ..lora.factors import Factors
from ..model.bayesian_lora import BayesianLoRA
from ..posterior.posterior import Posterior
from ..tasks import Task
from .held_out_scores import EVAL, NLL
from .history import KEPT

#: Number of characters of the posterior's repr that the repr of a result shows.
MAX_REPR = 1000


@dataclass(frozen=True, repr=False)
class FitResult:
    """The posterior and the history that :func:`scalabl_pyro.fit` returns.

    Attributes:
        posterior: The frozen posterior. Later training does not change it.
        history: One row per step: ``step``, ``loss`` and ``nll`` (nats per example), ``kl`` (nats per data set, not
            yet multiplied by ``kl_weight``), ``kl_weight``, ``grad_norm`` (before clipping), ``lr`` (learning rate of
            the factors B), ``seconds`` since the start, and ``skipped`` (number of steps so far that changed no
            parameter, because the loss or the gradient was NaN or infinite). :class:`~scalabl_pyro.Completion` adds
            ``nll_per_token``, the NLL of the batch divided by the number of its completion tokens (nats).
            With ``eval_data`` there are scores of the held-out rows, NaN at steps that were not evaluated: ``eval_nll``
            (nats per row, of the average over draws), and ``eval_accuracy`` and ``eval_ece`` of classes, ``eval_rmse``
            of numbers, or ``eval_nll_per_token`` of texts. ``kept`` says whether the posterior is that of this step.
        warnings: What is wrong with the end of the training, one sentence each: the loss or the NLL is above its start,
            or one class is predicted for all recent rows. Empty if neither was seen.
        settled: Whether loss, guide and steps had settled at the end, and what to change, in one line.
        interrupted: Whether Ctrl-C ended the training.

    Example:
        >>> result = scalabl_pyro.fit(blora, task, rows, num_steps=100)
        >>> result.posterior.predict(rows, num_draws=10).metrics()
    """

    posterior: Posterior
    history: pd.DataFrame
    warnings: tuple[str, ...] = ()
    settled: str = ""
    interrupted: bool = False

    @property
    def evaluations(self) -> pd.DataFrame:
        """Rows of the history in which held-out rows were scored: step, training NLL, the scores, ``kept``.

        Raises:
            ValueError: ``fit`` had no ``eval_data``.
        """
        return evaluations_of(self.history)

    def complete(self, what: str) -> "FitResult":
        """Return the result itself, for a caller that trains several times and cannot use a part of a training.

        Args:
            what: What was trained, such as ``"member 1 of 3"``.

        Raises:
            KeyboardInterrupt: Ctrl-C ended the training.
        """
        if self.interrupted:
            raise KeyboardInterrupt(f"Ctrl-C ended {what} after {len(self.history)} steps.")
        return self

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={value}" for name, value in self._summary().items())
        lines = [*(f"warning: {text}" for text in self.warnings), *filter(None, [self.settled])]
        notes = "".join(f"  {line}\n" for line in lines)
        return f"FitResult({numbers})\n{notes}" + textwrap.indent(f"posterior: {self._describe_posterior()}", "  ")

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
        notes = [
            *(("warning", text) for text in self.warnings),
            *(("settled", text) for text in [self.settled] if text),
        ]
        facts = [*self._summary().items(), *notes]
        return html_table("FitResult", [*facts, ("posterior", self._describe_posterior())])

    def _describe_posterior(self) -> str:
        """The posterior's repr if it is short, else its guide, task and number of latents."""
        shown = repr(self.posterior)
        if len(shown) <= MAX_REPR:
            return shown
        guide, task = type(self.posterior.guide).__name__, type(self.posterior.task).__name__
        return f"Posterior(guide={guide}, task={task}, dim={self.posterior.adapter.subspace.dim})"

    def _summary(self) -> dict[str, str]:
        """Steps, and loss, NLL, KL and seconds of the last one."""
        return last_step(self.history)


def last_step(history: pd.DataFrame) -> dict[str, str]:
    """Return the number of steps of a history, and loss, NLL, KL and seconds of the last one, as texts.

    With held-out rows there are also the step whose state the posterior holds, and its held-out NLL.
    """
    last = {} if history.empty else history.iloc[-1].to_dict()
    names = [name for name in ("loss", "nll", "kl", "seconds") if name in last]
    shown = {"steps": str(len(history))} | {name: f"{last[name]:.4g}" for name in names}
    if KEPT not in history or not history[KEPT].any():
        return shown
    kept = history[history[KEPT]].iloc[-1]
    scores = {} if kept[NLL] != kept[NLL] else {NLL: f"{kept[NLL]:.4g}"}
    return shown | {"kept_step": str(int(kept["step"]))} | scores


def evaluations_of(history: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a history in which held-out rows were scored; see :attr:`FitResult.evaluations`.

    Raises:
        ValueError: The history has no scores.
    """
    if NLL not in history:
        raise ValueError("Nothing was evaluated: pass held-out rows, fit(..., eval_data=rows).")
    names = [name for name in history if name in ("member", "step", "nll", KEPT) or str(name).startswith(EVAL)]
    return history.loc[history[NLL].notna(), names].reset_index(drop=True)


class TrainingError(FloatingPointError):
    """A loss, gradient or parameter is not finite.

    Attributes:
        result: The :class:`FitResult` of all earlier steps. It is None if there are none, or if the parameters do not
            make a posterior any more.
    """

    result: FitResult | None = None


@torch.no_grad()
def unit_rows(adapter: Adapter, factors: Factors) -> Factors:
    """Give the rows of each A unit norm, where training ignores their norms.

    Args:
        adapter: The layers.
        factors: A and B of each layer. Fixed ones have unit rows already, and keep every bit.
    """
    if adapter.gauge != "unit_rows":
        return factors
    trained = [live.requires_grad for live, _ in adapter.factors()]
    return tuple(
        (nn.functional.normalize(A, dim=-1) if is_trained else A, B)
        for (A, B), is_trained in zip(factors, trained, strict=True)
    )


def snapshot(blora: BayesianLoRA, task: Task, guide: Guide, provenance: dict[str, Any]) -> Posterior:
    """Copy what was learned so far into a posterior. The module stays as it is, so that the training can go on."""
    posterior = Posterior.capture(blora, task, guide, provenance=provenance)
    return replace(posterior, factors=unit_rows(blora.adapter, posterior.factors))


@torch.no_grad()
def freeze(blora: BayesianLoRA, task: Task, guide: Guide, provenance: dict[str, Any]) -> Posterior:
    """Copy what was learned into a posterior, and leave the module at the posterior mean."""
    adapter = blora.adapter
    for (live, _), (A, _) in zip(adapter.factors(), unit_rows(adapter, adapter.factors()), strict=True):
        if A is not live:
            live.copy_(A)
    posterior = Posterior.capture(blora, task, guide, provenance=provenance)
    adapter.rest_at(posterior.mean())
    return posterior
