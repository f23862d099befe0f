"""Folders with the longest names that a file system allows are written; longer names are refused, and nothing is."""

import os

import pytest
import tiny
import torch

import scalabl_pyro as sp
from scalabl_pyro.guides import as_guide

LORA = {"r": 2, "target_modules": ["q_proj"]}
ROWS = tiny.question_rows(8)
LONGEST = ["n" * 246, "n" * 255, "\u00e9" * 127, "\U0001f339" * 63]
TOO_LONG = ["n" * 256, "\u00e9" * 128]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the names are those of file systems of 255 bytes")


@pytest.fixture(scope="module")
def blora():
    return sp.bayesian_lora(tiny.causal_lm(), **LORA)


@pytest.fixture(scope="module")
def baseline():
    task = sp.MultipleChoice(tiny.tokenizer())
    return sp.baselines.mle(tiny.causal_lm(), task, ROWS, num_steps=2, progress=False, lora=LORA).posterior


def train(blora, folder):
    task, options = sp.MultipleChoice(tiny.tokenizer()), {"num_steps": 2, "progress": False}
    return sp.fit(blora, task, ROWS, checkpoint_dir=folder, reset=True, **options)


@pytest.mark.parametrize("name", LONGEST, ids=len)
def test_the_longest_names_are_written_twice_and_read(tmp_path, blora, baseline, name):
    task = sp.MultipleChoice(tiny.tokenizer())
    posterior = sp.Posterior.capture(blora, task, as_guide("normal", blora), provenance={})
    calibrated = sp.baselines.temperature_scaling(baseline, ROWS)
    for folder in ("posterior", "baseline", "checkpoints"):
        (tmp_path / folder).mkdir()
    for _ in range(2):
        posterior.save_pretrained(tmp_path / "posterior" / name)
        calibrated.save_pretrained(tmp_path / "baseline" / name)
        train(blora, tmp_path / "checkpoints" / name)  # the second one resumes
    for folder in ("posterior", "baseline", "checkpoints"):
        assert [p.name for p in (tmp_path / folder).iterdir()] == [name]
    loaded = sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / "posterior" / name)
    assert torch.equal(loaded.mean(), posterior.mean())
    assert sp.baselines.load(tiny.causal_lm(), tmp_path / "baseline" / name) is not None


@pytest.mark.parametrize("inner", ["", "inside"])
@pytest.mark.parametrize("name", TOO_LONG, ids=len)
def test_longer_names_are_refused_before_anything_is_written(tmp_path, blora, baseline, name, inner):
    posterior = sp.Posterior.capture(
        blora, sp.MultipleChoice(tiny.tokenizer()), as_guide("normal", blora), provenance={}
    )
    path = tmp_path / "parent" / name / inner
    for use in (
        lambda: posterior.save_pretrained(path),
        lambda: sp.baselines.temperature_scaling(baseline, ROWS).save_pretrained(path),
        lambda: train(blora, path),
        lambda: sp.Posterior.from_pretrained(tiny.causal_lm(), path),
        lambda: sp.baselines.load(tiny.causal_lm(), path),
    ):
        with pytest.raises(ValueError, match=r"has a name of 256 bytes, '.*\.\.\.'\. At most 255 are allowed"):
            use()
    assert list(tmp_path.iterdir()) == []
