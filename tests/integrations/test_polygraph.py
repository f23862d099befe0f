"""Estimators of lm-polygraph give our own numbers where both have the same quantity."""

import importlib
import importlib.util
import sys
import types

import completions
import numpy as np
import pytest

import scalabl_pyro as sp
from scalabl_pyro.integrations.polygraph import stats

PROMPTS = ["the sky is", "what colour is the rose ?"]


@pytest.fixture(scope="module")
def posterior():
    task = sp.Completion(completions.tokenizer())
    return completions.posterior_of(completions.adapted(), task)


@pytest.fixture(scope="module")
def samples(posterior):
    return posterior.generate(PROMPTS, num_draws=4, num_samples=2, do_sample=True, max_new_tokens=4, seed=1)


@pytest.fixture(scope="module")
def greedy(posterior):
    return posterior.generate(PROMPTS, num_draws=4, decode="mixture", max_new_tokens=4)


@pytest.fixture
def estimator(monkeypatch):
    """A function that loads an estimator. The package itself imports many tools, and the estimators need none."""
    spec = importlib.util.find_spec("lm_polygraph")
    if spec is None:
        pytest.skip("lm-polygraph is not installed")
    for name in ("lm_polygraph", "lm_polygraph.estimators", "lm_polygraph.utils"):
        package = types.ModuleType(name)
        package.__path__ = [path + name.removeprefix("lm_polygraph").replace(".", "/")
                            for path in spec.submodule_search_locations]  # fmt: skip
        monkeypatch.setitem(sys.modules, name, package)

    def load(module, name, **options):
        pytest.importorskip("PIL")
        return getattr(importlib.import_module(f"lm_polygraph.estimators.{module}"), name)(**options)

    yield load
    for name in [name for name in sys.modules if name.startswith("lm_polygraph.")]:
        monkeypatch.delitem(sys.modules, name)


def test_greedy_texts(estimator, samples, greedy):
    found, frame = stats(samples, greedy=greedy), greedy.to_frame()
    of = lambda *names: estimator(*names)(found)  # noqa: E731
    np.testing.assert_allclose(of("max_probability", "MaximumSequenceProbability"), -frame["log_prob"])
    np.testing.assert_allclose(of("perplexity", "Perplexity"), -frame["log_prob_per_token"])
    np.testing.assert_allclose(of("token_entropy", "MeanTokenEntropy"), frame["total_per_token"])


def test_sampled_texts(estimator, samples):
    pytest.importorskip("rouge_score")
    pytest.importorskip("nltk")
    found, frame = stats(samples), samples.to_frame()
    by_prompt = frame.groupby("prompt")
    of = lambda *names: estimator(*names)(found)  # noqa: E731
    entropy = of("monte_carlo_sequence_entropy", "MonteCarloSequenceEntropy")
    np.testing.assert_allclose(entropy, -by_prompt["log_prob"].mean())
    rate = of("monte_carlo_normalized_sequence_entropy", "MonteCarloNormalizedSequenceEntropy")
    np.testing.assert_allclose(rate, -by_prompt["log_prob_per_token"].mean())
    similar = of("lexical_similarity", "LexicalSimilarity")
    assert similar.shape == (2,) and (similar <= 0).all() and (similar >= -1).all()


@pytest.mark.parametrize("by_matrix", [False, True])
def test_semantic_entropy_of_given_classes(estimator, samples, by_matrix):
    same = lambda a, b: a.split()[:1] == b.split()[:1]  # noqa: E731
    texts = [samples.texts(i) for i in range(2)]
    matrix = [[[0.9 * same(a, b) for b in row] for a in row] for row in texts]
    found = stats(samples, **({"entailment": matrix} if by_matrix else {"same_meaning": same}))
    empirical = estimator("semantic_entropy", "SemanticEntropy", class_probability_estimation="frequency")
    np.testing.assert_allclose(empirical(found), samples.semantic_entropy(same), atol=1e-12)
    by_sum = estimator("semantic_entropy", "SemanticEntropy")(found)
    classes = found["semantic_classes_entail"]["class_to_sample"]
    log_probs = found["sample_log_probs"]
    for i in range(2):
        own = [np.logaddexp.reduce(np.asarray(log_probs[i])[c]) for c in classes[i] for _ in c]
        assert by_sum[i] == pytest.approx(-np.mean(own))


def test_the_draws_are_its_ensemble(estimator, samples):
    found = stats(samples)
    by_draw = samples.scored.log_probs.reshape(8 // 2, 2, 8)  # draws, prompts, texts
    mixture = samples.scored.log_prob.reshape(2, 8)
    weights = np.exp(mixture) / np.exp(mixture).sum(1, keepdims=True)
    expected = ((mixture - by_draw.mean(0)) * weights).sum(1)
    found = estimator("ensemble_sequence_measures", "EPSrmi")(found)
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # its logarithm of the number of draws is float32


def test_what_is_not_given_is_left_out(samples, greedy, posterior):
    found = stats(samples)
    assert not {"greedy_texts", "entropy", "semantic_classes_entail", "semantic_matrix_entail"} & set(found)
    assert stats(greedy)["greedy_texts"] == list(greedy.answers)
    assert found["sample_tokens"][1][3] == samples.scored.rows[11].tokens.tolist()
    with pytest.raises(ValueError, match="one text for each of the same prompts"):
        stats(samples, greedy=samples)
    with pytest.raises(ValueError, match=r"entailment has the shape \(2, 2\)"):
        stats(samples, entailment=np.eye(2))
    mean = posterior.generate(PROMPTS, num_draws=1, decode="mean", max_new_tokens=2)
    assert "ensemble_token_scores" not in stats(mean)
