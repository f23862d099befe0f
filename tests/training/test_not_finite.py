"""Numbers that are not finite, or that float32 cannot square: refused at the call, in a step, in a file."""

import json
import math

import pyro.distributions as dist
import pytest
import tiny
import torch

import scalabl_pyro as sp
from scalabl_pyro.baselines.released_step import AlternatingStep
from scalabl_pyro.guides import as_guide
from scalabl_pyro.storage.budget import Budget
from scalabl_pyro.storage.manifest import Manifest
from scalabl_pyro.storage.tensor_files import read_tensors, write_tensors
from scalabl_pyro.training.update_check import UpdateCheck, logarithms_of

ROWS = tiny.question_rows(8)
NAN, INF = math.nan, math.inf


def fit(blora=None, **options):
    blora = blora or sp.bayesian_lora(tiny.causal_lm(), target_modules=["q_proj"])
    options = {"num_steps": 3, "batch_size": 4, "progress": False, **options}
    return sp.fit(blora, sp.MultipleChoice(tiny.tokenizer()), ROWS, **options)


# at the call ----------------------------------------------------------------------------------------------------------

#: Calls, and the values that each option must refuse beside NaN and infinity.
OPTIONS = {
    "lr": (lambda v: fit(lr=v), [0.0, -1.0]),
    "lr_A": (lambda v: fit(lr_A=v), [0.0, -1.0]),
    "kl_weight": (lambda v: fit(kl_weight=v), [-1.0]),
    "kl_weight of a step": (lambda v: fit(kl_weight=lambda step: v), [-1.0]),
    "init_scale": (lambda v: fit(init_scale=v), [0.0, -1.0, 1e38, 1e-38]),
    "num_data": (lambda v: fit(num_data=v), [0, -1, 1.5]),
    "num_steps": (lambda v: fit(num_steps=v), [0, -1, 1.5]),
    "lr_loc": (lambda v: fit(optimizer={"lr_loc": v}), [0.0, -1.0]),
    "lr_scale": (lambda v: fit(optimizer={"lr_scale": v}), [0.0, -1.0]),
    "weight_decay": (lambda v: fit(optimizer={"weight_decay": v}), [-1.0, 1e38]),
    "factor_scale": (lambda v: fit(optimizer={"factor_scale": v}), [0.0, -1.0, 1e300, 1e-300]),
    "warmup": (lambda v: fit(optimizer={"warmup": v}), [-0.1, 1.1]),
    "max_grad_norm": (lambda v: fit(optimizer={"max_grad_norm": v}), [0.0, -1.0]),
    "lora_alpha": (lambda v: sp.bayesian_lora(tiny.causal_lm(), lora_alpha=v), [0.0, -1.0, 1e38]),
    "lora_dropout": (lambda v: sp.bayesian_lora(tiny.causal_lm(), lora_dropout=v), [-0.1, 1.0]),
    "prior": (lambda v: sp.bayesian_lora(tiny.causal_lm(), prior=v), [0.0, -1.0, 1e38, 1e-38]),
    "scale of a prior": (lambda v: with_prior(dist.Normal(0.0, v, validate_args=False)), [0.0, -1.0, 1e300]),
    "loc of a prior": (lambda v: with_prior(dist.Normal(v, 1.0, validate_args=False)), [1e300]),
    "prior of a layer": (lambda v: with_prior(lambda layer: dist.Laplace(0.0, v, validate_args=False)), [0.0, -1.0]),
    "horseshoe": (lambda v: with_prior(sp.priors.HorseshoePrior(v)), [0.0, -1.0, 1e38]),
    "slab": (lambda v: with_prior(sp.priors.HorseshoePrior(slab=v)), [0.0, 1e38]),
    "hierarchical": (lambda v: with_prior(sp.priors.HierarchicalPrior(v)), [0.0, 1e38]),
    "empirical": (lambda v: with_prior(sp.priors.EmpiricalBayesPrior(scale=v)), [0.0, 1e38]),
    "mask": (lambda v: with_prior(sp.priors.RankMaskPrior(v)), [0.0, -1.0, 1.1]),
}


def with_prior(prior):
    return sp.bayesian_lora(tiny.causal_lm(), prior=prior)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_refused_at_the_call(name):
    call, more = OPTIONS[name]
    for value in (NAN, *([] if name == "max_grad_norm" else [INF]), -INF, *more):
        with pytest.raises((ValueError, TypeError)):
            call(value)


#: Calls on a posterior.
OF_POSTERIORS = {
    "num_draws": (lambda p, v: p.predict(ROWS, num_draws=v), [-1, 1.5]),
    "prior_scale": (lambda p, v: sp.laplace(p, ROWS, prior_scale=v), [0.0, -1.0, 1e38]),
    "jitter": (lambda p, v: sp.mcmc(p, ROWS, jitter=v, progress=False), [-1.0]),
    "target_accept": (lambda p, v: sp.mcmc(p, ROWS, target_accept=v, progress=False), [0.0, 1.0]),
    "lr of refit": (lambda p, v: sp.refit(p, ROWS, lr=v, progress=False), [0.0, -1.0]),
    "spread": (lambda p, v: sp.ensemble(p, ROWS, spread=v, progress=False), [-1.0]),
    "laplace_lora": (lambda p, v: sp.baselines.laplace_lora(p, ROWS, prior_scale=v), [0.0, 1e38]),
    "tolerance": (lambda p, v: sp.baselines.tfb(p, ROWS, tolerance=v), [0.0, -1.0]),
    "max_scale": (lambda p, v: sp.baselines.tfb(p, ROWS, max_scale=v), [0.0, 1e38]),
    "temperature": (lambda p, v: sp.baselines.TemperatureScaled(p, v), [0.0, -1.0, 1e38]),
    "p": (lambda p, v: baseline("mc_dropout", p=v), [-0.1, 1.0]),
    "scale": (lambda p, v: baseline("map_lora", scale=v), [0.0, 1e38]),
    "blob": (lambda p, v: baseline("blob", prior_scale=v), [0.0, 1e38]),
    "lr of mle": (lambda p, v: baseline("mle", lr=v), [0.0, -1.0]),
    "lr_kl": (lambda p, v: baseline("scalabl_released", lr_kl=v), [0.0, -1.0]),
    "gamma": (lambda p, v: baseline("scalabl_released", gamma=v), [0.0, -1.0]),
    "warmup": (lambda p, v: baseline("scalabl_released", warmup=v), [-0.1, 1.1]),
}


def baseline(name, **options):
    task = sp.MultipleChoice(tiny.tokenizer())
    getattr(sp.baselines, name)(tiny.causal_lm(), task, ROWS, num_steps=1, progress=False, **options)


@pytest.fixture(scope="module")
def posterior():
    return fit().posterior


@pytest.mark.parametrize("name", OF_POSTERIORS)
def test_options_of_what_starts_from_a_posterior_are_refused_at_the_call(posterior, name):
    call, more = OF_POSTERIORS[name]
    for value in (NAN, INF, -INF, *more):
        with pytest.raises((ValueError, TypeError)):
            call(posterior, value)


# an update ------------------------------------------------------------------------------------------------------------

TOO_LARGE = {
    "lr": {"lr": 1e38},
    "lr that float32 can hold": {"lr": 1e30},
    "lr beyond float32": {"lr": 1e300},
    "lr_loc": {"optimizer": {"lr_loc": 1e30}},
    "lr_scale": {"optimizer": {"lr_scale": 1e3}},
}


@pytest.mark.parametrize("policy", ["raise", "skip", "restore"])
@pytest.mark.parametrize("name", TOO_LARGE)
def test_an_update_that_is_too_large_is_taken_back_at_once(name, policy):
    blora = sp.bayesian_lora(tiny.causal_lm(), target_modules=["q_proj"])
    guide = as_guide("normal", blora)
    trained = [*guide.parameters(), *blora.point_estimates.parameters()]
    before = [p.detach().clone() for p in trained]
    with pytest.raises(sp.TrainingError, match=r"At step 0: the update was too large: .* was taken back"):
        fit(blora, guide=guide, on_nonfinite=policy, **TOO_LARGE[name])
    for parameter, value in zip(trained, before, strict=True):
        assert torch.equal(parameter, value)


def test_the_parameter_is_named():
    with pytest.raises(sp.TrainingError, match="a scale of the guide was not finite any more"):
        fit(optimizer={"lr_scale": 1e3})


def test_parameters_are_put_back_by_their_bits():
    """As a GPU does it, without a branch."""
    start = [torch.randn(5), torch.tensor([0.0, -0.0, 1e-40]), torch.randn(3, dtype=torch.float64)]
    start += [torch.randn(4).bfloat16(), torch.empty(0)]
    for bad in (False, True):
        check = UpdateCheck([t.clone() for t in start])
        check.keep()
        after = [t * 2 for t in start]
        after[0][1], after[2][0] = torch.nan, torch.inf
        for parameter, value in zip(check.parameters, after, strict=True):
            parameter.copy_(value)
        check._put_back_where(torch.tensor(bad))
        for parameter, value in zip(check.parameters, start if bad else after, strict=True):
            bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
            assert torch.equal(parameter.view(bits), value.view(bits))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_the_quick_check_changes_no_bit(value):
    start = [torch.randn(5), torch.tensor([0.0, -0.0, 1e-40, 3e38]), torch.empty(0)]
    check = UpdateCheck([t.clone() for t in start], largest_rate=1e-2)
    assert check.is_quick
    check.keep()
    assert check.settle() == 0
    for parameter, own in zip(check.parameters, start, strict=True):
        assert torch.equal(parameter.view(torch.int32), own.view(torch.int32))
    check.parameters[1][2] = value
    assert check.settle() == INF and [id(p) for p in check.rejected] == [id(check.parameters[1])]
    for parameter, own in zip(check.parameters, start, strict=True):
        assert torch.equal(parameter.view(torch.int32), own.view(torch.int32))
    assert check.settle() == 0


def test_scales_are_known_to_be_logarithms(blora):
    guide = as_guide("normal", blora)
    assert [id(p) for p in logarithms_of(guide)] == [id(guide.scale_unconstrained)]
    horseshoe = sp.bayesian_lora(tiny.causal_lm(), prior="empirical")
    assert len(logarithms_of(horseshoe.prior)) == 1


class Latents(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.ones(2))

    def draw(self):
        return self.loc

    def kl(self):
        return self.loc.square().sum()


@pytest.mark.parametrize(("rates", "left"), [({"lr": 1e30, "lr_kl": 0.1}, 1.0), ({"lr": 0.1, "lr_kl": 1e30}, 0.9)])
def test_the_released_step_takes_back_the_one_of_its_updates_that_was_too_large(rates, left):
    latents = Latents()
    step = AlternatingStep(latents, [], **rates)
    with pytest.raises(FloatingPointError, match="too large and was taken back"):
        step(lambda s: s.sum(), weight=1.0, rate=1.0)
    torch.testing.assert_close(latents.loc.detach(), torch.full((2,), left))


# a file ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("where", ["factor", "guide", "prior"])
def test_a_posterior_that_is_not_finite_is_not_saved(tmp_path, value, where):
    posterior = fit().posterior
    tensor = {
        "factor": posterior.factors[0][0],
        "guide": posterior.guide.scale_unconstrained,
        "prior": posterior.prior.loc,
    }[where]
    with torch.no_grad():
        tensor.view(-1)[0] = value
    name = {"factor": "lora_A.weight", "guide": "guide.scale_unconstrained|draw of its guide", "prior": "prior.loc"}
    with pytest.raises(ValueError, match=name[where]):
        posterior.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_posterior_whose_draws_are_not_finite_is_not_saved(tmp_path):
    posterior = fit().posterior
    with torch.no_grad():
        posterior.guide.scale_unconstrained[0] = 1000.0
    with pytest.raises(ValueError, match="a draw of its guide holds NaN or infinity"):
        posterior.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def spoil_checkpoint(folder, change):
    """Change the tensors of the newest checkpoint, and its manifest with them."""
    path = max(folder.glob("step-*"))
    tensors = read_tensors(path, "tensors.safetensors", limit=2**30, budget=Budget(), finite=False)
    change(tensors)
    (path / "tensors.safetensors").unlink()
    write_tensors(path / "tensors.safetensors", tensors, finite=False)
    manifest = json.loads((path / "manifest.json").read_text())
    files = Manifest.of_folder(path).to_json()
    manifest["files"] = {name: files[name] for name in manifest["files"]}
    (path / "manifest.json").write_text(json.dumps(manifest))


SPOILT = {
    "negative second moments": ("exp_avg_sq", -1.0),
    "second moments that are NaN": ("exp_avg_sq", NAN),
    "moments that are infinite": ("exp_avg", INF),
    "a negative count": ("step", -5.0),
    "a negative step": ("history.step", -5.0),
    "a step that is NaN": ("history.step", NAN),
    "a parameter that is NaN": ("loc", NAN),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_checkpoint_with_such_numbers_is_not_resumed(tmp_path, name):
    ending, value = SPOILT[name]
    fit(checkpoint_dir=tmp_path, callbacks=[lambda row: row["step"] == 1], checkpoint={"every": 1})

    def change(tensors):
        learned = [k for k in tensors if not k.startswith("history.") and k.endswith("." + ending)]
        key = learned[0] if learned else ending
        tensors[key].view(-1)[0] = value

    spoil_checkpoint(tmp_path, change)
    with pytest.raises(ValueError, match=f"cannot be resumed from: .*{ending.split('.')[-1]}.* (negative|not finite)"):
        fit(checkpoint_dir=tmp_path, checkpoint={"every": 1})


@pytest.mark.parametrize("state", ["exp_avg_sq", "exp_avg"])
def test_a_checkpoint_with_moments_that_are_not_finite_is_not_written(tmp_path, caplog, state, monkeypatch):
    made = []
    build = sp.training.build_trainer.build_optimizer
    trainer = sp.training.build_trainer
    monkeypatch.setattr(trainer, "build_optimizer", lambda *a, **k: made.append(build(*a, **k)) or made[0])

    def spoil(row):
        if row["step"] == 1:
            moments = next(iter(made[0].state.values()))
            moments[state].fill_(torch.inf)

    with pytest.raises(sp.TrainingError):
        fit(num_steps=2, checkpoint_dir=tmp_path, callbacks=[spoil], checkpoint={"every": 1})
    assert f"is not saved: optimizer.0.{state}" in caplog.text
    assert not (tmp_path / "step-00000002").exists()


# the same run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.5), (0.5, 0.0), (0.5, 0.25)])
def test_another_dropout_is_another_run(tmp_path, before, after):
    def adapted(chance):
        return sp.bayesian_lora(tiny.causal_lm(), target_modules=["q_proj"], lora_dropout=chance)

    fit(adapted(before), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=f"another run: lora_dropout is {after}, was {before}"):
        fit(adapted(after), checkpoint_dir=tmp_path)
    fit(adapted(before), checkpoint_dir=tmp_path)
