"""A warning names the line of the user, however deep in the library it is raised."""

import json
import warnings

import peft
import pytest
import tiny

import scalabl_pyro as sp
from scalabl_pyro.baselines.temperature import fit_temperature

FEW = {"num_steps": 1, "progress": False}


def raw_targets(path):
    task = sp.Regression(tiny.tokenizer(), standardize=False)
    rows = [{**row, "label": 3e5 + 1e4 * i} for i, row in enumerate(tiny.text_rows(8))]
    sp.fit(sp.bayesian_lora(tiny.classifier(num_labels=1)), task, rows, **FEW)


def another_base(path):
    model = peft.get_peft_model(tiny.causal_lm(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(path)
    config = path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "meta/one"}))
    base = tiny.causal_lm()
    base.config._name_or_path = "/data/two"
    sp.from_peft(base, path)


def other_settings(path):
    blora = sp.bayesian_lora(tiny.causal_lm())
    sp.fit(blora, sp.MultipleChoice(tiny.tokenizer()), tiny.question_rows(4), **FEW).posterior.save_pretrained(path)
    sp.Posterior.from_pretrained(tiny.causal_lm(rms_norm_eps=1e-3), path)


def always_right(path):
    blora, task = sp.bayesian_lora(tiny.causal_lm()), sp.MultipleChoice(tiny.tokenizer())
    posterior = sp.fit(blora, task, tiny.question_rows(4), **FEW).posterior
    prediction = posterior.predict(tiny.question_rows(4), num_draws=0)
    right = [
        {**row, "answer": int(c)} for row, c in zip(tiny.question_rows(4), prediction.probs.argmax(1), strict=True)
    ]
    fit_temperature(posterior.predict(right, num_draws=0))


@pytest.mark.parametrize("cause", [raw_targets, another_base, other_settings, always_right])
def test_a_warning_names_the_line_of_the_user(cause, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cause(tmp_path)
    ours = [w for w in caught if w.category is sp.ScalaBLWarning]
    assert ours
    assert {w.filename for w in ours} == {__file__}
