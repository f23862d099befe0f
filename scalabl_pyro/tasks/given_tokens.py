"""The distribution of a completion, evaluated at the tokens that it was computed for."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints


class GivenTokens(TorchDistribution):
    """Distribution over sequences of T tokens that knows the log probability of one sequence per row.

    A table over all sequences would have vocabulary^T entries, and the logits of all tokens rarely fit into memory. So
    the log probabilities of the given tokens are computed before, and ``log_prob`` adds them up.

    Args:
        log_probs: Log probability of each token given those before it, nats, (..., B, T); 0 where a row has fewer.
        tokens: The tokens, (B, T).

    Example:
        >>> given = GivenTokens(torch.tensor([[-0.5, -1.0]]), torch.tensor([[7, 9]]))
        >>> given.log_prob(torch.tensor([[7, 9]]))
        tensor([-1.5000])
    """

    arg_constraints = {"log_probs": constraints.independent(constraints.real, 1)}  # noqa: RUF012  torch's own name
    has_rsample = False
    support = constraints.independent(constraints.real, 1)

    def __init__(self, log_probs: Tensor, tokens: Tensor, *, validate_args: bool | None = None) -> None:
        self.log_probs = log_probs
        self.tokens = tokens
        super().__init__(log_probs.shape[:-1], log_probs.shape[-1:], validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log probability of the sequences, nats, (..., B).

        Raises:
            ValueError: The value is another sequence than the given one.
        """
        if value is not self.tokens and (value.shape != self.tokens.shape or not torch.equal(value, self.tokens)):
            raise ValueError(
                "This distribution knows the probability of the given completions only. For others, pass rows with "
                "them to posterior.score(rows)."
            )
        return self.log_probs.sum(-1)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "GivenTokens":
        """Return the distribution with a larger batch shape."""
        shape = torch.Size(batch_shape) + self.event_shape
        return GivenTokens(self.log_probs.expand(shape), self.tokens, validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Raise an error: a completion is generated token by token."""
        raise NotImplementedError("A completion is generated token by token: use posterior.generate(prompts).")
