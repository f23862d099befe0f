"""The estimate of a step's memory: linear in rows and tokens, and what is known of its parts."""

import gc

import completions
import pytest
import tiny
import torch

import scalabl_pyro as sp
from scalabl_pyro.training.step import EagerStep


def inputs(rows, tokens):
    return {"input_ids": torch.ones(rows, tokens, dtype=torch.long)}


def test_weights_are_those_of_the_base_and_trained_bytes_follow_from_the_counts():
    llm = tiny.causal_lm()
    base = sum(p.numel() * p.element_size() for p in llm.parameters())
    buffers = sum(b.numel() * b.element_size() for b in llm.buffers())
    blora = sp.bayesian_lora(llm)
    estimate = blora.estimate_memory(inputs(2, 8))
    assert estimate.weights == base + buffers
    assert estimate.trained == 20 * blora.num_parameters()["lora"]
    assert estimate.total == estimate.weights + estimate.trained + estimate.activations
    assert "activations" in str(estimate) and "GiB" in str(estimate)


def test_activations_grow_with_rows_and_tokens():
    blora = sp.bayesian_lora(tiny.causal_lm())
    of = lambda rows, tokens: blora.estimate_memory(inputs(rows, tokens)).activations  # noqa: E731
    assert of(6, 8) - of(4, 8) == 2 * (of(3, 8) - of(2, 8)) > 0
    assert 1.8 < of(1, 64) / of(1, 32) < 2.1


def test_what_autograd_saves_of_a_layer_is_counted_to_the_byte():
    """One linear layer of known sizes, float32: for a row x (tokens, in), A x and s * A x (tokens, r)."""
    module = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
    blora = sp.bayesian_lora(module, r=2, target_modules=["0"], gauge="free")
    three, two = (blora.estimate_memory({"input": torch.zeros(rows, 7, 6)}).activations for rows in (3, 2))
    assert three - two == 4 * (7 * 6 + 7 * 2 + 7 * 2)


def test_running_blocks_again_saves_most_of_it():
    blora = sp.bayesian_lora(tiny.causal_lm(num_hidden_layers=6))
    plain = blora.estimate_memory(inputs(2, 64))
    again = blora.estimate_memory(inputs(2, 64), gradient_checkpointing=True)
    assert again.weights == plain.weights and again.activations < 0.5 * plain.activations


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_nothing_is_left_of_the_passes_that_were_counted(gradient_checkpointing):
    """A graph that stays alive holds gigabytes, and keeps a later step from being captured."""
    blora = sp.bayesian_lora(tiny.causal_lm())

    def tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    blora.estimate_memory(inputs(2, 8), gradient_checkpointing=gradient_checkpointing)
    before = tensors()
    blora.estimate_memory(inputs(2, 8), gradient_checkpointing=gradient_checkpointing)
    assert tensors() == before


def saved_by_fit(blora, task, rows, monkeypatch, **options):
    """Bytes that autograd saves in the second step of ``fit``, each storage once, without weights."""
    known = {t.untyped_storage().data_ptr() for t in (*blora.llm.parameters(), *blora.llm.buffers())}
    gradient, kept = EagerStep.gradient, {}

    def counted(self, *args):
        held = []

        def pack(tensor):
            held.append(tensor.detach())  # no storage is freed, so no address is used twice
            if tensor.untyped_storage().data_ptr() not in known:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return held[-1]

        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return gradient(self, *args)

    monkeypatch.setattr(EagerStep, "gradient", counted)
    sp.fit(blora, task, rows, num_steps=2, batch_size=len(rows), progress=False, **options)
    return sum(kept.values())


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("max_logits", [None, 2000])
def test_the_bytes_of_a_step_on_completions_are_those_that_fit_saves(max_logits, gradient_checkpointing, monkeypatch):
    blora = sp.bayesian_lora(tiny.causal_lm(num_hidden_layers=4))
    task = sp.Completion(completions.tokenizer())
    rows = [{"prompt": "what colour is the sky ?", "completion": " blue" * 115} for _ in range(6)]
    if max_logits:
        task.max_logits = max_logits
    options = {"gradient_checkpointing": gradient_checkpointing}
    estimate = blora.estimate_memory(rows, task=task, **options)
    found = saved_by_fit(blora, task, rows, monkeypatch, hardware=options)
    expected = estimate.activations
    if gradient_checkpointing:  # the estimate also has what one block saves while it runs again
        expected -= blora.estimate_memory(rows, task=task).activations // 4
    assert expected == pytest.approx(found, rel=0.03)
    vocabulary = len(tiny.VOCABULARY)
    per_part = 2000 // (6 * vocabulary) if max_logits else 0
    assert estimate.head == 4 * 6 * per_part * vocabulary
    if not max_logits:
        assert estimate.activations > 4 * 6 * 116 * vocabulary  # all logits


def test_the_task_counts_all_tokens_that_the_head_reads():
    blora = sp.bayesian_lora(tiny.causal_lm())
    task = sp.Completion(completions.tokenizer())

    def of(count, rows):
        row = {"prompt": "what is " + "the " * (40 - count) + "sky ?", "completion": " blue" * count}
        return blora.estimate_memory([row] * rows, task=task).activations

    vocabulary = len(tiny.VOCABULARY)
    assert of(40, 3) - of(20, 3) > 3 * 20 * vocabulary * 4  # rows of one length: only the head differs
    assert of(40, 6) - of(40, 4) == 2 * (of(40, 3) - of(40, 2)) > 0


def test_any_task_can_be_counted_and_missing_tasks_are_named(monkeypatch):
    blora = sp.bayesian_lora(tiny.causal_lm())
    task, rows = sp.MultipleChoice(tiny.tokenizer()), tiny.question_rows(5)
    estimate = blora.estimate_memory(rows, task=task)
    assert estimate.head == 0
    assert estimate.activations == pytest.approx(saved_by_fit(blora, task, rows, monkeypatch), rel=0.03)
    with pytest.raises(ValueError, match="Rows need their task"):
        blora.estimate_memory(rows)
    completion = sp.Completion(completions.tokenizer())
    with pytest.raises(ValueError, match="pass task="):
        blora.estimate_memory(completions.batch_of(completion, completions.rows(3)))
    with pytest.raises(ValueError, match="no answer"):
        blora.estimate_memory([{"prompt": "the sky is"}], task=completion)
