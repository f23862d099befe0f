"""Texts with what every draw of a posterior says of each of their tokens."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .._display import Summarized
from .._errors import check_choice, check_count
from ..metrics import Array
from .mixture import log_mean_exp
from .tokens_html import ShownText, page

Shade = Literal["epistemic", "total"]
"""Uncertainties that shade a token."""


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
        pieces: The text of each token of each completion. A character of several tokens belongs to the last of them.
        is_mean: Whether the only draw is the posterior mean (``num_draws=0``).
        seconds: Time that the computation took.
        top_pieces: The texts of ``top_tokens`` of each completion; empty for ``top=0``.

    Example:
        >>> scored = posterior.score([{"prompt": "the sky is", "completion": " blue"}], num_draws=10)
        >>> scored.to_frame()[["text", "log_prob", "epistemic"]]
    """

    rows: tuple[TokenNumbers, ...]
    texts: tuple[str, ...]
    pieces: tuple[list[str], ...]
    is_mean: bool = False
    seconds: float = float("nan")
    top_pieces: tuple[list[list[str]], ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_draws(self) -> int:
        """Number S of draws; 0 for the posterior mean."""
        return 0 if self.is_mean else len(self.rows[0].log_probs)

    @property
    def source(self) -> str:
        """What the numbers come from, in words: ``"10 draws"`` or ``"posterior mean"``."""
        count = self.num_draws
        return "posterior mean" if self.is_mean else "1 draw" if count == 1 else f"{count} draws"

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

    def alternatives(self, row: int) -> pd.DataFrame:
        """Return the most probable tokens at each place of a completion, for ``score(..., top=5)`` for instance.

        Args:
            row: Number of the completion.

        Returns:
            One row per place and token: ``place``, ``token``, its probability ``prob`` in the mixture, and its smallest
            and largest probability under a draw, ``low`` and ``high``. Without rows for ``top=0``.
        """
        numbers = self.rows[row]
        places, top = numbers.top_probs.shape
        texts = self.top_pieces[row] if self.top_pieces else [[f"#{i}" for i in ids] for ids in numbers.top_tokens]
        draws = numbers.top_probs_by_draw
        return pd.DataFrame(
            {
                "place": np.repeat(np.arange(places), top),
                "token": [token for here in texts for token in here],
                "prob": numbers.top_probs.ravel(),
                "low": draws.min(0).ravel(),
                "high": draws.max(0).ravel(),
            }
        )

    def uncertainty(self, row: int, by: Shade) -> Array:
        """Return the total or the epistemic uncertainty of each token of a completion, nats.

        One draw cannot disagree with itself, so its epistemic uncertainty is exactly 0.

        Args:
            row: Number of the completion.
            by: ``"total"`` or ``"epistemic"``.

        Raises:
            ValueError: ``by`` is another word.
        """
        check_choice("by", by, get_args(Shade))
        values: Array = getattr(self.rows[row], by)
        return np.zeros_like(values) if by == "epistemic" and self.num_draws < 2 else values

    def to_html(self, *, by: Shade = "epistemic", max_texts: int = 10, max_tokens: int = 400) -> str:
        """Return the texts as HTML, each token shaded by its uncertainty. A notebook shows it.

        A tooltip gives the numbers of a token, and the most probable tokens at its place if ``score(..., top=)`` kept
        them. A table below each text has the tokens with the largest values.

        Args:
            by: Shade: ``"epistemic"``, what the draws disagree about, or ``"total"``, the entropy of the mixture.
            max_texts: Largest number of texts to show.
            max_tokens: Largest number of tokens to show per text.

        Raises:
            ValueError: ``by`` is another word, or a number is less than 1.

        Example:
            >>> from IPython.display import HTML
            >>> HTML(posterior.score(rows, top=3).to_html(by="total"))
        """
        check_choice("by", by, get_args(Shade))
        check_count(max_texts=max_texts, max_tokens=max_tokens)
        shown = [self._shown(row, by, max_tokens) for row in range(min(len(self), max_texts))]
        count = f"{len(self)} texts" if len(shown) == len(self) else f"the first {len(shown)} of {len(self)} texts"
        count = "1 text" if len(self) == 1 else count
        return page(shown, title=f"{type(self).__name__}: {count}, {self.source}", by=by, notes=self._notes(by))

    def _repr_html_(self) -> str:
        return self.to_html()

    def _shown(self, row: int, by: Shade, max_tokens: int) -> ShownText:
        frame, others, values = self.tokens(row), self.alternatives(row), self.uncertainty(row, by)
        frame["epistemic"] = self.uncertainty(row, "epistemic")
        sums = f"{frame['log_mixture'].sum():.4g} nats, {by} uncertainty {values.sum():.4g} nats"
        return ShownText(
            title=f"Text {row}: {len(frame)} token{'s' * (len(frame) != 1)}, log probability {sums} in sum",
            tokens=frame[:max_tokens],
            alternatives=others[others["place"] < max_tokens],
            values=values[:max_tokens],
            num_hidden=max(len(frame) - max_tokens, 0),
        )

    def _notes(self, by: Shade) -> list[str]:
        if by == "total" or self.num_draws > 1:
            return []
        return [f"{self._one_function()} Show it with to_html(by='total'), or score with num_draws=10."]

    def _one_function(self) -> str:
        """Say why no token has an epistemic uncertainty."""
        what = "The posterior mean is one model" if self.is_mean else "One draw is one model"
        return f"{what}, so the epistemic uncertainty is 0 for every token."

    def _summary(self) -> dict[str, object]:
        return {"texts": len(self), "num_draws": self.num_draws, "tokens": int(self.num_tokens.sum())}
