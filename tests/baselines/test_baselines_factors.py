"""BLoB, TFB and Laplace-LoRA against the formulas that define them."""

import itertools
import math
import threading
import time
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from torch import nn
from torch.distributions import kl_divergence

import scalabl_pyro as sp
from scalabl_pyro import baselines
from scalabl_pyro._process.random_state import scoped_seed
from scalabl_pyro.baselines.bayes_by_backprop import FlipoutLoRA, NoiseGuide, NoisePrior, flat
from scalabl_pyro.baselines.factor_posterior import FactorPosterior, as_function, plain_factors
from scalabl_pyro.baselines.kfac import SecondMoment, kronecker_factors, record
from scalabl_pyro.baselines.kronecker_laplace import KroneckerNoise, best_prior_scale, correlate, predict_linear
from scalabl_pyro.baselines.predictor import predict_functions
from scalabl_pyro.baselines.training_free import SpectralNoise, spectral_factors
from scalabl_pyro.data import collate, encode
from scalabl_pyro.inference.largest_scale import largest_passing, mixture_nll
from scalabl_pyro.training.result import TrainingError

ROWS = tiny.question_rows(24)
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
OPTIONS = {"num_steps": 25, "batch_size": 8, "progress": False, "lora": LORA, "lr": 1e-2, "optimizer": {"warmup": 0.0}}


def task():
    return sp.MultipleChoice(tiny.tokenizer())


def log_odds(log_probs):
    """Logits up to a constant, as differences to the first class."""
    return log_probs[..., 1:4] - log_probs[..., :1]


@pytest.fixture(scope="module")
def point():
    """A trained adapter."""
    return baselines.mle(tiny.causal_lm(), task(), ROWS, **OPTIONS).posterior


# BLoB -------------------------------------------------------------------------------------------------------


def test_the_kl_of_blob_is_that_of_A_in_the_direction_of_the_elbo():
    result = baselines.blob(
        tiny.causal_lm(), task(), ROWS, prior_scale=0.3, seed=4, **{**OPTIONS, "num_steps": 1, "lr": 1e-12}
    )
    scales, factors = result.posterior.noise.scales, plain_factors(result.posterior.center)
    exact = sum(
        kl_divergence(dist.Normal(A, scale), dist.Normal(0.0, 0.3)).sum().item()
        for (A, _), scale in zip(factors, scales, strict=True)
    )
    row = result.history.iloc[0]
    assert row["kl"] == pytest.approx(exact, rel=1e-5)
    assert row["loss"] == pytest.approx(row["nll"] + exact / len(ROWS), rel=1e-5)
    roots = torch.cat([scale.flatten() for scale in scales]).sqrt()
    assert 0.05 * math.sqrt(0.5) < roots.min() < 0.036
    assert 0.049 < roots.max() < 0.05


def test_a_heavy_kl_brings_A_to_its_prior():
    options = {
        **OPTIONS,
        "num_steps": 100,
        "optimizer": {"warmup": 0.0, "schedule": "constant"},
        "lora": {"r": 2, "target_modules": ["q_proj"]},
    }
    heavy = {"kl_weight": 1e4, "prior_scale": 0.2, "init_root_scale": 0.3}
    result = baselines.blob(tiny.causal_lm(), task(), ROWS[:4], **heavy, **options)
    for scale, (A, _) in zip(result.posterior.noise.scales, result.posterior.center.factors, strict=True):
        torch.testing.assert_close(scale, torch.full_like(scale, 0.2), atol=0.02, rtol=0)
        assert A.abs().max() < 0.02


def test_flipout_gives_each_row_the_marginal_of_q(llm):
    """Entries of a row's noise are those of E up to signs, which form an outer product and differ between rows."""
    blora = sp.bayesian_lora(llm, gauge="free", **LORA)
    adapter = blora.adapter
    guide = NoiseGuide(adapter, init_root_scale=0.5, seed=0)
    flipout = FlipoutLoRA(adapter, prior=NoisePrior(adapter, 0.2))
    with scoped_seed(1), torch.no_grad(), pyro.settings.context(module_local_params=True):
        noise = flipout.row_noise(guide(), 500)
    first = noise[0]
    assert {v.item() for n in noise for v in torch.cat([n.inputs.flatten(), n.outputs.flatten()]).unique()} == {-1, 1}
    signs = first.outputs[:, :, None] * first.inputs[:, None]  # (rows, r, in)
    assert abs(signs.mean(0)).max() < 5 / math.sqrt(500) * 1.1
    pairs = (signs[:, 0, 0] * signs[:, 1, 1]).mean()  # entries of one matrix are uncorrelated
    assert abs(pairs) < 5 / math.sqrt(500)


def test_blob_starts_where_its_draws_are_those_of_a_plain_adapter(llm):
    """B = 0: no noise of A changes the function."""
    options = {**OPTIONS, "num_steps": 1, "lr": 1e-12}
    posterior = baselines.blob(llm, task(), ROWS, **options).posterior
    draws = posterior.predict(ROWS, num_draws=2).log_probs
    np.testing.assert_allclose(draws[0], draws[1], atol=1e-6)


def test_draws_of_blob_have_the_learned_scale():
    noise = baselines.NormalNoise((torch.full((4, 500), 0.3), torch.full((2, 10), 0.0)))
    center = ((torch.ones(4, 500), torch.zeros(3, 4)), (torch.ones(2, 10), torch.zeros(3, 2)))
    (A, _), (A_2, _) = next(noise.draws(center, torch.Generator().manual_seed(0)))
    assert abs((A - 1).std() - 0.3) < 5 * 0.3 / math.sqrt(2 * A.numel())
    assert torch.equal(A_2, torch.ones(2, 10))


def test_blob_takes_the_schedule_of_its_paper():
    schedule = baselines.KLReweighting(num_data=24, batch_size=8)
    history = baselines.blob(tiny.causal_lm(), task(), ROWS, kl_weight=schedule, **OPTIONS).history
    np.testing.assert_allclose(history["kl_weight"], [schedule(step) for step in range(25)])


def test_blob_that_diverges_returns_what_was_learned(llm):
    poisoned = itertools.chain([1.0, 1.0], itertools.repeat(float("nan")))
    task_ = task()
    likelihood = task_.likelihood

    def likelihood_then_nan(outputs, batch):
        return likelihood(outputs * next(poisoned), batch)

    task_.likelihood = likelihood_then_nan
    with pytest.raises(TrainingError) as caught:
        baselines.blob(llm, task_, ROWS, **OPTIONS)
    assert isinstance(caught.value.result.posterior, FactorPosterior)
    assert len(sp.lora.attach.find_adapter(llm).loc) == sp.lora.attach.find_adapter(llm).subspace.dim


def test_blob_refuses_scales_that_are_none(llm):
    for name in ("prior_scale", "init_root_scale"):
        with pytest.raises(ValueError, match=f"{name}=-1"):
            baselines.blob(llm, task(), ROWS, **{name: -1})
    assert sp.lora.attach.find_adapter(llm) is None


def test_flat_is_the_order_of_the_noise(llm):
    adapter = sp.bayesian_lora(llm, **LORA).adapter
    assert torch.equal(flat(adapter)[: adapter.factors()[0][0].numel()], adapter.factors()[0][0].detach().flatten())


# TFB --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0003, 0.05, 0.1999, 0.5])
def test_the_bisection_finds_the_largest_that_passes_and_never_one_that_does_not(threshold):
    tried = []

    def passes(scale):
        tried.append(scale)
        return scale <= threshold

    found = largest_passing(passes, 0.2, 12)
    assert found <= threshold
    assert min(threshold, 0.2) - found <= 0.2 / 2**12
    assert len(tried) <= 13
    assert largest_passing(lambda scale: False, 0.2, 5) == 0.0


def test_spectral_factors_compute_the_same_product_with_orthonormal_columns():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 9, generator=generator), torch.randn(7, 4, generator=generator)
    B[:, 3] = B[:, 0]  # a singular value of 0, by which nothing is divided
    turned, U = spectral_factors(A, B)
    torch.testing.assert_close(U @ turned, B @ A, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(U.T @ U, torch.eye(4), atol=1e-5, rtol=1e-5)


def test_the_noise_of_tfb_is_scale_over_singular_value_on_the_turned_A():
    """In the paper's words: B' = U diag(d), A' = V' A, and A'_ij gets the standard deviation scale / d_i."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 6, generator=generator), torch.randn(8, 3, generator=generator)
    U, d, _ = torch.linalg.svd(B, full_matrices=False)
    draws = SpectralNoise(0.1).draws(((A, B),), torch.Generator().manual_seed(2))
    ((new_A, new_B),) = next(draws)
    with torch.no_grad():
        change = new_B @ new_A - B @ A
    noise = (U.T @ change) / d[:, None]  # on A'
    eps = torch.randn(A.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(noise.abs(), (0.1 / d[:, None] * eps).abs(), atol=1e-4, rtol=1e-3)


def test_tfb_keeps_the_tolerance_and_nearly_uses_it_up(point):
    options = {"num_draws": 5, "seed": 3}
    posterior = baselines.tfb(point, ROWS, tolerance=0.1, num_bisections=8, **options)
    without, found = mixture_nll(point.predict(ROWS, num_draws=0)), posterior.provenance["scale"]
    assert mixture_nll(posterior.predict(ROWS, **options)) <= 1.1 * without
    larger = replace(posterior, noise=SpectralNoise(found + 0.2 / 2**8))
    assert mixture_nll(larger.predict(ROWS, **options)) > 1.1 * without


def test_tfb_reports_a_scale_at_the_limit_of_its_search(point):
    with pytest.warns(sp.ScalaBLWarning, match="raise max_scale"):
        assert baselines.tfb(point, ROWS, max_scale=1e-5, num_draws=2).noise.scale == 1e-5
    with pytest.raises(ValueError, match="tolerance=0 must be positive"):
        baselines.tfb(point, ROWS, tolerance=0)


def test_tfb_works_on_a_posterior_with_unit_rows_too():
    """Where the gauge takes norms out of A, s brings them back."""
    blora = sp.bayesian_lora(tiny.causal_lm(), **LORA)
    options = {k: v for k, v in OPTIONS.items() if k != "lora"}
    posterior = sp.fit(blora, task(), ROWS, guide="delta", **options).posterior
    still = FactorPosterior(posterior, SpectralNoise(0.0))
    expected = posterior.predict(ROWS, num_draws=0).log_probs
    np.testing.assert_allclose(still.predict(ROWS, num_draws=1).log_probs, expected, atol=1e-4)
    with pytest.warns(sp.ScalaBLWarning, match="raise max_scale"):
        baselines.tfb(posterior, ROWS, max_scale=1e-5, num_draws=2)


# Laplace-LoRA -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def double_head():
    """A trained adapter of the LM head alone, in float64: each row is one token there."""
    options = {**OPTIONS, "lora": {"r": 3, "target_modules": ["lm_head"]}}
    return baselines.mle(tiny.causal_lm(dtype=torch.float64), task(), ROWS, **options).posterior


def exact_jacobian(posterior, batch):
    """(K, P) gradients of the outputs of one row in A and B, by autograd through an LLM with those factors."""
    factors = plain_factors(posterior)
    leaves = [factor.double().requires_grad_(True) for pair in factors for factor in pair]
    llm, s = as_function(posterior, factors)
    llm.factors = tuple(zip(leaves[::2], leaves[1::2], strict=True))
    outputs = posterior.task.outputs(llm, batch, s)[0]
    rows = [torch.autograd.grad(o, leaves, retain_graph=True) for o in outputs]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]), [leaf.shape for leaf in leaves]


def test_the_curvature_of_one_row_with_one_token_is_exact(double_head):
    examples = encode(ROWS[:1], double_head.task.encode, need_target=True)
    batch = collate(examples, [0], 0)
    factors = plain_factors(double_head)
    eigen = kronecker_factors(
        as_function(double_head, factors), double_head.task, examples, factors, rank=4, exact_up_to=999, batch_size=1
    )
    jacobian, shapes = exact_jacobian(double_head, batch)
    outputs = torch.zeros(1, jacobian.shape[0], dtype=torch.float64)
    llm, s = as_function(double_head, factors)
    with torch.no_grad():
        outputs = double_head.task.outputs(llm, batch, s)
    p = double_head.task.likelihood(outputs, batch).probs[0]
    exact = jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    start = 0
    for ((U, g), (V, x)), shape in zip(eigen, shapes, strict=True):
        n = shape.numel()
        own = torch.kron(
            U.double() @ torch.diag(g.double()) @ U.double().T, V.double() @ torch.diag(x.double()) @ V.double().T
        )
        block = exact[start : start + n, start : start + n]
        torch.testing.assert_close(own, block, atol=1e-5 * float(block.abs().max()), rtol=1e-4)
        assert block.abs().max() > 0
        start += n


def test_curvature_does_not_depend_on_batches_or_padding(point):
    examples = encode(ROWS[:6], point.task.encode, need_target=True)
    factors = plain_factors(point)
    both = [
        kronecker_factors(
            as_function(point, factors), point.task, examples, factors, rank=4, exact_up_to=999, batch_size=size
        )
        for size in (1, 6)
    ]
    for one, six in zip(*both, strict=True):
        for (U, g), (V, x) in zip(one, six, strict=True):
            torch.testing.assert_close((U * g) @ U.T, (V * x) @ V.T, atol=2e-4 * float(g.max()), rtol=1e-3)


def test_a_low_rank_second_moment_is_that_of_the_leading_directions():
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([10.0, 7, 5, 3, *[0.05] * 60])
    turn = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    rows = torch.randn(400, 64, generator=generator) * spread @ turn
    moment = SecondMoment(64, rank=4, exact_up_to=10)
    assert not moment.is_exact
    with scoped_seed(0):
        for part in rows.split(90):
            moment.add(part)
    vectors, values = moment.eigen()
    exact, basis = torch.linalg.eigh(rows.T @ rows)
    torch.testing.assert_close(values, exact.flip(0)[:4], rtol=1e-3, atol=0)
    torch.testing.assert_close((vectors.T @ basis.flip(1)[:, :4]).abs(), torch.eye(4), atol=1e-2, rtol=0)


def test_noise_has_the_inverse_of_curvature_and_prior_as_its_covariance():
    """The map from white noise is linear, so its matrix times its transpose is the covariance."""
    generator = torch.Generator().manual_seed(0)
    sides, scale = [], 0.7
    for dim, rank in ((3, 3), (4, 2)):  # one side whole, one by two of its directions
        vectors = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q[:, :rank]
        sides.append((vectors, torch.rand(rank, generator=generator, dtype=torch.float64) * 5))
    basis = torch.eye(12, dtype=torch.float64).reshape(12, 3, 4)
    matrix = torch.stack([correlate(e, *sides, scale).flatten() for e in basis], dim=1)
    (U, g), (V, x) = sides
    precision = torch.kron((U * g) @ U.T, (V * x) @ V.T) + torch.eye(12, dtype=torch.float64) / scale**2
    torch.testing.assert_close(matrix @ matrix.T, torch.linalg.inv(precision))


def test_the_prior_scale_is_where_the_evidence_is_largest():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 5, generator=generator), torch.randn(4, 2, generator=generator)
    eigen = []
    for m, n in ((2, 5), (4, 2)):
        side = [torch.linalg.qr(torch.randn(d, d, generator=generator)).Q for d in (m, n)]
        eigen.append(tuple((q, torch.rand(len(q), generator=generator) * 3) for q in side))
    found = best_prior_scale(eigen, ((A, B),))

    def evidence(scale):
        weights = torch.cat([A.flatten(), B.flatten()]).double()
        log_prior = dist.Normal(0.0, scale).log_prob(weights).sum()
        blocks = [torch.kron((U * g) @ U.T, (V * x) @ V.T).double() for (U, g), (V, x) in eigen]
        precision = torch.block_diag(*blocks) + torch.eye(18) / scale**2
        return float(log_prior - 0.5 * torch.linalg.slogdet(precision)[1])

    assert evidence(found) > max(evidence(0.97 * found), evidence(1.03 * found))


def test_a_linearized_draw_is_the_output_plus_its_derivative_along_the_draw():
    """Against central differences in float64, through two blocks and all tokens."""
    posterior = baselines.mle(tiny.causal_lm(dtype=torch.float64), task(), ROWS, **OPTIONS).posterior
    factors = tuple((A.double(), B.double()) for A, B in plain_factors(posterior))
    generator = torch.Generator().manual_seed(0)
    deltas = [
        [torch.randn(f.shape, generator=generator, dtype=torch.float64) * 0.05 for pair in factors for f in pair]
        for _ in range(2)
    ]
    rows = ROWS[:5]
    linear = predict_linear(posterior, factors, deltas, rows, batch_size=2).log_probs

    def moved(delta, step):
        new = tuple((A + step * delta[2 * i], B + step * delta[2 * i + 1]) for i, (A, B) in enumerate(factors))
        return log_odds(predict_functions([as_function(posterior, new)], posterior.task, rows).log_probs[0])

    for draw, delta in zip(linear, deltas, strict=True):
        at, slope = moved(delta, 0.0), (moved(delta, 1e-3) - moved(delta, -1e-3)) / 2e-3
        assert np.abs(slope).max() > 1e-3
        np.testing.assert_allclose(log_odds(draw), at + slope, atol=2e-4)


def test_a_wider_prior_gives_more_disagreement(point):
    spread = [
        baselines.laplace_lora(point, ROWS, prior_scale=scale).predict(ROWS, num_draws=20).epistemic.mean()
        for scale in (0.001, 0.03, 0.3)
    ]
    assert spread[0] < 1e-3 < spread[1] < spread[2]


def test_laplace_of_a_regression():
    rows = [{**row, "label": row["label"] / 2} for row in tiny.text_rows(12)]
    llm = tiny.classifier(num_labels=1)
    posterior = baselines.mle(llm, sp.Regression(tiny.tokenizer()), rows, **{**OPTIONS, "num_steps": 5}).posterior
    prediction = baselines.laplace_lora(posterior, rows, prior_scale=0.1).predict(rows, num_draws=30)
    assert (prediction.epistemic > 0).all()
    assert prediction.means.shape == (30, 12)


def test_recording_leaves_the_layers_as_they_were(point):
    variants = [layer.lora_variant[point.adapter.adapter_name] for layer in point.adapter.layers]
    modes = [m.training for m in point.adapter.module.modules()]
    factors = plain_factors(point)
    examples = encode(ROWS[:2], point.task.encode, need_target=True)
    function = as_function(point, factors)
    record(function, point.task, collate(examples, [0, 1], 0), factors)
    with pytest.raises(AttributeError):
        record(function, nn.Identity(), collate(examples, [0, 1], 0), factors)
    assert [layer.lora_variant[point.adapter.adapter_name] for layer in point.adapter.layers] == variants
    assert [m.training for m in point.adapter.module.modules()] == modes


@pytest.mark.parametrize(("scale", "message"), [("best", "give a number, or 'evidence'"), (0.0, "must be positive")])
def test_laplace_refuses_a_prior_scale_that_is_none(point, scale, message):
    with pytest.raises(ValueError, match=message):
        baselines.laplace_lora(point, ROWS, prior_scale=scale)


def test_a_saved_curvature_of_another_shape_is_refused(point, tmp_path):
    posterior = baselines.laplace_lora(point, ROWS, prior_scale=0.1)
    broken = replace(posterior, noise=KroneckerNoise(posterior.noise.eigen[::-1], 0.1))
    broken.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="does not fit it"):
        baselines.load(tiny.causal_lm(), tmp_path / "saved")


@pytest.mark.parametrize("value", [2.5, True, 0])
def test_counts_are_whole_numbers(llm, point, value):
    calls = {
        "num_steps": lambda v: baselines.scalabl_released(llm, task(), ROWS, num_steps=v),
        "batch_size": lambda v: baselines.scalabl_released(llm, task(), ROWS, batch_size=v),
        "num_data": lambda v: baselines.KLReweighting(v, 4),
        "num_bisections": lambda v: baselines.tfb(point, ROWS, num_bisections=v),
        "num_draws": lambda v: baselines.tfb(point, ROWS, num_draws=v),
        "rank": lambda v: baselines.laplace_lora(point, ROWS, rank=v),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name}={value} must be a whole number, 1 or more"):
            call(value)
    assert sp.lora.attach.find_adapter(llm) is None


def test_other_models_predict_while_the_released_method_trains(llm, point):
    """Between two steps of a training, another thread gets the lock of the process."""
    stop, done = threading.Event(), []

    def predict():
        while not stop.is_set():
            point.predict(ROWS[:2])
            done.append(time.perf_counter())

    thread = threading.Thread(target=predict)
    start = time.perf_counter()
    thread.start()
    try:
        baselines.scalabl_released(llm, task(), ROWS, num_steps=40, progress=False)
    finally:
        end = time.perf_counter()
        stop.set()
        thread.join()
    inside = [t for t in done if start + 0.2 * (end - start) < t < start + 0.8 * (end - start)]
    assert len(inside) >= 3
