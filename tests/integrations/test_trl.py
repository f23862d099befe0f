"""The ELBO inside TRL's SFTTrainer, which makes its own data set: labels of -100 do not count."""

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from test_trainer import LIKE_FIT, QUIET, completion_rows, completion_task, learned, unchanged_generators  # noqa: F401

import scalabl_pyro as sp
from scalabl_pyro.integrations import ScalaBLMixin, ScalaBLTrainer

trl = pytest.importorskip("trl")


class BayesianSFT(ScalaBLMixin, trl.SFTTrainer):
    """As on the page *Hugging Face Trainer*."""


def wrapped():
    return sp.bayesian_lora(tiny.causal_lm(dtype=torch.float64), target_modules=["q_proj", "v_proj", "lm_head"])


def config(path, **options):
    return trl.SFTConfig(str(path), **(QUIET | LIKE_FIT | {"bf16": False, "gradient_checkpointing": False} | options))


def sft(path, *, rows, eval_rows=None, own=None, **options):
    tokenizer = completion_task().tokenizer
    evaluated = None if eval_rows is None else Dataset.from_list(eval_rows)
    return BayesianSFT(
        wrapped(),
        args=config(path, **options),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=evaluated,
        processing_class=tokenizer,
        **(own or {}),
    )


@pytest.mark.parametrize("again", [False, True], ids=["", "gradient checkpointing"])
def test_completions_of_sft_are_those_of_the_task(tmp_path, again):
    """Prompt and completion as TRL tokenizes them give the same steps as rows of Completion."""
    rows = completion_rows()
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = sft(tmp_path, rows=rows, eval_rows=rows, gradient_checkpointing=again, **options)
    trainer.train()
    args = config(tmp_path, **options)
    same = ScalaBLTrainer(wrapped(), completion_task(), args=args, train_dataset=rows)
    same.train()
    torch.testing.assert_close(learned(trainer.posterior()), learned(same.posterior()), rtol=0, atol=1e-9)
    scored = trainer.posterior().score(rows, num_draws=10, seed=LIKE_FIT["seed"])
    assert trainer.evaluate()["eval_nll"] == pytest.approx(-scored.log_prob.mean(), rel=1e-6)
    np.testing.assert_allclose(scored.num_tokens, 3)  # the answer, a full stop and the end token


def test_checkpoints_of_sft_resume_exactly(tmp_path):
    options = {"max_steps": 5, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3}
    whole = sft(tmp_path, rows=completion_rows(), **options)
    whole.train()
    resumed = sft(tmp_path, rows=completion_rows(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(learned(resumed.posterior()), learned(whole.posterior()))
    sp.Posterior.from_pretrained(tiny.causal_lm(dtype=torch.float64), tmp_path / "checkpoint-5" / "posterior")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"packing": True}, "packing"),
        ({"padding_free": True}, "padding_free"),
        ({"loss_type": "dft"}, "loss_type"),
        ({"activation_offloading": True}, "activation_offloading"),
        ({"chat_template_path": "some/model"}, "chat_template_path"),
        ({"own": {"peft_config": 1}}, "peft_config"),
    ],
    ids=str,
)
def test_what_joins_rows_or_changes_the_loss_is_refused(tmp_path, options, named):
    with pytest.raises(ValueError, match=f"{named}=.*cannot be used here"):
        sft(tmp_path, rows=completion_rows(), **options)
