"""The examples in the docstrings of guides, priors and inference run and print what they say."""

import doctest

import pytest
import tiny

import scalabl_pyro as sp

PUBLIC = {
    **{f"guides.{name}": getattr(sp.guides, name) for name in sp.guides.__all__},
    **{f"priors.{name}": getattr(sp.priors, name) for name in sp.priors.__all__},
    **{name: getattr(sp, name) for name in ("Draws", "ensemble", "laplace", "mcmc", "refit")},
}


@pytest.fixture(scope="module")
def names():
    task, rows = sp.MultipleChoice(tiny.tokenizer()), tiny.question_rows(16)
    blora = sp.bayesian_lora(tiny.causal_lm())
    posterior = sp.fit(blora, task, rows, num_steps=3, lr=1e-2, progress=False).posterior
    return {"scalabl_pyro": sp, "blora": blora, "posterior": posterior, "train_data": rows}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name, names):
    tests = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, module=False, globs=dict(names))
    assert any(test.examples for test in tests), "no example"
    output: list[str] = []
    for test in tests:
        assert doctest.DocTestRunner().run(test, out=output.append).failed == 0, "".join(output)
