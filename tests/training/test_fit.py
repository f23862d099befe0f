"""Training: what it records, what it refuses, what it leaves alone."""

import dataclasses
import inspect
import logging
import math

import numpy as np
import pyro
import pytest
import tiny
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from torch.utils.data import DataLoader

import scalabl_pyro as sp
from scalabl_pyro._deprecated import ScalaBLDeprecationWarning
from scalabl_pyro._process.random_state import derive_seed
from scalabl_pyro.data import collate, encode
from scalabl_pyro.data.training_batches import TrainingBatches
from scalabl_pyro.guides import Guide, NormalGuide
from scalabl_pyro.training import progress
from scalabl_pyro.training.option_groups import GROUPS, optimizer_with
from scalabl_pyro.training.options import TrainingOptions

ROWS = tiny.question_rows(16)


def fit(blora, task, rows=ROWS, **options):
    return sp.fit(blora, task, rows, **{"num_steps": 3, "batch_size": 8, "progress": False, **options})


def test_it_learns(blora, task):
    result = fit(blora, task, tiny.question_rows(48), num_steps=80, lr=1e-2, lr_A=1e-2, init_scale=0.05)
    assert result.history["loss"].iloc[-5:].mean() < 0.5 * result.history["loss"].iloc[:5].mean()
    assert result.posterior.predict(tiny.question_rows(20, seed=7)).metrics().loc["value", "accuracy"] > 0.9


def test_history_has_units_that_add_up(blora, task):
    history = fit(blora, task, kl_weight=0.5).history
    assert list(history) == ["step", "loss", "nll", "kl", "kl_weight", "grad_norm", "lr", "seconds", "skipped"]
    np.testing.assert_allclose(history["loss"], history["nll"] + 0.5 * history["kl"] / len(ROWS), rtol=1e-6)
    assert (history["kl_weight"] == 0.5).all()
    assert history["seconds"].is_monotonic_increasing


def test_equal_seeds_give_equal_posteriors_and_others_do_not(task):
    def run(seed):
        return fit(sp.bayesian_lora(tiny.causal_lm()), task, seed=seed).posterior

    a, b, c = run(0), run(0), run(1)
    assert torch.equal(a.guide.loc, b.guide.loc)
    assert torch.equal(a.guide.scale, b.guide.scale)
    assert not torch.equal(a.guide.scale, c.guide.scale)


def test_nothing_global_changes(blora, task, unchanged_rng):
    llm = blora.llm
    llm.train()
    llm.model.layers[0].eval()
    modes = [m.training for m in llm.modules()]
    fit(blora, task)
    assert [m.training for m in llm.modules()] == modes
    assert len(pyro.get_param_store()) == 0


def test_learning_rates_warm_up_and_decay_by_group(blora, task):
    rates = []
    fit(blora, task, num_steps=20, lr=1e-3, optimizer={"warmup": 0.25}, callbacks=[lambda r: rates.append(r["lr"])])
    assert rates[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    assert np.all(np.diff(rates[5:]) < 0)
    assert rates[-1] == pytest.approx(1e-3 / 15)


def test_scales_have_a_learning_rate_of_their_own(task):
    def scale_after(lr_scale):
        blora = sp.bayesian_lora(tiny.causal_lm())
        return fit(blora, task, num_steps=1, optimizer={"warmup": 0.0, "lr_scale": lr_scale}).posterior.guide.scale

    seed = derive_seed(0, "initial scales")
    start = sp.guides.as_guide("normal", sp.bayesian_lora(tiny.causal_lm()), seed=seed).scale.detach()
    for lr_scale in (1e-2, 1e-1):
        moved = (scale_after(lr_scale) / start).log().abs()  # Adam's first step is the learning rate
        torch.testing.assert_close(moved, torch.full_like(moved, lr_scale), rtol=1e-2, atol=0)


def test_A_and_B_have_learning_rates_of_their_own(task):
    blora = sp.bayesian_lora(tiny.causal_lm(), gauge="free")  # where A is what is learned, not its directions
    with torch.no_grad():
        for _, B in blora.adapter.factors():
            B.fill_(0.1)  # at B = 0 no gradient reaches A
    start = [(A.clone(), B.clone()) for A, B in blora.adapter.factors()]
    fit(blora, task, num_steps=1, optimizer={"warmup": 0.0}, lr=1e-2, lr_A=1e-4)
    for which, rate in enumerate((1e-4, 1e-2)):
        pairs = zip(start, blora.adapter.factors(), strict=True)
        moved = max((after[which] - before[which]).abs().max().item() for before, after in pairs)
        assert moved == pytest.approx(rate, rel=1e-2)  # Adam's first step is the learning rate


def test_a_new_head_learns_at_the_rate_of_A():
    blora = sp.bayesian_lora(tiny.classifier())
    (head,) = blora.adapter.heads.values()
    start = head.weight.detach().clone()
    classes = sp.SequenceClassification(tiny.tokenizer(), classes=["a", "b", "c"])
    fit(blora, classes, tiny.text_rows(16), num_steps=1, optimizer={"warmup": 0.0}, lr=1e-2, lr_A=1e-4)
    assert (head.weight - start).abs().max().item() == pytest.approx(1e-4, rel=1e-2)


def test_a_learning_rate_must_be_positive(blora, task):
    with pytest.raises(ValueError, match="lr_A=0"):
        fit(blora, task, lr_A=0)


def test_weight_decay_shrinks_factors_only(task):
    def run(weight_decay):
        blora = sp.bayesian_lora(tiny.causal_lm())
        with torch.no_grad():
            for _, B in blora.adapter.factors():
                B.fill_(1.0)
        return fit(blora, task, optimizer={"weight_decay": weight_decay}, lr=1e-2).posterior

    plain, decayed = run(0.0), run(10.0)
    norm = [sum(B.norm() for _, B in p.factors) for p in (plain, decayed)]
    assert norm[1] < 0.95 * norm[0]


@pytest.mark.parametrize("gauge", ["unit_rows", "free"])
def test_weight_decay_leaves_the_directions_of_unit_rows_alone(task, gauge):
    """Decay of rows whose norm does not matter would turn them further in each step, which is no regularization."""

    def factors(weight_decay):
        blora = sp.bayesian_lora(tiny.causal_lm(), gauge=gauge)
        with torch.no_grad():
            for _, B in blora.adapter.factors():
                B.fill_(1.0)
        options = {"weight_decay": weight_decay}
        return fit(blora, task, num_steps=1, lr=1e-2, lr_A=1e-2, optimizer=options).posterior.factors

    pairs = list(zip(factors(0.0), factors(10.0), strict=True))
    assert all(torch.equal(A, decayed) == (gauge == "unit_rows") for (A, _), (decayed, _) in pairs)
    assert not any(torch.equal(B, decayed) for (_, B), (_, decayed) in pairs)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO])
def test_the_history_averages_over_particles_that_run_one_by_one(task, elbo):
    """With q held equal to the prior each particle has log p(s) = log q(s): the KL of the history is 0."""

    def first(num_particles):
        blora = sp.bayesian_lora(tiny.causal_lm(dtype=torch.float64))
        with torch.no_grad():
            for _, B in blora.adapter.factors():
                B.fill_(0.5)
        guide = NormalGuide(torch.zeros(40, dtype=torch.float64), torch.ones(40, dtype=torch.float64))
        options = {"draws": "shared", "num_steps": 1, "guide": guide}
        return fit(blora, task, elbo=elbo(num_particles=num_particles), **options).history.iloc[0]

    row = first(4)
    assert row["kl"] == pytest.approx(0, abs=1e-4)  # TraceGraph_ELBO gives its loss in single precision
    assert row["nll"] == pytest.approx(row["loss"], rel=1e-6)
    assert row["nll"] != pytest.approx(first(1)["nll"], rel=1e-4)


def test_kl_weight_may_change_with_the_step(blora, task):
    history = fit(blora, task, num_steps=4, kl_weight=lambda step: min(1.0, step / 2)).history
    assert list(history["kl_weight"]) == [0, 0.5, 1, 1]
    assert np.isnan(history["kl"].iloc[0])  # at weight 0 the loss does not contain it
    assert history["loss"].iloc[0] == pytest.approx(history["nll"].iloc[0])


@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(),
        Trace_ELBO(num_particles=3, vectorize_particles=True),
        TraceMeanField_ELBO(),
        TraceGraph_ELBO(),
        RenyiELBO(num_particles=2),
        RenyiELBO(alpha=0.5, num_particles=3, vectorize_particles=True),
    ],
)
@pytest.mark.parametrize("draws", ["shared", "per_example"])
def test_any_elbo_of_pyro_drives_it(blora, task, elbo, draws):
    result = fit(blora, task, elbo=elbo, draws=draws)
    assert result.posterior.provenance["elbo"] == type(elbo).__name__
    assert np.isfinite(result.history["loss"]).all()


@pytest.mark.parametrize(
    ("guide", "elbo"),
    [
        ("normal", "TraceMeanField_ELBO"),
        ("delta", "TraceMeanField_ELBO"),
        (AutoNormal, "Trace_ELBO"),
        (AutoMultivariateNormal, "Trace_ELBO"),
        (AutoLowRankMultivariateNormal, "Trace_ELBO"),
        (AutoIAFNormal, "Trace_ELBO"),
    ],
)
def test_the_default_elbo_follows_guide_and_prior(blora, task, guide, elbo):
    result = fit(blora, task, guide=guide)
    assert result.posterior.provenance["elbo"] == elbo
    assert result.posterior.predict(ROWS, num_draws=2).log_probs.shape == (2, 16, 4)


def test_a_prior_without_closed_form_gets_the_sampled_elbo(llm, task):
    blora = sp.bayesian_lora(llm, prior=pyro.distributions.StudentT(4.0, 0.0, 1.0))
    assert fit(blora, task).posterior.provenance["elbo"] == "Trace_ELBO"


def test_callbacks_see_the_history_and_can_stop(blora, task):
    seen = []

    def stop_at_two(record):
        seen.append(record["step"])
        return record["step"] == 2

    result = fit(blora, task, num_steps=10, callbacks=[stop_at_two])
    assert seen == [0, 1, 2]
    assert result.posterior.provenance["num_steps"] == 3


def test_ctrl_c_returns_what_was_learned(blora, task, caplog):
    def interrupt(record):
        if record["step"] == 1:
            raise KeyboardInterrupt

    result = fit(blora, task, num_steps=10, callbacks=[interrupt])
    assert len(result.history) == 2 and result.interrupted
    assert "interrupted after 2 of 10 steps" in caplog.text
    assert not fit(blora, task, num_steps=1, reset=True).interrupted
    result.posterior.predict(ROWS, num_draws=2)


def test_a_loader_of_batches_needs_num_data(blora, task):
    examples = encode(ROWS, task.encode, need_target=True)
    plan = TrainingBatches(examples, 8, task.pad_token_id, seed=0)
    batches = [plan(0), plan(1)]
    with pytest.raises(ValueError, match="size N of the data set is unknown: pass num_data=N"):
        fit(blora, task, batches)
    assert fit(blora, task, batches, num_data=16).posterior.provenance["num_data"] == 16


def test_a_data_loader_knows_its_size(blora, task):
    examples = encode(ROWS, task.encode, need_target=True)
    loader = DataLoader(
        list(enumerate(examples)),
        batch_size=4,
        collate_fn=lambda pairs: collate([e for _, e in pairs], [i for i, _ in pairs], task.pad_token_id),
    )
    assert fit(blora, task, loader, num_steps=6).posterior.provenance["num_data"] == 16


def test_a_generator_that_runs_dry_is_explained(blora, task):
    plan = TrainingBatches(encode(ROWS, task.encode, need_target=True), 8, task.pad_token_id, seed=0)
    with pytest.raises(ValueError, match="no batches the second time: pass something that can be restarted"):
        fit(blora, task, (plan(i) for i in range(2)), num_data=16, num_steps=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": "each"}, "draws='each' is unknown"),
        ({"optimizer": {"schedule": "cosine"}}, "schedule='cosine' is unknown"),
        ({"num_steps": 0}, "num_steps=0 must be a whole number, 1 or more"),
        ({"lr": -1.0}, "lr=-1.0 must be positive"),
        ({"init_scale": 0.0}, "init_scale=0.0"),
        ({"guide": "norml"}, "guide='norml' is unknown. Did you mean 'normal'"),
        ({"num_data": 7}, "num_data=7, but train_data has 16 rows"),
        ({"kl_weight": -0.5}, "kl_weight=-0.5"),
        ({"optimizer": {"warmup": 2.0}}, "warmup=2.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(blora, task, options, message):
    with pytest.raises(ValueError, match=message):
        fit(blora, task, **options)


OUT_OF_RANGE = (-1.0, 0.0, math.nan, math.inf)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({r: value}, f"{r}={value}") for r in ("lr", "lr_A", "init_scale") for value in OUT_OF_RANGE),
        *(
            ({"optimizer": {r: value}}, f"{r}={value}")
            for r in ("lr_loc", "lr_scale", "factor_scale")
            for value in OUT_OF_RANGE
        ),
        *(({"optimizer": {"weight_decay": value}}, f"weight_decay={value}") for value in (-1.0, math.nan, math.inf)),
        *(({"optimizer": {"max_grad_norm": value}}, f"max_grad_norm={value}") for value in (-1, 0, math.nan)),
        *(({"optimizer": {"warmup": value}}, f"warmup={value}") for value in (-0.1, math.nan, True)),
        *(({"kl_weight": value}, f"kl_weight={value}") for value in (math.nan, math.inf)),
        *(({name: value}, f"{name}={value}") for name in ("num_steps", "batch_size") for value in (True, 2.5, 0, -1)),
        *(({"hardware": {"micro_batch_size": value}}, f"micro_batch_size={value}") for value in (True, 2.5, 0)),
        ({"callbacks": print}, "callbacks=.*expected a list of functions"),
        ({"callbacks": [3]}, "callbacks=.*expected a list of functions"),
        ({"hardware": {"cache_prefix": "yes"}}, "cache_prefix='yes': expected True or False"),
        ({"seed": 0.5}, "seed=0.5: expected an integer"),
        ({"optimizer": 0.1}, r"optimizer=0.1: expected scalabl_pyro.OptimizerOptions\(...\), or a dict"),
        ({"hardware": ["cuda_graph"]}, r"hardware=.*expected scalabl_pyro.HardwareOptions\(...\), or a dict"),
        ({"optimizer": {"warm_up": 0.1}}, "OptimizerOptions has no option 'warm_up'. Did you mean 'warmup'"),
        ({"checkpoint": {"evry": 1}}, "CheckpointOptions has no option 'evry'. Did you mean 'every'"),
        (
            {"hardware": {"cuda_graphs": True}},
            "HardwareOptions has no option 'cuda_graphs'. Did you mean 'cuda_graph'",
        ),
        ({"hardware": {3: True}}, "HardwareOptions has no option 3. Known names"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite='ignore' is unknown"),
        *(({name: np.array(["shared", "raise"])}, f"{name}=.* is unknown") for name in ("draws", "on_nonfinite")),
        *(
            ({name: value}, f"{name}=.*: expected True or")
            for name in ("progress", "reset")
            for value in ("no", 1, None)
        ),
        *(({"checkpoint": {"resume": value}}, "resume=.*: expected True, False or 'auto'") for value in (1, 0, "no")),
        *(({"hardware": {"cuda_graph": value}}, "cuda_graph=.*: expected True, False or") for value in (1, [1, 2])),
        *(({"kl_weight": value}, "kl_weight=.*: expected a number") for value in (True, np.ones(2), torch.ones(2))),
        *(({"num_data": value}, "num_data=.* must be a whole number") for value in (True, 16.5, -1, np.ones(2))),
        *(({"checkpoint_dir": value}, "checkpoint_dir.*expected the path of a folder") for value in (3, b"x", "")),
        ({"seed": 2**64}, "seed=18446744073709551616: expected an integer of at most 64 bits"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused_before_anything_starts(blora, task, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fit(blora, task, **options)


def test_numbers_of_numpy_are_numbers(task, tmp_path):
    """They give the same run: it resumes with Python's numbers, and another rate makes it another run."""

    def run(integer, real, lr=1e-3):
        blora = sp.bayesian_lora(tiny.causal_lm(), r=integer(2), lora_alpha=real(4), layers_to_transform=integer(1))
        optimizer = {"lr_scale": real(0.5), "warmup": real(0.25), "max_grad_norm": real(1)}
        groups = {"optimizer": optimizer, "checkpoint": {"every": integer(1)}}
        groups |= {"hardware": {"micro_batch_size": integer(4)}, "checkpoint_dir": tmp_path / "run"}
        numbers = {"num_steps": integer(2), "batch_size": integer(8), "seed": integer(3), "num_data": integer(16)}
        return fit(blora, task, lr=real(lr), kl_weight=real(0.5), **numbers, **groups).posterior

    first = run(np.int64, np.float32)
    first.save_pretrained(tmp_path / "saved")
    assert torch.equal(run(int, lambda value: float(np.float32(value))).mean(), first.mean())
    with pytest.raises(ValueError, match="lr"):
        run(np.int64, np.float32, lr=2e-3)


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63)])
def test_every_seed_of_64_bits_works(blora, task, seed):
    assert fit(blora, task, num_steps=1, seed=seed).posterior.sample(1, seed=seed).s.isfinite().all()


@pytest.mark.filterwarnings("default::scalabl_pyro._deprecated.ScalaBLDeprecationWarning")  # two at once
def test_old_flat_options_work_for_a_release_and_say_where_they_went(task):
    def run(**options):
        return fit(sp.bayesian_lora(tiny.causal_lm()), task, **options).posterior.guide.loc

    groups = {"optimizer": sp.OptimizerOptions(lr_loc=0.5, schedule="constant")}
    with pytest.warns(
        DeprecationWarning, match=r"loc_lr= is now given as optimizer=OptimizerOptions\(lr_loc=...\)"
    ) as seen:
        old = run(loc_lr=0.5, schedule="constant")
    assert all(
        w.filename == __file__
        for w in seen
        if w.category is ScalaBLDeprecationWarning and "is now given" in str(w.message)
    )
    assert torch.equal(run(**groups), old)
    with pytest.warns(DeprecationWarning, match="schedule= is now given as"):
        assert torch.equal(run(optimizer=sp.OptimizerOptions(lr_loc=0.5), schedule="constant"), old)
    with pytest.warns(DeprecationWarning), pytest.raises(TypeError, match=r"got lr_loc= and lr_loc in Optimizer"):
        run(lr_loc=0.1, **groups)
    with pytest.warns(DeprecationWarning, match="schedule= is now given as"):
        assert torch.equal(run(optimizer={"lr_loc": 0.5}, schedule="constant"), old)
    with pytest.warns(DeprecationWarning), pytest.raises(TypeError, match=r"got lr_loc= and lr_loc in Optimizer"):
        run(lr_loc=0.1, optimizer={"lr_loc": 0.5})
    with pytest.warns(DeprecationWarning), pytest.raises(TypeError, match=r"optimizer=3: expected"):
        run(lr_loc=0.1, optimizer=3)


def test_groups_may_be_dicts(task, tmp_path):
    def run(**groups):
        return fit(sp.bayesian_lora(tiny.causal_lm()), task, **groups).posterior.guide.loc

    groups = {
        "optimizer": {"lr_loc": 0.5, "schedule": "constant"},
        "checkpoint": {"every": 1, "keep": 1},
        "hardware": {"micro_batch_size": 4},
    }
    made = {name: GROUPS[name](**options) for name, options in groups.items()}
    assert torch.equal(run(**groups, checkpoint_dir=tmp_path / "a"), run(**made, checkpoint_dir=tmp_path / "b"))
    assert len(list((tmp_path / "a").iterdir())) == 1


@pytest.mark.parametrize("given", [None, {}, sp.OptimizerOptions(), {"warmup": 0.5}, sp.OptimizerOptions(warmup=0.5)])
def test_a_method_with_rates_of_its_own_leaves_the_callers_alone(given):
    options = optimizer_with(given, lr_scale=0.7)
    assert options.lr_scale == 0.7
    assert options.warmup == (0.5 if given and given != sp.OptimizerOptions() else 0.06)
    default = sp.OptimizerOptions().lr_scale
    for own in ({"lr_scale": 0.1}, sp.OptimizerOptions(lr_scale=0.1)):
        assert optimizer_with(own, lr_scale=0.7).lr_scale == 0.1
    assert optimizer_with({"lr_scale": default}, lr_scale=0.7).lr_scale == default


def test_fit_has_few_options_and_groups_cannot_change():
    assert len(inspect.signature(sp.fit).parameters) <= 26  # 32 before the groups
    for group in (*(kind() for kind in GROUPS.values()), TrainingOptions()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group, dataclasses.fields(group)[0].name, 1)


def test_the_identity_of_a_run_has_what_changes_its_numbers_and_nothing_else():
    base = TrainingOptions()
    same = dataclasses.replace(
        base,
        on_nonfinite="skip",
        checkpoint=sp.CheckpointOptions(every=3, keep=9, resume=False),
        hardware=sp.HardwareOptions(micro_batch_size=2, cuda_graph=False, gradient_checkpointing=True),
    )
    assert same.identity() == base.identity()
    for change in ({"lr": 1.0}, {"seed": 1}, {"optimizer": sp.OptimizerOptions(warmup=0.5)}):
        assert dataclasses.replace(base, **change).identity() != base.identity()


def test_order_initial_scales_and_noise_have_streams_of_their_own():
    """Correlations of 10,000 numbers lie within 5 standard errors of 0; one shared seed gives 0.7 and more."""
    n = 10_000
    seeds = {"order": 0, "scales": derive_seed(0, "initial scales"), "noise": derive_seed(0, "noise")}
    assert len(set(seeds.values())) == 3
    generators = {name: torch.Generator().manual_seed(seed) for name, seed in seeds.items()}
    streams = {name: torch.rand(n, generator=generator) for name, generator in generators.items()}
    streams["normal noise"] = torch.randn(n, generator=torch.Generator().manual_seed(seeds["noise"]))
    for a, b in [("order", "scales"), ("order", "noise"), ("scales", "noise"), ("scales", "normal noise")]:
        correlation = np.corrcoef(streams[a], streams[b])[0, 1]
        assert abs(correlation) < 5 / math.sqrt(n), (a, b)


def test_the_first_noise_of_a_fit_does_not_follow_its_initial_scales(task):
    """The same over 60 seeds, in fit itself: scales at the start, and the first draw of s."""
    scales, noise = [], []

    class Watched(sp.guides.NormalGuide):
        def forward(self, *args, **kwargs):
            s = super().forward(*args, **kwargs)
            if not first:
                first.append((s.reshape(-1, s.shape[-1])[0] - self.loc) / self.scale)
            return s

    blora = sp.bayesian_lora(tiny.causal_lm())
    for seed in range(20):
        first: list[torch.Tensor] = []

        def guide(blora, seed=seed):
            plain = sp.guides.as_guide("normal", blora, seed=derive_seed(seed, "initial scales"))
            scales.append(plain.scale.detach())
            return Watched(plain.loc.detach(), plain.scale.detach())

        fit(blora, task, guide=guide, num_steps=1, seed=seed, draws="shared")
        noise.append(first[0].detach())
    x, y = torch.cat(scales).numpy(), torch.cat(noise).numpy()
    assert abs(np.corrcoef(x, y)[0, 1]) < 5 / math.sqrt(len(x))


def test_a_result_shows_itself_in_a_few_lines_and_as_a_table(blora, task):
    result = fit(blora, task)
    shown = repr(result)
    assert shown.startswith("FitResult(steps=3, loss=") and "kl=" in shown and "posterior: " in shown
    assert len(shown) < 1500 and len(shown.splitlines()) <= 20
    assert "tensor(" not in shown
    table = result._repr_html_()
    assert table.startswith("<table>") and "<th>steps</th><td>3</td>" in table and len(table) < 1500


@pytest.mark.parametrize("guide", [3, lambda blora: "nonsense", AutoNormal.__init__])
def test_things_that_are_no_guide_are_refused(blora, task, guide):
    with pytest.raises(TypeError):
        fit(blora, task, guide=guide)


class Wrong(Guide):
    """A guide with a fault to order."""

    def __init__(self, dim, fault):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(dim))
        self.fault = fault

    def forward(self, *args, **kwargs):
        name, shape = ("z" if self.fault == "name" else "s"), (self.loc[:3] if self.fault == "shape" else self.loc)
        value = pyro.sample(name, pyro.distributions.Normal(shape, 1.0).to_event(1))
        if self.fault == "extra":
            pyro.sample("invented", pyro.distributions.Normal(0.0, 1.0))
        return value

    def mean(self):
        return {"s": self.loc}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("name", r"The guide does not sample \['s'\]"),
        ("extra", r"The guide samples \['invented'\], which the prior lacks"),
        ("shape", r"Site 's' has shape \(3,\) in the guide, \(40,\) in the prior"),
    ],
)
def test_a_guide_that_does_not_fit_the_prior_is_explained(blora, task, fault, message):
    with pytest.raises(ValueError, match=message):
        fit(blora, task, guide=Wrong(blora.subspace.dim, fault))


def test_a_guide_outside_the_support_of_the_prior_is_explained(llm, task):
    blora = sp.bayesian_lora(llm, prior=pyro.distributions.HalfNormal(1.0))
    loc = blora.adapter.loc
    with pytest.raises(ValueError, match="outside the support of its prior"):
        fit(blora, task, guide=sp.guides.NormalGuide(loc, torch.full_like(loc, 5.0)))
    guide = fit(blora, task).posterior.guide  # "normal" takes the support of the prior
    assert (guide.mean()["s"] > 0).all()


class Poisoned(sp.MultipleChoice):
    """Gives NaN from some step on."""

    def __init__(self, *args, at, **options):
        super().__init__(*args, **options)
        self.at, self.calls = at, 0

    def likelihood(self, outputs, batch):
        self.calls += 1
        if self.calls > self.at:
            outputs = torch.where((batch.index == batch.index.max()).unsqueeze(-1), torch.nan, outputs)
        return super().likelihood(outputs, batch)


@pytest.mark.parametrize("at", [0, 2])
def test_a_nan_loss_stops_before_the_update_and_says_where(blora, tokenizer, at):
    def snapshot(record=None):
        snapshots.append({n: p.detach().clone() for n, p in blora.point_estimates.named_parameters()})

    snapshots = []
    snapshot()
    message = rf"At step {at}: the loss is nan: site 'label' of the model .*examples \[1\d\]"
    with pytest.raises(sp.TrainingError, match=message) as caught:
        fit(blora, Poisoned(tokenizer, at=at), num_steps=5, callbacks=[snapshot])
    for name, parameter in blora.point_estimates.named_parameters():
        before = snapshots[-1][name]
        if name.endswith("/A"):
            before = torch.nn.functional.normalize(before, dim=-1)  # what fit leaves has unit rows
        torch.testing.assert_close(parameter, before)
    result = caught.value.result  # nothing is lost
    if at == 0:
        assert result is None
    else:
        assert len(result.history) == at
        assert torch.isfinite(result.posterior.guide.loc).all()


def test_a_gradient_that_is_not_finite_stops_before_the_update(blora, task):
    A, _ = blora.adapter.factors()[0]
    A.register_hook(lambda grad: grad * torch.inf)
    before = A.detach().clone()
    with pytest.raises(FloatingPointError, match="At step 0: the loss is finite, but its gradient is not"):
        fit(blora, task)
    torch.testing.assert_close(A.detach(), before)


def test_gradients_can_be_clipped(task):
    def run(limit):
        blora = sp.bayesian_lora(tiny.causal_lm())
        return fit(blora, task, num_steps=2, optimizer={"max_grad_norm": limit}).posterior.factors[0][1]

    assert not torch.equal(run(1e-6), run(None))


def test_the_progress_bar_shows_the_loss(blora, task, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_shows_bars", lambda: True)
    fit(blora, task, progress=True)
    assert "loss=" in capsys.readouterr().err


def test_a_log_file_gets_twenty_lines_instead_of_a_bar(blora, task, capsys):
    result = fit(blora, task, num_steps=60, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 20 and "\r" not in "".join(lines)
    assert lines[-1].startswith(f"fit: step 60 of 60, loss {result.history['loss'].iloc[-1]:.4g}, nll ")
    assert lines[-1].endswith("passed, 00:00 left)")


def test_cut_prompts_are_reported(blora, tokenizer, caplog):
    task = sp.MultipleChoice(tokenizer, max_length=21)
    with caplog.at_level(logging.WARNING):
        fit(blora, task)
    assert "longer than max_length and lost a part of their text" in caplog.text


def test_real_rows_train_a_step(blora, tokenizer, shared_data):
    task = sp.MultipleChoice(tokenizer, max_length=60)
    rows = sp.data.read_rows(shared_data / "text" / "trec_train.jsonl")[:16]
    assert np.isfinite(fit(blora, task, rows, num_steps=1).history["loss"]).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("yes", "cuda_graph='yes': expected True, False or 'auto'"),
        (True, "cuda_graph=True, but the model is not on a CUDA device"),
    ],
)
def test_a_graph_that_cannot_be_is_refused(blora, task, given, message):
    with pytest.raises(ValueError, match=message):
        fit(blora, task, num_steps=1, hardware={"cuda_graph": given})
