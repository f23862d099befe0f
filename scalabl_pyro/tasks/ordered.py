"""The task that assigns one of several ordered classes to a text, such as a number of stars."""

from collections.abc import Sequence
from typing import Any, cast

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.batch import Batch
from ..data.labels import ClassName
from .text import SequenceClassification, single_output


class OrderedClassification(SequenceClassification):
    """Task that assigns one of several ordered classes to a text, for a classification model with one output.

    Cutpoints c_1 < ... < c_(K-1) divide the real line into K parts, one per class, and p(y <= k) is the logistic
    function of c_(k+1) - output: the ordered logistic likelihood (McCullagh, 1980), as in
    ``pyro.distributions.OrderedLogistic``. The cutpoints are learned. They start where all classes have the same
    probability for the output 0.

    Args:
        tokenizer: A Hugging Face tokenizer with a pad token.
        classes: Names of the classes, from the lowest to the highest.
        options: ``text``, ``text_pair``, ``target``, ``max_length``, ``windows="logits"`` and ``class_weights``, as for
            :class:`SequenceClassification`.

    Raises:
        TypeError: ``tokenizer`` is not a Hugging Face tokenizer.
        ValueError: There are fewer than two classes, two of them have one name, or they mix texts and numbers.

    Example:
        >>> from scalabl_pyro.tasks import OrderedClassification
        >>> task = OrderedClassification(tokenizer, classes=[1, 2, 3, 4, 5], target="stars")
        >>> task.encode({"text": "the sky is blue", "stars": 4}).target
        3
    """

    can_mix_windows = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, classes: Sequence[ClassName], **options: Any) -> None:
        super().__init__(tokenizer, classes=classes, **options)
        number = len(self.classes)
        start = torch.logit(torch.arange(1, number) / number)
        self.cutpoints: Tensor | PyroParam = PyroParam(start, constraints.ordered_vector)

    def likelihood(self, outputs: Tensor, batch: Batch) -> dist.Categorical:
        """Build the ordered logistic distribution of the class."""
        cutpoints = cast(Tensor, self.cutpoints).to(outputs.dtype)
        return self._categorical(ordered_log_probs(single_output(outputs), cutpoints))


def ordered_log_probs(output: Tensor, cutpoints: Tensor) -> Tensor:
    """Compute the log probabilities of ordered classes, nats, (..., K).

    Differences of two probabilities near 1 would lose all digits, and Pyro's distribution clamps them, so that an
    answer far from the output has no gradient. Here log(S(a) - S(b)) = log S(a) + log S(-b) + log(1 - exp(b - a)), with
    the logistic function S.

    Args:
        output: Output of the model, (...).
        cutpoints: Increasing numbers, (K - 1,).

    Example:
        >>> ordered_log_probs(torch.zeros(1), torch.tensor([0.0])).exp()
        tensor([[0.5000, 0.5000]])
    """
    upper = cutpoints - output.unsqueeze(-1)
    between = F.logsigmoid(upper[..., 1:]) + F.logsigmoid(-upper[..., :-1]) + torch.log(-torch.expm1(-cutpoints.diff()))
    return torch.cat([F.logsigmoid(upper[..., :1]), between, F.logsigmoid(-upper[..., -1:])], dim=-1)
