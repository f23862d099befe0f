"""Bridge to lm-polygraph: the statistics that its estimators read, from texts that a posterior wrote.

Each estimator of lm-polygraph is a function of a dict of statistics. This module makes the dict, and imports nothing of
lm-polygraph.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ..metrics import Array
from ..prediction.generated import Generation, groups_of
from ..prediction.scored_texts import TokenNumbers

#: Probability from which on one text entails another.
ENTAILS = 0.5


def stats(
    samples: Generation,
    *,
    greedy: Generation | None = None,
    same_meaning: Callable[[str, str], bool] | None = None,
    entailment: Any = None,
    contradiction: Any = None,
) -> dict[str, Any]:
    """Make the statistics of lm-polygraph for P prompts with n texts each.

    Log probabilities and entropies are those of the mixture of all draws, nats. The end token of a text counts, in its
    tokens as in its log probability. lm-polygraph itself leaves it out of ``sample_tokens``.

    | statistic | for instance read by |
    |---|---|
    | ``input_texts``, ``sample_texts`` | LexicalSimilarity |
    | ``sample_tokens``, ``sample_log_probs``, ``sample_log_likelihoods`` | MonteCarlo(Normalized)SequenceEntropy |
    | ``greedy_texts``, ``greedy_tokens``, ``greedy_log_likelihoods`` | MaximumSequenceProbability, Perplexity |
    | ``entropy`` | MeanTokenEntropy |
    | ``semantic_classes_entail`` | SemanticEntropy |
    | ``semantic_matrix_entail``, ``semantic_matrix_contra`` | DegMat, EigValLaplacian, NumSemSets |
    | ``ensemble_token_scores`` | EPStu, EPSrmi, EPSrmiabs: the draws are the ensemble |

    ``greedy_log_probs`` (the whole vocabulary at each place), embeddings and attention weights are not kept by a
    generation, so estimators that read them raise a KeyError. So do PEStu and PESrmi, whose ensemble draws s again at
    each token.

    Args:
        samples: Sampled texts, ``posterior.generate(..., do_sample=True)``.
        greedy: One text per prompt, such as ``posterior.generate(..., decode="mixture")`` without ``do_sample``.
            Without it, and with n > 1, the statistics of greedy texts are left out.
        same_meaning: Whether two texts mean the same, as in ``samples.semantic_entropy``.
        entailment: (P, n, n) probability that the first text entails the second. Without ``same_meaning``, texts that
            entail each other with more than 0.5 mean the same.
        contradiction: (P, n, n) probability that the first text contradicts the second.

    Raises:
        ValueError: The prompts of both generations differ, ``greedy`` has several texts per prompt, or a matrix has a
            wrong shape.

    Example:
        >>> from lm_polygraph.estimators import MonteCarloSequenceEntropy
        >>> samples = posterior.generate(["the sky is"], num_draws=8, do_sample=True)
        >>> MonteCarloSequenceEntropy()(stats(samples))  # nats, one per prompt
    """
    found: dict[str, Any] = {
        "input_texts": list(samples.prompts),
        "sample_texts": [samples.texts(prompt) for prompt in range(len(samples.prompts))],
        "sample_tokens": _by_prompt(samples, lambda row: row.tokens.tolist()),
        "sample_log_likelihoods": _by_prompt(samples, lambda row: row.log_mixture.tolist()),
        "sample_log_probs": _by_prompt(samples, lambda row: float(row.log_mixture.sum())),
    }
    shape = (len(samples.prompts), samples.per_prompt)
    if samples.scored.num_draws > 1:
        log_probs = samples.scored.log_probs.reshape(-1, *shape).transpose(1, 0, 2)  # prompts, draws, texts
        found["ensemble_token_scores"] = {"ep_token_level_scores": {"log_probas": log_probs}}
    if greedy is not None or samples.per_prompt == 1:
        found |= _of_greedy(samples, samples if greedy is None else greedy)
    matrices = {"semantic_matrix_entail": entailment, "semantic_matrix_contra": contradiction}
    found |= {name: _matrix(name, given, shape) for name, given in matrices.items() if given is not None}
    if same_meaning is not None:
        found["semantic_classes_entail"] = _classes(
            shape, lambda prompt, a, b: same_meaning(*(found["sample_texts"][prompt][i] for i in (a, b)))
        )
    elif entailment is not None:
        entails = found["semantic_matrix_entail"] > ENTAILS
        both = entails & entails.transpose(0, 2, 1)
        found["semantic_classes_entail"] = _classes(shape, lambda prompt, a, b: bool(both[prompt, a, b]))
    return found


def _by_prompt(texts: Generation, of: Callable[[TokenNumbers], Any]) -> list[list[Any]]:
    n = texts.per_prompt
    return [[of(row) for row in texts.scored.rows[i * n : (i + 1) * n]] for i in range(len(texts.prompts))]


def _of_greedy(samples: Generation, greedy: Generation) -> dict[str, Any]:
    if greedy.prompts != samples.prompts or greedy.per_prompt != 1:
        raise ValueError(
            f"greedy has {greedy.per_prompt} texts for each of {len(greedy.prompts)} prompts, and samples has "
            f"{len(samples.prompts)} prompts: generate one text for each of the same prompts, with decode='mixture' "
            "or decode='mean'."
        )
    return {
        "greedy_texts": list(greedy.answers),
        "greedy_tokens": [row.tokens.tolist() for row in greedy.scored.rows],
        "greedy_log_likelihoods": [row.log_mixture.tolist() for row in greedy.scored.rows],
        "entropy": [row.total.tolist() for row in greedy.scored.rows],
    }


def _matrix(name: str, given: Any, shape: tuple[int, int]) -> Array:
    matrix = np.asarray(given, dtype=np.float64)
    expected = (*shape, shape[1])
    if matrix.shape != expected:
        word = "entailment" if name.endswith("entail") else "contradiction"
        raise ValueError(f"{word} has the shape {matrix.shape}, and {expected} is needed: prompts, texts, texts.")
    return matrix


def _classes(shape: tuple[int, int], is_same: Callable[[int, int, int], bool]) -> dict[str, dict[int, Any]]:
    """Put the texts of each prompt into classes of one meaning."""
    class_to_sample: dict[int, list[list[int]]] = {}
    sample_to_class: dict[int, dict[int, int]] = {}
    for prompt in range(shape[0]):
        classes = groups_of(shape[1], functools.partial(is_same, prompt))
        class_to_sample[prompt] = classes
        sample_to_class[prompt] = {text: c for c, members in enumerate(classes) for text in members}
    return {"sample_to_class": sample_to_class, "class_to_sample": class_to_sample}
