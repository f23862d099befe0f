"""The estimators do what scikit-learn's tools need, on texts; the base model of the user stays as it is."""

import doctest
import io
import subprocess
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

pytest.importorskip("sklearn")

import joblib
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV, calibration_curve
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks
from sklearn.utils.validation import has_fit_parameter

import scalabl_pyro as sp
from scalabl_pyro.integrations import ScalaBLClassifier, ScalaBLRegressor

ROWS = tiny.question_rows(24)
X = [row["question"] for row in ROWS]
Y = np.array([tiny.COLORS[row["answer"]] for row in ROWS])
NUMBERS = np.array([10.0 + 5 * row["answer"] for row in ROWS])
LEARNS = {"num_steps": 60, "lr": 1e-2, "lr_A": 1e-2, "num_draws": 4}
FAST = {"num_steps": 2, "num_draws": 2, "r": 2}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:sklearn")


def classifier(num_labels: int = 4, **options) -> ScalaBLClassifier:
    return ScalaBLClassifier(tiny.classifier(num_labels=num_labels), tokenizer=tiny.tokenizer(), **{**FAST, **options})


@pytest.fixture(scope="module")
def learned():
    return classifier(**LEARNS).fit(X, Y)


@pytest.fixture
def hub(monkeypatch):
    """Names give tiny models, whose new heads come from the global generator, as those of transformers do."""

    def load(name, num_labels=2, **options):
        model = tiny.classifier(num_labels=num_labels)
        torch.nn.init.normal_(model.score.weight)
        return model

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", load)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **options: tiny.tokenizer())


def test_learns_and_names_the_classes(learned):
    assert learned.classes_.tolist() == sorted(tiny.COLORS)
    assert learned.score(X, Y) == 1.0
    probs = learned.predict_proba(X)
    np.testing.assert_allclose(probs.sum(1), 1.0, rtol=1e-12)
    assert (learned.classes_[probs.argmax(1)] == Y).all()
    np.testing.assert_allclose(learned.predict_log_proba(X[:3]), np.log(probs[:3]))
    assert len(learned.history_) == 60


def test_the_estimator_computes_what_the_library_computes(learned):
    """The same fit and prediction by hand."""
    blora = sp.bayesian_lora(tiny.classifier(num_labels=4), r=2)
    task = sp.SequenceClassification(tiny.tokenizer(), classes=sorted(tiny.COLORS))
    rows = [{"text": text, "label": label} for text, label in zip(X, Y.tolist(), strict=True)]
    result = sp.fit(blora, task, rows, num_steps=60, lr=1e-2, lr_A=1e-2, progress=False)
    expected = result.posterior.predict(rows, num_draws=4)
    found = learned.predict_draws(X, Y)
    np.testing.assert_array_equal(found.log_probs, expected.log_probs)
    np.testing.assert_array_equal(found.target, expected.target)
    np.testing.assert_allclose(learned.predict_proba(X), expected.probs, rtol=1e-6)


def test_the_given_module_is_not_changed_by_fit_or_by_fits_of_clones():
    model = tiny.classifier(num_labels=4).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = ScalaBLClassifier(model, tokenizer=tiny.tokenizer(), **FAST).fit(X, Y)
    probs = first.predict_proba(X)
    second = clone(first).set_params(num_steps=4).fit(X, Y)
    assert second.model is model
    assert not np.allclose(second.predict_proba(X), probs)
    np.testing.assert_array_equal(first.predict_proba(X), probs)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and all(p.requires_grad for p in model.parameters())
    shared = {p.data_ptr() for p in model.parameters()} & {
        p.data_ptr() for p in first.posterior_.llm().llm.parameters()
    }
    assert len(shared) > 10  # frozen weights take memory once


@pytest.mark.parametrize(
    "labels",
    [np.arange(4), np.array([10, 20, 30, 5]), np.array(["d", "b", "c", "a"]), np.array([0.0, 2.0, 1.0, 4.0])],
    ids=["indices", "ints", "texts", "floats"],
)
def test_labels_of_other_types_and_orders_give_the_same_probabilities(labels):
    """Only the order of the columns changes: it is that of the sorted labels."""
    codes = np.array([row["answer"] for row in ROWS])
    fitted = classifier(**LEARNS).fit(X, labels[codes])
    assert fitted.classes_.tolist() == sorted(labels.tolist())
    assert fitted.classes_.dtype == labels.dtype
    assert (fitted.predict(X) == labels[codes]).all()


def test_two_truth_values():
    codes = np.array([row["answer"] % 2 == 1 for row in ROWS])
    fitted = classifier(2, **LEARNS).fit(X, codes)
    assert fitted.classes_.tolist() == [False, True]
    assert fitted.score(X, codes) > 0.8
    right, _ = calibration_curve(codes, fitted.predict_proba(X)[:, 1], n_bins=2)
    assert right[0] < right[1]


def test_a_trained_head_keeps_its_order():
    """The model names its outputs in another order than the sorted labels."""
    model = tiny.classifier(num_labels=4)
    model.config.id2label = dict(enumerate(["red", "black", "green", "blue"]))
    fitted = ScalaBLClassifier(model, tokenizer=tiny.tokenizer(), **LEARNS).fit(X, Y)
    assert fitted.posterior_.task.classes == ("red", "black", "green", "blue")
    assert fitted.classes_.tolist() == ["black", "blue", "green", "red"]
    assert fitted.score(X, Y) == 1.0
    prediction = fitted.predict_draws(X, Y)
    assert prediction.classes == ("black", "blue", "green", "red")
    assert prediction.metrics()["accuracy"].item() == 1.0


@pytest.mark.parametrize("kind", [np.array, pd.Series, tuple, partial(np.array, dtype=object)])
def test_containers_of_texts(learned, kind):
    np.testing.assert_array_equal(learned.predict_proba(kind(X[:5])), learned.predict_proba(X[:5]))


def test_data_frames():
    table = pd.DataFrame({"id": range(len(X)), "asked": X}, index=range(100, 100 + len(X)))
    with pytest.raises(ValueError, match=r"columns \['id', 'asked'\]: name the column of the text"):
        classifier().fit(table, Y)
    with pytest.raises(ValueError, match=r"no column 'ask'\. Did you mean 'asked'"):
        classifier(text_columns="ask").fit(table, Y)
    fitted = classifier(text_columns="asked").fit(table, Y)
    np.testing.assert_array_equal(fitted.predict_proba(table), fitted.predict_proba(X))
    assert fitted.text_columns_ == ["asked"]
    np.testing.assert_array_equal(
        classifier().fit(table[["asked"]], Y).predict_proba(X), classifier().fit(X, Y).predict_proba(X)
    )


def test_pairs_of_texts():
    pairs = pd.DataFrame({"a": X, "b": X[::-1]})
    fitted = classifier(text_columns=["a", "b"]).fit(pairs, Y)
    swapped = fitted.predict_proba(pairs.rename(columns={"a": "b", "b": "a"}))
    assert not np.allclose(fitted.predict_proba(pairs), swapped)
    np.testing.assert_array_equal(fitted.predict_proba(pairs.to_numpy()), fitted.predict_proba(pairs))
    with pytest.raises(ValueError, match=r"X has 1 column\(s\) of texts, but fit\(\) had 2"):
        fitted.predict(X)


def test_cross_validation_grid_search_pipeline_and_calibration():
    pipeline = Pipeline(
        [("strip", FunctionTransformer(lambda texts: [t.strip() for t in texts])), ("llm", classifier())]
    )
    assert len(cross_val_score(pipeline, X, Y, cv=2)) == 2
    search = GridSearchCV(pipeline, {"llm__lr": [1e-5, 1e-2]}, cv=2, scoring="neg_log_loss")
    search.set_params(estimator__llm__num_steps=30, estimator__llm__lr_A=1e-2).fit(X, Y)
    assert search.best_params_ == {"llm__lr": 1e-2}
    calibrated = CalibratedClassifierCV(classifier(), cv=2).fit(X, Y)
    assert calibrated.predict_proba(X[:3]).shape == (3, 4)


def test_a_name_is_loaded_for_the_classes_of_y_and_the_random_state_counts(hub, unchanged_rng):
    one, same, other = (ScalaBLClassifier("tiny", random_state=seed, **FAST).fit(X, Y) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.predict_proba(X), same.predict_proba(X))
    assert not np.allclose(one.predict_proba(X), other.predict_proba(X))
    assert (one.seed_, other.seed_) == (0, 1)
    state = ScalaBLClassifier("tiny", random_state=np.random.RandomState(0), **FAST)
    assert state.fit(X, Y).seed_ != state.fit(X, Y).seed_


@pytest.mark.parametrize("by_name", [True, False])
def test_joblib_writes_and_reads_a_fitted_estimator(hub, by_name):
    fitted = (ScalaBLClassifier("tiny", **FAST) if by_name else classifier()).fit(X, Y)
    file = io.BytesIO()
    joblib.dump(fitted, file)
    file.seek(0)
    read = joblib.load(file)
    np.testing.assert_array_equal(read.predict_proba(X), fitted.predict_proba(X))
    assert read.score(X, Y) == fitted.score(X, Y)


def test_saved_posterior_gives_the_same_predictions(learned, tmp_path):
    learned.posterior_.save_pretrained(tmp_path)
    posterior = sp.Posterior.from_pretrained(tiny.classifier(num_labels=4), tmp_path)
    rows = [{"text": text} for text in X]
    np.testing.assert_allclose(posterior.predict(rows, num_draws=4).probs, learned.predict_draws(X).probs, atol=1e-6)


def test_regressor():
    fitted = ScalaBLRegressor(tiny.classifier(num_labels=1), tokenizer=tiny.tokenizer(), **LEARNS).fit(X, NUMBERS)
    assert fitted.score(X, NUMBERS) > 0.8
    mean, sd = fitted.predict(X, return_std=True)
    np.testing.assert_array_equal(fitted.predict(X), mean)
    np.testing.assert_array_equal(fitted.predict_std(X), sd)
    prediction = fitted.predict_draws(X, NUMBERS)
    np.testing.assert_allclose(prediction.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(np.sqrt(prediction.total), sd, rtol=1e-5)
    assert prediction.target.tolist() == NUMBERS.tolist()
    file = io.BytesIO()
    joblib.dump(fitted, file)
    file.seek(0)
    np.testing.assert_array_equal(joblib.load(file).predict(X), mean)


def test_options_reach_the_library():
    fitted = classifier(
        lora_options={"lora_dropout": 0.1},
        fit_options={"kl_weight": 0.5, "optimizer": {"warmup": 0.0}},
        predict_options={"batch_size": 3, "design": "antithetic"},
        prior=2.0,
        guide="lowrank",
    ).fit(X, Y)
    assert (fitted.history_["kl_weight"] == 0.5).all()
    assert fitted.predict(X).shape == (len(X),)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda c: c.fit(X, Y, sample_weight=np.ones(len(X))), TypeError, r"fit\(\) takes no sample_weight: .*Repeat"),
        (lambda c: c.fit(X, Y, groups=1), TypeError, "groups"),
        (lambda c: c.fit("one text", Y), TypeError, r"pass \[text\]"),
        (lambda c: c.fit([1.0, 2.0], ["a", "b"]), TypeError, "X, row 0 is a float"),
        (lambda c: c.fit(np.ones((2, 5)), ["a", "b"]), ValueError, r"shape \(2, 5\)"),
        (lambda c: c.fit([*X[:3], None], Y[:4]), ValueError, "X, row 3 has no text"),
        (lambda c: c.fit([], []), ValueError, r"0 sample\(s\)"),
        (lambda c: c.fit(X, None), ValueError, "y is None"),
        (lambda c: c.fit(X, Y[:-1]), ValueError, "inconsistent numbers of samples"),
        (lambda c: c.fit(X, ["a"] * len(X)), ValueError, "y holds one class, 'a'"),
        (lambda c: c.fit(X, np.linspace(0, 1, len(X))), ValueError, "Unknown label type"),
        (lambda c: c.fit(X[:3], ["a", None, "b"]), ValueError, "NaN or None in row 1"),
        (lambda c: c.fit(X[:4], ["a", "b", "a", "b"]), ValueError, "4 outputs, but y needs 2"),
        (lambda c: c.predict(X), NotFittedError, "not fitted"),
        (lambda c: c.set_params(model=None).fit(X, Y), TypeError, "model is"),
        (lambda c: c.set_params(model=c.model, tokenizer=None).fit(X, Y), TypeError, "pass its tokenizer"),
        (lambda c: c.set_params(num_draws=-1).fit(X, Y), ValueError, "num_draws=-1"),
        (lambda c: c.set_params(model_options={"num_labels": 3}).fit(X, Y), ValueError, "follows from y"),
        (lambda c: c.set_params(lora_options={"r": 3}).fit(X, Y), TypeError, "pass r= to the estimator"),
        (lambda c: c.set_params(fit_options={"seed": 3}).fit(X, Y), TypeError, "pass random_state= to the estimator"),
        (lambda c: c.set_params(model=sp.bayesian_lora(c.model).llm).fit(X, Y), ValueError, "carries Bayesian LoRA"),
        (lambda c: c.fit(X, Y).predict_draws(X, ["pink"] * len(X)), ValueError, "'pink', which is not one of"),
        (lambda c: c.fit(X, Y).predict_draws(X, Y[:3]), ValueError, "inconsistent numbers of samples"),
    ],
)
def test_mistakes_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call(classifier())


def test_an_unknown_argument_is_named_with_the_nearest_one():
    with pytest.raises(TypeError, match="Did you mean 'lr'"):
        ScalaBLClassifier("tiny", learning_rate=1.0)
    with pytest.raises(ValueError, match="needs one number per row"):
        ScalaBLRegressor(tiny.classifier(num_labels=1), tokenizer=tiny.tokenizer()).fit(X, Y)


@pytest.mark.parametrize("kind", ["datetime64[D]", "timedelta64[s]"])
def test_dates_are_no_numbers(kind):
    with pytest.raises(ValueError, match="y holds dates or times"):
        regressor = ScalaBLRegressor(tiny.classifier(num_labels=1), tokenizer=tiny.tokenizer())
        regressor.fit(X, np.arange(len(X)).astype(kind))


@pytest.mark.parametrize("kind", [ScalaBLClassifier, ScalaBLRegressor])
@pytest.mark.parametrize(
    "check",
    [
        "check_estimator_cloneable",
        "check_estimator_repr",
        "check_no_attributes_set_in_init",
        "check_parameters_default_constructible",
        "check_get_params_invariance",
        "check_set_params",
        "check_do_not_raise_errors_in_init_or_set_params",
        "check_valid_tag_types",
        "check_estimator_tags_renamed",
        "check_mixin_order",
    ],
)
def test_checks_of_scikit_learn_that_need_no_data(kind, check):
    """Those that need data are in test_sklearn_checks.py."""
    getattr(estimator_checks, check)(kind.__name__, kind("tiny"))


def test_fit_has_no_weights_in_its_signature():
    assert not has_fit_parameter(classifier(), "sample_weight")


def test_scikit_learn_is_imported_only_when_asked_for_and_named_if_missing():
    code = """
import sys
import scalabl_pyro.integrations as integrations
assert "sklearn" not in sys.modules, "imported too early"
sys.modules["sklearn"] = None
try:
    integrations.ScalaBLClassifier
except ImportError as error:
    assert "pip install 'scalabl-pyro[sklearn]'" in str(error), error
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", [ScalaBLClassifier, ScalaBLRegressor])
def test_the_example_of_a_docstring_runs(kind):
    names = {"model": tiny.classifier(num_labels=2), "model_of_numbers": tiny.classifier(num_labels=1)}
    test = doctest.DocTestParser().get_doctest(kind.__doc__, {**names, "tokenizer": tiny.tokenizer()}, "x", None, 0)
    found = doctest.DocTestRunner(verbose=False).run(test)
    assert found.attempted and not found.failed
