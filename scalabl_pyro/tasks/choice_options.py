"""Checks of the labels, the template and the model of multiple-choice questions, before any text is tokenized."""

import logging
import re
from collections import Counter
from collections.abc import Sequence

from torch import nn

from .._values import shown
from ..lora.targets import is_encoder_decoder

logger = logging.getLogger(__name__)


def check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the labels of the choices, which must be two or more different texts.

    Raises:
        ValueError: They are something else.

    Example:
        >>> from scalabl_pyro.tasks.choice_options import check_labels
        >>> check_labels(["A", "B"])
        ('A', 'B')
    """
    if not isinstance(labels, Sequence) or len(labels) < 2 or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"labels={shown(labels)}: expected two or more texts, such as ('A', 'B', 'C', 'D').")
    if len(set(labels)) < len(labels):
        label, count = Counter(labels).most_common(1)[0]
        raise ValueError(
            f"labels={shown(tuple(labels))}: two labels become the same token, because {shown(label)} stands there "
            f"{count} times. Give each choice a label of its own."
        )
    return tuple(labels)


def check_template(template: str) -> None:
    """Check that a template has a place for the question. Warn of a field that a prompt does not fill.

    Raises:
        ValueError: It has no such place.
    """
    if not isinstance(template, str) or "{question}" not in template:
        raise ValueError(f"template={shown(template)} must contain '{{question}}'.")
    others = set(re.findall(r"\{[A-Za-z_]\w*\}", template)) - {"{question}", "{choices}"}
    if others:
        logger.warning(
            "The template contains %s, which stands in each prompt as it is. Only {question} and {choices} are filled: "
            "write other fields into the question of each row.",
            ", ".join(sorted(others)),
        )


def check_is_causal(llm: nn.Module) -> None:
    """Raise a ValueError for an encoder-decoder, which does not continue the prompt."""
    if is_encoder_decoder(llm):
        raise ValueError(
            f"MultipleChoice needs a causal LM, but {type(llm).__name__} is an encoder-decoder. Load a causal LM "
            "(AutoModelForCausalLM), or use SequenceClassification with a classification model."
        )


def check_number(count: int, most: int, *, least: int = 2) -> None:
    """Raise a ValueError if a row has too few or too many choices.

    Args:
        count: Number of choices.
        most: Number of labels.
        least: Smallest number of choices.
    """
    if not least <= count <= most:
        raise ValueError(
            f"the row has {count} choices. This task has {most} labels, so it allows 2 to {most} choices. By default, "
            "labels are the letters that the tokenizer writes as one token; pass labels= for others."
        )
