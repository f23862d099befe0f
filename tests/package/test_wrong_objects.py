"""Wrong objects and unknown names of arguments: each public function says what was given, and what to do."""

import inspect
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

import scalabl_pyro as sp
from scalabl_pyro import data
from scalabl_pyro._arguments import KINDS, ROLES, WAYS, kind_of
from scalabl_pyro._errors import describe

FEW = {"num_steps": 1, "batch_size": 4, "progress": False}
ROWS = tiny.question_rows(4)

#: Objects that users mix up, by kind. The functions get the ones of another kind than they want.
WRONG = {
    "llm": lambda w: w.llm,
    "blora": lambda w: w.blora,
    "posterior": lambda w: w.posterior,
    "result": lambda w: w.result,
    "prediction": lambda w: w.prediction,
    "task": lambda w: w.task,
    "tokenizer": lambda w: w.tokenizer,
    "class": lambda w: sp.MultipleChoice,
    "name": lambda w: "gpt2",
    "row": lambda w: ROWS[0],
    "texts": lambda w: ["one text", "another"],
    "rows": lambda w: ROWS,
    "frame": lambda w: pd.DataFrame({"loss": [1.0]}),
    "array": lambda w: np.zeros(3),
    "number": lambda w: 3,
    "nothing": lambda w: None,
    "function": lambda w: describe,
}


def calls() -> dict[str, tuple[tuple[str, ...], object]]:
    """Each function that takes one of these objects: the roles of its first arguments, and the call."""
    from_posterior = {
        "refit": lambda w, p, d: sp.refit(p, d, **FEW),
        "ensemble": lambda w, p, d: sp.ensemble(p, d, num_members=2, **FEW),
        "laplace": lambda w, p, d: sp.laplace(p, d),
        "mcmc": lambda w, p, d: sp.mcmc(p, d, num_samples=4, warmup_steps=1, max_tree_depth=1, progress=False),
        "compare": lambda w, p, d: sp.compare([p], d, num_draws=25),
        "baselines.laplace_lora": lambda w, p, d: sp.baselines.laplace_lora(p, d),
        "baselines.tfb": lambda w, p, d: sp.baselines.tfb(p, d, num_draws=2, num_bisections=1),
        "baselines.temperature_scaling": lambda w, p, d: sp.baselines.temperature_scaling(p, d, num_draws=2),
    }
    from_model = {
        f"baselines.{name}": (lambda w, m, t, d, name=name: getattr(sp.baselines, name)(m, t, d, **FEW))
        for name in ("mle", "map_lora", "mc_dropout", "deep_ensemble", "blob", "scalabl_released")
    }
    methods = {
        "Posterior.predict": lambda w, d: w.posterior.predict(d),
        "Posterior.predict_linearized": lambda w, d: w.posterior.predict_linearized(d),
        "Posterior.prior_predictive": lambda w, d: w.posterior.prior_predictive(d),
        "Posterior.loo": lambda w, d: w.posterior.loo(d),
        "Posterior.diagnose": lambda w, d: w.posterior.diagnose(d),
        "Posterior.log_likelihood": lambda w, d: w.posterior.log_likelihood(d),
        "Posterior.log_weights": lambda w, d: w.posterior.log_weights(d),
        "data.stratified_split": lambda w, d: data.encode(
            data.stratified_split(d, by="answer")[0], w.task.encode, need_target=True
        ),
        "data.read_rows": lambda w, d: data.encode(data.read_rows(d), w.task.encode, need_target=True),
    }
    tasks = {
        "MultipleChoice": lambda w, t: sp.MultipleChoice(t),
        "Completion": lambda w, t: sp.Completion(t),
        "SequenceClassification": lambda w, t: sp.SequenceClassification(t, classes=["a", "b"]),
        "Regression": lambda w, t: sp.Regression(t),
        "Task": lambda w, t: sp.Task(t),
    }
    plots = {
        "plots.reliability": lambda w, p: sp.plots.reliability(p),
        "plots.risk_coverage": lambda w, p: sp.plots.risk_coverage(p),
        "plots.uncertainty_histogram": lambda w, p: sp.plots.uncertainty_histogram(p, p),
        "plots.confident_mistakes": lambda w, p: sp.plots.confident_mistakes({"a": p}),
        "Posterior.to_arviz": lambda w, p: w.posterior.to_arviz(num_draws=2, prediction=p),
    }
    return {
        "bayesian_lora": (("llm",), lambda w, m: sp.bayesian_lora(m)),
        "fit": (("blora", "task", "rows"), lambda w, b, t, d: sp.fit(b, t, d, **FEW)),
        "tune": (
            ("blora", "task", "rows"),
            lambda w, b, t, d: sp.tune(b, t, d, ROWS[:2], search={"lr": [1e-3]}, num_trials=1, **FEW),
        ),
        "posthoc": (("blora", "task", "rows"), lambda w, b, t, d: sp.posthoc(b, t, d)),
        **{name: (("posterior", "rows"), call) for name, call in from_posterior.items()},
        **{name: (("llm", "task", "rows"), call) for name, call in from_model.items()},
        **{name: (("rows",), call) for name, call in methods.items()},
        **{name: (("tokenizer",), call) for name, call in tasks.items()},
        **{name: (("prediction",), call) for name, call in plots.items()},
        "plots.posterior_by_layer": (("posterior",), lambda w, p: sp.plots.posterior_by_layer(p)),
        "plots.history": (("history",), lambda w, f: sp.plots.history(f)),
        "plots.loss": (("history",), lambda w, f: sp.plots.loss(f)),
        "guides.as_guide": (("blora",), lambda w, b: sp.guides.as_guide("normal", b)),
        "Posterior.from_pretrained": (("llm", "path"), lambda w, m, p: sp.Posterior.from_pretrained(m, p)),
        "baselines.load": (("llm", "path"), lambda w, m, p: sp.baselines.load(m, p)),
        "Posterior.save_pretrained": (("path",), lambda w, p: w.posterior.save_pretrained(p)),
    }


#: Wrong objects that a role takes all the same.
TAKEN = {
    "rows": {"frame"},  # a container of rows, which the tests of containers judge
    "path": {"name"},
    "history": {"frame"},
    "prediction": {"nothing"},
    "tokenizer": set(),
}
CASES = [
    pytest.param(name, position, kind, id=f"{name}-{position}-{kind}")
    for name, (roles, _) in calls().items()
    for position, role in enumerate(roles)
    for kind in WRONG
    if kind != role
    and kind not in TAKEN.get(role, ())
    and not (name == "Task" and kind == "nothing")
    and not (name == "baselines.temperature_scaling" and kind == "prediction")
    and not (name == "Posterior.to_arviz" and kind == "nothing")
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Right objects of every kind; those that a call may change are not shared."""
    task = sp.MultipleChoice(tiny.tokenizer())
    result = sp.fit(sp.bayesian_lora(tiny.causal_lm(), r=2), task, ROWS, **FEW)
    path = tmp_path_factory.mktemp("saved")
    result.posterior.save_pretrained(path)
    return SimpleNamespace(
        result=result,
        posterior=result.posterior,
        blora=result.posterior.blora(),
        prediction=result.posterior.predict(ROWS, num_draws=2),
        task=task,
        tokenizer=task.tokenizer,
        rows=ROWS,
        path=path,
        history=result.history,
        llm=tiny.causal_lm(),
    )


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("name", "position", "kind"), CASES)
def test_a_wrong_object_is_named_with_the_way(world, tmp_path, monkeypatch, name, position, kind):
    monkeypatch.chdir(tmp_path)
    roles, call = calls()[name]
    given = WRONG[kind](world)
    arguments = [getattr(world, role) for role in roles]
    arguments[position] = given
    modules = [type(m) for m in world.llm.modules()]
    with pytest.raises((TypeError, ValueError)) as error:
        call(world, *arguments)
    message = str(error.value)
    expected = given.__name__ if isinstance(given, type) or inspect.isroutine(given) else type(given).__name__
    named = (expected.removesuffix("Type"), type(given).__name__, "Row 0 is", "already carries a Bayesian LoRA")
    assert any(text in message for text in named), message
    assert any(word in message for word in ("xpected", "ass a list", "ass its", "Use the object")), message
    assert len(message) < 500 and "Trace Shapes" not in message, message
    assert [type(m) for m in world.llm.modules()] == modules, "the model was changed"


def test_each_way_belongs_to_a_role_and_a_kind(world):
    kinds = {*KINDS.values(), "name", "class", "row", "other"}
    assert {role for role, _ in WAYS} <= set(ROLES) and {kind for _, kind in WAYS} <= kinds
    for kind in set(KINDS.values()) & set(WRONG):
        assert kind_of(WRONG[kind](world)) == kind


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: sp.fit(w.llm, w.task, ROWS), r"blora is a LlamaForCausalLM.*blora = bayesian_lora\(llm\)"),
        (lambda w: sp.fit(w.posterior, w.task, ROWS), r"blora is a Posterior.*posterior\.blora\(\)"),
        (lambda w: sp.fit(w.task, w.blora, ROWS), r"blora is a MultipleChoice.*fit\(blora, task, train_data\)"),
        (lambda w: sp.fit(w.blora, sp.MultipleChoice, ROWS), r"the class MultipleChoice.*Make an instance"),
        (lambda w: sp.fit(w.blora, w.tokenizer, ROWS), r"MultipleChoice\(tokenizer\)"),
        (lambda w: sp.fit("gpt2", w.task, ROWS), r"blora is a str \('gpt2'\).*Load the model"),
        (lambda w: sp.fit(w.blora, w.task, ["a text"]), r"Row 0 is a str.*a text"),
        (lambda w: sp.fit(w.blora, w.task, ROWS[0]), r"a dict.* single row.*\[row\]"),
        (lambda w: sp.fit(w.blora, w.task, ROWS, kl_weight="linear"), r"kl_weight='linear': expected a number.*lambda"),
        (
            lambda w: sp.fit(w.blora, w.task, ROWS, kl_weight=lambda step: "one", progress=False),
            r"kl_weight\(0\) gives a str \('one'\)",
        ),
        (lambda w: sp.bayesian_lora("gpt2"), r"module is a str \('gpt2'\).*AutoModelForCausalLM\.from_pretrained"),
        (lambda w: sp.Posterior.from_pretrained(w.path, w.llm), r"from_pretrained\(llm, path\)"),
        (lambda w: sp.laplace(w.result, ROWS), r"Pass result\.posterior"),
        (lambda w: sp.MultipleChoice("gpt2"), r"tokenizer is a str \('gpt2'\).*AutoTokenizer"),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_plausible_mistakes_get_the_right_hint(world, call, message):
    with pytest.raises(TypeError, match=message):
        call(world)


#: Names of arguments in other libraries, and ours.
ELSEWHERE = {
    "fit": ("learning_rate", "lr"),
    "bayesian_lora": ("lora_rank", "r"),
    "Posterior.predict": ("num_samples", "num_draws"),
    "mcmc": ("n_samples", "num_samples"),
    "OptimizerOptions": ("warm_up", "warmup"),
    "Posterior.from_pretrained": ("tsk", "task"),
}


def public_callables() -> dict[str, object]:
    """Functions, methods and constructors of the public surface that take keyword arguments of their own."""
    names = ("priors", "data", "guides", "metrics", "plots", "baselines")
    namespaces = {"": sp, **{f"{name}.": getattr(sp, name) for name in names}}
    found = {}
    for prefix, module in namespaces.items():
        own = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__ and n[0] != "_"]
        for name in getattr(module, "__all__", own):
            value = getattr(module, name)
            if inspect.isfunction(value):
                found[prefix + name] = value
            elif isinstance(value, type) and issubclass(value, sp.Task | sp.priors.Prior | sp.guides.Guide):
                found[prefix + name] = value
            elif name in ("Posterior",) or name.endswith("Options"):
                found[prefix + name] = value
    predictors = (sp.baselines.EnsemblePosterior, sp.baselines.FactorPosterior, sp.baselines.TemperatureScaled)
    for kind in (sp.Posterior, sp.Prediction, sp.NumericPrediction, *predictors):
        for name, value in inspect.getmembers(kind, inspect.isroutine):
            if not name.startswith("_"):
                found[f"{kind.__name__}.{name}"] = value
    return found


@pytest.mark.parametrize(("name", "call"), public_callables().items(), ids=public_callables().keys())
def test_an_unknown_argument_is_refused_with_the_nearest_name(name, call, world):
    signature = inspect.signature(call)
    kinds = {p.kind for p in signature.parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        pytest.skip("passes options on to a function that refuses them")
    arguments = [None for p in signature.parameters.values() if p.default is p.empty and p.kind is not p.KEYWORD_ONLY]
    with pytest.raises(TypeError, match=r"has no argument '(unknown_name)'\. (Did you mean|Known names|It takes none)"):
        call(*arguments, unknown_name=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: sp.fit(w.blora, w.task, ROWS, learning_rate=1e-3), r"fit\(\) has no argument 'learning_rate'.*'lr'"),
        (
            lambda w: sp.fit(w.blora, w.task, ROWS, eval_dataset=ROWS),
            r"no argument 'eval_dataset'. Did you mean 'eval_data'",
        ),
        (lambda w: sp.fit(w.blora, w.task, ROWS, early_stopping=3), "'patience'"),
        (lambda w: sp.fit(w.blora, w.task, ROWS, eval_steps=3), "'eval_every'"),
        (lambda w: sp.fit(w.blora, w.task, ROWS, epochs=3), "'num_steps'"),
        (lambda w: sp.fit(w.blora, w.task, ROWS, optimizer={"warm_up": 1}), "'warmup'"),
        (lambda w: sp.refit(w.posterior, ROWS, learning_rate=1e-3), "'lr'"),
        (lambda w: sp.tune(w.blora, w.task, ROWS, ROWS[:2], learning_rate=1e-3), "'lr'"),
        (lambda w: sp.ensemble(w.posterior, ROWS, learning_rate=1e-3), "'lr'"),
        (lambda w: sp.baselines.mle(tiny.causal_lm(), w.task, ROWS, epochs=3), "'num_steps'"),
        (lambda w: sp.bayesian_lora(tiny.causal_lm(), rank=3), "'r'"),
        (lambda w: w.posterior.predict(ROWS, num_samples=3), r"predict\(\) has no argument 'num_samples'.*'num_draws'"),
        (lambda w: w.posterior.loo(ROWS, n_draws=3), "'num_draws'"),
        (lambda w: sp.Posterior.from_pretrained(w.llm, w.path, tsk=w.task), r"from_pretrained\(\).*'task'"),
        (lambda w: sp.OptimizerOptions(warm_up=0.1), r"OptimizerOptions\(\) has no argument 'warm_up'.*'warmup'"),
        (lambda w: sp.MultipleChoice(w.tokenizer, label="AB"), r"MultipleChoice\(\).*'labels'"),
        (
            lambda w: sp.SequenceClassification(w.tokenizer, num_labels=2),
            r"SequenceClassification\(\) has no argument 'num_labels'. Known names: 'class_weights', 'classes'",
        ),
        (lambda w: sp.Regression(w.tokenizer, targt="y"), r"Regression\(\) has no argument 'targt'.*'target'"),
        (lambda w: sp.Regression(w.tokenizer, noise=1.0), r"Regression\(\) has no argument 'noise'.*'noise_scale'"),
        (lambda w: sp.priors.EmpiricalBayesPrior(pr="layer"), r"EmpiricalBayesPrior\(\).*'per'"),
    ],
)
def test_a_name_of_another_library_gives_ours(world, call, message):
    with pytest.raises(TypeError, match=message):
        call(world)


class Misfit(sp.MultipleChoice):
    """A task that refuses its batch in words."""

    def likelihood(self, outputs, batch):
        raise ValueError("this batch does not suit me")


def test_the_table_of_pyro_is_not_appended_to_messages(tokenizer):
    llm = tiny.classifier(num_labels=3)
    four = sp.SequenceClassification(tokenizer, classes=["a", "b", "c", "d"])
    with pytest.raises(ValueError, match=r"Load the model with num_labels=4\.$"):
        sp.fit(sp.bayesian_lora(llm, r=2), four, tiny.text_rows(8), **FEW)
    with pytest.raises(ValueError, match=r"^this batch does not suit me$"):
        sp.fit(sp.bayesian_lora(tiny.causal_lm(), r=2), Misfit(tokenizer), ROWS, **FEW)


class Broken(sp.MultipleChoice):
    """A task with an error of shapes, which torch finds."""

    def likelihood(self, outputs, batch):
        return super().likelihood(outputs @ torch.ones(99, 3), batch)


def test_errors_of_shapes_keep_the_table(tokenizer):
    with pytest.raises(RuntimeError, match="Trace Shapes"):
        sp.fit(sp.bayesian_lora(tiny.causal_lm(), r=2), Broken(tokenizer), ROWS, **FEW)
