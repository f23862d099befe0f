"""Adapters, their latents and guides show a few numbers, never names of all layers or modules."""

import pytest
import tiny
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal

import scalabl_pyro as sp
from scalabl_pyro.guides import EmpiricalGuide, Guide, MixtureGuide, NormalGuide, as_guide


@pytest.fixture(scope="module")
def blora():
    return sp.bayesian_lora(tiny.causal_lm(), r=4, target_modules=["q_proj", "v_proj"])


def test_an_adapter_shows_layers_rank_and_gauge(blora):
    assert repr(blora.adapter) == "Adapter(layers=4, dim=16, rank=4, gauge=unit_rows)"
    assert "<tr><th>gauge</th><td>unit_rows</td></tr>" in blora.adapter._repr_html_()


def test_a_subspace_shows_its_size_and_no_names(blora):
    assert repr(blora.subspace) == "Subspace(layers=4, dim=16, rank=4)"
    assert "<caption>Subspace</caption>" in blora.subspace._repr_html_()
    ragged = sp.bayesian_lora(tiny.causal_lm(), r=10, target_modules=["q_proj", "v_proj"], cut_rank=True).subspace
    assert repr(ragged).startswith(f"Subspace(layers=4, dim={ragged.dim}, rank=")
    assert len(repr(ragged)) < 60


NAMES = ["normal", "layer_covariance", "full_covariance", "lowrank", "delta", "flow", "svgd"]


@pytest.mark.parametrize("name", NAMES)
def test_a_guide_shows_its_number_of_latents(blora, name):
    guide = as_guide(name, blora)
    assert repr(guide).startswith(f"{type(guide).__name__}(") and "dim=16" in repr(guide)
    assert "<th>dim</th><td>16</td>" in guide._repr_html_()
    assert "\n" not in repr(guide) and len(repr(guide)) < 120


def test_other_guides_are_one_short_line(blora):
    normal = as_guide("normal", blora)
    assert repr(normal) == "NormalGuide(dim=16)"
    assert repr(MixtureGuide([normal, normal])) == "MixtureGuide(components=['NormalGuide', 'NormalGuide'])"
    assert (
        repr(EmpiricalGuide(normal.sample(6, seed=0), num_chains=2)) == "EmpiricalGuide(dim=16, points=6, num_chains=2)"
    )
    assert repr(as_guide(AutoNormal, blora)).startswith("AutoFamily(class=AutoNormal")
    assert "\n" not in repr(Own())


class Own(Guide):
    """A guide of a user, with a module inside."""

    def __init__(self):
        super().__init__()
        self.inner = NormalGuide(torch.zeros(3), torch.ones(3))


def test_guides_whose_draws_of_s_are_all_the_same_say_so(blora):
    for name in NAMES:
        assert as_guide(name, blora).is_point == (name == "delta"), name
    assert as_guide(AutoDelta, blora).is_point and as_guide(AutoDelta(blora.prior), blora).is_point
    assert not as_guide(AutoNormal, blora).is_point
    hierarchical = sp.BayesianLoRA(blora.adapter, prior="hierarchical")
    assert as_guide("delta", hierarchical).is_point and not as_guide("normal", hierarchical).is_point
