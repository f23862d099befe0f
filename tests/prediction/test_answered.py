"""Rows with and without answers in one prediction: each known answer counts, and each table says how many do."""

import logging

import numpy as np
import pytest
import tiny

import scalabl_pyro as sp
from scalabl_pyro import plots
from scalabl_pyro.baselines import temperature_scaling

ROWS = tiny.question_rows(8)
UNKNOWN = [0, 3, 4]
KNOWN = [i for i in range(8) if i not in UNKNOWN]


@pytest.fixture(scope="module")
def posterior():
    blora = sp.bayesian_lora(tiny.causal_lm(), r=2)
    return sp.fit(blora, sp.MultipleChoice(tiny.tokenizer()), ROWS, num_steps=2, progress=False).posterior


@pytest.fixture(scope="module", params=[None, -1, float("nan")], ids=str)
def half(posterior, request):
    rows = [dict(row, answer=request.param) if i in UNKNOWN else row for i, row in enumerate(ROWS)]
    return posterior.predict(rows, num_draws=3, batch_size=3)


@pytest.fixture(scope="module")
def known(posterior, half):
    """The prediction of the rows with answers alone; the same numbers, so that only the answers are compared."""
    whole = posterior.predict(ROWS, num_draws=3, batch_size=3)
    np.testing.assert_array_equal(whole.log_probs, half.log_probs)
    return sp.Prediction(whole.log_probs[:, KNOWN], whole.target[KNOWN], whole.classes)


def test_each_known_answer_is_kept(half):
    expected = [-1 if i in UNKNOWN else row["answer"] for i, row in enumerate(ROWS)]
    assert half.target.tolist() == expected
    assert np.flatnonzero(half.is_answered).tolist() == KNOWN
    named = half.to_frame()["target"]
    assert named[KNOWN].tolist() == ["ABCD"[expected[i]] for i in KNOWN]
    assert named[UNKNOWN].isna().all()
    assert "answers=5 of 8" in repr(half)


def test_metrics_are_those_of_the_rows_with_answers(half, known, caplog):
    with caplog.at_level(logging.WARNING, logger="scalabl_pyro"):
        table = half.metrics(bootstrap=10)
    assert table.pop("num_answered").tolist() == [5, 5, 5]
    assert table.equals(known.metrics(bootstrap=10))
    assert "5 of 8 rows have an answer" in caplog.text
    assert "num_answered" not in known.metrics()


def test_the_log_likelihood_is_missing_only_there(half, known):
    np.testing.assert_array_equal(half.log_likelihood[:, KNOWN], known.log_likelihood)
    assert np.isnan(half.log_likelihood[:, UNKNOWN]).all()
    np.testing.assert_array_equal(half.with_answers().log_likelihood, known.log_likelihood)


def test_what_reads_a_prediction_reads_the_rows_with_answers(posterior, half, known):
    assert plots.risk_coverage(half, uncertainty=half.epistemic).lines[0].get_ydata() == pytest.approx(
        plots.risk_coverage(known, uncertainty=known.epistemic).lines[0].get_ydata()
    )
    scaled, expected = (temperature_scaling(half, validation) for validation in (half, known))
    np.testing.assert_array_equal(scaled.log_probs, expected.log_probs)
    groups = posterior.to_arviz(num_draws=5, prediction=half, prior_prediction=half)
    for name in ("posterior_predictive", "prior_predictive", "log_likelihood", "observed_data"):
        assert groups[name]["row"].values.tolist() == KNOWN
    np.testing.assert_array_equal(groups["observed_data"]["label"].values, known.target)


def test_temperature_scaling_records_the_number_of_rows_with_answers(posterior, half):
    assert temperature_scaling(posterior, half).provenance["num_validation"] == len(KNOWN)


def test_rows_without_any_answer_are_predicted_and_not_scored(posterior):
    prediction = posterior.predict([dict(row, answer=None) for row in ROWS], num_draws=2)
    assert prediction.target is None and not prediction.is_answered.any()
    for act in (prediction.metrics, prediction.with_answers, lambda: prediction.log_likelihood):
        with pytest.raises(ValueError, match="have no answers, so nothing can be scored"):
            act()
