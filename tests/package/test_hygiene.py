"""Every public call leaves the process as it found it, whether it succeeds or fails in the middle."""

import gc
import inspect
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
import toy_scores
from matplotlib import pyplot as plt
from pyro import infer, poutine

import scalabl_pyro as sp
from scalabl_pyro.data import read_rows, stratified_split
from scalabl_pyro.lora import binding, hidden_state_cache

ROWS = tiny.question_rows(8)
TEXTS = [{"prompt": "the sky is", "completion": " blue"}, {"prompt": "grass", "completion": " green"}]
FEW = {"num_steps": 2, "progress": False}
CHAIN = {"num_samples": 4, "warmup_steps": 1, "num_chains": 1, "max_tree_depth": 1, "progress": False}


def state(llm: torch.nn.Module) -> dict[str, Any]:
    """All that is global, and the modes of a module."""
    store = pyro.get_param_store()
    return {
        "torch": hash(torch.get_rng_state().numpy().tobytes()),
        "random": hash(random.getstate()),
        "numpy": [hash(np.asarray(part).tobytes()) for part in np.random.get_state()[1:3]],  # noqa: NPY002
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "param store": {name: value.tolist() for name, value in store.items()},
        "settings": dict(pyro.settings.get()),
        "validation": [d.is_validation_enabled() for d in (dist, infer, poutine)],
        "handlers": len(poutine.runtime._PYRO_STACK),
        "draws bound": dict(binding._BOUND.get()),
        "prefixes": dict(hidden_state_cache._PREFIX.get()),
        "warning filters": list(warnings.filters),
        "train modes": [m.training for m in llm.modules()],
        "base": [hash(p.detach().numpy().tobytes()) for n, p in llm.named_parameters() if "lora_" not in n],
    }


@contextmanager
def untouched(llm: torch.nn.Module) -> Iterator[None]:
    before = state(llm)
    yield
    after = state(llm)
    for key in before:
        assert after[key] == before[key], key


class Fails(sp.MultipleChoice):
    """Fails in the middle: at the second pass through the model, or the second likelihood."""

    at = "outputs"

    def outputs(self, llm, batch, s):
        result = super().outputs(llm, batch, s)
        self.fail("outputs")
        return result

    def likelihood(self, outputs, batch):
        self.fail("likelihood")
        return super().likelihood(outputs, batch)

    def fail(self, where: str) -> None:
        self.__dict__["calls"] = calls = self.__dict__.get("calls", 0) + (where == self.at)
        if where == self.at and calls >= 2:
            raise ZeroDivisionError("in the middle")


class FailsLate(Fails):
    """Fails in the likelihood."""

    at = "likelihood"


class FailingGuide(sp.guides.NormalGuide):
    """Fails at its third draw."""

    count = itertools.count()

    def forward(self, *args, **kwargs):
        value = super().forward(*args, **kwargs)
        if next(self.count) % 4 == 2:
            raise ZeroDivisionError("in the middle")
        return value


def broken(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("in the middle")


def make(tmp_path: Path) -> SimpleNamespace:
    """What the calls work on; the models stand in train mode, with one module in eval mode."""
    llm, task = tiny.causal_lm().train(), sp.MultipleChoice(tiny.tokenizer())
    llm.model.norm.eval()
    blora = sp.bayesian_lora(llm, r=2, target_modules=["q_proj"])
    posterior = sp.fit(blora, task, ROWS, **FEW).posterior
    with torch.no_grad():
        guide = FailingGuide(posterior.mean(), torch.full_like(posterior.mean(), 0.1))
    posterior.save_pretrained(tmp_path / "p")
    (tmp_path / "broken").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"question": "what ?", "choices": ["red", "blue"], "answer": 0}\n' * 4)
    (tmp_path / "broken.jsonl").write_text("{")
    for file in (tmp_path / "p").iterdir():
        if file.is_file():
            (tmp_path / "broken" / file.name).write_bytes(file.read_bytes()[:-1])
    plain = tiny.causal_lm().train()
    return SimpleNamespace(
        llm=llm,
        plain=plain,
        task=task,
        blora=blora,
        posterior=posterior,
        fails=replace(posterior, task=Fails(tiny.tokenizer())),
        fails_late=replace(posterior, task=FailsLate(tiny.tokenizer())),
        no_draws=replace(posterior, guide=guide),
        prediction=posterior.predict(ROWS, num_draws=3),
        numbers=sp.NumericPrediction(np.zeros((3, 4)), np.ones((3, 4)), np.zeros((3, 4)), None, None),
        texts=replace(posterior, task=sp.Completion(tiny.tokenizer(), end_token=False)),
        scored=toy_scores.scored([["a", " text"]]),
        path=tmp_path,
        number=0,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    matplotlib.use("Agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(tmp_path_factory.mktemp("world"))


def exported(w: SimpleNamespace) -> Path:
    """An adapter of PEFT."""
    (folder,) = w.posterior.export_peft(new_path(w))
    return folder


def new_path(w: SimpleNamespace) -> Path:
    w.number += 1
    return w.path / f"new{w.number}"


def interrupted(row: dict[str, float]) -> None:
    raise ZeroDivisionError("in a callback")


def _deprecated(call: Callable[[], Any]) -> Any:
    with pytest.deprecated_call():
        return call()


def small_batches(call: Callable[..., Any], **options: Any) -> Any:
    return call(ROWS, batch_size=3, **options)


def draw(posterior: sp.Posterior, index: Any, fail: bool = False) -> None:
    with posterior.draw(index) as llm:
        llm(input_ids=torch.tensor([[3, 4]]))
        if fail:
            raise ZeroDivisionError


def disable(blora: sp.BayesianLoRA, fail: bool = False) -> None:
    with blora.disabled():
        if fail:
            raise ZeroDivisionError


#: For each public function: calls that succeed, and calls that fail (beside these, see ELSEWHERE).
CALLS: dict[str, tuple[list[Callable[[Any], Any]], list[Callable[[Any], Any]]]] = {
    "bayesian_lora": (
        [
            lambda w: sp.bayesian_lora(w.plain, r=2).unload(),
            lambda w: sp.bayesian_lora(tiny_classifier()).unload(),
            lambda w: sp.bayesian_lora(w.plain, r=2, base_precision="float8").unload(),
        ],
        [
            lambda w: sp.bayesian_lora(w.plain, r=10**6),
            lambda w: sp.bayesian_lora(w.plain, base_precision="fp8"),
            lambda w: sp.bayesian_lora(w.plain, prior=-1.0),
            lambda w: sp.bayesian_lora(w.plain, target_modules=["nothing"]),
        ],
    ),
    "from_peft": (
        [lambda w: sp.from_peft(w.plain, exported(w)).unload().unload()],
        [
            lambda w: sp.from_peft(w.plain, w.path / "broken"),
            lambda w: sp.from_peft(w.plain, exported(w), prior=-1.0),
            lambda w: sp.from_peft(w.plain),
        ],
    ),
    "posthoc": (
        [lambda w: sp.posthoc(w.posterior.blora(), w.task, ROWS)],
        [
            lambda w: sp.posthoc(w.posterior.blora(), w.task, ROWS, method="nothing"),
            lambda w: sp.posthoc(w.posterior.blora(), FailsLate(tiny.tokenizer()), ROWS),
            lambda w: sp.posthoc(w.posterior.blora(), w.task, ROWS, tolerance=1.0),
        ],
    ),
    "Posterior.export_peft": (
        [lambda w: w.posterior.export_peft(new_path(w), draws=2)],
        [lambda w: w.posterior.export_peft(new_path(w), draws=-1), lambda w: w.posterior.export_peft(w.path)],
    ),
    "Posterior.merge": ([lambda w: w.posterior.merge(1)], [lambda w: w.posterior.merge(-1)]),
    "fit": (
        [
            lambda w: sp.fit(w.blora, w.task, ROWS, **FEW),
            lambda w: sp.fit(w.blora, w.task, ROWS, guide="flow", **FEW),
            lambda w: sp.fit(w.blora, w.task, w.path / "rows.jsonl", guide="svgd", **FEW),
        ],
        [
            lambda w: sp.fit(w.blora, Fails(tiny.tokenizer()), ROWS, **FEW),
            lambda w: sp.fit(w.blora, FailsLate(tiny.tokenizer()), ROWS, **FEW),
            lambda w: sp.fit(w.blora, w.task, ROWS, callbacks=[interrupted], **FEW),
            lambda w: sp.fit(
                w.blora,
                w.task,
                ROWS,
                guide=lambda b: FailingGuide(b.adapter.loc, torch.ones(len(b.adapter.loc))),
                num_steps=9,
                progress=False,
            ),
            lambda w: sp.fit(w.blora, w.task, ROWS, guide="nothing", **FEW),
            lambda w: sp.fit(w.blora, w.task, [{"question": "what ?"}], **FEW),
            lambda w: sp.fit(w.blora, w.task, ROWS, lr=1e30, num_steps=9, optimizer={"warmup": 0.0}, progress=False),
        ],
    ),
    "tune": (
        [lambda w: sp.tune(w.blora, w.task, ROWS, ROWS[:2], search={"lr": [1e-3, 1e-2]}, num_trials=2, **FEW)],
        [
            lambda w: sp.tune(w.blora, Fails(tiny.tokenizer()), ROWS, ROWS[:2], search={"lr": [1e-3]}, **FEW),
            lambda w: sp.tune(w.blora, FailsLate(tiny.tokenizer()), ROWS, ROWS[:2], search={"lr": [1e-3]}, **FEW),
            lambda w: sp.tune(w.blora, w.task, ROWS, ROWS[:2], search={"lr": [1e38]}, num_trials=1, **FEW),
            lambda w: sp.tune(w.blora, w.task, ROWS, ROWS[:2], search={"lrr": [1e-3]}, **FEW),
        ],
    ),
    "refit": (
        [lambda w: sp.refit(w.posterior, ROWS, prior=2.0, **FEW)],
        [lambda w: sp.refit(w.fails, ROWS, **FEW), lambda w: sp.refit(w.posterior, ROWS, prior="nothing", **FEW)],
    ),
    "ensemble": (
        [lambda w: sp.ensemble(w.posterior, ROWS, num_members=2, **FEW)],
        [
            lambda w: sp.ensemble(w.fails, ROWS, num_members=2, **FEW),
            lambda w: sp.ensemble(w.posterior, ROWS, num_members=1),
        ],
    ),
    "laplace": (
        [
            lambda w: sp.laplace(w.posterior, ROWS, newton_steps=1),
            lambda w: sp.laplace(w.posterior, ROWS, prior_scale="evidence"),
        ],
        [
            lambda w: sp.laplace(w.fails, ROWS, batch_size=3),
            lambda w: sp.laplace(w.fails_late, ROWS, batch_size=3),
            lambda w: sp.laplace(w.posterior, ROWS, prior_scale="x"),
        ],
    ),
    "mcmc": (
        [lambda w: sp.mcmc(w.posterior, ROWS, **CHAIN)],
        [
            lambda w: sp.mcmc(w.fails, ROWS, **CHAIN),
            lambda w: sp.mcmc(w.fails_late, ROWS, **CHAIN),
            lambda w: sp.mcmc(w.posterior, ROWS, num_samples=0),
        ],
    ),
    "compare": (
        [lambda w: sp.compare({"a": w.posterior, "b": w.posterior}, ROWS, num_draws=30)],
        [lambda w: sp.compare({"a": w.posterior, "b": w.fails}, ROWS, num_draws=5, batch_size=3)],
    ),
    "baselines.mle": (
        [lambda w: sp.baselines.mle(w.plain, w.task, ROWS, lora={"r": 2}, **FEW).posterior.blora().unload()],
        [lambda w: sp.baselines.mle(w.plain, w.task, ROWS, lora={"r": 0}, **FEW)],
    ),
    "Posterior.sample": (
        [lambda w: w.posterior.sample(3), lambda w: w.posterior.sample(0)],
        [lambda w: w.no_draws.sample(9), lambda w: w.posterior.sample(-1), lambda w: w.posterior.sample(1, seed="x")],
    ),
    "Posterior.predict": (
        [
            lambda w: w.posterior.predict(ROWS, num_draws=2),
            lambda w: w.posterior.predict(w.path / "rows.jsonl", num_draws=0),
            lambda w: w.posterior.predict(ROWS, num_draws=3, draws_per_pass=2, keep_draws=False),
        ],
        [
            lambda w: small_batches(w.fails.predict),
            lambda w: small_batches(w.fails_late.predict, keep_draws=False),
            lambda w: w.no_draws.predict(ROWS, keep_draws=False),
            lambda w: w.posterior.predict(ROWS, num_draws=10**12),
            lambda w: small_batches(w.fails_late.predict),
            lambda w: w.no_draws.predict(ROWS),
            lambda w: w.posterior.predict(w.path / "broken.jsonl"),
            lambda w: w.posterior.predict([]),
        ],
    ),
    "Posterior.score": (
        [lambda w: w.texts.score(TEXTS, num_draws=2), lambda w: w.texts.score(TEXTS, num_draws=0, top=2)],
        [
            lambda w: w.posterior.score(TEXTS),
            lambda w: replace(w.texts, guide=w.no_draws.guide).score(TEXTS, num_draws=9),
            lambda w: w.texts.score(TEXTS, top=10**6),
            lambda w: w.texts.score([*TEXTS, {"prompt": "the sky"}]),
        ],
    ),
    "Posterior.generate": (
        [
            lambda w: w.texts.generate(["the sky"], num_draws=2, max_new_tokens=2),
            lambda w: w.texts.generate(["the sky"], num_draws=2, do_sample=True, decode="mixture", max_new_tokens=2),
        ],
        [
            lambda w: w.posterior.generate(["the sky"]),
            lambda w: w.texts.generate(["the sky", ""]),
            lambda w: w.texts.generate(["the sky"], max_new_tokens=2, temprature=2.0),
            lambda w: w.texts.generate(["the sky"], max_new_tokens=2, logits_processor=[broken]),
        ],
    ),
    "Posterior.predict_linearised": (
        [lambda w: _deprecated(lambda: w.posterior.predict_linearised(ROWS, num_draws=3))],
        [lambda w: _deprecated(lambda: small_batches(w.fails.predict_linearised))],
    ),
    "Posterior.sample_in_parts": (
        [
            lambda w: list(w.posterior.sample_in_parts(5, size=2)),
            lambda w: list(w.posterior.sample_in_parts(5, size=2, design="antithetic")),
            lambda w: next(w.posterior.sample_in_parts(5, size=2)),  # the caller stops after the first part
        ],
        [
            lambda w: list(w.no_draws.sample_in_parts(9, size=2)),
            lambda w: w.posterior.sample_in_parts(3, size=0),
            lambda w: list(w.posterior.sample_in_parts(1, seed="x")),
        ],
    ),
    "Posterior.predict_linearized": (
        [lambda w: w.posterior.predict_linearized(ROWS, num_draws=3)],
        [lambda w: small_batches(w.fails.predict_linearized), lambda w: small_batches(w.fails_late.predict_linearized)],
    ),
    "Posterior.prior_predictive": (
        [lambda w: w.posterior.prior_predictive(ROWS, num_draws=3)],
        [lambda w: small_batches(w.fails.prior_predictive), lambda w: w.posterior.prior_predictive([])],
    ),
    "Posterior.log_weights": (
        [lambda w: w.posterior.log_weights(ROWS, num_draws=3)],
        [
            lambda w: small_batches(w.fails.log_weights),
            lambda w: small_batches(w.fails_late.log_weights),
            lambda w: w.no_draws.log_weights(ROWS),
        ],
    ),
    "Posterior.loo": ([lambda w: w.posterior.loo(ROWS, num_draws=30)], [lambda w: small_batches(w.fails.loo)]),
    "Posterior.diagnose": (
        [lambda w: w.posterior.diagnose(ROWS, num_draws=30)],
        [lambda w: small_batches(w.fails.diagnose), lambda w: w.no_draws.diagnose(ROWS)],
    ),
    "Posterior.draw": (
        [lambda w: draw(w.posterior, None), lambda w: draw(w.posterior, 1)],
        [lambda w: draw(w.posterior, 1, fail=True), lambda w: draw(w.no_draws, 5)],
    ),
    "Posterior.to_arviz": (
        [lambda w: w.posterior.to_arviz(num_draws=5, prediction=w.prediction)],
        [lambda w: w.no_draws.to_arviz(num_draws=5)],
    ),
    "Posterior.summary": ([lambda w: w.posterior.summary(num_draws=5)], [lambda w: w.no_draws.summary()]),
    "Posterior.mean": ([lambda w: w.posterior.mean()], []),
    "Posterior.blora": ([lambda w: w.posterior.blora()], []),
    "Posterior.llm": ([lambda w: w.posterior.llm()], []),
    "Posterior.describe": ([lambda w: w.posterior.describe()], []),
    "Posterior.capture": ([lambda w: sp.Posterior.capture(w.blora, w.task, w.posterior.guide, provenance={})], []),
    "Posterior.save_pretrained": (
        [lambda w: w.posterior.save_pretrained(new_path(w))],
        [lambda w: w.posterior.save_pretrained(w.path)],
    ),
    "Posterior.from_pretrained": (
        [
            lambda w: sp.Posterior.from_pretrained(w.plain, w.path / "p").blora().unload(),
            lambda w: sp.Posterior.from_pretrained(w.llm, w.path / "p"),
        ],
        [
            lambda w: sp.Posterior.from_pretrained(w.plain, w.path / "broken"),
            lambda w: sp.Posterior.from_pretrained(tiny.causal_lm(seed=1), w.path / "p"),
            lambda w: sp.Posterior.from_pretrained(w.plain, w.path / "p", task=3),
            lambda w: sp.Posterior.from_pretrained(w.plain, w.path / "p", guide=lambda b: 1 / 0),
        ],
    ),
    "BayesianLoRA.disabled": ([lambda w: disable(w.blora)], [lambda w: disable(w.blora, fail=True)]),
    "BayesianLoRA.num_parameters": ([lambda w: w.blora.num_parameters()], []),
    "Prediction.metrics": (
        [lambda w: w.prediction.metrics(bootstrap=5)],
        [lambda w: replace(w.prediction, target=None).metrics()],
    ),
    "Prediction.to_frame": ([lambda w: w.prediction.to_frame()], []),
    "Prediction.with_answers": (
        [
            lambda w: w.prediction.with_answers(),
            lambda w: replace(w.prediction, target=np.where(np.arange(len(ROWS)) % 2, -1, 0)).with_answers(),
        ],
        [lambda w: replace(w.prediction, target=None).with_answers()],
    ),
    "NumericPrediction.with_answers": (
        [lambda w: replace(w.numbers, target=np.where(np.arange(4) % 2, np.nan, 0.0)).with_answers()],
        [lambda w: w.numbers.with_answers()],
    ),
    "plots.reliability": ([lambda w: sp.plots.reliability(w.prediction)], [lambda w: sp.plots.reliability(None)]),
    "plots.confident_mistakes": (
        [lambda w: sp.plots.confident_mistakes({"a": w.prediction, "b": [w.prediction] * 2})],
        [lambda w: sp.plots.confident_mistakes({"a": None})],
    ),
    "plots.history": (
        [lambda w: sp.plots.history(sp.fit(w.blora, w.task, ROWS, **FEW).history)],
        [lambda w: sp.plots.history(None)],
    ),
    "plots.loss": (
        [lambda w: sp.plots.loss(sp.fit(w.blora, w.task, ROWS, **FEW).history)],
        [lambda w: sp.plots.loss(None)],
    ),
    "plots.posterior_by_layer": (
        [lambda w: sp.plots.posterior_by_layer(w.posterior, num_draws=5)],
        [lambda w: sp.plots.posterior_by_layer(w.no_draws)],
    ),
    "plots.tokens": ([lambda w: sp.plots.tokens(w.scored)], [lambda w: sp.plots.tokens(None)]),
    "plots.uncertainty_histogram": (
        [lambda w: sp.plots.uncertainty_histogram(w.prediction, w.prediction)],
        [lambda w: sp.plots.uncertainty_histogram(None, None)],
    ),
    "plots.risk_coverage": ([lambda w: sp.plots.risk_coverage(w.prediction)], [lambda w: sp.plots.risk_coverage(None)]),
    "conformal.coverage_law": (
        [lambda w: sp.conformal.coverage_law(20, 0.9)],
        [lambda w: sp.conformal.coverage_law(2, 0.9)],
    ),
    "conformal.prediction_sets": (
        [lambda w: sp.conformal.prediction_sets(w.prediction, level=0.5).apply(w.prediction)],
        [
            lambda w: sp.conformal.prediction_sets(w.prediction, level=0.99),
            lambda w: sp.conformal.prediction_sets(None),
        ],
    ),
    "conformal.prediction_intervals": (
        [
            lambda w: sp.conformal.prediction_intervals(replace(w.numbers, target=np.ones(4)), level=0.5).apply(
                w.numbers
            )
        ],
        [lambda w: sp.conformal.prediction_intervals(w.numbers), lambda w: sp.conformal.prediction_intervals(None)],
    ),
    "conformal.selective_answers": (
        [lambda w: sp.conformal.selective_answers(w.prediction, risk=0.9).apply(w.prediction)],
        [
            lambda w: sp.conformal.selective_answers(w.prediction),
            lambda w: sp.conformal.selective_answers(w.prediction, risk=0.9, score=lambda p: 1 / 0),
        ],
    ),
    "guides.as_guide": (
        [
            lambda w: [
                sp.guides.as_guide(g, w.blora)
                for g in ("normal", "flow", "svgd", "lowrank", infer.autoguide.AutoNormal)
            ]
        ],
        [lambda w: sp.guides.as_guide("nothing", w.blora), lambda w: sp.guides.as_guide(lambda b: 1 / 0, w.blora)],
    ),
    "priors.as_prior": (
        [lambda w: [sp.priors.as_prior(p, w.blora.subspace) for p in (1.0, "horseshoe", dist.Normal(0.0, 1.0))]],
        [lambda w: sp.priors.as_prior("nothing", w.blora.subspace)],
    ),
    "data.stratified_split": (
        [lambda w: stratified_split(ROWS, by="answer")],
        [lambda w: stratified_split(ROWS, by="absent"), lambda w: stratified_split(ROWS, by="answer", share=2)],
    ),
    "data.read_rows": ([lambda w: read_rows(w.path / "rows.jsonl")], [lambda w: read_rows(w.path / "broken.jsonl")]),
}


def trained_on(method: Callable[..., Any], **options: Any) -> Callable[[Any], Any]:
    """A baseline that trains the plain model, predicts, and gives it back."""

    def call(w: SimpleNamespace) -> None:
        posterior = method(w.plain, w.task, ROWS, **{**FEW, **options}).posterior
        posterior.predict(ROWS, num_draws=2)
        posterior.blora().unload()

    return call


def fails_on(method: Callable[..., Any], **options: Any) -> Callable[[Any], Any]:
    return lambda w: method(w.plain, Fails(tiny.tokenizer()), ROWS, **{**FEW, **options})


def scaled(w: SimpleNamespace) -> Any:
    return sp.baselines.temperature_scaling(w.posterior, ROWS, num_draws=2)


def read_back(w: SimpleNamespace) -> None:
    path = new_path(w)
    scaled(w).save_pretrained(path)
    sp.baselines.load(w.llm, path).predict(ROWS, num_draws=2)


OF_BASELINES = {name: {"lora": {"r": 2}} for name in ("mle", "map_lora", "mc_dropout", "deep_ensemble", "blob")}
OF_BASELINES["scalabl_released"] = {"lora": {"r": 2}}
for _name, _options in OF_BASELINES.items():
    _method = getattr(sp.baselines, _name)
    CALLS[f"baselines.{_name}"] = ([trained_on(_method, **_options)], [fails_on(_method, **_options)])
CALLS |= {
    "baselines.temperature_scaling": (
        [lambda w: scaled(w).predict(ROWS, num_draws=2)],
        [lambda w: sp.baselines.temperature_scaling(w.fails, ROWS, batch_size=3)],
    ),
    "baselines.laplace_lora": (
        [lambda w: sp.baselines.laplace_lora(w.posterior, ROWS).predict(ROWS, num_draws=2)],
        [lambda w: sp.baselines.laplace_lora(w.fails, ROWS, batch_size=2)],
    ),
    "baselines.tfb": (
        [lambda w: sp.baselines.tfb(w.posterior, ROWS, num_draws=2, num_bisections=1).predict(ROWS, num_draws=2)],
        [lambda w: sp.baselines.tfb(w.fails, ROWS, num_draws=2)],
    ),
    "baselines.load": ([read_back], [lambda w: sp.baselines.load(w.plain, w.path / "broken")]),
    "BayesianLoRA.estimate_memory": (
        [lambda w: w.blora.estimate_memory({"input_ids": torch.tensor([[3, 4]])})],
        [lambda w: w.blora.estimate_memory({"input_ids": torch.tensor([[3, 99]])})],
    ),
    "Posterior.log_likelihood": (
        [lambda w: w.posterior.log_likelihood(ROWS).by_row(w.posterior.sample(2).s)],
        [lambda w: w.fails.log_likelihood(ROWS, batch_size=3).by_row(w.posterior.sample(2).s)],
    ),
}
#: Names that change what they are called on, are tested by what calls them, or are Pyro programs, which draw from
#: Pyro's own state by design.
ELSEWHERE = {
    *("BayesianLoRA.forward", "BayesianLoRA.sample_latents", "BayesianLoRA.unload", "BayesianLoRA.train"),
    *("BayesianLoRA.init_loc", "BayesianLoRA.move_own_tensors", "NumericPrediction.metrics"),
    *("NumericPrediction.interval", "NumericPrediction.to_frame"),
}


def tiny_classifier() -> torch.nn.Module:
    """Made under the generator's own state."""
    return tiny.classifier()


def each(which: int) -> list[Any]:
    return [
        pytest.param(call, id=f"{name}-{i}") for name, calls in CALLS.items() for i, call in enumerate(calls[which])
    ]


@contextmanager
def plain() -> Iterator[None]:
    yield


@contextmanager
def unusual() -> Iterator[None]:
    """No gradients, no validation, local parameters, float64: what a caller may have set."""
    validation = [d.is_validation_enabled() for d in (dist, infer, poutine)]
    pyro.enable_validation(False)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), pyro.settings.context(module_local_params=True):
            yield
    finally:
        torch.set_default_dtype(torch.float32)
        for d, value in zip((dist, infer, poutine), validation, strict=True):
            d.enable_validation(value)


@pytest.fixture
def ambient():
    """Random states in the middle of their sequences, and a parameter of the user's own in the store."""
    torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    pyro.param("own", torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    pyro.clear_param_store()
    plt.close("all")


@pytest.mark.usefixtures("ambient")
@pytest.mark.parametrize("surroundings", [plain, unusual], ids=["plain", "unusual"])
@pytest.mark.parametrize("call", each(0))
def test_success_leaves_everything_as_it_was(world, call, surroundings):
    with surroundings(), untouched(world.llm), untouched(world.plain):
        call(world)


@pytest.mark.usefixtures("ambient")
@pytest.mark.parametrize("call", each(1))
def test_failure_leaves_everything_as_it_was_while_the_error_is_held_and_after(world, call):
    for model in (world.fails, world.fails_late):
        model.task.__dict__["calls"] = 0
    with untouched(world.llm), untouched(world.plain):
        with untouched(world.llm), pytest.raises(Exception, match="") as error:
            call(world)
        assert error.type not in (AssertionError, AttributeError, NameError) or "NoneType" in str(error.value)
        del error  # with its frames, and generators that have not ended
        gc.collect(1)
    assert torch.is_grad_enabled()


def _is_ours(c: type) -> bool:
    return c.__module__.startswith("scalabl_pyro.") and not c.__module__.startswith("scalabl_pyro._process")


def test_the_calls_cover_every_public_function():
    names = set()
    for name in sp.__all__:
        value = getattr(sp, name)
        if inspect.isfunction(value):
            names.add(name)
        elif name in ("Posterior", "BayesianLoRA", "Prediction", "NumericPrediction"):
            own = {n: m for c in reversed(value.__mro__) if _is_ours(c) for n, m in vars(c).items()}
            methods = {n for n, m in own.items() if not n.startswith("_") and callable(getattr(value, n))}
            methods -= {n for n, m in own.items() if isinstance(m, property)}
            names |= {f"{name}.{n}" for n in methods}
        elif name in ("baselines", "conformal", "plots"):
            own = {n for n, v in vars(value).items() if inspect.isfunction(v) and not n.startswith("_")}
            names |= {f"{name}.{n}" for n in own if getattr(value, n).__module__.startswith(value.__name__)}
    assert sorted(names - ELSEWHERE - set(CALLS)) == []
