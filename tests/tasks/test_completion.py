"""Completions: the log likelihood is that of the plain LLM at the tokens of the answer, however it is computed."""

import pytest
import tiny
import torch
import transformers as tf
from completions import EXACT, adapted, batch_of, draws_of, expected, likelihood, posterior_of, rows, tokenizer

import scalabl_pyro as sp
from scalabl_pyro.data import encode
from scalabl_pyro.lora import head_check
from scalabl_pyro.lora.gradient_checkpointing import recompute
from scalabl_pyro.lora.token_log_probs import TokenLogProbs
from scalabl_pyro.model.log_likelihood import LogLikelihood


@pytest.fixture
def task():
    return sp.Completion(tokenizer())


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mistral", "qwen3", "gemma", "gpt2"])
def test_the_log_likelihood_is_that_of_the_plain_llm_under_the_same_draw(task, family):
    posterior = posterior_of(adapted(family), task)
    data = rows()
    found = posterior.log_likelihood(data, batch_size=4).by_row(posterior.sample(3, seed=5).s)
    assert found.shape == (3, len(data)) and found.dtype == torch.float64
    for i in range(3):
        with posterior.draw(i, seed=5) as llm, torch.no_grad():
            plain = torch.stack([expected(llm, task, row) for row in data])
        torch.testing.assert_close(found[i], plain, rtol=0, atol=1e-10)


def test_the_target_is_the_completion_with_the_end_token(task):
    example = task.encode({"prompt": "the sky is", "completion": " blue"})
    assert task.tokenizer.decode(example.target) == "blue ."
    assert example.extras["positions"] == [2, 3]
    assert task.tokenizer.decode(example.inputs["input_ids"]) == "the sky is blue ."
    without = sp.Completion(tokenizer(), end_token=False)
    assert task.tokenizer.decode(without.encode({"prompt": "the sky is", "completion": " blue"}).target) == "blue"


@pytest.mark.parametrize("options", [{}, {"layers_to_transform": [1]}, {"target_modules": ["q_proj"]},
                                     {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
                         ids=["all", "upper block", "head not adapted", "head in full"])  # fmt: skip
def test_parts_change_neither_value_nor_gradient(task, options):
    blora = adapted(**options)
    batch = batch_of(task, rows())
    s = draws_of(blora, 2, 1).requires_grad_(True)
    tensors = [s, *blora.point_estimates.parameters()]

    def run(max_logits, again=False):
        with recompute(blora.adapter.blocks if again else ()):
            value = task.read(blora, batch, s, TokenLogProbs(batch.target, max_logits=max_logits))[..., 0].sum(-1)
            return value, torch.autograd.grad(value.cos().sum(), tensors)

    whole, slopes = run(2**25)
    assert whole.shape == (2, 6)
    for max_logits, again in ((1, False), (700, False), (1, True), (2**25, True)):
        value, found = run(max_logits, again)
        torch.testing.assert_close(value, whole, rtol=0, atol=1e-10)
        for a, b in zip(found, slopes, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(likelihood(task, blora, batch, s), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("again", [False, True], ids=["blocks once", "blocks again"])
def test_dropout_draws_the_same_masks_when_a_part_runs_again(task, again):
    blora = adapted(lora_dropout=0.4)
    for layer in blora.adapter.layers:
        for dropout in layer.lora_dropout.values():
            dropout.train()
    batch, s = batch_of(task, rows()), draws_of(blora, 1, 1)
    A, B = blora.adapter.factors()[-1]  # of the head
    readout = TokenLogProbs(batch.target, has_dropout=True, max_logits=700)

    def value():
        torch.manual_seed(0)
        return task.read(blora, batch, s, readout).sum()

    with recompute(blora.adapter.blocks if again else (), has_dropout=True):
        total = value()
        slopes = torch.autograd.grad(total, [A, B])
    torch.manual_seed(1)
    assert value() == total, "the masks follow the seed alone"
    with torch.no_grad():
        for factor, slope in zip((A, B), slopes, strict=True):
            direction = torch.randn(factor.shape, dtype=factor.dtype, generator=torch.Generator().manual_seed(3))
            ends = []
            for step in (1e-6, -2e-6):
                factor.add_(step * direction)
                ends.append(value())
            factor.add_(1e-6 * direction)
            torch.testing.assert_close((ends[0] - ends[1]) / 2e-6, (slope * direction).sum(), rtol=1e-5, atol=1e-7)


def test_batches_padding_order_and_a_kept_prefix_change_nothing(task):
    posterior = posterior_of(adapted(layers_to_transform=[1]), task)
    data, s = rows(), posterior.sample(3, seed=1).s
    whole = posterior.log_likelihood(data, batch_size=6).by_row(s)
    for batch_size in (1, 4):
        torch.testing.assert_close(posterior.log_likelihood(data, batch_size=batch_size).by_row(s), whole, **EXACT)
    order = [3, 0, 5, 1, 4, 2]
    turned = posterior.log_likelihood([data[i] for i in order]).by_row(s)
    torch.testing.assert_close(turned, whole[:, order], **EXACT)
    kept = LogLikelihood(posterior.llm(), task, encode(data, task.encode, need_target=True), cache_prefix=True)
    for _ in range(2):
        torch.testing.assert_close(kept.by_row(s), whole, **EXACT)
    torch.testing.assert_close(kept.by_row(s, draws_per_pass=1), whole, **EXACT)
    blora = posterior.blora()
    wide = batch_of(task, data, multiple=32)
    assert wide.inputs["input_ids"].shape[1] == 32 == wide.target.shape[1] == wide.extras["positions"].shape[1]
    llm = posterior.llm()
    found = task.distribution(task.outputs(llm, wide, s.unsqueeze(1)), wide).log_prob(wide.target)
    torch.testing.assert_close(found.detach(), whole, **EXACT)
    blora.unload()


@pytest.mark.parametrize("options", [{}, {"layers_to_transform": [1]}], ids=["all blocks", "upper block"])
def test_draws_of_all_shapes_agree_with_single_runs(task, options):
    blora = adapted(**options)
    batch = batch_of(task, rows())
    s = draws_of(blora, 3)
    single = torch.stack([likelihood(task, blora, batch, one) for one in s])
    torch.testing.assert_close(likelihood(task, blora, batch, s.unsqueeze(1)), single, **EXACT)
    torch.testing.assert_close(likelihood(task, blora, batch, s[:1]), single[0], **EXACT)
    torch.testing.assert_close(likelihood(task, blora, batch, s.view(3, 1, 1, -1)), single.unsqueeze(1), **EXACT)
    own = likelihood(task, blora, batch, s[[0, 1, 2, 0, 1, 2]])
    torch.testing.assert_close(own, single[[0, 1, 2, 0, 1, 2], range(6)], **EXACT)
    several = s[torch.tensor([[0, 1, 2, 0, 1, 2], [2, 2, 1, 1, 0, 0]])]
    expected_rows = torch.stack([single[[0, 1, 2, 0, 1, 2], range(6)], single[[2, 2, 1, 1, 0, 0], range(6)]])
    torch.testing.assert_close(likelihood(task, blora, batch, several), expected_rows, **EXACT)


def test_a_gradient_flows_once_from_a_position_that_fills_up_other_rows(task):
    """The first token is read in the row with a prompt of one token, and stands for nothing in shorter rows."""
    blora = adapted()
    pair = [{"prompt": "sky", "completion": " blue"}, {"prompt": "the grass", "completion": " green green green"}]
    tensors = list(blora.point_estimates.parameters())
    s = draws_of(blora, 1)

    def slopes(data):
        batch = batch_of(task, data)
        return torch.autograd.grad(likelihood(task, blora, batch, s).sum(), tensors)

    together, first, second = slopes(pair), slopes(pair[:1]), slopes(pair[1:])
    for a, b, c in zip(together, first, second, strict=True):
        torch.testing.assert_close(a, b + c, rtol=1e-9, atol=1e-11)


CHANGED = {
    "gemma2, capped": lambda: tf.Gemma2Config(**{**tiny._DECODER, "head_dim": 8}, final_logit_softcapping=30.0),
    "cohere, scaled": lambda: tf.CohereConfig(**tiny._DECODER, logit_scale=0.25),
    "granite, scaled": lambda: tf.GraniteConfig(**tiny._DECODER, logits_scaling=4.0),
}
SAME = {
    "gemma2": lambda: tf.Gemma2Config(**{**tiny._DECODER, "head_dim": 8}, final_logit_softcapping=None),
    "granite": lambda: tf.GraniteConfig(**tiny._DECODER, logits_scaling=1.0),
    "llama": lambda: tf.LlamaConfig(**tiny._DECODER),
}


def built(config, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.mark.parametrize("name", [*CHANGED, *SAME])
def test_logits_that_change_after_the_head_are_computed_whole(task, name):
    blora = adapted(built({**CHANGED, **SAME}[name]()))
    posterior = posterior_of(blora, task, num_steps=1)
    assert head_check._KNOWN[blora.llm] is (name in SAME)
    found = posterior.log_likelihood(rows()).by_row(posterior.sample(2, seed=0).s)
    for i in range(2):
        with posterior.draw(i, seed=0) as llm, torch.no_grad():
            plain = torch.stack([expected(llm, task, row) for row in rows()])
        torch.testing.assert_close(found[i], plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cap_that_changes_small_logits_little_is_seen(task, dtype):
    """A relative difference of 1e-5 here may be one of 0.5 at the logits of another text."""
    blora = sp.bayesian_lora(built(CHANGED["gemma2, capped"](), dtype))
    assert not head_check.ends_with_head(blora.adapter, batch_of(task, rows()).inputs)


def test_trained_heads_and_tied_heads(task):
    head = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    for blora in (adapted(**head), adapted("llama-tied"), adapted("llama-tied", target_modules=["q_proj"])):
        posterior = posterior_of(blora, task)
        found = posterior.log_likelihood(rows()).by_row(posterior.sample(1, seed=0).s)
        with posterior.draw(0, seed=0) as llm, torch.no_grad():
            plain = torch.stack([expected(llm, task, row) for row in rows()])
        torch.testing.assert_close(found[0], plain, rtol=0, atol=1e-10)
