"""The ELBO inside the real Trainer of transformers: steps equal to those of ``fit``, resumption, evaluation, files."""

import json

import numpy as np
import pytest
import tiny
import torch
from transformers import EarlyStoppingCallback, TrainingArguments

import scalabl_pyro as sp
from scalabl_pyro.data import collate
from scalabl_pyro.integrations import ScalaBLTrainer
from scalabl_pyro.integrations.trainer.inputs import as_batch

QUIET = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
LIKE_FIT = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "seed": 3}


def arguments(path, **options):
    return TrainingArguments(str(path), **(QUIET | options))


@pytest.fixture(autouse=True)
def unchanged_generators():
    """A Trainer seeds the global generators, as it says."""
    with torch.random.fork_rng():
        numbers = np.random.get_state()  # noqa: NPY002  what a Trainer seeds
        yield
        np.random.set_state(numbers)  # noqa: NPY002


def choice_trainer(path, *, rows=None, dtype=torch.float64, callbacks=None, eval_rows=None, own=None, **options):
    blora = sp.bayesian_lora(tiny.causal_lm(dtype=dtype))
    task = sp.MultipleChoice(tiny.tokenizer())
    rows = tiny.question_rows(32) if rows is None else rows
    args = arguments(path, **options)
    return ScalaBLTrainer(
        blora, task, args=args, train_dataset=rows, eval_dataset=eval_rows, callbacks=callbacks, **(own or {})
    )


def learned(posterior):
    """All that was learned, in one vector."""
    guide = [p.detach().flatten() for p in posterior.guide.parameters()]
    factors = [tensor.flatten() for pair in posterior.factors for tensor in pair]
    heads = [p.flatten() for head in posterior.heads.values() for p in head.parameters()]
    return torch.cat([t.double() for t in (*guide, *factors, *heads)])


def by_fit(rows, *, num_steps, **options):
    blora = sp.bayesian_lora(tiny.causal_lm(dtype=torch.float64))
    task = sp.MultipleChoice(tiny.tokenizer())
    examples = [task.encode(row) for row in rows]
    batch = collate(examples, range(len(rows)), task.pad_token_id)
    optimizer = {"schedule": "constant", "warmup": 0.0}
    options |= {"optimizer": optimizer, "seed": 3, "progress": False, "num_data": len(rows)}
    return sp.fit(blora, task, [batch], num_steps=num_steps, **options).posterior


@pytest.mark.parametrize(
    "own",
    [{}, {"guide": "lowrank"}, {"draws": "shared"}, {"kl_weight": lambda step: 0.5 + step}],
    ids=["plain", "lowrank", "shared", "schedule"],
)
def test_accumulated_batches_make_the_step_of_one_batch_and_of_fit(tmp_path, own):
    rows = tiny.question_rows(32)
    expected = learned(by_fit(rows, num_steps=3, **own))
    start = learned(by_fit(rows, num_steps=1, lr=1e-30, lr_A=1e-30))
    for size, count in ((32, 1), (8, 4), (12, 3)):  # the last has a short batch
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count}
        trainer = choice_trainer(tmp_path, max_steps=3, own=own, **LIKE_FIT, **batches)
        trainer.train()
        found = learned(trainer.posterior())
        assert found.shape != start.shape or (found - start).abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_logs_hold_the_terms_of_the_loss(tmp_path):
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "logging_steps": 2}
    trainer = choice_trainer(tmp_path, max_steps=2, **LIKE_FIT, **options)
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert row["loss"] == pytest.approx(row["nll"] + row["kl"] / 32, rel=1e-6)  # a Trainer adds up in float32


def test_gradient_checkpointing_and_dropout_of_the_base_change_nothing(tmp_path):
    found = []
    for again in (False, True):
        trainer = choice_trainer(tmp_path, max_steps=2, gradient_checkpointing=again, **LIKE_FIT)
        for module in trainer.blora.llm.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        trainer.train()
        found.append(learned(trainer.posterior()))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path):
    """It stops in the middle of the second epoch. Dropout of the adapters and evaluations have random states too."""
    options = {"max_steps": 9, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "eval_steps": 2}
    options |= {"save_steps": 4, "save_strategy": "steps", "eval_strategy": "steps", "seed": 5}
    rows = tiny.question_rows(20)
    whole = choice_trainer(tmp_path / "a", rows=rows, eval_rows=rows[:5], **options)
    whole.train()
    resumed = choice_trainer(tmp_path / "a", rows=rows, eval_rows=rows[:5], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert torch.equal(learned(resumed.posterior()), learned(whole.posterior()))
    assert resumed.state.log_history[-1]["step"] == 9
    pickled = {p.name for p in (tmp_path / "a" / "checkpoint-8").rglob("*") if p.suffix in (".bin", ".pt", ".pth")}
    assert pickled == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}  # the Trainer's own


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    options = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
    choice_trainer(tmp_path, rows=tiny.question_rows(8), **options).train()
    other = choice_trainer(tmp_path, rows=tiny.question_rows(8, seed=1), own={"lr_A": 1e-3}, **options)
    before = learned(other.posterior())
    with pytest.raises(ValueError, match=r"belongs to another run: lr_A is 0.001, was 0.00025; train_data differs"):
        other.train(resume_from_checkpoint=True)
    assert torch.equal(learned(other.posterior()), before)
    (tmp_path / "checkpoint-2" / "state" / "step-00000002" / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no state of a Bayesian training, or a damaged one"):
        choice_trainer(tmp_path, rows=tiny.question_rows(8), **options).train(resume_from_checkpoint=True)


def test_evaluations_are_those_of_the_posterior(tmp_path):
    rows = tiny.question_rows(11, seed=1)
    own = {
        "num_draws": 4,
        "compute_metrics": lambda p: {"right": float((p.predictions.argmax(1) == p.label_ids).sum())},
    }
    trainer = choice_trainer(tmp_path, max_steps=4, eval_rows=rows, per_device_eval_batch_size=3, own=own)
    trainer.train()
    found = trainer.evaluate()
    expected = trainer.posterior().predict(rows, num_draws=4, seed=42)
    metrics = expected.metrics().loc["value"]
    for name in ("nll", "accuracy", "ece", "brier"):
        assert found[f"eval_{name}"] == pytest.approx(metrics[name], abs=1e-7), name
    assert found["eval_loss"] == found["eval_nll"] and found["eval_right"] == round(11 * metrics["accuracy"])
    output = trainer.predict([{k: v for k, v in row.items() if k != "answer"} for row in rows])
    assert output.label_ids is None and "test_nll" not in output.metrics
    np.testing.assert_allclose(np.exp(output.predictions[:, :4]), expected.probs, atol=1e-9)
    trainer.args.prediction_loss_only = True
    assert trainer.evaluate()["eval_loss"] == pytest.approx(metrics["nll"], abs=1e-6)
    trainer.num_draws = 0
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        trainer.posterior().predict(rows, num_draws=0).metrics()["nll"].iloc[0], abs=1e-6
    )


def test_the_best_checkpoint_is_loaded_and_training_stops_early(tmp_path):
    """The rate is far too high, so the first evaluation is the best one."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 12}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "nll", "greater_is_better": False}
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    rows = tiny.question_rows(8)
    wrong = [row | {"answer": (row["answer"] + 1) % 4} for row in rows]
    trainer = choice_trainer(
        tmp_path, rows=rows, eval_rows=wrong, own={"lr": 0.05}, callbacks=[stop], save_total_limit=1, **options
    )
    trainer.train()
    values = [row["eval_nll"] for row in trainer.state.log_history if "eval_nll" in row]
    assert len(values) < 12 and min(values) < values[-1]
    assert trainer.evaluate()["eval_nll"] == pytest.approx(min(values), abs=1e-12)
    assert learned(trainer.posterior()).equal(
        learned(sp.Posterior.from_pretrained(tiny.causal_lm(dtype=torch.float64), best_of(trainer)))
    )


def best_of(trainer):
    return f"{trainer.state.best_model_checkpoint}/posterior"


def test_a_posterior_is_saved_and_exported_like_any_other(tmp_path):
    trainer = choice_trainer(tmp_path / "out", rows=tiny.question_rows(8), dtype=torch.float32, max_steps=3)
    trainer.train()
    posterior, rows = trainer.posterior(), tiny.question_rows(4, seed=1)
    trainer.save_model(str(tmp_path / "own"))
    assert not (tmp_path / "own" / "state").exists()
    loaded = sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / "own" / "posterior")
    np.testing.assert_array_equal(
        loaded.predict(rows, num_draws=3).log_probs, posterior.predict(rows, num_draws=3).log_probs
    )
    posterior.export_peft(tmp_path / "peft", draws=1)
    assert posterior.provenance["trainer"] == "ScalaBLTrainer" and posterior.provenance["num_data"] == 8
    json.dumps(posterior.provenance)
    torch.testing.assert_close(trainer.blora.adapter.loc, posterior.mean())


def test_heads_and_parameters_of_the_task_are_trained_and_resumed(tmp_path):
    options = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 2}

    def trainer(kind):
        llm = tiny.classifier(num_labels=3 if kind == "classes" else 1)
        tokenizer, rows = tiny.tokenizer(), tiny.text_rows(9)
        if kind == "classes":
            task = sp.SequenceClassification(tokenizer, classes=["a", "b", "c"])
        else:
            task = sp.Regression(tokenizer)
            rows = [{"text": row["text"], "label": 100.0 + 7 * row["label"]} for row in rows]
        args = arguments(tmp_path / kind, **options)
        return ScalaBLTrainer(sp.bayesian_lora(llm), task, args=args, train_dataset=rows, eval_dataset={"x": rows})

    for kind in ("classes", "numbers"):
        whole, resumed = trainer(kind), trainer(kind)
        before = learned(whole.posterior())
        whole.train()
        resumed.train(resume_from_checkpoint=str(tmp_path / kind / "checkpoint-2"))
        assert torch.equal(learned(whole.posterior()), learned(resumed.posterior()))
        assert whole.posterior().heads and not torch.equal(learned(whole.posterior()), before)
        found = whole.evaluate()
        expected = whole.posterior().predict(
            tiny.text_rows(9) if kind == "classes" else numbers(), num_draws=10, seed=42
        )
        assert found["eval_x_nll"] == pytest.approx(expected.metrics()["nll"].iloc[0], abs=1e-6)


def numbers():
    return [{"text": row["text"], "label": 100.0 + 7 * row["label"]} for row in tiny.text_rows(9)]


def completion_rows(n=8):
    return [
        {"prompt": row["question"], "completion": f" {tiny.COLORS[row['answer']]} ."} for row in tiny.question_rows(n)
    ]


def completion_task():
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "Z"
    return sp.Completion(tokenizer)


def test_completions_are_scored_as_by_the_posterior(tmp_path):
    rows = completion_rows()
    blora = sp.bayesian_lora(tiny.causal_lm(), target_modules=["q_proj", "v_proj", "lm_head"])
    args = arguments(tmp_path, max_steps=3, per_device_eval_batch_size=3)
    trainer = ScalaBLTrainer(blora, completion_task(), args=args, train_dataset=rows, eval_dataset=rows, num_draws=3)
    trainer.train()
    found, scored = trainer.evaluate(), trainer.posterior().score(rows, num_draws=3, seed=42)
    assert found["eval_nll"] == pytest.approx(-scored.log_prob.mean(), rel=1e-5)
    assert found["eval_nll_per_token"] == pytest.approx(-scored.log_prob.sum() / scored.num_tokens.sum(), rel=1e-5)
    np.testing.assert_allclose(trainer.predict(rows).predictions, scored.log_prob, rtol=1e-5)


def test_labels_give_the_batch_of_the_task():
    task = completion_task()
    examples = [task.encode(row) for row in completion_rows(5)]
    expected = collate(examples, range(5), task.pad_token_id)
    labels = torch.full_like(expected.inputs["input_ids"], -100)
    for row, example in enumerate(examples):
        for position, token in zip(example.extras["positions"], example.target, strict=True):
            labels[row, position + 1] = token
    found = as_batch({**expected.inputs, "labels": labels}, task)
    for name, tensor in expected.tensors().items():
        assert torch.equal(found.tensors()[name], tensor), name
    left = {
        "input_ids": torch.ones(1, 3).long(),
        "labels": torch.ones(1, 3),
        "attention_mask": torch.tensor([[0, 1, 1]]),
    }
    with pytest.raises(ValueError, match="padded on the left"):
        as_batch(left, task)
    with pytest.raises(ValueError, match=r"fields \['position_ids'\], which the ELBO would ignore"):
        as_batch({**expected.inputs, "labels": labels, "position_ids": labels}, task)


def test_autocast_holds_for_the_llm_alone(tmp_path):
    """The KL of a guide with matrices is that of float32, to the last digit; the NLL is rounded."""
    terms = {}
    for half in (False, True):
        trainer = choice_trainer(
            tmp_path, dtype=torch.float32, own={"guide": "lowrank"}, max_steps=1, bf16=half, **LIKE_FIT
        )
        trainer.train()
        terms[half] = next(row for row in trainer.state.log_history if "train_loss" in row)["train_loss"], trainer
    (exact, trainer), (rounded, _) = terms[False], terms[True]
    assert rounded != exact and rounded == pytest.approx(exact, rel=1e-2)
    assert all(p.dtype == torch.float32 for p in trainer.elbo_module.parameters())
    kls = {}
    for half in (False, True):
        batch = collate([trainer.task.encode(row) for row in tiny.question_rows(6)], range(6), 0)
        trainer.elbo_module.noise.load_states(torch_states())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss, values = trainer.elbo_module(batch, 1.0)
        assert loss.dtype == torch.float32
        kls[half] = values
    assert kls[True][1] != kls[False][1]
    torch.testing.assert_close(kls[True][2], kls[False][2], rtol=1e-6, atol=1e-5)


def torch_states():
    return {"cpu": torch.Generator().manual_seed(0).get_state()}


def test_parameter_groups_are_those_of_fit(tmp_path):
    own = {"lr": 0.02, "lr_A": 0.001, "lr_scale": 0.04}
    trainer = choice_trainer(tmp_path, own=own, weight_decay=0.1, max_steps=1)
    groups = {g["name"]: (g["lr"], g["weight_decay"]) for g in trainer.create_optimizer().param_groups}
    assert groups == {"B": (0.02, 0.1), "A": (0.001, 0.0), "loc": (0.02, 0.0), "scale": (0.04, 0.0)}
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.elbo_module.parameters()}


def test_the_rate_of_B(tmp_path):
    assert choice_trainer(tmp_path).options.lr == 8e-3
    assert choice_trainer(tmp_path, learning_rate=0.01).options.lr == 0.01
    assert choice_trainer(tmp_path, own={"lr": 0.02}).options.lr == 0.02
    with pytest.raises(ValueError, match="name two rates of B"):
        choice_trainer(tmp_path, own={"lr": 0.02}, learning_rate=0.01)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0"),
        ({"torch_compile": True}, "torch_compile=True"),
        ({"bf16_full_eval": True}, "bf16_full_eval=True"),
        ({"optim": "sgd"}, "optim='sgd'"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics=True"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches=False"),
        ({"gradient_checkpointing_kwargs": {"offload": True}}, "checkpointing_kwargs"),
        ({"own": {"compute_loss_func": print}}, "compute_loss_func="),
        ({"own": {"optimizers": (1, None)}}, "optimizers="),
        ({"own": {"data_collator": print}}, "data_collator="),
        ({"own": {"guide": "svgd"}}, "guide='svgd'"),
        ({"own": {"model_init": print}}, "model_init="),
    ],
    ids=str,
)
def test_what_would_be_wrong_in_silence_is_refused(tmp_path, options, named):
    with pytest.raises(ValueError, match=r"cannot be used here|Trainer could") as error:
        choice_trainer(tmp_path, **options)
    assert named.split("=")[0] in str(error.value)


def test_missing_and_wrong_objects_are_named(tmp_path):
    blora, task = sp.bayesian_lora(tiny.causal_lm()), sp.MultipleChoice(tiny.tokenizer())
    with pytest.raises(TypeError, match="args is missing: pass args=TrainingArguments"):
        ScalaBLTrainer(blora, task)
    with pytest.raises(TypeError, match="blora is a LlamaForCausalLM"):
        ScalaBLTrainer(tiny.causal_lm(), task, args=arguments(tmp_path))
    with pytest.raises(ValueError, match="no field 'choices'"):
        ScalaBLTrainer(blora, task, args=arguments(tmp_path), train_dataset=[{"question": "what ?"}])


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_an_error(tmp_path, place):
    trainer = choice_trainer(tmp_path, max_steps=2)
    _, B = trainer.blora.adapter.factors()[0]
    before = learned(trainer.posterior())
    if place == "loss":
        head = trainer.blora.llm.get_input_embeddings()
        with torch.no_grad():
            head.weight[5] = torch.inf
    else:
        B.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(FloatingPointError, match="At step 0: the loss is"):
        trainer.train()
    assert torch.equal(learned(trainer.posterior()), before)
