"""The ELBO in loops that are not ours: a loop in plain torch equals ``fit``; Lightning trains with it."""

import copy

import numpy as np
import pytest
import tiny
import torch

import scalabl_pyro as sp
from scalabl_pyro.data import collate
from scalabl_pyro.integrations import ElboLoss

ROWS = tiny.question_rows(12)


def learned(posterior):
    """All that was learned, in one vector."""
    guide = [p.detach().flatten() for p in posterior.guide.parameters()]
    factors = [tensor.flatten() for pair in posterior.factors for tensor in pair]
    return torch.cat([t.double() for t in (*guide, *factors)])


def setup(rows=ROWS, dtype=torch.float64, **options):
    blora, task = sp.bayesian_lora(tiny.causal_lm(dtype=dtype)), sp.MultipleChoice(tiny.tokenizer())
    return ElboLoss(blora, task, rows, **options)


def plain_loop(loss, num_steps):
    optimizer = torch.optim.AdamW(loss.parameter_groups())
    (batch,) = loss.batches(batch_size=len(loss.dataset), shuffle=False)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss(batch)["loss"].backward()
        optimizer.step()
    return loss.posterior()


@pytest.mark.parametrize(
    "own", [{}, {"guide": "lowrank"}, {"draws": "shared"}, {"lr": 1e-3, "lr_scale": 1e-3}], ids=str
)
def test_a_plain_loop_makes_the_steps_of_fit(own, unchanged_rng):
    loss = setup(seed=3, **own)
    found = plain_loop(loss, 3)
    blora, task = sp.bayesian_lora(tiny.causal_lm(dtype=torch.float64)), sp.MultipleChoice(tiny.tokenizer())
    batch = collate([task.encode(row) for row in ROWS], range(len(ROWS)), task.pad_token_id)
    options = {name: value for name, value in own.items() if name != "lr_scale"}
    optimizer = {"schedule": "constant", "warmup": 0.0, "lr_scale": own.get("lr_scale", 3e-2)}
    options |= {"optimizer": optimizer, "seed": 3, "progress": False, "num_data": len(ROWS)}
    expected = sp.fit(blora, task, [batch], num_steps=3, **options).posterior
    torch.testing.assert_close(learned(found), learned(expected), rtol=0, atol=1e-9)
    assert (learned(found) - learned(setup(seed=3, **own).posterior())).abs().max() > 1e-4
    assert found.provenance["num_steps"] == 3 and found.provenance["num_data"] == len(ROWS)


def test_the_terms_add_up_and_the_posterior_predicts_as_its_copy_on_disk(tmp_path):
    loss = setup()
    (batch,) = loss.batches(batch_size=12)
    terms = {name: value.detach() for name, value in loss(batch, kl_weight=0.5).items()}
    assert float(terms["loss"]) == pytest.approx(float(terms["nll"] + terms["kl"] / 12), abs=1e-12)
    posterior = plain_loop(loss, 2)
    posterior.save_pretrained(tmp_path / "p")
    loaded = sp.Posterior.from_pretrained(tiny.causal_lm(dtype=torch.float64), tmp_path / "p")
    expected = posterior.predict(ROWS, num_draws=3).probs
    np.testing.assert_allclose(loaded.predict(ROWS, num_draws=3).probs, expected, rtol=0, atol=1e-12)


def test_the_state_is_what_the_elbo_trains_and_brings_it_back():
    loss = setup()
    start = copy.deepcopy(loss.state_dict())
    assert sum(t.numel() for t in start.values()) < sum(p.numel() for p in loss.blora.llm.parameters())
    before = learned(loss.posterior())
    plain_loop(loss, 2)
    loss.load_state_dict(start)
    assert torch.equal(learned(loss.posterior()), before)


def test_what_cannot_be_a_loss_is_refused():
    with pytest.raises(ValueError, match="lr=-1"):
        setup(lr=-1.0)
    with pytest.raises(ValueError, match="svgd"):
        setup(guide="svgd")
    with pytest.raises(ValueError, match="answer"):
        setup(rows=[{"question": "a", "choices": ["b", "c"]}])
    with pytest.raises(ValueError, match="batch_size=0"):
        setup().batches(batch_size=0)
    loss = setup()
    with torch.no_grad():
        next(p for n, p in loss.named_parameters() if n.endswith("/B")).fill_(float("nan"))
    (batch,) = loss.batches(batch_size=12)
    with pytest.raises(FloatingPointError, match="loss is nan"):
        loss(batch)


def test_a_sampler_decides_the_order_and_a_batch_without_answers_is_refused():
    loss = setup()
    sampler = torch.utils.data.SequentialSampler(loss.dataset)
    first, *_ = loss.batches(batch_size=4, sampler=sampler)
    assert first["row_index"].tolist() == [0, 1, 2, 3]
    del first["labels"]
    with pytest.raises(ValueError, match="has no answers"):
        loss(first)


def test_a_wrapped_llm_that_is_trained_again_goes_on_with_a_warning(caplog):
    loss = setup()
    plain_loop(loss, 1)
    again = ElboLoss(loss.blora, sp.MultipleChoice(tiny.tokenizer()), ROWS)
    assert "an earlier training changed" in caplog.text
    assert again.posterior().provenance["start"] == "continued"


def test_lightning_accumulates_as_one_batch_saves_and_resumes(tmp_path):
    """Two batches per step, without noise of the batch order, against a plain loop of the same batches."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, loss):
            super().__init__()
            self.loss = loss

        def training_step(self, batch, index):
            return self.loss(batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.AdamW(self.loss.parameter_groups())

    def trainer(**options):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        options |= {"accelerator": "cpu", "accumulate_grad_batches": 2, "default_root_dir": tmp_path}
        return lightning.Trainer(**quiet, **options)

    loss = setup(seed=3)
    module = Module(loss)
    run = trainer(max_epochs=2, enable_checkpointing=False)
    run.fit(module, loss.batches(batch_size=6, shuffle=False))
    run.save_checkpoint(tmp_path / "last.ckpt")

    plain = setup(seed=3)
    optimizer = torch.optim.AdamW(plain.parameter_groups())
    for _ in range(2):
        optimizer.zero_grad()
        for batch in plain.batches(batch_size=6, shuffle=False):
            (plain(batch)["loss"] / 2).backward()
        optimizer.step()
    torch.testing.assert_close(learned(loss.posterior()), learned(plain.posterior()), rtol=0, atol=1e-9)

    other = Module(setup(seed=3))
    state = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    other.load_state_dict(state)
    assert torch.equal(learned(other.loss.posterior()), learned(loss.posterior()))
