"""The estimate of a step's memory: linear in rows and tokens, and what is known of its parts."""

import gc

import pytest
import tiny
import torch

import scalabl_pyro as sp


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
