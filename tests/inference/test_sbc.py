"""Simulation-based calibration: where s and y come from the joint model, s has a uniform rank among posterior draws.

A tiny transformer whose factors are known and whose latents are drawn from the prior answers questions; each inference
gets the answers and has to give s back, with the right width (Talts et al., 2018). Minutes each, so marked ``slow``.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

import scalabl_pyro as sp
from scalabl_pyro.data import encode
from scalabl_pyro.guides import DeltaGuide
from scalabl_pyro.prediction.predict import predict

DRAWS = 99
ROWS = tiny.question_rows(40)


@dataclass
class World:
    """A joint model of s and the answers to ROWS."""

    base: sp.Posterior

    @classmethod
    def build(cls) -> "World":
        task = sp.MultipleChoice(tiny.tokenizer())
        blora = sp.bayesian_lora(tiny.causal_lm(), r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, B in blora.adapter.factors():
                B.copy_(torch.randn(B.shape, generator=generator))
        provenance = {"num_data": len(ROWS)}
        return cls(sp.Posterior.capture(blora, task, DeltaGuide(torch.zeros(4)), provenance=provenance))

    def answers(self, s: Tensor, generator: torch.Generator) -> list[dict]:
        """Rows with answers drawn under s."""
        examples = encode(ROWS, self.base.task.encode, need_target=False)
        probs = np.exp(predict(self.base.llm(), self.base.task, s.unsqueeze(0), examples).log_probs[0])
        drawn = torch.multinomial(torch.from_numpy(probs), 1, generator=generator)[:, 0].tolist()
        return [{**row, "answer": answer} for row, answer in zip(ROWS, drawn, strict=True)]


def by_guide(guide: str):
    def infer(world: World, rows: list[dict], seed: int) -> Tensor:
        options = {
            "num_steps": 150,
            "batch_size": len(rows),
            "optimizer": {"lr_loc": 5e-2, "lr_scale": 5e-2},
            "init_scale": 0.5,
        }
        fitted = sp.refit(
            world.base, rows, guide=guide, seed=seed, hardware={"cache_prefix": True}, progress=False, **options
        )
        return fitted.posterior.sample(DRAWS, seed=seed).s

    return infer


def by_nuts(world: World, rows: list[dict], seed: int) -> Tensor:
    options = {"num_chains": 1, "warmup_steps": 80, "num_samples": 3 * DRAWS, "max_tree_depth": 5}
    chain = sp.mcmc(world.base, rows, seed=seed, progress=False, **options)
    return chain.guide.points("s")[::3]  # neighbors are dependent


def half_as_wide(world: World, rows: list[dict], seed: int) -> Tensor:
    s = by_guide("full_covariance")(world, rows, seed)
    return s.mean(0) + 0.5 * (s - s.mean(0))


def ranks(world: World, infer, simulations: int) -> np.ndarray:
    """(simulations, D) share of the posterior draws that lie below the s that gave the answers."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for seed in range(simulations):
        s = torch.randn(world.base.subspace.dim, generator=generator)
        draws = infer(world, world.answers(s, generator), seed)
        found.append((draws < s).double().mean(0).numpy())
    return np.stack(found)


def z_scores(u: np.ndarray) -> dict[str, float]:
    """Distance of the ranks' mean (bias) and spread (width) from those of the uniform, in standard errors."""
    n = len(u)
    grid = np.arange(DRAWS + 1) / DRAWS
    variance = grid.var()
    fourth = ((grid - 0.5) ** 4).mean()
    bias = (u.mean(0) - 0.5) / math.sqrt(variance / n)
    width = (((u - 0.5) ** 2).mean(0) - variance) / math.sqrt((fourth - variance**2) / n)
    return {"bias": float(np.abs(bias).max()), "width": float(width[np.abs(width).argmax()])}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "infer", "simulations"),
    [
        ("mean field", by_guide("normal"), 200),
        ("full covariance", by_guide("full_covariance"), 200),
        ("NUTS", by_nuts, 100),
    ],
)
def test_the_truth_has_a_uniform_rank(name, infer, simulations, record_property):
    scores = z_scores(ranks(World.build(), infer, simulations))
    record_property("z scores", scores)
    assert scores["bias"] < 5 and abs(scores["width"]) < 5, scores


@pytest.mark.slow
def test_a_posterior_of_half_the_width_is_found_out():
    """Without this the test above could pass for any posterior."""
    scores = z_scores(ranks(World.build(), half_as_wide, 100))
    assert scores["width"] > 5, scores


def test_z_scores_are_small_for_uniform_ranks_and_large_for_others():
    generator = np.random.default_rng(0)
    uniform = generator.integers(0, DRAWS + 1, (400, 3)) / DRAWS
    assert z_scores(uniform)["bias"] < 5 and abs(z_scores(uniform)["width"]) < 5
    assert z_scores(np.clip(uniform + 0.15, 0, 1))["bias"] > 5
    assert z_scores(np.round(uniform))["width"] > 5
