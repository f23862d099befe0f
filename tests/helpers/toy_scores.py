"""Scored texts with random numbers that fit together, without an LLM."""

import numpy as np

from scalabl_pyro.prediction.scored_texts import ScoredTexts, TokenNumbers

#: Size of the vocabulary.
WORDS = 6


def scored(texts, *, draws=4, top=3, seed=0, is_mean=False, spread=0.4):
    """Score texts that are given as lists of tokens; every draw has its own distribution at each place."""
    rng = np.random.default_rng(seed)
    rows, tops = zip(*(_row(rng, len(text), draws, top, spread) for text in texts), strict=True)
    return ScoredTexts(
        rows=rows,
        texts=tuple("".join(text) for text in texts),
        pieces=tuple(list(text) for text in texts),
        is_mean=is_mean,
        top_pieces=tops if top else (),
    )


def _row(rng, count, draws, top, spread):
    probs = rng.dirichlet(np.full(WORDS, spread), (draws, count)) + 1e-9
    probs /= probs.sum(-1, keepdims=True)
    tokens = rng.integers(0, WORDS, count)
    own = np.log(probs[:, np.arange(count), tokens])
    log_weights = np.cumsum(own, 1) - own
    weights = np.exp(log_weights - np.logaddexp.reduce(log_weights, 0))
    mixture = np.einsum("st,stv->tv", weights, probs)
    best = np.argsort(-mixture, 1)[:, :top]
    numbers = TokenNumbers(
        tokens=tokens,
        log_probs=own,
        log_mixture=np.log(mixture[np.arange(count), tokens]),
        total=-(mixture * np.log(mixture)).sum(-1),
        aleatoric=-np.einsum("st,stv->t", weights, probs * np.log(probs)),
        top_tokens=best,
        top_probs=np.take_along_axis(mixture, best, 1),
        top_probs_by_draw=np.take_along_axis(probs, best[None], 2),
    )
    return numbers, [[f" w{i}" for i in here] for here in best]
