"""Two processes are one: gradients, training, predictions; what one of them meets, both deal with; none is waited for.

Processes are forked, and talk through gloo on the CPU.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyro
import pytest
import tiny
import torch
import torch.distributed as dist
from accelerate import Accelerator, dispatch_model
from processes import results, run_together
from pyro.infer import RenyiELBO, Trace_ELBO

import scalabl_pyro as sp
from scalabl_pyro import distributed
from scalabl_pyro.data import encode
from scalabl_pyro.data.training_batches import TrainingBatches
from scalabl_pyro.distributed.processes import Processes, current_processes
from scalabl_pyro.guides import as_guide
from scalabl_pyro.model.joint import TaskModel
from scalabl_pyro.prediction import predict as predictive
from scalabl_pyro.training.objective import Objective, ScopedGuide, default_elbo
from scalabl_pyro.training.optimizer import build_optimizer
from scalabl_pyro.training.step import EagerStep

ROWS = tiny.question_rows(23)
TEST = tiny.question_rows(20, seed=1)
STEPS = 4
#: Ways to train; an odd number of rows, so that the shares differ.
WAYS = {
    "rows of draws": {},
    "float32": {"dtype": torch.float32},
    "a shared draw": {"draws": "shared"},
    "two draws": {"elbo": Trace_ELBO(num_particles=2, vectorize_particles=True)},
    "low rank": {"guide": "lowrank"},
    "particles": {"guide": "svgd"},
    "masks": {"guide": "rank_mask", "prior": "rank_mask"},
    "horseshoe": {"prior": "horseshoe"},
    "a prior on the factors": {
        "optimizer": {"factor_scale": 0.5, "max_grad_norm": 0.5},
        "kl_weight": lambda step: 0.1 * step,
    },
    "micro-batches": {"hardware": {"micro_batch_size": 1}},
    "batches of one's own": {"batches": True},
    "a head": {"head": True},
}


def train(*, dtype=torch.float64, prior=1.0, head=False, batches=False, rows=ROWS, blora=None, **options):
    """A short fit of a tiny model."""
    task = sp.MultipleChoice(tiny.tokenizer())
    if head:
        task = sp.SequenceClassification(tiny.tokenizer(), classes=["a", "b", "c"])
        blora, rows = sp.bayesian_lora(tiny.classifier(dtype=dtype)), tiny.text_rows(23)
    elif blora is None:
        blora = sp.bayesian_lora(tiny.causal_lm(dtype=dtype), prior=prior)
    if batches:
        examples = encode(rows, task.encode, need_target=True)
        source = TrainingBatches(examples, 5, task.pad_token_id, seed=7)
        rows, options = [source(step) for step in range(5)], {**options, "num_data": 23}
    return sp.fit(blora, task, rows, **{"num_steps": STEPS, "batch_size": 5, "lr": 1e-2, "progress": False, **options})


def learned(result):
    """All that was learned, as one vector."""
    posterior = result.posterior
    tensors = [*posterior.guide.state_dict().values(), *(t for pair in posterior.factors for t in pair)]
    tensors += [p for head in posterior.heads.values() for p in head.parameters()]
    return torch.cat([t.flatten().double().cpu() for t in tensors])


def figures(result):
    return result.history.drop(columns="seconds").fillna(-1).to_numpy(float)  # no KL where its weight is 0


def assert_close(a, b, within):
    """Equal up to ``within`` of the largest number."""
    a, b = np.asarray(a), np.asarray(b)
    assert np.abs(a - b).max() <= within * np.abs(b).max(), np.abs(a - b).max()


def train_and_predict(way):
    result = train(**way)
    rows = tiny.text_rows(20) if way.get("head") else TEST
    posterior = result.posterior
    predictions = [
        posterior.predict(rows, num_draws=3, batch_size=4),
        posterior.predict(rows[:5], num_draws=5, batch_size=16),  # draws are shared out
        posterior.predict(rows, num_draws=0),
    ]
    return learned(result), figures(result), [p.log_probs for p in predictions], result.history


def every_way(rank):
    torch.manual_seed(rank)  # the state of the caller's generator is nobody's business
    return {name: train_and_predict(way) for name, way in WAYS.items()}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes has for each way to train."""
    return results(run_together(every_way, tmp_path_factory.mktemp("processes")))


@pytest.mark.parametrize("name", WAYS)
def test_two_processes_learn_and_predict_what_one_does(both, name):
    way = WAYS[name]
    within = 1e-5 if way.get("dtype") == torch.float32 else 1e-10
    micro = {"hardware": {n: 2 * rows for n, rows in way["hardware"].items()}} if "hardware" in way else {}
    parameters, history, predictions, _ = train_and_predict({**way, **micro})
    (first, its_history, its_predictions, whole), (second, *_, other) = (process[name] for process in both)
    assert torch.equal(first, second)
    assert whole.equals(other)
    assert_close(first, parameters, within)
    assert_close(its_history, history, within)
    for ours, one in zip(its_predictions, predictions, strict=True):
        assert_close(np.exp(ours), np.exp(one), within)
    for ours, theirs in zip(its_predictions, both[1][name][2], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def gradient(processes, dtype):
    """Gradients of a batch of 7 rows, which two processes share unevenly, by name, and the loss."""
    task, blora = sp.MultipleChoice(tiny.tokenizer()), sp.bayesian_lora(tiny.causal_lm(dtype=dtype))
    with torch.no_grad():
        for _, B in blora.adapter.factors():
            B.normal_(generator=torch.Generator().manual_seed(0))
    batches = TrainingBatches(encode(ROWS, task.encode, need_target=True), 8, task.pad_token_id, seed=0)
    batch = next(b for b in map(batches, range(3)) if len(b) == 7)  # 23 rows are 8, 8 and 7
    model = TaskModel(blora, task, num_data=23, draws="per_example")
    scoped = ScopedGuide(as_guide("normal", blora, init_scale=0.3), draws="per_example")
    objective = Objective(default_elbo(scoped.guide, blora.prior), model, scoped)
    optimizer = build_optimizer(model, scoped.guide, lr=0.0, lr_A=0.0, lr_loc=0.0, lr_scale=0.0, weight_decay=0.0)
    step = EagerStep(objective, optimizer, device=torch.device("cpu"), processes=processes)
    with pyro.settings.context(module_local_params=True), torch.random.fork_rng():
        torch.manual_seed(3)
        loss = step(batch, 1.0)
    return {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}, loss


def gradient_in_both(rank, dtype):
    return gradient(current_processes(), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_gradient_is_that_of_the_joint_batch(tmp_path, dtype):
    slopes, loss = gradient(Processes(), dtype)
    for own, terms in results(run_together(gradient_in_both, tmp_path, dtype)):
        torch.testing.assert_close(terms, loss, rtol=1e-6, atol=1e-6)
        assert set(own) == set(slopes) and len(own) > 10
        for name, slope in slopes.items():
            torch.testing.assert_close(own[name], slope, rtol=1e-6, atol=1e-6, msg=name)


def what_each_process_runs(rank):
    posterior, real, ran = train(num_steps=1).posterior, predictive._outputs, []

    def noted(llm, task, s, batch):
        ran.append((len(s), len(batch)))
        return real(llm, task, s, batch)

    predictive._outputs = noted
    posterior.predict(TEST[:6], num_draws=5, batch_size=16)  # one batch
    posterior.predict(TEST, num_draws=3, batch_size=5)  # four
    return ran


def test_draws_of_one_batch_and_batches_are_shared_out(tmp_path):
    """That both get all predictions would be true, too, if each process computed all of them."""
    first, second = results(run_together(what_each_process_runs, tmp_path))
    assert first == [(3, 6), (3, 5), (3, 5)]
    assert second == [(2, 6), (3, 5), (3, 5)]


def with_little_memory_in_one(rank):
    posterior, real = train().posterior, predictive._outputs

    def limited(llm, task, s, batch):
        if rank == 1 and len(s) > 1:
            raise torch.OutOfMemoryError("pretend")
        return real(llm, task, s, batch)

    predictive._outputs = limited
    return posterior.predict(TEST, num_draws=3, batch_size=4).log_probs


def test_memory_that_runs_out_in_one_process_is_the_affair_of_that_one(tmp_path):
    expected = train().posterior.predict(TEST, num_draws=3, batch_size=4).log_probs
    for found in results(run_together(with_little_memory_in_one, tmp_path)):
        assert_close(np.exp(found), np.exp(expected), 1e-10)


def predict_numbers(rank=0):
    task, rows = sp.Regression(tiny.tokenizer()), [{"text": r["question"], "label": float(r["answer"])} for r in ROWS]
    blora = sp.bayesian_lora(tiny.classifier(num_labels=1, dtype=torch.float64))
    posterior = sp.fit(blora, task, rows, num_steps=2, progress=False).posterior
    prediction = posterior.predict(rows, num_draws=4, batch_size=4, seed=3)
    return np.stack([prediction.means, prediction.variances, prediction.replicates, prediction.log_density])


def test_simulated_answers_are_those_of_one_process(tmp_path):
    first, second = results(run_together(predict_numbers, tmp_path))
    np.testing.assert_array_equal(first, second)
    assert_close(first, predict_numbers(), 1e-10)


def of_three(rank):
    # A batch has 3 + 2 rows: in the second part one process has none.
    result = train(hardware={"micro_batch_size": 1}, guide="lowrank")
    return learned(result), result.posterior.predict(TEST[:2], num_draws=4, batch_size=1).log_probs


def test_a_process_without_rows_keeps_up(tmp_path):
    one = train(hardware={"micro_batch_size": 3}, guide="lowrank")
    log_probs = one.posterior.predict(TEST[:2], num_draws=4, batch_size=1).log_probs
    for parameters, predicted in results(run_together(of_three, tmp_path, size=3)):
        assert_close(parameters, learned(one), 1e-10)
        assert_close(predicted, log_probs, 1e-10)


def with_dropout(rank):
    blora = sp.bayesian_lora(tiny.causal_lm(), lora_dropout=0.3)
    result = train(blora=blora)
    return learned(result)


def test_masks_of_dropout_leave_the_processes_alike(tmp_path):
    first, second = results(run_together(with_dropout, tmp_path))
    assert torch.equal(first, second) and first.isfinite().all()


def on_a_sharded_base(rank, folder):
    """Fits on bases whose weights lie in pieces on both processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, found = init_device_mesh("cpu", (2,)), {}
    for way in ("before", "root", "after", "in pieces"):
        llm = tiny.causal_lm(dtype=torch.float64)
        blora = sp.bayesian_lora(llm) if way in ("after", "in pieces") else None
        kept = {"ignored_params": set(blora.parameters())} if way == "after" else {}
        for module in (*llm.model.layers, *([llm] if way == "root" else [])):
            fully_shard(module, mesh=mesh, **kept)
        try:
            result = train(blora=blora or sp.bayesian_lora(llm), checkpoint_dir=folder / f"run-{way}")
        except ValueError as error:
            found[way] = str(error)
            continue
        prediction = result.posterior.predict(TEST, num_draws=3, batch_size=8)  # three batches: 2 rounds for each
        if rank == 0:
            result.posterior.save_pretrained(folder / way)
        found[way] = learned(result), figures(result), prediction.log_probs
    dist.barrier()
    llm = tiny.causal_lm(dtype=torch.float64)
    fully_shard(llm, mesh=mesh)
    found["loaded"] = sp.Posterior.from_pretrained(llm, folder / "after").predict(TEST, num_draws=3).log_probs
    llm = tiny.causal_lm(dtype=torch.float64)
    fully_shard(llm.model.layers[1], mesh=mesh)
    found["skipped"] = nan_in_the_first_step(rank, sp.bayesian_lora(llm))
    return found


def nan_in_the_first_step(rank, blora):
    """Number of steps left out where one process of two has NaN in its first pass."""
    task = sp.MultipleChoice(tiny.tokenizer())
    likelihood, left = task.likelihood, [1] * rank
    task.likelihood = lambda outputs, batch: likelihood(outputs * (torch.nan if left and left.pop() else 1), batch)
    options = {"num_steps": 3, "batch_size": 6, "progress": False, "on_nonfinite": "skip"}
    return int(sp.fit(blora, task, ROWS, **options).history["skipped"].iloc[-1])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_base_may_be_sharded_but_not_the_adapter(tmp_path):
    one = train()
    log_probs = one.posterior.predict(TEST, num_draws=3, batch_size=8).log_probs
    for found in results(run_together(on_a_sharded_base, tmp_path, tmp_path)):
        for way in ("before", "root", "after"):
            parameters, history, predicted = found[way]
            assert_close(parameters, learned(one), 1e-10)
            assert_close(history, figures(one), 1e-10)
            assert_close(predicted, log_probs, 1e-10)
        assert "ignored_params=set(blora.parameters())" in found["in pieces"]
        assert_close(found["loaded"], log_probs, 1e-6)
        assert found["skipped"] == 1
    whole = sp.Posterior.from_pretrained(tiny.causal_lm(dtype=torch.float64), tmp_path / "root")
    assert_close(whole.predict(TEST, num_draws=3, batch_size=8).log_probs, log_probs, 1e-6)


def over_devices(places, **options):
    """A fit of a model whose modules accelerate has put on devices."""
    llm = tiny.causal_lm(dtype=torch.float64)
    names = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    dispatch_model(llm, dict(zip(names, places, strict=True)), force_hooks=True, **options)
    return train(blora=sp.bayesian_lora(llm))


def test_the_hooks_of_a_device_map_change_nothing():
    placed, one = over_devices(["cpu"] * 6), train()
    assert torch.equal(learned(placed), learned(one))
    log_probs = [result.posterior.predict(TEST, num_draws=3).log_probs for result in (placed, one)]
    np.testing.assert_array_equal(*log_probs)


#: Norms and rotations of transformers are float32, also in a float64 model: see benchmarks/device_difference.py.
WITHIN_FLOAT32 = 1e-6


@pytest.mark.gpu
def test_one_model_over_a_gpu_and_the_cpu():
    """Two devices, of which every machine with a GPU has both; blocks below run on one, blocks above on the other."""
    for places in (["cpu", "cpu", 0, 0, "cpu", "cpu"], [0, 0, "cpu", "cpu", 0, 0]):
        first = [places[1]] * 6  # noise is drawn where the first adapted block is
        placed, one = (over_devices(devices, main_device="cpu") for devices in (places, first))
        assert {A.device.type for A, _ in placed.posterior.adapter.factors()} == {"cpu", "cuda"}
        assert_close(learned(placed), learned(one), WITHIN_FLOAT32)
        log_probs = [result.posterior.predict(TEST, num_draws=3).log_probs for result in (placed, one)]
        assert_close(*log_probs, WITHIN_FLOAT32)


@pytest.mark.gpu
def test_one_model_over_two_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    placed, one = over_devices([0, 0, 1, 1, 0, 1]), over_devices([0] * 6)
    assert_close(learned(placed), learned(one), WITHIN_FLOAT32)
    log_probs = [result.posterior.predict(TEST, num_draws=3).log_probs for result in (placed, one)]
    assert_close(*log_probs, WITHIN_FLOAT32)


@pytest.mark.gpu
def test_two_gpus_learn_what_one_does(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert max(differences_of_the_example(tmp_path, "--random")) < 1e-3


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    # --multi_gpu means several processes on one machine; it does not require GPUs
    "accelerate": (
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_torchrun_and_accelerate_launch_start_the_example(tmp_path, launcher):
    assert max(differences_of_the_example(tmp_path, "--tiny", launcher=launcher)) < 1e-5


def differences_of_the_example(folder, *options, launcher="torchrun"):
    """What ``examples/distributed.py --check`` prints of two processes: differences of parameters, losses, answers."""
    script = Path(__file__).resolve().parents[2] / "examples" / "distributed.py"
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(script)]
    path = os.pathsep.join([str(script.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}  # the package need not be installed
    done = subprocess.run(
        [*command, "--check", *options], cwd=folder, capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "2 processes" in done.stdout
    return [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("largest")]


def started_by_accelerate(rank):
    accelerator = Accelerator(cpu=True)
    assert (accelerator.num_processes, accelerator.process_index) == (2, rank)
    return learned(train())


def test_accelerate_may_start_the_group(tmp_path):
    first, second = results(run_together(started_by_accelerate, tmp_path, starts_group=False))
    assert torch.equal(first, second)
    assert_close(first, learned(train()), 1e-10)


# what goes wrong ---------------------------------------------------------------------------


def killed_at_step_two(rank):
    def stop(row):
        if rank == 1 and row["step"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    began = time.monotonic()
    try:
        train(num_steps=100, callbacks=[stop])
    except distributed.LostProcess as error:
        return str(error), time.monotonic() - began
    return None


def test_a_killed_process_ends_the_others_with_an_error(tmp_path):
    first, second = run_together(killed_at_step_two, tmp_path)
    assert second.status == -signal.SIGKILL
    message, seconds = first.result
    assert "Process 0 of 2 cannot reach the others" in message and "can be resumed" in message
    assert seconds < 30


def killed_any_time(rank, folder, moment):
    if rank == 1 and moment is not None:
        threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL)).start()
    began = time.monotonic()
    try:
        result = train(num_steps=12, checkpoint_dir=folder, checkpoint={"every": 2})
    except distributed.LostProcess:
        return "lost", time.monotonic() - began
    return learned(result), time.monotonic() - began


@pytest.mark.slow
def test_kills_at_random_moments_are_noticed_and_resumed_from(tmp_path, count=20):
    (whole, duration), _ = results(run_together(killed_any_time, tmp_path, tmp_path / "whole", None))
    random, longest, noticed = np.random.default_rng(0), 0.0, 0
    for number in range(count):
        folder = tmp_path / f"run-{number}"
        first, second = run_together(killed_any_time, tmp_path, folder, float(random.uniform(0, 0.9 * duration)))
        if second.status == -signal.SIGKILL:
            said, seconds = results([first])[0]
            noticed += said == "lost"
            longest = max(longest, seconds)
        for parameters, _ in results(run_together(killed_any_time, tmp_path, folder, None)):
            assert torch.equal(parameters, whole)
    sys.stdout.write(f"\n{noticed} of {count} runs lost a process; {longest:.1f} s at most, whole {duration:.1f} s\n")
    assert longest < duration + 5


def fails_alone(rank, noticed):
    real = EagerStep.gradient

    def fail(self, *args):
        if rank == 1:
            raise torch.OutOfMemoryError("pretend")
        return real(self, *args)

    EagerStep.gradient = fail
    try:
        train()
    except torch.OutOfMemoryError as error:
        kept, deadline = error, time.monotonic() + 20  # with all that its frames hold
        while not noticed.exists() and time.monotonic() < deadline:  # it goes on, as a notebook does
            time.sleep(0.02)
        return f"{kept}, noticed: {noticed.exists()}"
    except distributed.LostProcess:
        noticed.touch()
        return "lost"


def test_an_error_in_one_process_is_not_waited_for(tmp_path):
    assert results(run_together(fails_alone, tmp_path, tmp_path / "noticed")) == ["lost", "pretend, noticed: True"]


def spoiled(rank, policy, bad_row=ROWS[7]["id"]):
    """A run in which the loss of one row, which lies in one process alone, is NaN at its first time."""
    task = sp.MultipleChoice(tiny.tokenizer())
    likelihood, index, left = task.likelihood, [r["id"] for r in ROWS].index(bad_row), [1]

    def poison(outputs, batch):
        bad = batch.index == index
        if bad.any() and left:
            left[:] = [1] if policy == "raise" else []  # where a run ends of it, the cause is looked for again
            outputs = torch.where(bad.view(-1, *[1] * (outputs.dim() - 1)), torch.nan, outputs)
        return likelihood(outputs, batch)

    task.likelihood = poison
    options = {"num_steps": 7, "batch_size": 6, "lr": 1e-2, "progress": False, "on_nonfinite": policy}
    try:
        result = sp.fit(sp.bayesian_lora(tiny.causal_lm(dtype=torch.float64)), task, ROWS, **options)
    except sp.TrainingError as error:
        return str(error), figures(error.result) if error.result else None
    return learned(result), figures(result)


def test_a_loss_that_is_nan_in_one_process_is_left_out_by_both(tmp_path):
    def every_policy(rank):
        return {policy: spoiled(rank, policy) for policy in ("raise", "skip", "restore")}

    found = results(run_together(every_policy, tmp_path))
    for policy in ("skip", "restore"):
        (first, history), (second, other) = (process[policy] for process in found)
        assert torch.equal(first, second) and np.array_equal(history, other)
        assert history[-1, -1] == 1  # skipped
        parameters, one = spoiled(0, policy)
        assert_close(first, parameters, 1e-10)
        assert_close(history, one, 1e-10)
    (message, _), (other, _) = (process["raise"] for process in found)
    assert message == other
    assert "log density not finite for examples [7]" in message


# checkpoints and signals -------------------------------------------------------------------


def in_two_parts(rank, folder):
    if rank == 1:  # it need not see the folder
        distributed_folder = folder / "elsewhere"
    else:
        distributed_folder = folder / "run"
    options = {"checkpoint_dir": distributed_folder, "checkpoint": {"every": 2}, "num_steps": 6}
    stopped = train(callbacks=[lambda row: rank == 0 and row["step"] == 2], **options)
    return learned(stopped), learned(train(**options)), figures(train(**options))


def test_the_first_process_writes_checkpoints_from_which_all_go_on(tmp_path):
    whole = train(num_steps=6)
    (stopped, first, history), (_, second, other) = results(run_together(in_two_parts, tmp_path, tmp_path))
    assert not (tmp_path / "elsewhere").exists()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"step-00000004", "step-00000006"}
    assert not torch.equal(stopped, first)
    assert torch.equal(first, second) and np.array_equal(history, other)
    assert_close(first, learned(whole), 1e-10)
    assert_close(history, figures(whole), 1e-10)


def test_one_process_goes_on_from_the_checkpoint_of_two(tmp_path):
    def half(rank):
        stop = [lambda row: row["step"] == 2] if rank == 1 else []  # one that only one process has stops both
        return len(train(num_steps=6, checkpoint_dir=tmp_path / "run", callbacks=stop).history)

    assert results(run_together(half, tmp_path)) == [3, 3]
    assert_close(
        learned(train(num_steps=6, checkpoint_dir=tmp_path / "run", checkpoint={"resume": True})),
        learned(train(num_steps=6)),
        1e-10,
    )


def told_to_end(rank, folder, signum):
    def call(row):
        if rank == 1 and row["step"] == 2:
            os.kill(os.getpid(), signum)

    return len(train(num_steps=100, checkpoint_dir=folder, callbacks=[call]).history)


def test_a_signal_that_one_process_gets_stops_both_with_a_checkpoint(tmp_path):
    ended = run_together(told_to_end, tmp_path, tmp_path / "run", signal.SIGTERM)
    assert [outcome.status for outcome in ended] == [143, 143], ended
    assert "step-00000004" in {p.name for p in (tmp_path / "run").iterdir()}
    first, second = results(run_together(told_to_end, tmp_path, tmp_path / "interrupted", signal.SIGINT))
    assert first == second < 10


# what is refused ---------------------------------------------------------------------------


def refusals(rank):
    said = {}
    rows = [*ROWS[:-1], {**ROWS[-1], "answer": (ROWS[-1]["answer"] + rank) % 4}]
    calls = {
        "too few rows": lambda: train(batch_size=1),
        "no sum": lambda: train(elbo=RenyiELBO()),
        "other options": lambda: train(lr=1e-2 * (1 + rank)),
        "other rows": lambda: train(rows=rows),
        "other batches": lambda: train(batches=True, rows=rows),
        "nothing to resume": lambda: train(checkpoint={"resume": True}, checkpoint_dir="/nowhere"),
        "another base": lambda: train(blora=sp.bayesian_lora(tiny.causal_lm(dtype=torch.float64, seed=rank))),
        "other draws": lambda: train(num_steps=1).posterior.predict(TEST, seed=rank),
    }
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    with distributed.single_process():
        said["single_process"] = len(train(lr=1e-2 * (1 + rank), batch_size=1).history)
    return said


def test_what_cannot_be_shared_is_refused_by_all(tmp_path):
    for said in results(run_together(refusals, tmp_path)):
        assert "use at least 2" in said["too few rows"]
        assert "RenyiELBO is not a sum over rows" in said["no sum"]
        assert "FileNotFoundError" in said["nothing to resume"]
        assert "The processes hold different batches" in said["other batches"]
        assert "different predictions" in said["other draws"]
        assert said["single_process"] == STEPS
    assert "lr is 0.02, was 0.01" in said["other options"]
    assert "train_data differs" in said["other rows"]
    assert "Another base model" in said["another base"]


def wrapped_for_another_engine(rank):
    try:
        sp.bayesian_lora(Accelerator(cpu=True).prepare(tiny.causal_lm()))
    except ValueError as error:
        return str(error)
    return None


def test_a_model_in_a_wrapper_that_adds_up_gradients_is_refused(tmp_path):
    for said in results(run_together(wrapped_for_another_engine, tmp_path, starts_group=False)):
        assert "wrapped in DistributedDataParallel: give bayesian_lora() the model itself" in said


def test_a_launch_without_a_group_is_pointed_out(monkeypatch, caplog):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with caplog.at_level(logging.WARNING):
        assert not current_processes().are_several
    assert "torch.distributed is not initialized" in caplog.text


def test_alone_there_is_nobody_to_talk_to(tmp_path):
    own = Processes()
    batch = object()
    assert own.shard(batch) == (batch, 1.0) and own.all_gather(lambda: 3) == [3] and own.from_rank_zero(lambda: 3) == 3
    assert not dist.is_initialized()


# interrupted twice, changed, installed otherwise -----------------------------------------


def interrupted(rank, who, times, folder):
    """Sends itself Ctrl-C after each of the first steps; the second one takes effect at once."""
    sent = []

    def call(row):
        if rank in who and len(sent) < times:
            sent.append(os.kill(os.getpid(), signal.SIGINT))

    started = time.monotonic()
    try:
        ended = len(train(num_steps=50, checkpoint_dir=folder, callbacks=[call]).history)
    except (KeyboardInterrupt, distributed.LostProcess) as error:
        notes = " ".join(getattr(error, "__notes__", []))
        ended = f"{type(error).__name__} {error} {notes}"
    return ended, time.monotonic() - started


@pytest.mark.parametrize("keeps", [False, True], ids=["", "with checkpoints"])
@pytest.mark.parametrize("who", [(0,), (1,), (0, 1)], ids=str)
def test_a_second_interrupt_in_one_process_is_not_waited_for(tmp_path, who, keeps):
    folder = tmp_path / "run" if keeps else None
    found = results(run_together(interrupted, tmp_path, who, 9, folder))
    for rank, (ended, seconds) in enumerate(found):
        assert seconds < 15  # the group waits for 40
        if rank in who:
            assert ended.startswith("KeyboardInterrupt") and "in this process alone" in ended
        else:
            assert ended.startswith("LostProcess") and "interrupted twice" in ended


@pytest.mark.parametrize("who", [(0,), (1,), (0, 1)], ids=str)
def test_one_interrupt_ends_both_processes_with_what_was_learned(tmp_path, who):
    first, second = (ended for ended, _ in results(run_together(interrupted, tmp_path, who, 1, None)))
    assert first == second and first < 5


def interrupted_by_its_own_code(rank):
    """A KeyboardInterrupt that no signal of fit brought: only this process knows of it."""

    def call(row):
        if rank == 1 and row["step"] == 1:
            raise KeyboardInterrupt

    try:
        train(num_steps=50, callbacks=[call])
    except (KeyboardInterrupt, distributed.LostProcess) as error:
        return type(error).__name__


def test_an_interrupt_that_one_process_makes_itself_is_not_waited_for(tmp_path):
    assert results(run_together(interrupted_by_its_own_code, tmp_path)) == ["LostProcess", "KeyboardInterrupt"]


def changed(rank, who, what, folder):
    """One process changes its copy of a parameter, by as little as float64 can tell."""
    blora = sp.bayesian_lora(tiny.causal_lm(dtype=torch.float64))
    guide = as_guide("normal", blora)
    tensor = {"A": blora.adapter.factors()[1][0], "loc": guide.loc}[what]

    def call(row):
        if rank == who and row["step"] == 2:
            with torch.no_grad():
                tensor.view(-1)[0] *= 1 + 1e-12

    try:
        options = {"checkpoint_dir": folder, "checkpoint": {"every": 4}} if folder else {}
        train(num_steps=20, blora=blora, guide=guide, callbacks=[call], **options)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("what", ["A", "loc"])
@pytest.mark.parametrize("who", [0, 1])
def test_a_parameter_that_one_process_changes_is_noticed_at_the_next_checkpoint(tmp_path, who, what):
    name = {"A": "v_proj/A", "loc": "loc"}[what]
    for said in results(run_together(changed, tmp_path, who, what, tmp_path / "run")):
        assert said is not None and "Process 1 holds other numbers than process 0 in" in said and name in said
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["step-00000000"]


def test_a_parameter_that_one_process_changes_is_noticed_at_the_end_without_checkpoints(tmp_path):
    for said in results(run_together(changed, tmp_path, 1, "A", None)):
        assert said is not None and "Process 1 holds other numbers than process 0" in said


def installed_otherwise(rank, library, call):
    if rank == 2:
        module = {"torch": torch, "pyro": pyro, "scalabl_pyro": sp._version}[library]
        module.__version__ = "0.0.7"
    with distributed.single_process():
        posterior = train(num_steps=1).posterior
    try:
        train() if call == "fit" else posterior.predict(TEST)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("call", ["fit", "predict"])
@pytest.mark.parametrize("library", ["torch", "pyro", "scalabl_pyro"])
def test_another_version_in_one_process_is_refused_by_all(tmp_path, library, call):
    version = {"torch": torch.__version__, "pyro": pyro.__version__, "scalabl_pyro": sp.__version__}[library]
    for said in results(run_together(installed_otherwise, tmp_path, library, call, size=3)):
        assert f"{library} {version} in processes 0, 1, {library} 0.0.7 in process 2" in said
