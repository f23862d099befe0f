"""Every object that a user gets back is a small table in a notebook: escaped, without script and without colors."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

import scalabl_pyro as sp
from scalabl_pyro import baselines
from scalabl_pyro._display import Summarized, html_table
from scalabl_pyro.analysis.finding import Finding, as_diagnosis

ROWS = tiny.question_rows(12)
FEW = {"num_steps": 2, "batch_size": 4, "progress": False}


class Cells(HTMLParser):
    """Reads caption and rows of a table."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.cells, self.texts = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.texts.append("")

    def handle_data(self, data):
        self.texts[-1] += data


@pytest.fixture(scope="module")
def made():
    """One object of each kind, with texts that its table must show."""
    task = sp.MultipleChoice(tiny.tokenizer())
    blora = sp.bayesian_lora(tiny.causal_lm())
    result = sp.fit(blora, task, ROWS, **FEW)
    posterior = result.posterior
    prediction = posterior.predict(ROWS, num_draws=2)
    point = baselines.map_lora(tiny.causal_lm(), task, ROWS, **FEW).posterior
    scales = tuple(torch.full_like(A, 0.25) for A, _ in point.factors)
    noisy = baselines.FactorPosterior(point, baselines.NormalNoise(scales), {"method": "BLoB"})
    one = np.zeros((2, 3))
    return {
        "BayesianLoRA": (blora, ["LlamaForCausalLM", "layers", "latents", str(posterior.subspace.dim)]),
        "FitResult": (replace(result, warnings=("The loss rose.",)), ["steps", "2", "loss", "The loss rose."]),
        "BaselineResult": (
            baselines.mc_dropout(tiny.causal_lm(), task, ROWS, p=0.3, **FEW),
            ["steps", "2", "nll", "DropoutNoise(p=0.3)"],
        ),
        "Posterior": (posterior, ["guide", "prior", "MultipleChoice"]),
        "Posterior of Laplace": (sp.laplace(posterior, ROWS), ["method", "Laplace"]),
        "Posterior of MCMC": (
            sp.mcmc(posterior, ROWS, num_samples=4, warmup_steps=4, max_tree_depth=1, progress=False),
            ["method", "NUTS"],
        ),
        "EnsemblePosterior": (baselines.EnsemblePosterior((posterior, posterior)), ["members", "2 x Posterior"]),
        "FactorPosterior": (noisy, ["BLoB", "NormalNoise"]),
        "TemperatureScaled": (baselines.TemperatureScaled(noisy, 1.5), ["temperature", "1.5", "FactorPosterior"]),
        "Prediction": (prediction, ["rows", "12", "draws", "2"]),
        "NumericPrediction": (sp.NumericPrediction(one, one + 1, one, None, None), ["rows", "3", "draws", "2"]),
        "Draws": (posterior.sample(3, seed=5), ["draws", "3", "seed", "5"]),
        "Diagnosis": (
            as_diagnosis([Finding("width", "warning", 0.31, 0.1, "The bars are narrow.", "Train longer.")]),
            ["warning", "The bars are narrow (width = 0.31). Train longer.", "Do not trust the uncertainties yet"],
        ),
        "Finding": (Finding("width", "ok", 0.3, 0.7, "The bars fit.", ""), ["width", "ok", "The bars fit."]),
        "LOO": (posterior.log_weights(ROWS, num_draws=30).loo(), ["elpd", "good_k"]),
        "LogWeights": (posterior.log_weights(ROWS, num_draws=3), ["elbo", "draws", "3"]),
        "MultipleChoice": (task, ["template"]),
        "MemoryEstimate": (blora.estimate_memory({"input_ids": torch.ones(2, 5, dtype=torch.long)}), ["total", "GiB"]),
    }


KINDS = [
    *("BayesianLoRA", "FitResult", "BaselineResult", "Posterior", "Posterior of Laplace", "Posterior of MCMC"),
    *("EnsemblePosterior", "FactorPosterior", "TemperatureScaled", "Prediction", "NumericPrediction", "Draws"),
    *("Diagnosis", "Finding", "LOO", "LogWeights", "MultipleChoice", "MemoryEstimate"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_small_table_that_says_what_matters(made, kind):
    value, facts = made[kind]
    text = value._repr_html_()
    table = Cells(text)
    shown = " ".join(table.texts)
    assert table.texts[1].startswith(kind.split()[0]), "the caption names the class"
    for fact in facts:
        assert fact in shown
    assert len(text) < 2000 and table.tags.count("tr") <= 14
    assert "tensor(" not in shown and "array(" not in shown


@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_the_colors_of_the_notebook_and_runs_nothing(made, kind):
    table = Cells(made[kind][0]._repr_html_())
    assert set(table.tags) <= {"table", "caption", "tr", "th", "td"}
    assert not table.attributes, "a color or a style is wrong on one of the themes, light or dark"


def test_every_public_result_is_tested_here(made):
    named = {kind.split()[0] for kind in KINDS}
    classes = {getattr(sp, name) for name in sp.__all__} | {getattr(baselines, name) for name in baselines.__all__}
    classes = {cls for cls in classes if isinstance(cls, type)}
    results = {cls.__name__ for cls in classes if issubclass(cls, Summarized) or cls.__name__.endswith("Result")}
    tasks = {cls.__name__ for cls in classes if issubclass(cls, sp.Task)}
    assert results - tasks <= named
    assert {type(value).__name__ for value, _ in made.values()} == named


STRANGE = '<script>alert("&")</script>'
ESCAPED = "&lt;script&gt;alert(&quot;&amp;&quot;)&lt;/script&gt;"


def test_texts_of_users_and_of_findings_are_escaped(made):
    strange = as_diagnosis([Finding("width", "error", 1.0, 0.1, f"{STRANGE}.", STRANGE)])
    tables = [
        html_table(STRANGE, [(STRANGE, STRANGE)]),
        strange._repr_html_(),
        strange.findings[0]._repr_html_(),
        replace(made["FitResult"][0], warnings=(STRANGE,))._repr_html_(),
        sp.MultipleChoice(tiny.tokenizer(), template=f"{{question}} {STRANGE}")._repr_html_(),
        replace(made["FactorPosterior"][0], provenance={"method": STRANGE})._repr_html_(),
        replace(made["BaselineResult"][0], posterior=STRANGE)._repr_html_(),
        pd.DataFrame({STRANGE: [STRANGE]}, index=[STRANGE])._repr_html_(),  # compare() and metrics() are frames
    ]
    for table in tables:
        assert "<script" not in table and "&lt;script" in table
    assert tables[0].count(ESCAPED) == 3


def test_a_long_text_is_cut_and_a_warning_has_its_own_row(made):
    assert len(html_table("a", [("b", "x" * 5000)])) < 500
    two = replace(made["FitResult"][0], warnings=("One.", "Two."))._repr_html_()
    assert re.findall(r"<th>warning</th><td>(.*?)</td>", two) == ["One.", "Two."]


def test_a_history_without_steps_has_a_table(made):
    empty = replace(made["FitResult"][0], history=pd.DataFrame())
    assert "<th>steps</th><td>0</td>" in empty._repr_html_()
