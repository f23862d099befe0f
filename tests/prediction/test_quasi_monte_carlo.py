"""Even designs: each draw comes from q, and together they need fewer passes."""

import numpy as np
import pytest
import tiny
import torch

import scalabl_pyro as sp
from scalabl_pyro.guides import CovarianceGuide, NormalGuide
from scalabl_pyro.prediction.quasi_monte_carlo import quasi_monte_carlo_draws

ROWS = tiny.question_rows(12)


def correlated(dim=6):
    generator = torch.Generator().manual_seed(0)
    guide = CovarianceGuide(torch.randn(dim, generator=generator), 0.5 + torch.rand(dim, generator=generator))
    with torch.no_grad():
        guide.lower.normal_(generator=generator)
    return guide


@pytest.mark.parametrize("design", ["antithetic", "sobol"])
def test_moments_are_those_of_the_guide(design):
    guide, count = correlated(), 4096
    s = quasi_monte_carlo_draws(guide, count, seed=3, design=design).s
    mean, covariance = guide.mean()["s"], guide.covariance()
    error = 5 * covariance.diagonal().sqrt() / count**0.5  # error of independent draws; these have at most that
    assert ((s.mean(0) - mean).abs() < error).all()
    spread = 5 * (covariance.diagonal().outer(covariance.diagonal()) * 2 * 2 / count).sqrt()  # pairs: count / 2
    assert ((torch.cov(s.T) - covariance).abs() < spread).all()


def test_antithetic_draws_come_in_mirrored_pairs_and_density_is_that_of_the_guide():
    guide = NormalGuide(torch.linspace(-1, 1, 5), torch.linspace(0.1, 0.5, 5))
    draws = quasi_monte_carlo_draws(guide, 5, seed=1, design="antithetic")
    torch.testing.assert_close(draws.s[0] + draws.s[1], 2 * guide.mean()["s"].detach())
    torch.testing.assert_close(draws.s[2] + draws.s[3], 2 * guide.mean()["s"].detach())
    expected = torch.distributions.Normal(guide.loc.detach(), guide.scale.detach()).log_prob(draws.s).sum(-1)
    torch.testing.assert_close(draws.log_q, expected)


@pytest.mark.parametrize("design", ["antithetic", "sobol"])
def test_the_seed_decides_and_fewer_draws_are_the_first_ones(design, fitted, unchanged_rng):
    draw = lambda n, seed: fitted.posterior.sample(n, seed=seed, design=design).s  # noqa: E731
    assert torch.equal(draw(6, 1)[:4], draw(4, 1))
    assert not torch.equal(draw(4, 1), draw(4, 2))


def test_four_antithetic_draws_predict_as_exactly_as_ten_independent_ones(fitted):
    posterior = fitted.posterior
    exact = posterior.predict(ROWS, num_draws=1000, seed=99).probs  # a tenth of the error of ten

    def error(num_draws, design):
        runs = [posterior.predict(ROWS, num_draws=num_draws, seed=seed, design=design).probs for seed in range(40)]
        return np.sqrt(np.mean([(run - exact) ** 2 for run in runs]))

    assert error(4, "antithetic") < error(10, "independent")


def test_what_has_no_even_design_is_refused(fitted):
    with pytest.raises(ValueError, match=r"design='antithetc' is unknown. Did you mean 'antithetic'"):
        fitted.posterior.predict(ROWS, design="antithetc")
    blora = sp.bayesian_lora(tiny.causal_lm(), prior="hierarchical")
    options = {"num_steps": 1, "progress": False}
    posterior = sp.fit(blora, sp.MultipleChoice(tiny.tokenizer()), ROWS, **options).posterior
    with pytest.raises(TypeError, match="is for posteriors of s alone"):
        posterior.predict(ROWS, design="antithetic")
