"""What a training says about itself: where it started, what it was asked for, and how it ended."""

import copy
import dataclasses
import json
import logging
import platform
import re

import numpy as np
import peft
import pyro
import pytest
import tiny
import torch
import transformers
from torch.utils.data import DataLoader

import scalabl_pyro as sp
from scalabl_pyro.data import collate, encode
from scalabl_pyro.training.options import TrainingOptions
from scalabl_pyro.training.outcome import ended_worse

ROWS = tiny.question_rows(16)
GOES_ON = "this one goes on from there; pass reset=True"


def fit(blora, task, rows=ROWS, **options):
    return sp.fit(blora, task, rows, **{"num_steps": 3, "batch_size": 8, "lr_A": 8e-3, "progress": False, **options})


def numbers(posterior):
    """All that was learned, by name."""
    learned = {f"factor {i}": f for i, pair in enumerate(posterior.factors) for f in pair}
    learned |= {f"guide {k}": v for k, v in posterior.guide.state_dict().items()}
    learned |= {f"prior {k}": v for k, v in posterior.prior.state_dict().items()}
    learned |= {f"task {k}": v for k, v in posterior.task.state_dict().items()}
    return learned | {f"{n} {k}": v for n, head in posterior.heads.items() for k, v in head.state_dict().items()}


def same(a, b):
    x, y = numbers(a), numbers(b)
    return x.keys() == y.keys() and all(torch.equal(x[name].cpu(), y[name].cpu()) for name in x)


def adopted():
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return peft.get_peft_model(tiny.causal_lm(), config)


def numbers_task():
    return sp.Regression(tiny.tokenizer(), noise_scale=0.7)


def choice():
    return sp.MultipleChoice(tiny.tokenizer())


#: Wrapped model, task, rows: all that a training can change beside the factors.
KINDS = {
    "new layers": (lambda: sp.bayesian_lora(tiny.causal_lm(), r=2), choice, ROWS),
    "free gauge, other seed": (lambda: sp.bayesian_lora(tiny.causal_lm(), r=2, gauge="free", seed=5), choice, ROWS),
    "adopted layers": (lambda: sp.bayesian_lora(adopted()), choice, ROWS),
    "new head, learned noise": (
        lambda: sp.bayesian_lora(tiny.classifier(num_labels=1), r=2),
        numbers_task,
        tiny.text_rows(16),
    ),
    "learned prior": (lambda: sp.bayesian_lora(tiny.causal_lm(), r=2, prior="empirical"), choice, ROWS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_reset_gives_the_first_training_again(kind, caplog):
    wrap, make_task, rows = KINDS[kind]
    blora, task = wrap(), make_task()
    first = fit(blora, task, rows).posterior
    assert GOES_ON not in caplog.text
    again = fit(blora, task, rows, reset=True).posterior
    assert GOES_ON not in caplog.text
    assert same(first, again), "a fresh start is the start of the wrapping, bit for bit"
    assert first.provenance["start"] == again.provenance["start"] == "fresh"
    further = fit(blora, task, rows).posterior
    assert GOES_ON in caplog.text
    assert not same(first, further)
    assert further.provenance["start"] == "continued"
    assert same(first, fit(blora, task, rows, reset=True).posterior)


def test_reset_before_the_first_training_changes_nothing(caplog):
    wrap, make_task, rows = KINDS["new layers"]
    assert same(fit(wrap(), make_task(), rows, reset=True).posterior, fit(wrap(), make_task(), rows).posterior)
    assert GOES_ON not in caplog.text


def test_the_warning_names_what_was_trained(caplog):
    wrap, make_task, rows = KINDS["new head, learned noise"]
    task = make_task()
    fit(wrap(), task, rows)
    fit(wrap(), task, rows)  # another model, the same task
    assert "an earlier training changed noise_scale of the task, and this one" in caplog.text
    caplog.clear()
    wrap, make_task, rows = KINDS["learned prior"]
    blora = wrap()
    fit(blora, make_task(), rows)
    fit(blora, make_task(), rows)
    assert "changed the LoRA factors and latents and scale of the prior" in caplog.text


def test_bad_rows_do_not_undo_a_training():
    blora = sp.bayesian_lora(tiny.causal_lm(), r=2)
    first = fit(blora, choice()).posterior
    with pytest.raises(ValueError, match="Row 0"):
        fit(blora, choice(), [{"question": "one"}], reset=True)
    assert all(
        torch.equal(a, b)
        for pair, own in zip(first.factors, blora.adapter.factors(), strict=True)
        for a, b in zip(pair, own, strict=True)
    )


def test_a_posterior_that_is_trained_further_says_so(tmp_path, caplog):
    fit(sp.bayesian_lora(tiny.causal_lm(), r=2), choice()).posterior.save_pretrained(tmp_path / "saved")
    loaded = sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / "saved")
    assert fit(loaded.blora(), choice()).posterior.provenance["start"] == "continued"
    assert GOES_ON in caplog.text


def test_methods_that_hold_or_restart_the_factors_themselves_do_not_warn(caplog):
    few = {"num_steps": 2, "batch_size": 8, "progress": False}
    posterior = fit(sp.bayesian_lora(tiny.causal_lm(), r=2), choice()).posterior
    sp.refit(posterior, ROWS, **few)
    sp.ensemble(posterior, ROWS, num_members=2, **few)
    for method in ("mle", "map_lora", "mc_dropout", "blob", "deep_ensemble"):
        getattr(sp.baselines, method)(tiny.causal_lm(), choice(), ROWS, **few)
    assert GOES_ON not in caplog.text


def test_a_resumed_run_keeps_its_start(tmp_path, caplog):
    def run(blora, stop):
        stops = [lambda row: row["step"] == 1] if stop else []
        return fit(blora, choice(), num_steps=4, checkpoint_dir=tmp_path, callbacks=stops).posterior

    blora = sp.bayesian_lora(tiny.causal_lm(), r=2)
    fit(blora, choice())
    assert run(blora, stop=True).provenance["start"] == "continued"
    caplog.clear()
    assert run(sp.bayesian_lora(tiny.causal_lm(), r=2), stop=False).provenance["start"] == "continued"
    assert GOES_ON not in caplog.text, "the checkpoint decides where it starts"


# provenance ---------------------------------------------------------------------------------------------------


def test_provenance_holds_every_option_and_survives_saving(tmp_path):
    given = {
        "num_steps": 3,
        "batch_size": 8,
        "lr": 1e-3,
        "lr_A": 2e-4,
        "kl_weight": 0.5,
        "elbo": pyro.infer.Trace_ELBO(num_particles=2, vectorize_particles=True),
        "init_scale": 0.1,
        "seed": 7,
        "on_nonfinite": "skip",
        "optimizer": {"lr_loc": 3e-3, "warmup": 0.5, "max_grad_norm": float("inf")},
        "hardware": {"micro_batch_size": 4},
    }
    posterior = fit(sp.bayesian_lora(tiny.causal_lm(), r=2), choice(), **given).posterior
    options = posterior.provenance["options"]
    assert options.keys() == {f.name for f in dataclasses.fields(TrainingOptions)}
    for group in ("optimizer", "checkpoint", "hardware"):
        kind = {f.name: f for f in dataclasses.fields(TrainingOptions)}[group].default_factory
        assert options[group].keys() == {f.name for f in dataclasses.fields(kind)}
    for name in given.keys() - {"optimizer", "hardware", "elbo"}:
        assert options[name] == given[name]
    assert options["elbo"] == {"class": "Trace_ELBO", "num_particles": 2, "vectorize_particles": True}
    assert options["optimizer"]["warmup"] == 0.5 and options["hardware"]["micro_batch_size"] == 4
    assert posterior.provenance["rates"] == {
        **{"A": 2e-4, "B": 1e-3, "heads": 2e-4, "task": 1e-3},
        **{"loc": 3e-3, "scale": sp.OptimizerOptions().lr_scale},
    }
    assert posterior.provenance["versions"] == {
        "scalabl_pyro": sp.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "pyro": pyro.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    posterior.save_pretrained(tmp_path / "saved")
    loaded = sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / "saved")
    assert loaded.provenance == posterior.provenance
    attrs = loaded.to_arviz(num_draws=2).posterior.attrs
    assert attrs["options.lr"] == 1e-3 and attrs["options.optimizer.warmup"] == 0.5
    assert attrs["rates.loc"] == 3e-3 and attrs["start"] == "fresh"
    assert attrs["data.sha256"] == posterior.provenance["data"]["sha256"]
    assert attrs["versions.torch"] == str(torch.__version__)
    assert all(isinstance(value, str | int | float) for value in attrs.values()), "what netCDF can hold"


def test_a_schedule_is_recorded_by_the_weights_that_were_used():
    calls = []

    def weight(step):
        calls.append(step)
        return min(1.0, step / 4)

    posterior = fit(sp.bayesian_lora(tiny.causal_lm(), r=2), choice(), num_steps=5, kl_weight=weight).posterior
    assert posterior.provenance["options"]["kl_weight"] == {str(i): i / 4 for i in range(5)}
    assert calls == list(range(5)), "the function is the user's own, and may count its calls"


def test_the_fingerprint_of_the_data_follows_tokens_and_answers(task):
    def fingerprint(rows, task=task):
        return fit(sp.bayesian_lora(tiny.causal_lm(), r=2), task, rows, num_steps=1).posterior.provenance["data"]

    base = fingerprint(ROWS)
    assert base["num_rows"] == 16 and len(base["sha256"]) == 64
    assert fingerprint([{**row, "id": "other"} for row in ROWS]) == base, "an id is not trained on"
    changed = copy.deepcopy(ROWS)
    changed[3]["answer"] = (changed[3]["answer"] + 1) % 4
    prompt = sp.MultipleChoice(tiny.tokenizer(), template="Question {question} {choices} Answer")
    for other in (fingerprint(changed), fingerprint(ROWS[::-1]), fingerprint(ROWS[:15]), fingerprint(ROWS, prompt)):
        assert other["sha256"] != base["sha256"]


def test_a_loader_has_no_fingerprint_but_a_size(task):
    examples = encode(ROWS, task.encode, need_target=True)
    loader = DataLoader(
        range(16), batch_size=4, collate_fn=lambda rows: collate([examples[i] for i in rows], rows, task.pad_token_id)
    )
    record = fit(sp.bayesian_lora(tiny.causal_lm(), r=2), task, loader).posterior.provenance["data"]
    assert record == {"num_rows": 16, "sha256": None}


# the end ------------------------------------------------------------------------------------------------------


def history(nll, loss=None, kl_weight=None):
    loss = nll if loss is None else loss
    weights = np.ones(len(nll)) if kl_weight is None else kl_weight
    return [
        {"step": i, "loss": a, "nll": b, "kl_weight": w}
        for i, (a, b, w) in enumerate(zip(loss, nll, weights, strict=True))
    ]


def test_a_training_that_ends_above_its_start_is_told_from_noise():
    rng = np.random.default_rng(0)
    for n in (20, 100, 1000):
        for _ in range(50):
            flat = 1.4 + 0.3 * rng.standard_normal(n)
            assert ended_worse(history(flat)) is None
            assert ended_worse(history(flat - np.linspace(0, 1, n))) is None
        if n > 20:  # a single first step and five last ones say too little
            assert "NLL" in ended_worse(history(flat + np.linspace(0, 3, n)))
    assert ended_worse([]) is ended_worse(history([1.0])) is ended_worse(history([1.0, 1.2, 1.1])) is None
    spoiled = np.concatenate([[1.4], 1e4 * np.ones(19), 20 + 0.3 * rng.standard_normal(80)])
    assert "NLL 1.4 -> 20" in ended_worse(history(spoiled)), "the first steps are spoiled too, but not the first one"
    assert "NLL 1.4 -> 5.115e+05" in ended_worse(history([1.4, 2.0, 900.0, 511451.0]))


def test_a_loss_that_rises_with_the_weight_of_the_kl_is_not_worse():
    n = 100
    nll, weight = np.linspace(1.4, 0.2, n), np.linspace(0, 1, n)
    assert ended_worse(history(nll, loss=nll + 3 * weight, kl_weight=weight)) is None
    assert "loss 1.4 -> 4.036" in ended_worse(history(nll, loss=1.4 + np.linspace(0, 3, n)))


def test_a_rate_that_is_far_too_high_is_reported(task, caplog):
    result = fit(
        sp.bayesian_lora(tiny.causal_lm()), task, num_steps=24, lr=5.0, lr_A=5.0, optimizer={"schedule": "constant"}
    )
    assert any("ended worse than it began" in text for text in result.warnings), result.history["nll"]
    assert "Lower the learning rates" in caplog.text
    assert "ended worse" in repr(result) and "ended worse" in result._repr_html_()


def test_one_class_for_all_rows_is_reported(caplog):
    """Answers that the texts do not tell: the model can learn no more than a bias."""
    rows = [{"text": "the sky is blue .", "label": [0, 0, 1, 2][i % 4]} for i in range(64)]
    task = sp.SequenceClassification(tiny.tokenizer(), classes=["no", "maybe", "yes"])
    blora = sp.bayesian_lora(tiny.classifier(num_labels=3), r=2)
    result = sp.fit(blora, task, rows, num_steps=20, batch_size=4, progress=False)
    (text,) = result.warnings
    assert text.startswith("The posterior mean predicts one class,") and "last 64 training rows" in text
    assert re.search(r"at most 5\d % have one answer", text)
    assert text in caplog.text
    micro = sp.fit(
        blora, task, rows, num_steps=20, batch_size=4, hardware={"micro_batch_size": 3}, reset=True, progress=False
    )
    assert [re.sub(r"'\w+'", "", t) for t in micro.warnings] == [re.sub(r"'\w+'", "", t) for t in result.warnings]


def test_a_training_that_learns_says_nothing(fitted, caplog):
    assert fitted.warnings == ()
    with caplog.at_level(logging.WARNING):
        rows = [{"text": "the sky is blue .", "label": 0}] * 64  # one answer: one class is right
        task = sp.SequenceClassification(tiny.tokenizer(), classes=["no", "yes"])
        blora = sp.bayesian_lora(tiny.classifier(num_labels=2), r=2)
        result = sp.fit(blora, task, rows, num_steps=20, batch_size=4, progress=False)
    assert result.warnings == () and not caplog.records


def test_the_look_back_changes_no_random_state(task, unchanged_rng):
    blora = sp.bayesian_lora(tiny.causal_lm(), r=2, lora_dropout=0.5)
    blora.llm.train()
    fit(blora, task, num_steps=20)
    assert blora.llm.training


def test_provenance_is_plain_json(fitted):
    assert json.loads(json.dumps(fitted.posterior.provenance, allow_nan=False)) == fitted.posterior.provenance
