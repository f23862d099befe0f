"""Averages over draws of a posterior where each draw tells only its most probable tokens: bounds that hold.

Probabilities are averaged, never logits or log probabilities. Copy this file into a client of your own; it needs only
the standard library.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """Interval that holds a probability.

    Attributes:
        lower: Smallest value that the answers allow.
        upper: Largest value that the answers allow.
    """

    lower: float
    upper: float


@dataclass(frozen=True)
class TopTokens:
    """What a draw tells of the next token.

    Attributes:
        probs: Probability of each token in the list.
        left: Probability of all other tokens together.
        other: Largest probability that one other token can have: at most ``left``, and at most the smallest
            probability in the list.
    """

    probs: Mapping[str, float]
    left: float
    other: float

    @classmethod
    def of(cls, log_probs: Mapping[str, float], count: int) -> "TopTokens":
        """Read the log probabilities (nats) that an engine returned for the ``count`` most probable tokens.

        Some engines add the sampled token, even if it is not among these tokens. So the smallest probability is that
        of place ``count``.
        """
        probs = {token: math.exp(value) for token, value in log_probs.items()}
        largest = sorted(probs.values(), reverse=True)[:count]
        left = max(0.0, 1.0 - math.fsum(probs.values()))
        return cls(probs, left, min(left, largest[-1]))

    def bounds(self, token: str) -> Bounds:
        """Return the probability of a token: exact in the list, and 0 to ``other`` outside of it."""
        known = self.probs.get(token)
        return Bounds(0.0, self.other) if known is None else Bounds(known, known)

    def among(self, labels: Sequence[str]) -> dict[str, Bounds]:
        """Return the probability of each label, given that the next token is one of the labels."""
        known = math.fsum(self.probs.get(label, 0.0) for label in labels)
        unknown = sum(label not in self.probs for label in labels)
        most = known + min(unknown * self.other, self.left)
        found = {}
        for label in labels:
            p = self.bounds(label)
            others = known - p.lower
            # The label is least probable if the labels outside of the list are as probable as possible.
            lower = p.lower / most if p.lower else 0.0
            found[label] = Bounds(lower, p.upper / (p.upper + others) if p.upper else 0.0)
        return found if known else dict.fromkeys(labels, Bounds(0.0, 1.0))


def equal_weights(count: int) -> list[Bounds]:
    """Return the weights of ``count`` draws for the first token."""
    return [Bounds(1.0, 1.0)] * count


def average(draws: Sequence[TopTokens], weights: Sequence[Bounds] | None = None) -> dict[str, Bounds]:
    """Average the probability of each token that a draw named, the most probable first.

    Args:
        draws: What each draw tells.
        weights: Weight of each draw, from :func:`weights_after`; None for equal ones.
    """
    tokens = dict.fromkeys(token for draw in draws for token in draw.probs)
    found = {token: weighted([draw.bounds(token) for draw in draws], weights) for token in tokens}
    return dict(sorted(found.items(), key=lambda item: -item[1].lower))


def average_labels(
    draws: Sequence[TopTokens], labels: Sequence[str], weights: Sequence[Bounds] | None = None
) -> dict[str, Bounds]:
    """Average the probability of each label, given that the next token is a label, as ``posterior.predict`` does.

    Each draw is normalized first, and then the draws are averaged.
    """
    rows = [draw.among(labels) for draw in draws]
    return {label: weighted([row[label] for row in rows], weights) for label in labels}


def weights_after(draws: Sequence[TopTokens], token: str, weights: Sequence[Bounds]) -> list[Bounds]:
    """Update the weights of the draws by a token: w_k is proportional to the product of p_k(token) so far.

    A draw is one function for the whole text, so the probability of a text is the average over draws of the *product*
    of its tokens. Therefore a draw that found the text so far improbable counts less for the next token. Equal weights
    at each token would be the prediction of a model that draws s anew at each token.

    Returns:
        Weights up to a common factor.
    """
    told = [draw.bounds(token) for draw in draws]
    products = [Bounds(w.lower * p.lower, w.upper * p.upper) for w, p in zip(weights, told, strict=True)]
    largest = max(product.upper for product in products)
    return [Bounds(product.lower / largest, product.upper / largest) for product in products]


def weighted(values: Sequence[Bounds], weights: Sequence[Bounds] | None = None) -> Bounds:
    """Bound a weighted mean whose values and weights lie in intervals.

    The mean is largest if the draws with the largest values have their largest weights, and the other draws their
    smallest ones. Each number of such draws is tried. The smallest mean mirrors this.
    """
    weights = equal_weights(len(values)) if weights is None else weights
    upper = _largest_mean([v.upper for v in values], weights)
    lower = -_largest_mean([-v.lower for v in values], weights)
    return Bounds(max(0.0, lower), upper)


def _largest_mean(values: Sequence[float], weights: Sequence[Bounds]) -> float:
    pairs = sorted(zip(values, weights, strict=True), key=lambda pair: -pair[0])
    means = []
    for heavy in range(1, len(pairs) + 1):
        chosen = [w.upper if i < heavy else w.lower for i, (_, w) in enumerate(pairs)]
        if total := math.fsum(chosen):
            means.append(math.fsum(w * value for w, (value, _) in zip(chosen, pairs, strict=True)) / total)
    return max(means)
