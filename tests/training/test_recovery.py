"""Faults let in on purpose: what is raised, left out or restored, what it says, and that no parameter takes harm."""

import math
import os
import signal

import numpy as np
import pyro
import pytest
import tiny
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from toys import LinearToy

import scalabl_pyro as sp
from scalabl_pyro._process.random_state import derive_seed
from scalabl_pyro.data import Example, collate, encode
from scalabl_pyro.data.training_batches import TrainingBatches
from scalabl_pyro.guides import as_guide
from scalabl_pyro.training import gradient_check, recovery
from scalabl_pyro.training.gradient_check import GradientCheck
from scalabl_pyro.training.messages import largest_scale
from scalabl_pyro.training.step import EagerStep

ROWS = tiny.question_rows(16)


def fit(blora, task, rows=ROWS, **options):
    return sp.fit(blora, task, rows, **{"num_steps": 6, "batch_size": 4, "lr": 1e-2, "progress": False, **options})


def bad_batches(monkeypatch, steps, *, where="loss"):
    """The steps (by the order in which they are computed) whose loss or gradient is NaN; a list to look at."""
    gradient, calls = EagerStep.gradient, []

    def spoiled(self, batch, kl_weight):
        figures = gradient(self, batch, kl_weight)
        calls.append(len(calls))
        if calls[-1] in steps:
            if where == "loss":
                figures = figures * torch.nan
            else:
                self.optimizer.param_groups[-1]["params"][0].grad.fill_(torch.inf)
        return figures

    monkeypatch.setattr(EagerStep, "gradient", spoiled)
    return calls


def parameters_after(result):
    return [*result.posterior.guide.parameters(), *(t for pair in result.posterior.factors for t in pair)]


# left out -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_skip_leaves_the_step_out_and_counts_it(blora, task, monkeypatch, caplog, where):
    bad_batches(monkeypatch, {2, 4}, where=where)
    history = fit(blora, task, on_nonfinite="skip").history
    assert history["step"].tolist() == [0, 1, 3, 5]
    assert history["skipped"].tolist() == [0, 0, 1, 2]
    assert np.isfinite(history.drop(columns="kl")).all(axis=None)
    assert "step 2 was not finite and is left out. Examples [" in caplog.text
    assert "step 4 was not finite and is left out. Examples [" in caplog.text


def test_a_step_left_out_changes_neither_parameters_nor_moments(task, monkeypatch):
    """What follows is what would have followed under the same noise, had the step's learning rates been 0."""
    with monkeypatch.context() as patch:
        bad_batches(patch, {2})
        left_out = fit(sp.bayesian_lora(tiny.causal_lm()), task, on_nonfinite="skip")
    step, calls = torch.optim.AdamW.step, []

    def sit_out(self, *args):
        calls.append(None)
        return None if len(calls) == 3 else step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", sit_out)
    expected = fit(sp.bayesian_lora(tiny.causal_lm()), task)
    for one, other in zip(parameters_after(left_out), parameters_after(expected), strict=True):
        assert torch.equal(one, other)


def test_skip_gives_up_after_ten_in_a_row(blora, task, monkeypatch):
    bad_batches(monkeypatch, {1, *range(3, 99)})
    with pytest.raises(
        sp.TrainingError, match=r"At step 12: the loss is nan: .* 10 steps in a row were not finite"
    ) as caught:
        fit(blora, task, num_steps=30, on_nonfinite="skip")
    assert caught.value.result.history["step"].tolist() == [0, 2]


@pytest.mark.parametrize("read_every", [2, 3, 10])
def test_steps_behind_a_bad_one_are_taken_again_when_the_host_looks_late(task, monkeypatch, read_every):
    """They were computed while the flag was up, and had not moved anything."""
    calls = bad_batches(monkeypatch, {2})
    monkeypatch.setattr(sp.training.loop.Trainer, "__init__", read_late(read_every))
    result = fit(sp.bayesian_lora(tiny.causal_lm()), task, on_nonfinite="skip")
    assert result.history["step"].tolist() == [0, 1, 3, 4, 5]
    assert all(t.isfinite().all() for t in parameters_after(result))
    behind = {2: 0, 3: 1, 10: 3}[read_every]  # the first step is read at once
    assert len(calls) == 6 + behind


def read_late(read_every):
    original = sp.training.loop.Trainer.__init__
    return lambda self, *args, **options: original(self, *args, **{**options, "read_every": read_every})


# restored -------------------------------------------------------------------------------------------------------------


def test_restore_goes_back_to_the_last_copy_and_on_with_the_next_batch(task, monkeypatch, caplog):
    monkeypatch.setattr(recovery, "SNAPSHOT_EVERY", 3)
    states = []
    load = sp.training.training_state.LearnedState.load

    def note(self, saved):
        load(self, saved)
        states.append({k: v.clone() for k, v in self.tensors().items()})

    monkeypatch.setattr(sp.training.training_state.LearnedState, "load", note)
    with monkeypatch.context() as patch:
        bad_batches(patch, {5})
        result = fit(sp.bayesian_lora(tiny.causal_lm()), task, num_steps=8, on_nonfinite="restore")
    assert result.history["step"].tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert result.history["skipped"].tolist() == [0] * 5 + [1, 1]
    assert "step 5 was not finite and is left out, and the parameters of step 3 are back. Examples [" in caplog.text

    seen = []
    execute = EagerStep.__call__

    def look(self, batch, kl_weight):
        seen.append(
            {
                k: v.clone()
                for k, v in sp.training.training_state.LearnedState(self.objective, self.optimizer).tensors().items()
            }
        )
        return execute(self, batch, kl_weight)

    monkeypatch.setattr(EagerStep, "__call__", look)
    fit(sp.bayesian_lora(tiny.causal_lm()), task, num_steps=8)
    (restored,) = states
    assert set(restored) == set(seen[3])
    for name, tensor in restored.items():  # parameters, moments and step counts of before step 3
        assert torch.equal(tensor, seen[3][name]), name


def test_restore_brings_the_optimizer_back_to_before_its_first_step(blora, task, monkeypatch):
    calls = bad_batches(monkeypatch, {1})
    result = fit(blora, task, num_steps=3, on_nonfinite="restore", optimizer={"schedule": "constant", "warmup": 0.0})
    assert len(calls) == 3
    seed = derive_seed(0, "initial scales")
    start = as_guide("normal", sp.bayesian_lora(tiny.causal_lm()), seed=seed).scale.detach()
    moved = (result.posterior.guide.scale / start).log().abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 3e-2), rtol=1e-2, atol=0)  # one step of Adam, its first


def test_restore_raises_when_it_happens_again_soon(blora, task, monkeypatch):
    bad_batches(monkeypatch, {2, 40})
    with pytest.raises(sp.TrainingError, match=r"At step 40: .* second time within 50 steps: restoring does not help"):
        fit(blora, task, num_steps=60, on_nonfinite="restore")


def test_restore_goes_back_as_often_as_it_takes_if_rarely(blora, task, monkeypatch):
    monkeypatch.setattr(recovery, "SNAPSHOT_EVERY", 3)
    bad_batches(monkeypatch, {2, 6, 10})
    assert fit(blora, task, num_steps=12, on_nonfinite="restore").history["skipped"].iloc[-1] == 3


@pytest.mark.parametrize("policy", ["skip", "restore"])
@pytest.mark.parametrize("stop", [2, 4, 5, 7])
def test_a_run_with_faults_resumes_bit_for_bit(task, policy, stop, tmp_path, monkeypatch):
    """Faults belong to batches here, so that a resumed run meets them too."""
    monkeypatch.setattr(recovery, "SNAPSHOT_EVERY", 2)
    plan = TrainingBatches(encode(ROWS, task.encode, need_target=True), 4, task.pad_token_id, seed=0)
    bad = {tuple(plan(step).index.tolist()) for step in (3, 6)}
    gradient = EagerStep.gradient

    def spoiled(self, batch, kl_weight):
        return gradient(self, batch, kl_weight) * (torch.nan if tuple(batch.index.tolist()) in bad else 1)

    monkeypatch.setattr(EagerStep, "gradient", spoiled)

    def run(**options):
        options = {"num_steps": 9, "on_nonfinite": policy, "checkpoint": {"every": 1}, **options}
        return fit(sp.bayesian_lora(tiny.causal_lm()), task, **options)

    whole = run(checkpoint_dir=tmp_path / "whole")
    run(checkpoint_dir=tmp_path / "half", callbacks=[lambda row: row["step"] >= stop])
    resumed = run(checkpoint_dir=tmp_path / "half")
    assert whole.history["skipped"].iloc[-1] == 2
    assert whole.history.drop(columns="seconds").equals(resumed.history.drop(columns="seconds"))
    for one, other in zip(parameters_after(whole), parameters_after(resumed), strict=True):
        assert torch.equal(one, other)


# raised ---------------------------------------------------------------------------------------------------------------


class NaNLogits(sp.MultipleChoice):
    """Gives NaN for the first row of a batch, once the LLM has been called ``at`` times."""

    def __init__(self, *args, at, **options):
        super().__init__(*args, **options)
        self.at, self.calls = at, 0

    def likelihood(self, outputs, batch):
        self.calls += 1
        bad = (torch.arange(len(batch)) == 0) & (self.calls > self.at)
        return super().likelihood(torch.where(bad.unsqueeze(-1), torch.nan, outputs), batch)


def test_the_message_names_step_examples_terms_and_scale(blora, tokenizer):
    with pytest.raises(sp.TrainingError) as caught:
        fit(blora, NaNLogits(tokenizer, at=2))
    message = str(caught.value)
    plan = TrainingBatches(encode(ROWS, sp.MultipleChoice(tokenizer).encode, need_target=True), 4, 0, seed=0)
    index = plan(2).index.tolist()
    assert (
        f"At step 2: the loss is nan: site 'label' of the model (log density not finite for examples [{index[0]}])"
        in message
    )
    scale = caught.value.result.posterior.guide.scale.max().item()
    assert (
        f"Examples {index}: NLL nan nats per example, KL nan nats, largest scale of the guide {scale:.4g}." in message
    )


def test_a_bad_gradient_tells_the_terms_of_its_finite_loss(blora, task, monkeypatch):
    bad_batches(monkeypatch, {1}, where="gradient")
    with pytest.raises(
        sp.TrainingError, match=r"finite, but its gradient is not\. .*NLL 1\.\d+ nats per example, KL \d"
    ):
        fit(blora, task)


@pytest.mark.parametrize("limit", [None, 1.0], ids=["", "clipped"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_gradient_that_is_not_finite_from_the_first_backward_pass_on_names_its_layer(blora, task, value, limit):
    name, before = blora.adapter.subspace.names[1], blora.adapter.factors()[1][1].detach().clone()

    def spoil(module, args, output):
        if output.requires_grad:  # not in passes that probe the model
            output.register_hook(lambda grad: torch.full_like(grad, value))

    hook = blora.adapter.layers[1].register_forward_hook(spoil)
    message = rf"At step 0: the loss is finite, but its gradient is not in 1 of 5 adapted layers: '{name}'\."
    with pytest.raises(sp.TrainingError, match=message):
        fit(blora, task, optimizer={"max_grad_norm": limit})
    hook.remove()
    assert torch.equal(blora.adapter.factors()[1][1], before)


@pytest.mark.parametrize("name", ["guide.loc", "A", "B", "noise"])
def test_a_parameter_that_is_nan_moves_no_other(name):
    """Whatever made it so; here a callback."""
    task = sp.Regression(tiny.tokenizer())
    blora = sp.bayesian_lora(tiny.classifier(num_labels=1), gauge="free")  # else A gets unit rows at the end
    guide = as_guide("normal", blora)
    A, B = blora.adapter.factors()[0]
    spoilt = {"guide.loc": guide.loc, "A": A, "B": B, "noise": next(task.parameters())}[name]
    others = [*guide.parameters(), *blora.point_estimates.parameters(), *task.parameters()]
    before = []

    def spoil(row):
        if row["step"] == 1:
            with torch.no_grad():
                spoilt.fill_(torch.nan)
            before[:] = [p.detach().clone() for p in others]

    rows = [{**row, "label": float(row["label"])} for row in tiny.text_rows(8)]
    with pytest.raises(sp.TrainingError, match="At step 2: the loss is nan"):
        fit(blora, task, rows, guide=guide, callbacks=[spoil])
    for parameter, value in zip(others, before, strict=True):
        assert torch.equal(parameter.nan_to_num(), value.nan_to_num())


LAST = {"lr": (1e39, {}), "lr_scale": (8e-3, {"lr_scale": 1e4})}


@pytest.mark.parametrize("rate", LAST)
@pytest.mark.parametrize("policy", ["raise", "skip", "restore"])
def test_a_last_update_that_overflows_is_neither_returned_nor_saved(task, policy, rate, tmp_path, caplog):
    """No step comes behind it that would meet its numbers."""
    blora, (lr, more) = sp.bayesian_lora(tiny.causal_lm()), LAST[rate]
    options = {"num_steps": 1, "lr": lr, "optimizer": {"schedule": "constant", "warmup": 0.0, **more}}
    with pytest.raises(sp.TrainingError, match=r"At step 0: the update was too large: .* not finite any more"):
        fit(blora, task, on_nonfinite=policy, checkpoint_dir=tmp_path, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000000"]
    assert "step 1 is not saved" in caplog.text


def test_restore_goes_back_behind_an_update_that_overflowed(blora, task, monkeypatch):
    """A copy that is due just then is not taken: it would be of no use."""
    monkeypatch.setattr(recovery, "SNAPSHOT_EVERY", 2)

    def blow_up(row):
        if row["step"] == 1:  # the copy of step 2 is due
            with torch.no_grad():
                guide.loc[0] = torch.inf

    guide = as_guide("normal", blora)
    result = fit(blora, task, guide=guide, on_nonfinite="restore", callbacks=[blow_up])
    assert result.history["step"].tolist() == [0, 1, 3, 4, 5]
    assert result.posterior.guide.loc.isfinite().all()


@pytest.mark.parametrize("policy", ["raise", "skip", "restore"])
def test_memory_that_runs_out_in_a_step_leaves_the_batch_as_it_was_asked_for(blora, task, policy, monkeypatch):
    gradient, rows = EagerStep.gradient, []

    def limited(self, batch, kl_weight):
        rows.append(len(batch))
        if len(rows) == 3:
            raise torch.OutOfMemoryError("pretend")
        return gradient(self, batch, kl_weight)

    monkeypatch.setattr(EagerStep, "gradient", limited)
    with pytest.raises(torch.OutOfMemoryError, match="pretend") as caught:
        fit(blora, task, on_nonfinite=policy)
    assert rows == [4, 4, 4]  # the third was not tried again with fewer
    (note,) = caught.value.__notes__
    assert "At step 2, and no row was left out. micro_batch_size=" in note


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_scale_that_overflows_is_found(blora, task, policy):
    def blow_up(row):
        if row["step"] == 1:
            with torch.no_grad():
                guide.scale_unconstrained[3] = 1000.0

    guide = as_guide("normal", blora)
    with pytest.raises(sp.TrainingError, match=r"At step \d+: .*largest scale of the guide (inf|nan)") as caught:
        fit(blora, task, guide=guide, num_steps=30, on_nonfinite=policy, callbacks=[blow_up])
    assert caught.value.result.history["step"].tolist() == [0, 1]


def test_restore_cures_a_scale_that_overflows(blora, task, monkeypatch):
    def blow_up(row):
        if row["step"] == 1:
            with torch.no_grad():
                guide.scale_unconstrained[3] = 1000.0

    guide = as_guide("normal", blora, init_scale=0.05)
    result = fit(blora, task, guide=guide, num_steps=6, on_nonfinite="restore", callbacks=[blow_up])
    assert result.history["step"].tolist() == [0, 1, 3, 4, 5]
    assert result.posterior.guide.scale.max() < 0.1


@pytest.mark.parametrize("place", ["input", "target"])
def test_nan_in_the_data_never_reaches_a_parameter(place):
    """Numbers instead of tokens, as a model of features reads them."""
    toy = LinearToy(3)
    rows = [dict(row) for row in toy.rows]
    if place == "target":
        rows[5]["y"] = math.nan
        with pytest.raises(ValueError, match="Row 5 has no answer"):
            sp.fit(toy.blora, toy.task, rows, num_steps=8, batch_size=16, progress=False)
        return
    rows[5]["x"] = [math.nan] * 3
    result = sp.fit(toy.blora, toy.task, rows, num_steps=8, batch_size=16, on_nonfinite="skip", progress=False)
    assert result.history["skipped"].iloc[-1] == 2  # once in each of two epochs
    assert all(t.isfinite().all() for t in parameters_after(result))


def test_the_largest_scale_is_found_in_any_guide(blora):
    with pyro.settings.context(module_local_params=True):
        for guide in ("normal", "layer_covariance", "lowrank", "flow", AutoNormal):
            assert 0.03 < largest_scale(as_guide(guide, blora)) < 2
        assert largest_scale(as_guide("delta", blora)) is None


# layers that no gradient reaches --------------------------------------------------------------------------------------


def cut_off(block, how):
    """Let no gradient through a block."""
    forward = block.forward

    def detached(*args, **kwargs):
        return forward(*args, **kwargs).detach()

    def without_grad(*args, **kwargs):
        with torch.no_grad():
            return forward(*args, **kwargs)

    def recomputed(hidden, *args, **kwargs):  # as gradient checkpointing of old does; nothing below asks for gradients
        return checkpoint(lambda h: forward(h, *args, **kwargs), hidden, use_reentrant=True)

    block.forward = {"detached": detached, "no_grad": without_grad, "checkpointed": recomputed}[how]


def hooks_of(blora):
    return [list(layer._forward_hooks) for layer in blora.adapter.layers]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("how", ["detached", "no_grad", "checkpointed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_no_gradient_reaches_are_named(task, how, dtype):
    llm = tiny.causal_lm(dtype=dtype)
    cut_off(llm.model.layers[0], how)
    blora = sp.bayesian_lora(llm)
    before, hooks = [p.detach().clone() for p in blora.point_estimates.parameters()], hooks_of(blora)
    message = r"No gradient reaches 2 of 5 adapted layers: '.*0.self_attn.q_proj', '.*0.self_attn.v_proj'\. They would"
    with pytest.raises(RuntimeError, match=message + r" never learn\. .*enable_input_require_grads"):
        fit(blora, task, num_steps=20)
    for parameter, value in zip(blora.point_estimates.parameters(), before, strict=True):
        assert torch.equal(parameter, value)  # at once, before the first update
    assert hooks_of(blora) == hooks


class Detached(sp.MultipleChoice):
    """Loses the graph."""

    def outputs(self, llm, batch, s):
        return super().outputs(llm, batch, s).detach()


def test_a_loss_that_depends_on_nothing_is_explained(llm, tokenizer):
    with pytest.raises(RuntimeError, match=r"At step 0: no trained parameter affects the loss\. Typical causes"):
        sp.baselines.mle(llm, Detached(tokenizer), ROWS, num_steps=2, progress=False)


def test_the_gradient_is_looked_at_once(blora, task, monkeypatch):
    looked, hooks = [], hooks_of(blora)
    moved = gradient_check._is_moved
    monkeypatch.setattr(gradient_check, "_is_moved", lambda p: looked.append(p) or moved(p))
    fit(blora, task)
    assert 5 <= len(looked) <= 10  # 5 layers, A and B at most
    assert hooks_of(blora) == hooks


class Experts(nn.Module):
    """Two linear layers, of which a module picks one by its first feature, as a router would."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 1), nn.Linear(3, 1)
        self.used = "first"

    def forward(self, input_ids, attention_mask=None):
        return getattr(self, self.used)(input_ids.float())


class Plain(sp.Task):
    """y ~ Normal(output, 1)."""

    def encode(self, row):
        return Example({"input_ids": row["x"]}, row["y"])

    def outputs(self, llm, batch, s):
        return llm(**batch.inputs, s=s)

    def likelihood(self, outputs, batch):
        return pyro.distributions.Normal(outputs[..., 0], 1.0)


FEATURES = [{"x": [1.0, float(i), 2.0], "y": float(i)} for i in range(8)]


def test_an_expert_that_no_row_was_routed_to_is_let_pass():
    blora = sp.bayesian_lora(Experts(), r=1, target_modules=["first", "second"])
    with pytest.warns(sp.ScalaBLWarning, match="did not use 'second'"):
        history = sp.fit(blora, Plain(), FEATURES, num_steps=15, batch_size=4, progress=False).history
    assert len(history) == 15


def test_a_gradient_that_is_zero_for_long_is_no_accident():
    module = Experts()
    blora = sp.bayesian_lora(module, r=1, target_modules=["first", "second"])

    class Dead(Plain):
        def outputs(self, llm, batch, s):
            return super().outputs(llm, batch, s).clamp(max=-1e6)

    steps = []
    error = pytest.raises(RuntimeError, match="No gradient reaches 1 of 2 adapted layers: 'first'")
    with error, pytest.warns(sp.ScalaBLWarning, match="did not use 'second'"):
        sp.fit(blora, Dead(), FEATURES, num_steps=15, progress=False, callbacks=[lambda row: steps.append(row["step"])])
    assert steps == list(range(gradient_check.MAX_ZERO_STEPS - 1))


def test_masks_of_zero_are_let_pass():
    blora = sp.bayesian_lora(Experts(), r=1, target_modules=["first"], prior="rank_mask")
    guide = as_guide("normal", blora)
    with torch.no_grad():
        guide.logits.fill_(-50.0)
    assert len(sp.fit(blora, Plain(), FEATURES, guide=guide, num_steps=15, progress=False).history) == 15


def test_factors_held_fixed_are_not_asked_for_gradients(fitted):
    result = sp.refit(fitted.posterior, ROWS, num_steps=2, progress=False)
    assert len(result.history) == 2


def test_a_check_that_ended_asks_nothing_more(blora):
    check = GradientCheck(blora)
    check.close()
    check(torch.tensor(1.0))  # no gradient anywhere


# a worker that dies ---------------------------------------------------------------------------------------------------


class Deadly(Dataset):
    """Its worker is killed on the way to row 9, as by the kernel when memory runs out."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        if i == 9 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return i, self.examples[i]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_worker_that_dies_is_an_error_that_says_so_and_costs_no_step(blora, task, tmp_path, monkeypatch):
    # torch looks every five seconds whether its workers live.
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))

    def together(pairs):
        return collate([e for _, e in pairs], [i for i, _ in pairs], task.pad_token_id)

    examples = encode(ROWS, task.encode, need_target=True)
    loader = DataLoader(Deadly(examples), batch_size=4, num_workers=1, prefetch_factor=1, collate_fn=together)
    message = r"At step \d: a worker process of the data loader died \(DataLoader worker .*lower num_workers"
    with pytest.raises(RuntimeError, match=message):
        fit(blora, task, loader, checkpoint_dir=tmp_path, checkpoint={"every": 1})
    assert sorted(tmp_path.iterdir())[-1].name != "step-00000000"
