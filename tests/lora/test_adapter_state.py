"""An adapter is changed by its own methods alone: not by assignments from outside, and not by a forward pass."""

import ast
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

import scalabl_pyro as sp

PACKAGE = Path(sp.__file__).parent


def assigned(path):
    """Attributes that a file assigns on something called an adapter."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            owner = getattr(target, "value", None)
            if isinstance(target, ast.Attribute) and getattr(owner, "id", getattr(owner, "attr", "")) == "adapter":
                yield f"{path.name}: {ast.unparse(target)}"


def test_no_file_assigns_attributes_of_an_adapter():
    assert not [found for path in PACKAGE.rglob("*.py") for found in assigned(path)]


def test_a_pass_with_many_draws_changes_nothing_on_the_adapter():
    blora = sp.bayesian_lora(tiny.causal_lm(), layers_to_transform=[1])
    before = dict(vars(blora.adapter))
    blora(input_ids=torch.arange(2, 8).view(2, 3), s=torch.randn(3, 1, blora.subspace.dim))
    after = vars(blora.adapter)
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)


class CountsInputRows(nn.Module):
    """A model whose head pairs what comes out of the blocks with the rows of the input."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        self.head = nn.Linear(4, 3)
        self.runs = 0

    def get_output_embeddings(self):
        return self.head

    def forward(self, x):
        self.runs += 1
        rows = len(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)[:rows]


def test_a_module_that_counts_input_rows_is_found_out_once_per_function():
    module = CountsInputRows()
    blora = sp.bayesian_lora(module, r=2, target_modules=["layers.1.0"])
    assert blora.adapter.shares_prefix
    x, s = torch.randn(2, 4), torch.randn(3, 1, blora.subspace.dim)
    runs = []
    for _ in range(2):
        module.runs = 0
        out = blora(x, s=s)
        runs.append(module.runs)
        for draw, part in zip(s, out, strict=True):
            torch.testing.assert_close(part, blora(x, s=draw))
    assert runs == [2, 1]
    assert blora.adapter.shares_prefix  # the adapter itself is as it was


@pytest.mark.parametrize("fails", [False, True])
def test_resting_at_puts_everything_back(fails):
    blora = sp.bayesian_lora(tiny.classifier())
    adapter = blora.adapter
    trained = list(blora.point_estimates.parameters())
    before, loc = [p.detach().clone() for p in trained], adapter.loc
    others = tuple((torch.ones_like(A), torch.ones_like(B)) for A, B in adapter.factors())
    try:
        with adapter.resting_at(torch.zeros_like(loc), factors=others, heads={}):
            assert not any(p.requires_grad for p in trained)
            assert all((f == 1).all() for pair in adapter.factors() for f in pair)
            assert (adapter.loc == 0).all()
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert all(torch.equal(p, b) for p, b in zip(trained, before, strict=True))
    assert all(p.requires_grad for p in trained)
    assert adapter.loc is loc
