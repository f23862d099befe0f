"""Checks that draws, and what is kept of each, fit into memory, before the first of them is made."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from .._process.memory import check_memory
from ..data.batch import Example
from ..guides import Guide
from ..tasks import Task

#: Smallest number of draws for which one draw is made to see its size. Fewer draws of s alone always fit.
MANY = 1000
#: Copies of the draws that are in memory at once: the parts, and the parts joined.
COPIES = 2
#: Bytes that a draw takes besides its numbers, per site, until the draws are joined.
OVERHEAD = 1024
#: Copies of the predictions that are in memory at once: one per batch, joined, and in the order of the rows. The
#: float64 arrays from which uncertainties are computed later take as much.
COPIES_OF_PREDICTIONS = 6
#: Numbers that are kept per draw and row if answers are numbers: mean, variance, simulated answer, log density.
MOMENTS = 4

FEWER = "Ask for fewer draws."
FEWER_OR_AVERAGES = (
    "Ask for fewer draws, or call predict(..., keep_draws=False), which keeps averages over draws only and needs "
    "little memory for any number of draws."
)


def check_room(
    guide: Guide, num_draws: int, *, per_draw: int = 0, copies: int = COPIES, kept: str = "", advice: str = FEWER
) -> None:
    """Check that draws of a guide fit into memory, together with what is kept of each.

    Args:
        guide: Guide to draw from.
        num_draws: Number S of draws.
        per_draw: Bytes that are kept per draw besides the draw itself.
        copies: Number of copies of the draws that are in memory at once.
        kept: What these bytes hold, as part of a sentence.
        advice: What to do, as a sentence.

    Raises:
        ValueError: If they do not fit. The message has the bytes that they take and the bytes that are available.

    Example:
        >>> check_room(posterior.guide, 1000)
    """
    own = copies * size_of(guide.sample(1, seed=0)) if num_draws >= MANY else 0
    check_memory(f"{num_draws:,} draws{kept}", num_draws * (own + per_draw), advice)


def size_of(sites: Mapping[str, Tensor]) -> int:
    """Return the bytes of tensors by name."""
    return sum(value.nbytes for value in sites.values())


def size_of_predictions(task: Task, examples: Sequence[Example], itemsize: int) -> int:
    """Return the bytes that the predictions of rows take per draw, while they are computed.

    Args:
        task: Task that defines the likelihood.
        examples: Tokenized rows.
        itemsize: Bytes per number of the outputs.
    """
    choices = max((e.extras.get("num_choices", 0) for e in examples), default=0)
    per_row = choices or len(task.classes or ()) or MOMENTS
    return COPIES_OF_PREDICTIONS * len(examples) * per_row * max(itemsize, 4)
