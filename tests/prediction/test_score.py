"""Scores of given texts: the weights of the draws follow the tokens before, so that sums over tokens are exact."""

import itertools
import math

import numpy as np
import pytest
import tiny
import torch
from completions import tokenizer

import scalabl_pyro as sp
from scalabl_pyro.lora.token_log_probs import NO_TOKEN
from scalabl_pyro.prediction.token_readout import TokenReadout, entropy

VOCABULARY, LENGTH, DRAWS = 4, 3, 5
TEXTS = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))  # (64, 3)
ROWS = [
    {"prompt": "what colour is the sky ?", "completion": " blue is the sky"},
    {"prompt": "what colour is grass ?", "completion": " green"},
    {"prompt": "night", "completion": " black"},
]


def table(seed=0, scale=2.0):
    """Log probabilities of the next of 4 words under 5 draws, which depend on the words before, (S, 64, 3, 4)."""
    generator = torch.Generator().manual_seed(seed)
    by_prefix = {}
    out = torch.empty(DRAWS, len(TEXTS), LENGTH, VOCABULARY, dtype=torch.float64)
    for row, words in enumerate(TEXTS.tolist()):
        for t in range(LENGTH):
            prefix = tuple(words[:t])
            if prefix not in by_prefix:
                by_prefix[prefix] = scale * torch.randn(DRAWS, VOCABULARY, dtype=torch.float64, generator=generator)
            out[:, row, t] = by_prefix[prefix]
    return out.log_softmax(-1)


def read(logits, tokens, **options):
    """Numbers of each token, (S, B, T, C), from a head that returns its input."""
    readout = TokenReadout(tokens, len(logits), **options)
    return readout(lambda hidden: hidden, logits.flatten(0, 1)).unflatten(0, logits.shape[:2])


def own_log_probs(logits):
    return logits.gather(-1, TEXTS.expand(DRAWS, -1, -1).unsqueeze(-1))[..., 0]


def test_tokens_of_the_mixture_add_up_to_the_mixture_of_the_texts():
    logits = table()
    numbers = read(logits, TEXTS)
    by_draw = own_log_probs(logits)
    torch.testing.assert_close(numbers[..., 0], by_draw, rtol=0, atol=1e-13)
    mixture = torch.logsumexp(by_draw.sum(-1), dim=0) - math.log(DRAWS)
    torch.testing.assert_close(numbers[0, ..., 1].sum(-1), mixture, rtol=0, atol=1e-12)
    assert abs(mixture.exp().sum() - 1) < 1e-12


def mutual_information(logits):
    """I(text; draw) = H[mixture] - mean H[draw], by enumeration of all texts."""
    texts = own_log_probs(logits).sum(-1)  # (S, 64)
    mixture = torch.logsumexp(texts, dim=0) - math.log(DRAWS)
    return entropy(mixture) - entropy(texts).mean(), mixture


@pytest.mark.parametrize("scale", [0.5, 2.0, 20.0])
def test_the_epistemic_uncertainty_of_tokens_adds_up_to_the_mutual_information(scale):
    logits = table(scale=scale)
    exact, mixture = mutual_information(logits)
    numbers = read(logits, TEXTS)[0]
    epistemic = (numbers[..., 2] - numbers[..., 3]).sum(-1)
    assert abs((mixture.exp() * epistemic).sum() - exact) < 1e-12
    total = (mixture.exp() * numbers[..., 2].sum(-1)).sum()
    assert abs(total - entropy(mixture)) < 1e-12, "the chain rule holds for the total too"
    assert 0 <= exact <= math.log(DRAWS) + 1e-12
    assert (numbers[..., 2] - numbers[..., 3]).min() > -1e-12


def test_equal_weights_would_be_biased():
    logits = table()
    exact, mixture = mutual_information(logits)
    equal = torch.logsumexp(logits, dim=0) - math.log(DRAWS)  # (64, 3, 4)
    epistemic = (entropy(equal) - entropy(logits).mean(0)).sum(-1)
    assert (mixture.exp() * epistemic).sum() > exact + 0.05


@pytest.mark.parametrize("max_logits", [1, DRAWS * len(TEXTS) * VOCABULARY * 2])
def test_parts_change_nothing(max_logits):
    logits, tokens = table(), TEXTS.clone()
    tokens[5, 1:] = NO_TOKEN
    whole = read(logits, tokens, top=2)
    torch.testing.assert_close(read(logits, tokens, top=2, max_logits=max_logits), whole, rtol=0, atol=1e-13)
    assert not whole[:, 5, 1:, :4].any(), "places without a token count nothing"


def test_the_most_probable_tokens_of_the_mixture():
    logits = table()
    numbers = read(logits, TEXTS, top=3)
    first = torch.logsumexp(logits[:, 0, 0], dim=0).sub(math.log(DRAWS)).exp()  # weights are equal at the start
    best, ids = first.topk(3)
    torch.testing.assert_close(numbers[2, 0, 0, 4:7].long(), ids)
    torch.testing.assert_close(numbers[2, 0, 0, 7:10], best)
    torch.testing.assert_close(numbers[2, 0, 0, 10:], logits[2, 0, 0, ids].exp())


def test_a_draw_that_excludes_a_token_has_no_weight_behind_it():
    logits = torch.zeros(2, 1, 3, VOCABULARY, dtype=torch.float64)
    logits[0, 0, 0, 1] = -torch.inf  # draw 0 excludes token 1
    logits[0, 0, 1, 2] = 9.0
    numbers = read(logits, torch.tensor([[1, 0, 0]]))
    assert not torch.isnan(numbers).any()
    torch.testing.assert_close(numbers[0, 0, 1:, 1], torch.full((2,), 0.25, dtype=torch.float64).log())
    torch.testing.assert_close(numbers[0, 0, 1:, 2], torch.full((2,), 4.0, dtype=torch.float64).log())


# posterior.score ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def posterior():
    blora = sp.bayesian_lora(tiny.causal_lm(dtype=torch.float64), layers_to_transform=[1])
    options = {"num_steps": 10, "lr": 3e-2, "batch_size": 3, "progress": False, "init_scale": 1.0}
    return sp.fit(blora, sp.Completion(tokenizer()), ROWS, **options).posterior


def test_scores_are_those_of_the_plain_llm_under_each_draw(posterior):
    scored = posterior.score(ROWS, num_draws=4, seed=3, top=2)
    by_row = posterior.log_likelihood(ROWS).by_row(posterior.sample(4, seed=3).s).numpy()
    np.testing.assert_allclose(scored.log_probs, by_row, rtol=0, atol=1e-10)
    np.testing.assert_allclose(scored.log_likelihood, by_row, rtol=0, atol=1e-10)
    np.testing.assert_allclose(scored.log_prob, np.log(np.exp(by_row).mean(0)), rtol=0, atol=1e-10)
    np.testing.assert_allclose([row.log_mixture.sum() for row in scored.rows], scored.log_prob, rtol=0, atol=1e-10)
    assert scored.texts == ("blue is the sky .", "green .", "black .")
    assert scored.num_tokens.tolist() == [5, 2, 2]
    assert scored.num_draws == 4 and not scored.is_mean
    row = scored.rows[0]
    assert row.log_probs.shape == (4, 5) and row.top_tokens.shape == (5, 2) and row.top_probs_by_draw.shape == (4, 5, 2)
    assert (row.epistemic >= 0).all() and scored.epistemic.max() > 1e-4
    np.testing.assert_allclose(row.top_probs[0], row.top_probs_by_draw[:, 0].mean(0), rtol=1e-10)


def test_the_frames_of_scores(posterior):
    scored = posterior.score(ROWS, num_draws=3)
    frame = scored.to_frame()
    assert list(frame.columns[:3]) == ["text", "num_tokens", "log_prob"]
    np.testing.assert_allclose(frame["epistemic"], frame["total"] - frame["aleatoric"], atol=1e-12)
    np.testing.assert_allclose(frame["log_prob_per_token"] * frame["num_tokens"], frame["log_prob"])
    tokens = scored.tokens(0)
    assert list(tokens["token"]) == [" blue", " is", " the", " sky", " ."]
    assert abs(tokens["log_mixture"].sum() - scored.log_prob[0]) < 1e-10


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batches_and_order_change_no_score(posterior, batch_size):
    whole = posterior.score(ROWS, num_draws=3, seed=1, top=1)
    parts = posterior.score(ROWS[::-1], num_draws=3, seed=1, top=1, batch_size=batch_size)
    for a, b in zip(whole.rows, parts.rows[::-1], strict=True):
        for name in ("tokens", "log_probs", "log_mixture", "total", "aleatoric", "top_tokens", "top_probs"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=0, atol=1e-10)


def test_the_posterior_mean_alone_has_no_epistemic_uncertainty(posterior):
    scored = posterior.score(ROWS, num_draws=0)
    assert scored.is_mean and scored.num_draws == 0
    assert scored.epistemic.max() < 1e-12
    by_row = posterior.log_likelihood(ROWS).by_row(posterior.mean().unsqueeze(0)).numpy()
    np.testing.assert_allclose(scored.log_probs, by_row, rtol=0, atol=1e-10)


def test_scores_survive_saving(posterior, tmp_path):
    posterior.save_pretrained(tmp_path / "posterior")
    loaded = sp.Posterior.from_pretrained(tiny.causal_lm(dtype=torch.float64), tmp_path / "posterior")
    assert isinstance(loaded.task, sp.Completion)
    was, now = (p.score(ROWS, num_draws=3, seed=2) for p in (posterior, loaded))
    np.testing.assert_array_equal(now.log_probs, was.log_probs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draws": -1}, "num_draws"),
        ({"batch_size": 0}, "batch_size"),
        ({"top": 1.5}, "top"),
        ({"top": 1000}, "top=1000 .* vocabulary"),
    ],
    ids=str,
)
def test_wrong_numbers_are_refused(posterior, options, message):
    with pytest.raises(ValueError, match=message):
        posterior.score(ROWS, **options)


def test_what_cannot_be_scored_is_refused(posterior, fitted):
    with pytest.raises(ValueError, match="Row 1 has no answer"):
        posterior.score([ROWS[0], {"prompt": "the sky"}])
    with pytest.raises(TypeError, match=r"score\(\) needs a posterior of the task Completion.*MultipleChoice.*predict"):
        fitted.posterior.score(ROWS)


def test_an_overflow_is_reported(posterior):
    llm = posterior.adapter.module
    weight = llm.model.norm.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(torch.nan)
        with pytest.raises(FloatingPointError, match="NaN or infinite"):
            posterior.score(ROWS, num_draws=2)
    finally:
        with torch.no_grad():
            weight.copy_(before)
