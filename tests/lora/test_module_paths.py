"""Paths of modules: suffixes end at a dot, and the first number is the block."""

import pytest

from scalabl_pyro.lora.module_paths import block_of, has_suffix, last_name, lies_in


@pytest.mark.parametrize(
    ("path", "suffix", "expected"),
    [
        ("model.layers.0.q_proj", "q_proj", True),
        ("q_proj", "q_proj", True),
        ("model.layers.0.q_proj", "0.q_proj", True),
        ("model.layers.0.qq_proj", "q_proj", False),
        ("q_proj.base", "q_proj", False),
    ],
)
def test_suffix(path, suffix, expected):
    assert has_suffix(path, suffix) is expected


def test_lies_in_and_last_name():
    assert lies_in("score", "score") and lies_in("score.dense", "score") and not lies_in("scores", "score")
    assert last_name("a.b.q_proj") == last_name("q_proj") == "q_proj"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model.layers.11.self_attn.q_proj", ("model.layers", 11, "model.layers.11")),
        ("h.3", ("h", 3, "h.3")),
        ("0.q", ("", 0, "0")),
        ("model.layers.2.experts.7.w1", ("model.layers", 2, "model.layers.2")),
    ],
)
def test_block(path, expected):
    block = block_of(path)
    assert (block.stack, block.index, block.path) == expected


def test_outside_of_blocks():
    assert block_of("lm_head") is None
