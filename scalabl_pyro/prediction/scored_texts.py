"""Texts with what every draw of a posterior says of each of their tokens."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .._display import Summarized
from ..metrics import Array
from .mixture import log_mean_exp


@dataclass(frozen=True)
class TokenNumbers:
    """Numbers of the T tokens of one completion. Logarithms are natural, so entropies are in nats.

    The mixture weights each draw by what the tokens before say of it, w_k proportional to prod_{j<t} p_k(y_j).

    Attributes:
        tokens: (T,) token ids.
        log_probs: (S, T) log probability of each token given those before it, under each draw.
        log_mixture: (T,) log probability of each token under the mixture. Their sum is that of the sequence.
        total: (T,) entropy of the mixture.
        aleatoric: (T,) weighted mean of the entropies of the draws.
        top_tokens: (T, top) most probable tokens of the mixture.
        top_probs: (T, top) their probabilities in the mixture.
        top_probs_by_draw: (S, T, top) their probabilities under each draw.
    """

    tokens: NDArray[np.integer]
    log_probs: Array
    log_mixture: Array
    total: Array
    aleatoric: Array
    top_tokens: NDArray[np.integer]
    top_probs: Array
    top_probs_by_draw: Array

    @property
    def epistemic(self) -> Array:
        """(T,) total - aleatoric: what the draws disagree about, at most log S."""
        return np.maximum(self.total - self.aleatoric, 0.0)


@dataclass(frozen=True, repr=False)
class ScoredTexts(Summarized):
    """N completions with what S draws of a posterior say of their tokens.

    Attributes:
        rows: Numbers of the tokens of each completion.
        texts: The completions.
        pieces: The text of each token of each completion.
        is_mean: Whether the only draw is the posterior mean (``num_draws=0``).
        seconds: Time that the computation took.

    Example:
        >>> scored = posterior.score([{"prompt": "the sky is", "completion": " blue"}], num_draws=10)
        >>> scored.to_frame()[["text", "log_prob", "epistemic"]]
    """

    rows: tuple[TokenNumbers, ...]
    texts: tuple[str, ...]
    pieces: tuple[list[str], ...]
    is_mean: bool = False
    seconds: float = float("nan")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_draws(self) -> int:
        """Number S of draws; 0 for the posterior mean."""
        return 0 if self.is_mean else len(self.rows[0].log_probs)

    @property
    def num_tokens(self) -> NDArray[np.integer]:
        """(N,) number of tokens of each completion, with its end token."""
        return np.asarray([len(row.tokens) for row in self.rows])

    @property
    def log_probs(self) -> Array:
        """(S, N) log probability of each whole completion under each draw, nats."""
        return np.stack([row.log_probs.sum(-1) for row in self.rows], axis=1)

    @property
    def log_prob(self) -> Array:
        """(N,) log probability of each whole completion under the mixture of the draws, nats."""
        return log_mean_exp(self.log_probs)

    @property
    def log_likelihood(self) -> Array:
        """(S, N) as :attr:`log_probs`, under the name that other predictions have."""
        return self.log_probs

    @property
    def total(self) -> Array:
        """(N,) sum over tokens of the entropy of the mixture, nats."""
        return np.asarray([row.total.sum() for row in self.rows])

    @property
    def aleatoric(self) -> Array:
        """(N,) sum over tokens of the mean entropy of the draws, nats."""
        return np.asarray([row.aleatoric.sum() for row in self.rows])

    @property
    def epistemic(self) -> Array:
        """(N,) sum over tokens of :attr:`TokenNumbers.epistemic`, nats.

        Its mean over texts that the mixture wrote is the mutual information of text and draw (chain rule).
        """
        return np.asarray([row.epistemic.sum() for row in self.rows])

    def to_frame(self) -> pd.DataFrame:
        """Return one row per text: sums over its tokens, and the same per token.

        A long text has larger sums. The columns that end with ``_per_token`` can be compared between lengths, but they
        are no entropies.
        """
        count = self.num_tokens
        sums = {name: getattr(self, name) for name in ("log_prob", "total", "aleatoric", "epistemic")}
        rates = {f"{name}_per_token": value / count for name, value in sums.items()}
        return pd.DataFrame({"text": self.texts, "num_tokens": count, **sums, **rates})

    def tokens(self, row: int) -> pd.DataFrame:
        """Return one row per token of a completion.

        Args:
            row: Number of the completion.
        """
        numbers = self.rows[row]
        columns = {name: getattr(numbers, name) for name in ("log_mixture", "total", "aleatoric", "epistemic")}
        return pd.DataFrame({"token": self.pieces[row], **columns})

    def _summary(self) -> dict[str, object]:
        return {"texts": len(self), "num_draws": self.num_draws, "tokens": int(self.num_tokens.sum())}
