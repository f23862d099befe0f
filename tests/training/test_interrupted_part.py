"""Ctrl-C in one of several trainings ends them all, and does not put a half-trained member into the result."""

import pytest
import tiny

import scalabl_pyro as sp
from scalabl_pyro import baselines

ROWS = tiny.question_rows(12)
SHORT = {"num_steps": 3, "batch_size": 4, "progress": False}


def press_in(training):
    """A callback that stands for Ctrl-C after the second step of a training, and the trainings it has seen."""
    begun = []

    def press(row):
        begun.extend([row["step"]] * (row["step"] == 0))
        if len(begun) == training and row["step"] == 1:
            raise KeyboardInterrupt

    return press, begun


def task():
    return sp.MultipleChoice(tiny.tokenizer())


def test_of_restarts_of_the_guide(tmp_path):
    posterior = sp.fit(sp.bayesian_lora(tiny.causal_lm()), task(), ROWS, **SHORT).posterior
    press, begun = press_in(2)
    options = {**SHORT, "checkpoint_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt, match=r"Ctrl-C ended member 1 of 3 after 2 steps\."):
        sp.ensemble(posterior, ROWS, num_members=3, callbacks=[press], **options)
    assert len(begun) == 2
    resumed = sp.ensemble(posterior, ROWS, num_members=3, **options)
    whole = sp.ensemble(posterior, ROWS, num_members=3, **SHORT)
    assert resumed.sample(6).s.equal(whole.sample(6).s)


def test_of_a_deep_ensemble():
    llm = tiny.causal_lm()
    names = [name for name, _ in llm.named_modules()]
    press, begun = press_in(2)
    with pytest.raises(KeyboardInterrupt, match="Ctrl-C ended member 1 of 3"):
        baselines.deep_ensemble(llm, task(), ROWS, num_members=3, callbacks=[press], **SHORT)
    assert len(begun) == 2 and [name for name, _ in llm.named_modules()] == names


def test_of_a_cross_validation():
    pytest.importorskip("sklearn")
    from sklearn.model_selection import cross_val_score

    from scalabl_pyro.integrations import ScalaBLClassifier

    press, begun = press_in(2)
    estimator = ScalaBLClassifier(
        tiny.classifier(num_labels=4), tokenizer=tiny.tokenizer(), num_steps=3, fit_options={"callbacks": [press]}
    )
    texts, colors = [row["question"] for row in ROWS], [tiny.COLORS[row["answer"]] for row in ROWS]
    with pytest.raises(KeyboardInterrupt, match=r"Ctrl-C ended fit\(\) after 2 steps"):
        cross_val_score(estimator, texts, colors, cv=3)
    assert len(begun) == 2
