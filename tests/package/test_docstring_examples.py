"""The examples in the docstrings of all public names and their methods run, and print what they say."""

import contextlib
import doctest
import importlib.util
import inspect
import io
import sys
from dataclasses import replace
from pathlib import Path

import arviz as az
import matplotlib
import pytest
import tiny
import torch
from matplotlib import pyplot as plt

import scalabl_pyro as sp

PAGE = Path(__file__).resolve().parents[2] / "docs" / "public_api.py"
SPEC = importlib.util.spec_from_file_location("public_api", PAGE)
public_api = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(public_api)
STEPS = 3


def documented() -> dict[str, object]:
    """Every public name and public method of this package whose docstring has an example."""
    found = {}
    for name, value in public_api.public_names().items():
        own = {name: value}
        if inspect.isclass(value):
            methods = [
                key for key in vars(value) if key[0] != "_" and inspect.isroutine(inspect.unwrap(getattr(value, key)))
            ]
            own |= {f"{name}.{key}": getattr(value, key) for key in methods}
        found |= {key: item for key, item in own.items() if ">>>" in (inspect.getdoc(item) or "")}
    return found


EXAMPLES = documented()
#: Examples whose posterior writes or scores texts.
TEXTS = {"Posterior.score", "Posterior.generate", "plots.tokens"}


@pytest.fixture(scope="module")
def trained():
    tokenizer, rows = tiny.tokenizer(), tiny.question_rows(16)
    tokenizer.eos_token = "night"  # completions end with it
    task = sp.MultipleChoice(tokenizer)
    blora = sp.bayesian_lora(tiny.causal_lm())
    result = sp.fit(blora, task, rows, num_steps=STEPS, lr=1e-2, progress=False)
    point = sp.baselines.mle(tiny.causal_lm(), task, rows, num_steps=STEPS, progress=False).posterior
    prediction = result.posterior.predict(rows, num_draws=4)
    return {
        "blora": blora,
        "result": result,
        "posterior": result.posterior,
        "point": point,
        "prediction": prediction,
        **dict.fromkeys(("first", "second", "other"), result.posterior),
        **dict.fromkeys(("inside", "outside"), prediction),
        **dict.fromkeys(("rows", "train_data", "test_data", "validation_rows"), rows),
        "task": task,
        "tokenizer": task.tokenizer,
        "inputs": {"input_ids": torch.ones(1, 3, dtype=torch.long), "max_new_tokens": 2},
        "scalabl_pyro": sp,
        "torch": torch,
        "az": az,
    }


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Training takes a few steps, and files go into a folder of their own."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    trainer = sys.modules["scalabl_pyro.training.loop"].Trainer
    run = trainer.run
    monkeypatch.setattr(trainer, "run", lambda self, steps: run(self, steps[:STEPS]))
    yield
    plt.close("all")


@pytest.mark.filterwarnings("ignore")  # few steps and draws
@pytest.mark.usefixtures("short", "stock_pyro")
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name, trained):
    value = inspect.unwrap(EXAMPLES[name])
    names = {**vars(sys.modules[value.__module__]), **trained, "llm": tiny.causal_lm()}
    if name in TEXTS:
        names["posterior"] = replace(trained["posterior"], task=sp.Completion(trained["tokenizer"]))
    if name.endswith("from_pretrained"):
        trained["posterior"].save_pretrained("my-posterior")
    for example in doctest.DocTestParser().get_examples(inspect.getdoc(value)):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(example.source, name, "single"), names)
        if example.want:
            assert doctest.OutputChecker().check_output(example.want, output.getvalue(), doctest.ELLIPSIS), (
                f"{example.source}expected: {example.want}got: {output.getvalue()}"
            )
