"""What every baseline can do, and the formula that defines each of the simple ones."""

import json
import math

import numpy as np
import pyro.distributions as dist
import pytest
import tiny
import torch
from pyro.infer.autoguide import AutoDelta
from torch import nn

import scalabl_pyro as sp
from scalabl_pyro import baselines
from scalabl_pyro._process.random_state import scoped_seed
from scalabl_pyro.baselines.dropout import DropoutLoRA
from scalabl_pyro.baselines.factor_posterior import as_function, plain_factors
from scalabl_pyro.baselines.predictor import predict_functions
from scalabl_pyro.baselines.released_kl import LogNormals, reversed_kl
from scalabl_pyro.baselines.released_step import AlternatingStep
from scalabl_pyro.baselines.temperature import apply_temperature, fit_temperature
from scalabl_pyro.lora.binding import RowNoise
from scalabl_pyro.prediction.predict import NumericPrediction, Prediction

ROWS, TEST = tiny.question_rows(24), tiny.question_rows(11, seed=1)
LORA = {"r": 4}
FIT = {"num_steps": 25, "batch_size": 8, "progress": False, "lora": LORA}
MLE = {**FIT, "lr": 1e-2, "optimizer": {"warmup": 0.0}}


def task():
    return sp.MultipleChoice(tiny.tokenizer())


def mle_posterior(module, options):
    return baselines.mle(module, task(), ROWS, **options).posterior


def ensemble(module, options):
    return baselines.deep_ensemble(module, task(), ROWS, num_members=2, **options).posterior


#: method -> (base model, options of the training -> posterior). Each starts from the base model, as a user would.
METHODS = {
    "mle": mle_posterior,
    "map_lora": lambda m, o: baselines.map_lora(m, task(), ROWS, scale=0.5, **o).posterior,
    "mc_dropout": lambda m, o: baselines.mc_dropout(m, task(), ROWS, p=0.3, **o).posterior,
    "deep_ensemble": ensemble,
    "temperature": lambda m, o: baselines.temperature_scaling(mle_posterior(m, o), TEST),
    "temperature of an ensemble": lambda m, o: baselines.temperature_scaling(ensemble(m, o), TEST),
    "blob": lambda m, o: baselines.blob(m, task(), ROWS, kl_weight=0.01, **o).posterior,
    "tfb": lambda m, o: baselines.tfb(mle_posterior(m, o), ROWS, tolerance=0.2, num_draws=3, num_bisections=5),
    "laplace_lora": lambda m, o: baselines.laplace_lora(mle_posterior(m, o), ROWS, prior_scale=0.1),
    "laplace_lora, sampled": lambda m, o: baselines.laplace_lora(
        mle_posterior(m, o), ROWS, prior_scale=0.05, linearized=False, exact_up_to=8, rank=6
    ),
    "scalabl_released": lambda m, o: (
        baselines.scalabl_released(
            m, task(), ROWS, **{k: v for k, v in o.items() if k != "optimizer"}, **o["optimizer"]
        ).posterior
    ),
}
#: Methods whose draws are all the same function, and those that have one draw per member.
POINTS = ("mle", "map_lora", "temperature")
SEEDLESS = (*POINTS, "deep_ensemble", "temperature of an ensemble")


@pytest.fixture(scope="module")
def trained():
    """Name -> posterior, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = METHODS[name](tiny.causal_lm(), MLE)
        return made[name]

    return get


@pytest.fixture(scope="module")
def untrained_nll():
    """Return the NLL of the base model: an adapter adds nothing before it is trained."""
    posterior = mle_posterior(tiny.causal_lm(), {**MLE, "num_steps": 1, "lr": 1e-12})
    return posterior.predict(ROWS, num_draws=0).metrics().loc["value", "nll"]


@pytest.mark.parametrize("name", METHODS)
class TestEveryMethod:
    def test_draws_are_functions_that_no_batch_changes(self, trained, name):
        posterior = trained(name)
        assert isinstance(posterior, baselines.Predictor)
        whole = posterior.predict(TEST, num_draws=3, seed=5, batch_size=11)
        parts = posterior.predict(TEST, num_draws=3, seed=5, batch_size=2)
        np.testing.assert_allclose(whole.log_probs, parts.log_probs, atol=1e-5)
        for row in (0, 7):
            alone = posterior.predict(TEST[row : row + 1], num_draws=3, seed=5)
            np.testing.assert_allclose(alone.log_probs[:, 0], whole.log_probs[:, row], atol=1e-5)

    def test_a_draw_depends_on_seed_and_number_alone(self, trained, name, unchanged_rng):
        posterior = trained(name)
        few, many = (posterior.predict(TEST, num_draws=n, seed=3) for n in (2, 4))
        if "ensemble" not in name:  # their draws are their members, however many are asked for
            np.testing.assert_allclose(many.log_probs[:2], few.log_probs, atol=1e-5)
        again = posterior.predict(TEST, num_draws=4, seed=3)
        np.testing.assert_array_equal(again.log_probs, many.log_probs)
        differ = np.abs(many.log_probs[0] - many.log_probs[1]).max()
        assert differ == 0 if name in POINTS else differ > 1e-4

    def test_other_seeds_give_other_draws(self, trained, name):
        posterior = trained(name)
        one, two = (posterior.predict(TEST, num_draws=2, seed=seed).log_probs for seed in (0, 1))
        assert (np.abs(one - two).max() > 1e-4) == (
            name not in (*POINTS, "deep_ensemble", "temperature of an ensemble")
        )

    def test_it_learns(self, trained, untrained_nll, name):
        nll = trained(name).predict(ROWS, num_draws=4).metrics().loc["value", "nll"]
        assert nll < untrained_nll - 0.1

    def test_the_mean_is_one_function_a_member(self, trained, name):
        posterior = trained(name)
        prediction = posterior.predict(TEST, num_draws=0)
        assert len(prediction.log_probs) == (2 if "ensemble" in name else 1)
        assert prediction.is_mean == ("ensemble" not in name)

    def test_saved_and_loaded_it_predicts_the_same(self, trained, name, tmp_path):
        posterior = trained(name)
        posterior.save_pretrained(tmp_path / "saved")
        posterior.save_pretrained(tmp_path / "saved")  # over itself
        module = tiny.causal_lm()
        loaded = baselines.load(module, tmp_path / "saved")
        assert type(loaded) is type(posterior)
        expected = posterior.predict(TEST, num_draws=3, seed=2)
        np.testing.assert_allclose(loaded.predict(TEST, num_draws=3, seed=2).log_probs, expected.log_probs, atol=1e-5)

    def test_it_gives_the_base_model_back_bit_for_bit(self, name):
        module = tiny.causal_lm()
        before = {k: v.clone() for k, v in module.state_dict().items()}
        flags = [p.requires_grad for p in module.parameters()]
        assert METHODS[name](module, {**MLE, "num_steps": 2}).blora().unload() is module
        after = module.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[k], v) for k, v in before.items())
        assert [p.requires_grad for p in module.parameters()] == flags


TRAINERS = (
    baselines.mle,
    baselines.map_lora,
    baselines.mc_dropout,
    baselines.deep_ensemble,
    baselines.blob,
    baselines.scalabl_released,
)


@pytest.mark.parametrize("train", TRAINERS, ids=lambda train: train.__name__)
def test_rows_that_do_not_fit_leave_the_base_model_as_it_was(llm, task, train):
    before = {k: v.clone() for k, v in llm.state_dict().items()}
    with pytest.raises(ValueError, match="Row 0"):
        train(llm, task, [{"question": "what ?"}])
    assert sp.lora.attach.find_adapter(llm) is None
    assert all(torch.equal(llm.state_dict()[k], v) for k, v in before.items())
    option = "num_members" if train is baselines.deep_ensemble else "batch_size"
    message = "an ensemble needs 2|must be positive and finite|must be a whole number, 1 or more"
    with pytest.raises(ValueError, match=rf"{option}=0:? ({message})"):
        train(llm, task, ROWS, **{option: 0})
    assert sp.lora.attach.find_adapter(llm) is None


def test_training_leaves_the_global_random_state_alone(unchanged_rng):
    for name in METHODS:
        METHODS[name](tiny.causal_lm(), {**MLE, "num_steps": 2})


# the noise seam ---------------------------------------------------------------------------------------------


def test_row_noise_is_a_matrix_of_its_own_for_each_row(llm, task):
    """Row b computes with A + diag(outputs_b) E diag(inputs_b), as a dense twin with those factors does."""
    blora = sp.bayesian_lora(llm, r=4, gauge="free")
    generator = torch.Generator().manual_seed(0)
    noise = []
    for A, B in blora.adapter.factors():
        with torch.no_grad():
            B.copy_(0.3 * torch.randn(B.shape, generator=generator))
        noise.append(
            RowNoise(
                torch.randn(A.shape, generator=generator),
                torch.randn(3, A.shape[1], generator=generator),
                torch.randn(3, A.shape[0], generator=generator),
            )
        )
    ids = torch.randint(2, 30, (3, 6), generator=generator)
    s = torch.rand(blora.subspace.dim, generator=generator)
    with torch.no_grad():
        plain = blora(input_ids=ids, s=s).logits
        noisy = blora._adapted(input_ids=ids, s=s, noise=noise).logits
        assert (noisy - plain).abs().max() > 1e-3
        for b in range(3):
            twin = tuple(
                (A + n.outputs[b][:, None] * n.matrix * n.inputs[b], B)
                for (A, B), n in zip(blora.adapter.factors(), noise, strict=True)
            )
            alone = sp.lora.forward.AdaptedLLM(blora.adapter, factors=twin)(input_ids=ids[b : b + 1], s=s).logits
            torch.testing.assert_close(noisy[b : b + 1], alone, atol=1e-5, rtol=1e-5)


def test_row_noise_goes_with_one_draw_only(blora):
    noise = [RowNoise(A) for A, _ in blora.adapter.factors()]
    ids = torch.randint(2, 30, (3, 6))
    with pytest.raises(ValueError, match="Noise per row allows only one draw"):
        blora._adapted(input_ids=ids, s=torch.rand(2, 1, blora.subspace.dim), noise=noise)


def test_blocks_below_the_first_adapted_one_run_once_for_all_draws():
    """And what they give is that of a pass of its own for each draw."""
    module = tiny.causal_lm()
    options = {**MLE, "num_steps": 3, "lora": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]}}
    posterior = baselines.mc_dropout(module, task(), ROWS, p=0.5, **options).posterior
    passes = []
    hook = module.model.layers[0].self_attn.register_forward_hook(lambda *args: passes.append(1))
    draws = posterior.predict(TEST, num_draws=5, batch_size=11).log_probs
    hook.remove()
    assert len(passes) == 1
    for i, factors in enumerate(posterior.sample(5)):
        alone = predict_functions([as_function(posterior.center, factors)], posterior.task, TEST).log_probs[0]
        np.testing.assert_allclose(draws[i], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "lr"), [("mle", 2.5e-4), ("map_lora", 2.5e-4), ("mc_dropout", 2.5e-4), ("blob", 4e-3)]
)
def test_each_learns_at_its_own_rate_unless_told_otherwise(name, lr):
    fit = getattr(baselines, name)
    rates = [fit(tiny.causal_lm(), task(), ROWS, **FIT, **own).history["lr"].max() for own in ({}, {"lr": 1e-5})]
    assert rates == pytest.approx([lr, 1e-5])


def test_a_point_estimate_learns_both_factors_at_one_rate():
    alike, apart = (
        baselines.mle(tiny.causal_lm(), task(), ROWS, **MLE, **own).posterior.factors
        for own in ({"lr_A": MLE["lr"]}, {"lr_A": 1e-12})
    )
    default = baselines.mle(tiny.causal_lm(), task(), ROWS, **MLE).posterior.factors
    assert all(torch.equal(A, B) for pair in zip(default, alike, strict=True) for A, B in zip(*pair, strict=True))
    assert not torch.equal(default[0][0], apart[0][0])


# MAP --------------------------------------------------------------------------------------------------------


def test_the_map_loss_is_nll_plus_the_squares_of_both_factors():
    scale, n = 0.3, len(ROWS)
    plain, penalized = (
        baselines.map_lora(tiny.causal_lm(), task(), ROWS, scale=s, **{**MLE, "num_steps": 1}).history.iloc[0]
        for s in (1e6, scale)
    )
    blora = baselines.mle(tiny.causal_lm(), task(), ROWS, **{**MLE, "num_steps": 1, "lr": 1e-12}).posterior
    squares = sum(float(A.square().sum() + B.square().sum()) for A, B in blora.factors)
    assert penalized["nll"] == pytest.approx(plain["nll"])
    assert penalized["loss"] - penalized["nll"] == pytest.approx(squares / (2 * n * scale**2), rel=1e-4)


def test_a_narrow_prior_keeps_the_factors_small():
    sizes = []
    for scale in (0.05, 10.0):
        result = baselines.map_lora(tiny.causal_lm(), task(), ROWS, scale=scale, **{**MLE, "num_steps": 60})
        sizes.append(sum(float(B.square().sum()) for _, B in result.posterior.factors))
    assert sizes[0] < 0.5 * sizes[1]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf")])
def test_map_refuses_a_scale_that_is_none(llm, task, scale):
    with pytest.raises(ValueError, match="must be positive and finite"):
        baselines.map_lora(llm, task, ROWS, scale=scale)
    assert sp.lora.attach.find_adapter(llm) is None


# MC dropout -------------------------------------------------------------------------------------------------


def test_a_draw_of_dropout_masks_columns_of_A(trained):
    posterior = trained("mc_dropout")
    dropped = []
    for factors in posterior.sample(20, seed=1):
        for (A, B), (A_0, B_0) in zip(factors, plain_factors(posterior.center), strict=True):
            ratio = A / A_0
            mask = ratio[0] > 0.5
            torch.testing.assert_close(ratio, mask.float().expand_as(ratio) / 0.7)  # one mask for all r rows
            assert torch.equal(B, B_0)
            dropped.append((~mask).float())
    share = torch.cat(dropped)
    assert abs(share.mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / len(share))


def test_dropout_in_training_gives_each_row_one_mask_for_all_its_tokens(llm):
    adapter = baselines.mle(llm, task(), ROWS, **MLE).posterior.adapter
    blora = DropoutLoRA(adapter, 0.5)
    ids = torch.randint(2, 30, (2, 5), generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0)
    with scoped_seed(3):
        noise = blora.row_noise(torch.ones(adapter.subspace.dim), 4)
    assert all(set(n.inputs.unique().tolist()) == {-1.0, 1.0} for n in noise)
    with scoped_seed(3), torch.no_grad():
        logits = blora(input_ids=ids, s=torch.ones(adapter.subspace.dim)).logits
    for b in range(4):
        masked = tuple((A * (n.inputs[b] + 1), B) for (A, B), n in zip(adapter.factors(), noise, strict=True))
        function = sp.lora.forward.AdaptedLLM(adapter, factors=masked)
        with torch.no_grad():
            alone = function(input_ids=ids[b : b + 1], s=torch.ones(adapter.subspace.dim)).logits
        torch.testing.assert_close(logits[b : b + 1], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits[0], logits[1], atol=1e-4)  # the same text, another mask


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, "0.1"])
def test_dropout_refuses_a_p_that_is_no_probability(llm, task, p):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        baselines.mc_dropout(llm, task, ROWS, p=p)
    assert sp.lora.attach.find_adapter(llm) is None


# deep ensemble ----------------------------------------------------------------------------------------------


def test_the_first_member_is_the_mle_and_the_others_start_elsewhere(trained):
    ensemble = trained("deep_ensemble")
    alone = trained("mle")
    for (A, B), (A_0, B_0) in zip(ensemble.members[0].factors, alone.factors, strict=True):
        assert torch.equal(A, A_0)
        assert torch.equal(B, B_0)
    for (A, _), (A_1, _) in zip(ensemble.members[0].factors, ensemble.members[1].factors, strict=True):
        assert (A - A_1).abs().mean() > 0.01


def test_an_ensemble_predicts_the_mixture_of_its_members(trained):
    ensemble = trained("deep_ensemble")
    own = [member.predict(TEST, num_draws=0).probs for member in ensemble.members]
    prediction = ensemble.predict(TEST)
    np.testing.assert_allclose(prediction.probs, np.mean(own, axis=0), atol=1e-6)
    assert prediction.num_draws == 2
    assert (prediction.epistemic > 0).all()


@pytest.mark.parametrize("guide", ["delta", AutoDelta], ids=str)
def test_a_member_that_is_a_point_gives_one_draw(guide):
    blora = sp.bayesian_lora(tiny.causal_lm(), r=2, target_modules=["q_proj"])
    point = sp.fit(blora, sp.MultipleChoice(tiny.tokenizer()), ROWS, guide=guide, num_steps=2, progress=False).posterior
    assert baselines.EnsemblePosterior((point, point)).predict(TEST, num_draws=3).num_draws == 2


def test_members_with_draws_keep_their_draws(trained):
    posterior = trained("scalabl_released")
    mixed = baselines.EnsemblePosterior((posterior, posterior))
    assert mixed.predict(TEST, num_draws=3).num_draws == 6


def test_an_ensemble_of_regressions_mixes_numbers():
    rows = [{**row, "label": row["label"] / 2} for row in tiny.text_rows(12)]
    options = {**MLE, "num_members": 2, "num_steps": 3}
    result = baselines.deep_ensemble(tiny.classifier(num_labels=1), sp.Regression(tiny.tokenizer()), rows, **options)
    prediction = result.posterior.predict(rows)
    assert isinstance(prediction, NumericPrediction)
    assert prediction.means.shape == (2, 12)
    assert np.isfinite(prediction.metrics().to_numpy()).all()
    members = result.posterior.members
    heads = [member.heads["score"].weight for member in members]
    assert not torch.equal(*heads)  # each has trained its own


def test_an_ensemble_refuses_one_member_and_members_that_do_not_fit(llm, task, trained):
    with pytest.raises(ValueError, match="2 or more"):
        baselines.deep_ensemble(llm, task, ROWS, num_members=1)
    with pytest.raises(ValueError, match="share one adapted LLM"):
        baselines.EnsemblePosterior((trained("mle"), trained("map_lora")))
    ensemble = trained("deep_ensemble")
    with pytest.raises(ValueError, match="cannot be mixed"):
        baselines.EnsemblePosterior((ensemble.members[0], ensemble))


# temperature ------------------------------------------------------------------------------------------------


def made_prediction(*, draws=3, rows=400, classes=4, sharpness=3.0, seed=0):
    """Labels drawn from softmax(z); the prediction claims softmax(sharpness * z), a little differently each draw."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(rows, classes))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    target = np.array([rng.choice(classes, p=row) for row in p])
    noisy = sharpness * (z + (0.05 * rng.normal(size=(draws, rows, classes)) if draws > 1 else 0.0))
    log_probs = torch.tensor(noisy).reshape(draws, rows, classes).log_softmax(-1).numpy()
    return Prediction(log_probs, target, tuple("abcd"))


def test_the_temperature_is_where_the_derivative_of_the_nll_vanishes():
    prediction = made_prediction(draws=1)
    temperature = fit_temperature(prediction)
    logits = torch.tensor(prediction.log_probs[0])
    inverse = torch.tensor(1 / temperature, dtype=torch.float64, requires_grad=True)
    loss = nn.functional.cross_entropy(logits * inverse, torch.tensor(prediction.target))
    (slope,) = torch.autograd.grad(loss, inverse)
    assert abs(slope) < 1e-6
    assert 2.3 < temperature < 3.9  # the claim was three times too sharp


def test_each_draw_is_scaled_and_the_mixture_is_fitted():
    prediction = made_prediction()
    temperature = fit_temperature(prediction)
    scaled = apply_temperature(prediction, temperature)
    expected = torch.tensor(prediction.log_probs / temperature).log_softmax(-1).numpy()
    np.testing.assert_allclose(scaled.log_probs, expected, atol=1e-12)
    best = scaled.metrics().loc["value", "nll"]
    for other in (0.9 * temperature, 1.1 * temperature):
        assert apply_temperature(prediction, other).metrics().loc["value", "nll"] > best
    assert (scaled.epistemic > 0).all()


def test_a_prediction_made_before_is_scaled_like_its_posterior(trained):
    posterior = trained("scalabl_released")
    validation = posterior.predict(ROWS, num_draws=4, seed=1)
    test = posterior.predict(TEST, num_draws=4, seed=2)
    by_rows = baselines.temperature_scaling(posterior, ROWS, num_draws=4, seed=1)
    by_prediction = baselines.temperature_scaling(posterior, validation)
    assert by_rows.temperature == by_prediction.temperature
    scaled = baselines.temperature_scaling(test, validation)
    np.testing.assert_array_equal(scaled.log_probs, by_rows.predict(TEST, num_draws=4, seed=2).log_probs)
    assert (scaled.labels == apply_temperature(test, 1.0).labels).mean() > 0.9


def test_choices_that_a_row_lacks_stay_impossible():
    prediction = made_prediction()
    prediction.log_probs[:, :, 3] = -np.inf
    prediction.target[:] = prediction.target % 3
    scaled = apply_temperature(prediction, 2.0)
    assert np.isneginf(scaled.log_probs[:, :, 3]).all()
    np.testing.assert_allclose(np.exp(scaled.log_probs).sum(-1), 1)
    assert np.isfinite(fit_temperature(prediction))


def test_validation_rows_that_are_all_right_are_reported():
    prediction = made_prediction(rows=5)
    prediction.target[:] = prediction.labels
    with pytest.warns(sp.ScalaBLWarning, match="all answered right"):
        assert fit_temperature(prediction) < 0.02


def test_temperature_scaling_says_what_it_cannot_do(trained):
    posterior = trained("mle")
    prediction = made_prediction()
    with pytest.raises(TypeError, match="pass the prediction of those rows"):
        baselines.temperature_scaling(prediction, ROWS)
    unlabeled = [{k: v for k, v in row.items() if k != "answer"} for row in TEST]
    with pytest.raises(ValueError, match="have no answers"):
        baselines.temperature_scaling(posterior, unlabeled)
    numbers = NumericPrediction(np.zeros((1, 2)), np.ones((1, 2)), np.zeros((1, 2)), None, None)
    with pytest.raises(TypeError, match="Do not scale predictions of numbers"):
        baselines.temperature_scaling(posterior, numbers)
    with pytest.raises(ValueError, match="positive and finite"):
        apply_temperature(prediction, 0.0)


# the released ScalaBL ---------------------------------------------------------------------------------------


def test_the_kl_at_the_start_is_2889_nats_where_that_of_the_elbo_is_22():
    """One layer of in_features 3584 and rank 8, started as in the paper."""
    adapter = sp.bayesian_lora(nn.Sequential(nn.Linear(3584, 16)), r=8, target_modules=["0"], gauge="free").adapter
    reversed_kls, kls = [], []
    for seed in range(50):
        latents = LogNormals(adapter.loc, init_scale=0.05, seed=seed)
        reversed_kls.append(latents.kl().item())
        q, p = dist.Normal(latents.log_loc.exp(), latents.log_scale.exp()), dist.Normal(1e-8, 1.0)
        assert latents.kl().item() == pytest.approx(torch.distributions.kl_divergence(p, q).sum().item(), rel=1e-5)
        kls.append(torch.distributions.kl_divergence(q, p).sum().item())
    for values, published in ((reversed_kls, 2888.56), (kls, 22.39)):
        error = np.std(values) / math.sqrt(len(values)) + 0.03 * published  # theirs is of one draw of the start
        assert abs(np.mean(values) - published) < 5 * error
    assert np.mean(reversed_kls) == pytest.approx(2888.56, rel=0.1)
    assert np.mean(kls) == pytest.approx(22.39, rel=0.02)


def test_the_reversed_kl_of_a_wide_posterior():
    loc, scale = torch.full((4,), 0.57735), torch.full((4,), 0.6)
    exact = torch.distributions.kl_divergence(dist.Normal(1e-8, 1.0), dist.Normal(loc, scale)).sum()
    torch.testing.assert_close(reversed_kl(loc, scale), exact)


def test_one_step_is_adamw_on_the_nll_and_then_sgd_on_the_weighted_kl():
    """A linear layer y = B (s * A x) with a squared loss, by hand."""
    lr, lr_kl, weight, rate = 1e-2, 0.1, 0.25, 0.5
    latents = LogNormals(torch.tensor([0.5, 0.8]), init_scale=0.05, seed=0)
    A, B = nn.Parameter(torch.tensor([[1.0, 2.0], [0.5, -1.0]])), nn.Parameter(torch.tensor([[0.3, -0.7]]))
    x, y = torch.tensor([[1.0, 0.4], [-0.3, 2.0]]), torch.tensor([[0.2], [1.0]])
    m, v = latents.log_loc.detach().clone(), latents.log_scale.detach().clone()
    A_0, B_0 = A.detach().clone(), B.detach().clone()
    step = AlternatingStep(latents, [A, B], lr=lr, lr_kl=lr_kl)
    with scoped_seed(4):
        step(lambda s: 0.5 * ((x @ A.T * s) @ B.T - y).square().mean(), weight=weight, rate=rate)
    with scoped_seed(4):
        noise = torch.randn(2)
    s = m.exp() + v.exp() * noise
    hidden = x @ A_0.T
    residual = ((hidden * s) @ B_0.T - y) / 2
    grad_B = residual.T @ (hidden * s)
    grad_A = (residual @ B_0 * s).T @ x
    grad_s = (residual @ B_0 * hidden).sum(0)
    # The first step of Adam, bias-corrected, is g / (|g| + eps).
    torch.testing.assert_close(A.detach(), A_0 - rate * lr * grad_A / (grad_A.abs() + 1e-6))
    torch.testing.assert_close(B.detach(), B_0 - rate * lr * grad_B / (grad_B.abs() + 1e-6))
    grad_m, grad_v = grad_s * m.exp(), grad_s * v.exp() * noise
    m = m - rate * lr * grad_m / (grad_m.abs() + 1e-6)
    v = v - rate * lr * grad_v / (grad_v.abs() + 1e-6)
    loc, scale = m.exp(), v.exp()
    grad_m = (loc - 1e-8) * loc / scale.square()
    grad_v = 1 - (1 + (loc - 1e-8).square()) / scale.square()
    torch.testing.assert_close(latents.log_loc.detach(), m - rate * lr_kl * weight * grad_m)
    torch.testing.assert_close(latents.log_scale.detach(), v - rate * lr_kl * weight * grad_v)


def test_the_reweighting_has_the_published_periods_and_sums_to_one():
    """M of WinoGrande S and M, ARC-C, OpenBookQA and BoolQ, batch 4."""
    for n, period in {640: 316, 1119: 393, 2558: 544, 4957: 706, 9427: 909}.items():
        assert baselines.KLReweighting(n, 4).period == period
    schedule = baselines.KLReweighting(640, 4)
    shares = [schedule.share(step) for step in range(316)]
    assert sum(shares) == pytest.approx(1)
    assert sum(share > 1e-3 for share in shares) == 9
    assert shares[-1] == pytest.approx(0.5)
    assert schedule.share(316) == shares[0]
    assert schedule(315) == 640 * shares[-1]
    small = baselines.KLReweighting(4, 100)  # M = 1: 2^1 / (2^2 - 1)
    assert small.period == 1
    assert small.share(7) == pytest.approx(2 / 3)


def test_the_released_training_keeps_loc_and_scale_positive_and_says_what_it_did():
    options = {**FIT, "num_steps": 60, "lr_kl": 0.2, "lr": 1e-2}
    result = baselines.scalabl_released(tiny.causal_lm(), task(), ROWS, **options)
    guide = result.posterior.guide
    assert (guide.loc > 0).all()
    assert (guide.scale > 0).all()
    assert result.posterior.provenance["method"] == "ScalaBL as released"
    assert set(result.history) == {"step", "loss", "nll", "kl", "kl_weight", "lr", "seconds"}
    assert result.history["kl"].iloc[-1] < result.history["kl"].iloc[0]
    rise = round(0.06 * 60)
    assert result.history["lr"].iloc[rise - 1] == pytest.approx(1e-2)
    assert result.history["lr"].iloc[-1] == pytest.approx(1e-2 / (60 - rise))


def test_a_released_training_that_diverges_returns_what_was_learned():
    options = {**FIT, "num_steps": 400, "lr_kl": 1e4}
    with pytest.raises(
        sp.TrainingError, match=r"At step \d+: The (NLL|KL|update) (is|was) .*Lower lr or lr_kl"
    ) as caught:
        baselines.scalabl_released(tiny.causal_lm(), task(), ROWS, **options)
    assert caught.value.result is not None


# files ------------------------------------------------------------------------------------------------------


def test_load_reads_posteriors_too_and_leaves_the_model_alone_when_it_fails(trained, tmp_path):
    trained("mle").save_pretrained(tmp_path / "point")
    assert isinstance(baselines.load(tiny.causal_lm(), tmp_path / "point"), sp.Posterior)
    with pytest.raises(FileNotFoundError, match=r"neither a posterior .* nor a baseline"):
        baselines.load(tiny.causal_lm(), tmp_path)
    path = tmp_path / "ensemble"
    trained("deep_ensemble").save_pretrained(path)
    (path / "member_1" / "adapter_model.safetensors").write_bytes(b"nothing")
    module = tiny.causal_lm()
    with pytest.raises(ValueError, match="damaged"):
        baselines.load(module, path)
    assert sp.lora.attach.find_adapter(module) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "magic"}, "kind='magic' is unknown"),
        ({"kind": None}, "kind=None is unknown"),
        ({"format_version": 99}, "reads format_version 1"),
        ({"children": ["../x"]}, "list of folder names"),
        ({"options": {}}, "damaged: KeyError 'noise'"),
        ({"options": {"noise": "dropout", "options": {"p": 3.0}, "provenance": {}}}, "between 0 and 1"),
        ({"options": {"noise": "fog", "options": {}, "provenance": {}}}, "noise='fog' is unknown"),
    ],
)
def test_a_damaged_baseline_is_named(trained, tmp_path, change, message):
    trained("mc_dropout").save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "baseline.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        baselines.load(tiny.causal_lm(), tmp_path / "saved")


def test_a_baseline_does_not_write_over_something_else(trained, tmp_path):
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(FileExistsError, match="does not hold a baseline"):
        trained("mc_dropout").save_pretrained(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "important"


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_on_a_gpu_it_trains_and_its_files_predict_the_same_on_the_cpu(name, tmp_path):
    posterior = METHODS[name](tiny.causal_lm().cuda(), MLE)
    expected = posterior.predict(TEST, num_draws=3, seed=2).log_probs
    np.testing.assert_array_equal(posterior.predict(TEST, num_draws=3, seed=2).log_probs, expected)
    posterior.save_pretrained(tmp_path / "saved")
    loaded = baselines.load(tiny.causal_lm(), tmp_path / "saved")
    np.testing.assert_allclose(loaded.predict(TEST, num_draws=3, seed=2).log_probs, expected, atol=2e-3)
    assert isinstance(posterior.blora().unload(), nn.Module)
