"""The same code on a GPU in bfloat16: run with `make test-gpu` where there is one."""

import copy

import numpy as np
import pytest
import tiny
import torch

import scalabl_pyro as sp

pytestmark = pytest.mark.gpu
ROWS = tiny.question_rows(24)
RATES = {"lr": 1e-2, "lr_A": 1e-2}  # a random model needs a fast A


@pytest.fixture(autouse=True)
def cuda():
    if not torch.cuda.is_available():
        pytest.fail("tests marked gpu need a CUDA device")


def base(dtype=torch.bfloat16, family="llama"):
    return tiny.causal_lm(family).to(dtype)  # the same weights in every precision


def fitted(dtype=torch.bfloat16, family="llama", **options):
    llm = base(dtype, family).cuda()
    blora = sp.bayesian_lora(llm)
    task = sp.MultipleChoice(tiny.tokenizer())
    return sp.fit(blora, task, ROWS, **{"num_steps": 30, **RATES, "progress": False, **options}).posterior


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "gemma", "gpt2"])
def test_it_learns_in_bfloat16(family):
    posterior = fitted(family=family, num_steps=150, init_scale=0.05)  # few steps
    prediction = posterior.predict(ROWS, num_draws=8)
    assert prediction.log_probs.dtype == np.float32
    assert prediction.metrics().loc["value", "accuracy"] > 0.8
    assert prediction.epistemic.max() > 0


def test_latents_and_factors_stay_float32_and_the_posterior_lives_on_the_cpu():
    posterior = fitted()
    assert all(t.dtype == torch.float32 and t.is_cuda for pair in posterior.adapter.factors() for t in pair)
    assert posterior.guide.loc.device.type == "cpu"
    assert posterior.sample(3).s.device.type == "cpu"


def test_draws_are_those_of_the_cpu_and_predictions_agree():
    posterior = fitted(dtype=torch.float32)
    on_gpu = posterior.predict(ROWS, num_draws=4)
    on_cpu = copy.deepcopy(posterior.adapter.module).cpu()
    adapter = sp.lora.attach.find_adapter(on_cpu)
    twin = sp.Posterior(adapter, posterior.task.cpu(), posterior.prior, posterior.guide, posterior.factors)
    np.testing.assert_allclose(twin.predict(ROWS, num_draws=4).log_probs, on_gpu.log_probs, atol=2e-3)


def test_a_seed_starts_alike_on_every_device():
    on_gpu, on_cpu = sp.bayesian_lora(base().cuda(), seed=3), sp.bayesian_lora(base(), seed=3)
    for found, expected in zip(on_gpu.adapter.factors(), on_cpu.adapter.factors(), strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(on_gpu.adapter.loc.cpu(), on_cpu.adapter.loc)


def test_it_saves_and_loads_across_devices(tmp_path):
    posterior = fitted()
    before = posterior.predict(ROWS, num_draws=4)
    posterior.save_pretrained(tmp_path / "p")
    loaded = sp.Posterior.from_pretrained(base().cuda(), tmp_path / "p")
    np.testing.assert_array_equal(loaded.predict(ROWS, num_draws=4).log_probs, before.log_probs)
    on_cpu = sp.Posterior.from_pretrained(base(torch.float32), tmp_path / "p")
    assert torch.equal(on_cpu.sample(4).s, posterior.sample(4).s)
    np.testing.assert_allclose(on_cpu.predict(ROWS, num_draws=4).probs, before.probs, atol=0.05)


def test_equal_seeds_are_equal_and_no_random_state_moves():
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state()
    a, b = fitted(num_steps=5), fitted(num_steps=5)
    assert torch.equal(torch.get_rng_state(), cpu)
    assert torch.equal(torch.cuda.get_rng_state(), cuda)
    torch.testing.assert_close(a.guide.loc, b.guide.loc, rtol=1e-3, atol=1e-4)


def history_of(*, seed=0, **options):
    llm = base(torch.float32).cuda()
    blora, task = sp.bayesian_lora(llm), sp.MultipleChoice(tiny.tokenizer())
    settings = {"num_steps": 25, "batch_size": 6, **RATES, "progress": False, "seed": seed}
    return sp.fit(blora, task, ROWS, **settings, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_weight": lambda step: step / 10},
        {"optimizer": {"max_grad_norm": 0.5}, "hardware": {"micro_batch_size": 4}},
        {"guide": "full_covariance", "optimizer": {"factor_scale": 1.0}},
        {"guide": "flow"},
    ],
    ids=["plain", "kl schedule", "clipped", "full covariance", "flow"],
)
def test_captured_steps_have_the_losses_and_the_result_of_eager_ones(options, caplog):
    eager_options = {**options, "hardware": {**options.get("hardware", {}), "cuda_graph": False}}
    eager, graphed = history_of(**eager_options), history_of(**options)
    assert "without CUDA graphs" not in caplog.text, caplog.text
    for name in ("loss", "nll", "kl", "grad_norm", "lr", "kl_weight"):
        np.testing.assert_allclose(graphed.history[name], eager.history[name], rtol=2e-3, atol=1e-4, err_msg=name)
    for one, other in zip(graphed.posterior.factors, eager.posterior.factors, strict=True):
        torch.testing.assert_close(one[1], other[1], rtol=1e-2, atol=1e-3)
    other_noise = history_of(seed=1, **options)
    assert not np.allclose(other_noise.history["loss"], graphed.history["loss"], rtol=2e-3)


@pytest.mark.parametrize("name", ["blob", "map_lora", "mc_dropout", "mle"])
def test_baselines_are_captured_with_the_losses_of_eager_steps(name, caplog):
    def losses(cuda_graph):
        llm, task = base(torch.float32).cuda(), sp.MultipleChoice(tiny.tokenizer())
        options = {
            "num_steps": 25,
            "batch_size": 6,
            "lr": 1e-2,
            "progress": False,
            "hardware": {"cuda_graph": cuda_graph},
        }
        return getattr(sp.baselines, name)(llm, task, ROWS, **options).history["loss"]

    np.testing.assert_allclose(losses("auto"), losses(False), rtol=2e-3, atol=1e-4)
    assert "without CUDA graphs" not in caplog.text, caplog.text


def test_the_released_training_has_the_same_losses_with_captured_gradients(caplog):
    def history(cuda_graph):
        llm, task = base(torch.float32).cuda(), sp.MultipleChoice(tiny.tokenizer())
        options = {"num_steps": 25, "batch_size": 6, "lr": 1e-2, "progress": False, "cuda_graph": cuda_graph}
        return sp.baselines.scalabl_released(llm, task, ROWS, **options).history

    eager, graphed = history(False), history(True)
    assert "without CUDA graphs" not in caplog.text, caplog.text
    for name in ("nll", "kl"):
        np.testing.assert_allclose(graphed[name], eager[name], rtol=2e-3, atol=1e-4, err_msg=name)


def test_a_nan_inside_a_captured_step_changes_nothing(caplog):
    class PoisonedLater(sp.MultipleChoice):
        """NaN for row 3 from the sixth call on: by then the step is replayed. The device counts the calls."""

        def __init__(self, tokenizer):
            super().__init__(tokenizer)
            self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)

        def likelihood(self, outputs, batch):
            self.calls.add_(1)
            bad = ((batch.index == 3) & (self.calls > 5)).unsqueeze(-1)  # row 3 is in one batch per epoch
            return super().likelihood(torch.where(bad, torch.nan, outputs), batch)

    blora = sp.bayesian_lora(base(torch.float32).cuda())
    with pytest.raises(sp.TrainingError, match=r"the loss is nan: site 'label' of the model .*examples \[3\]") as told:
        sp.fit(blora, PoisonedLater(tiny.tokenizer()), ROWS, num_steps=16, batch_size=6, progress=False)
    assert told.value.result.posterior.provenance["cuda_graph"]["used"], caplog.text
    assert len(told.value.result.history) >= 5
    assert all(torch.isfinite(p).all() for p in blora.point_estimates.parameters())


def test_what_cannot_be_captured_runs_eagerly_and_says_why(caplog):
    class OnTheHost(sp.MultipleChoice):
        def likelihood(self, outputs, batch):
            assert outputs.mean().item() == outputs.mean().item()  # waits for the GPU, which a capture forbids
            return super().likelihood(outputs, batch)

    blora = sp.bayesian_lora(base(torch.float32).cuda())
    result = sp.fit(blora, OnTheHost(tiny.tokenizer()), ROWS, num_steps=12, batch_size=6, progress=False)
    assert "steps run without CUDA graphs, which this model does not allow" in caplog.text
    assert len(result.history) == 12 and np.isfinite(result.history["loss"]).all()
    torch.empty(3, device="cuda").normal_()  # a failed capture leaves a generator that still draws


def test_a_guide_that_factorizes_matrices_is_captured_and_learns_alike(caplog):
    eager, other = history_of(hardware={"cuda_graph": False}, guide="lowrank"), history_of(guide="lowrank")
    assert other.posterior.provenance["cuda_graph"]["used"], caplog.text
    np.testing.assert_allclose(other.history["loss"], eager.history["loss"], rtol=2e-3)


def test_one_batch_and_chunks_agree():
    posterior = fitted()
    whole = posterior.predict(ROWS, num_draws=8)
    parts = posterior.predict(ROWS, num_draws=8, draws_per_pass=3, batch_size=5)
    np.testing.assert_allclose(whole.probs, parts.probs, atol=0.02)


def test_a_real_out_of_memory_halves_the_draws(monkeypatch, caplog):
    posterior = fitted()
    torch.cuda.empty_cache()
    _, whole = torch.cuda.mem_get_info()
    share = (torch.cuda.memory_reserved() + 400 * 2**20) / whole
    torch.cuda.set_per_process_memory_fraction(share)  # a limit of this process: others on the GPU keep their memory
    try:
        prediction = posterior.predict(ROWS * 40, num_draws=256, batch_size=960)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert prediction.log_probs.shape[0] == 256
    assert "Out of memory: going on with" in caplog.text


def test_a_classifier_with_a_new_head_trains():
    llm = tiny.classifier("bert", dtype=torch.bfloat16).cuda()
    task = sp.SequenceClassification(tiny.tokenizer(), classes=["a", "b", "c"])
    posterior = sp.fit(sp.bayesian_lora(llm), task, tiny.text_rows(24), num_steps=3, progress=False).posterior
    assert posterior.heads["classifier"].weight.dtype == torch.float32
    assert np.isfinite(posterior.predict(tiny.text_rows(6), num_draws=3).log_probs).all()


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_resumed_run_ends_as_the_run_that_was_not_stopped(cuda_graph, tmp_path):
    """Random states of the GPU come back; bits are promised on a CPU alone."""
    options = {"num_steps": 24, "batch_size": 8, "hardware": {"cuda_graph": cuda_graph}, "checkpoint": {"every": 6}}
    whole = fitted(**options)
    fitted(**options, checkpoint_dir=tmp_path, callbacks=[lambda row: row["step"] == 11])
    resumed = fitted(**{**options, "checkpoint": {"every": 6, "resume": True}}, checkpoint_dir=tmp_path)
    torch.testing.assert_close(resumed.guide.loc, whole.guide.loc, rtol=1e-3, atol=1e-4)
    for (A, B), (other_A, other_B) in zip(resumed.factors, whole.factors, strict=True):
        torch.testing.assert_close(A, other_A, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(B, other_B, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("policy", ["skip", "restore"])
def test_steps_that_are_not_finite_are_left_out_though_the_host_looks_late(policy, monkeypatch):
    gradient, calls = sp.training.loop.EagerStep.gradient, []

    def spoiled(self, batch, kl_weight):
        calls.append(None)
        return gradient(self, batch, kl_weight) * (torch.nan if len(calls) == 14 else 1.0)

    monkeypatch.setattr(sp.training.loop.EagerStep, "gradient", spoiled)
    posterior = fitted(on_nonfinite=policy, hardware={"cuda_graph": False})
    assert posterior.provenance["num_steps"] == 29
    assert all(t.isfinite().all() for pair in posterior.factors for t in pair)
