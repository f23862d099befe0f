"""Shows how far a training is: a bar in a terminal or a notebook, and single lines where output goes to a file."""

import sys
from collections.abc import Mapping
from typing import Any, Self

from tqdm.auto import tqdm

from .held_out_scores import NLL

#: Number of lines of a whole training, where there is no terminal.
NUM_LINES = 20


class Progress:
    """Progress of a training on the standard error stream, with the time left.

    A terminal or a notebook shows a bar. Elsewhere, as in the log of a batch job, a line is written 20 times in a run,
    and with each evaluation on held-out rows.

    Args:
        num_steps: Number of steps of the run.
        first_step: Number of steps that an earlier call has taken.
        is_on: Whether to show anything.

    Example:
        >>> with Progress(100, first_step=0, is_on=True) as progress:
        ...     progress.show({"step": 0, "loss": 0.7, "nll": 0.6, "kl": 3.0})
    """

    def __init__(self, num_steps: int, *, first_step: int, is_on: bool) -> None:
        self.num_steps = num_steps
        self.has_lines = is_on and not _shows_bars()
        self.every = max(num_steps // NUM_LINES, 1)
        options: dict[str, Any] = {"total": num_steps, "initial": first_step, "desc": "fit", "unit": "step"}
        self.bar = tqdm(disable=not is_on or self.has_lines, **options)
        # A bar that is never drawn, which knows the time left.
        self.clock = tqdm(file=_Nowhere(), mininterval=0, **options) if self.has_lines else None
        self.last_nll = float("nan")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()
        if self.clock is not None:
            self.clock.close()

    def show(self, row: Mapping[str, float]) -> None:
        """Show a row of the history.

        Args:
            row: Row with ``step``, ``loss``, ``nll`` and ``kl``, and with scores of held-out rows if there are any.
        """
        is_evaluated = row.get(NLL, float("nan")) == row.get(NLL)
        self.last_nll = row[NLL] if is_evaluated else self.last_nll
        numbers = {name: row[name] for name in ("loss", "nll", "kl")} | {NLL: self.last_nll}
        shown = {name: f"{value:.4g}" for name, value in numbers.items() if value == value}  # a point has no KL
        done = int(row["step"]) + 1
        self.bar.update(done - self.bar.n)
        self.bar.set_postfix(shown, refresh=False)
        if self.clock is None:
            return
        if not is_evaluated:  # a bar goes on showing the last score, and a line stands for itself
            shown.pop(NLL, None)
        self.clock.update(done - self.clock.n)
        if done % self.every == 0 or done == self.num_steps or is_evaluated:
            facts = self.clock.format_dict
            left = (self.num_steps - done) / facts["rate"] if facts["rate"] else float("nan")
            passed, rest = (tqdm.format_interval(s) if s == s else "?" for s in (facts["elapsed"], left))
            values = ", ".join(f"{name} {value}" for name, value in shown.items())
            sys.stderr.write(f"fit: step {done} of {self.num_steps}, {values} ({passed} passed, {rest} left)\n")
            sys.stderr.flush()


class _Nowhere:
    """A stream that drops what is written to it."""

    def write(self, text: str) -> None:
        """Drop a text."""

    def flush(self) -> None:
        """Do nothing."""


def _shows_bars() -> bool:
    """Whether the standard error stream is a terminal, or this is a notebook."""
    notebook = sys.modules.get("tqdm.notebook")  # tqdm.auto imports it where a notebook runs
    in_notebook = notebook is not None and issubclass(tqdm, notebook.tqdm)
    return in_notebook or bool(getattr(sys.stderr, "isatty", lambda: False)())
