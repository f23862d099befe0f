"""A posterior that release 0.1.0 saved loads for good, and what a later format may change is kept to a rule."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from golden_posterior import GOLDEN, base_model

import scalabl_pyro as sp
from scalabl_pyro.data import encode
from scalabl_pyro.posterior.config import FORMAT_MINOR, FORMAT_VERSION
from scalabl_pyro.prediction.predict import predict

CONFIG = "scalabl_config.json"
#: Three rows, one of them with fewer choices.
ROWS = [*tiny.question_rows(2, seed=5), *tiny.question_rows(1, seed=6, num_choices=3)]


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    shown = json.loads((GOLDEN / "expected.json").read_text())
    shown["log_probs"] = [[[-math.inf if x is None else x for x in row] for row in draw] for draw in shown["log_probs"]]
    return {name: np.asarray(values) for name, values in shown.items()}


@pytest.fixture(scope="module")
def posterior() -> sp.Posterior:
    return sp.Posterior.from_pretrained(base_model(), GOLDEN / "posterior-1.0")


def assert_close(found: Any, expected: np.ndarray, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=atol)


def test_its_mean_is_the_stored_one(posterior, expected):
    assert_close(posterior.mean(), expected["mean"])


def test_it_predicts_what_it_did_under_the_stored_draws(posterior, expected):
    """Independent of the random numbers of a torch version."""
    examples = encode(ROWS, posterior.task.encode, need_target=False)
    draws = torch.as_tensor(expected["draws"], dtype=torch.float32)
    assert_close(predict(posterior.llm(), posterior.task, draws, examples).log_probs, expected["log_probs"])


def test_it_draws_what_it_did(posterior, expected):
    assert_close(posterior.sample(3, seed=7).s, expected["draws"])


def test_it_predicts_what_it_did_with_its_own_draws(posterior, expected):
    prediction = posterior.predict(ROWS, num_draws=3, seed=7)
    assert_close(prediction.log_probs, expected["log_probs"])
    spread = prediction.log_probs[:, 0].std(0)
    assert spread.max() > 1e-3, "the draws should differ visibly"


def test_its_options_and_provenance_are_read(posterior):
    assert posterior.task.max_length == 60
    assert posterior.subspace.dim == 8 and [layer.rank for layer in posterior.subspace] == [2] * 4
    assert posterior.provenance["num_steps"] == 20
    assert posterior.prior.distribution().base_dist.scale.tolist() == [0.5] * 8


def test_it_is_small():
    assert sum(f.stat().st_size for f in GOLDEN.rglob("*") if f.is_file()) < 20_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_it_loads_on_the_base_in_another_precision(expected, dtype):
    loaded = sp.Posterior.from_pretrained(base_model(dtype), GOLDEN / "posterior-1.0")
    assert_close(loaded.sample(3, seed=7).s, expected["draws"])
    atol = 0.3 if dtype is torch.bfloat16 else 1e-5
    found = loaded.predict(ROWS, num_draws=3, seed=7).log_probs
    known = np.isfinite(expected["log_probs"])
    assert_close(found[known], expected["log_probs"][known], atol=atol)


@pytest.mark.parametrize("saved_on", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loaded_on", [torch.float32, torch.bfloat16], ids=str)
def test_posterior_moves_between_precisions_of_its_base(tmp_path, saved_on, loaded_on):
    blora = sp.bayesian_lora(base_model(saved_on), r=2)
    task = sp.MultipleChoice(tiny.tokenizer())
    learned = sp.fit(blora, task, tiny.question_rows(8), num_steps=3, lr=0.05, progress=False).posterior
    learned.save_pretrained(tmp_path / "p")
    loaded = sp.Posterior.from_pretrained(base_model(loaded_on), tmp_path / "p")
    assert torch.equal(loaded.sample(3).s, learned.sample(3).s)
    for (A, B), (own_A, own_B) in zip(loaded.factors, learned.factors, strict=True):
        assert A.dtype == B.dtype == torch.float32
        assert torch.equal(A, own_A) and torch.equal(B, own_B)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    for name in ("adapter_model.safetensors", "posterior.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / "p" / name).read_bytes()


@pytest.mark.gpu
def test_it_loads_on_a_gpu(expected):
    loaded = sp.Posterior.from_pretrained(base_model().cuda(), GOLDEN / "posterior-1.0")
    assert_close(loaded.sample(3, seed=7).s, expected["draws"])
    assert_close(loaded.predict(ROWS, num_draws=3, seed=7).log_probs, expected["log_probs"], atol=1e-3)


# what later formats may change ------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return Path(shutil.copytree(GOLDEN / "posterior-1.0", tmp_path / "p"))


def edit(path: Path, *keys: Any, **fields: Any) -> None:
    config = json.loads((path / CONFIG).read_text())
    part = config
    for key in keys:
        part = part[key]
    part.update(fields)
    (path / CONFIG).write_text(json.dumps(config))


PLACES = [(), ("guide",), ("prior",), ("task",), ("base_model",), ("layers", 0)]


@pytest.mark.parametrize("where", PLACES, ids=str)
def test_new_field_of_a_newer_minor_format_is_ignored_with_a_warning(path, posterior, where):
    edit(path, format_minor=FORMAT_MINOR + 1, library_version="9.0.0")
    edit(path, *where, color="blue")
    with pytest.warns(sp.ScalaBLWarning, match=r"does not know: \['.*color'\]\. scalabl_pyro 9\.0\.0 wrote it"):
        loaded = sp.Posterior.from_pretrained(base_model(), path)
    assert torch.equal(loaded.sample(3).s, posterior.sample(3).s)


@pytest.mark.parametrize("where", PLACES, ids=str)
def test_new_field_of_the_present_format_is_damage(path, where):
    edit(path, *where, color="blue")
    with pytest.raises(ValueError, match=r"color'\]\. Format 1\.0 has no such fields, so the file is damaged"):
        sp.Posterior.from_pretrained(base_model(), path)


@pytest.mark.parametrize("minor", [FORMAT_MINOR, FORMAT_MINOR + 1])
@pytest.mark.parametrize("part", ["guide", "prior", "task"])
def test_new_option_is_refused_whatever_the_format(path, part, minor):
    """To leave out an option would be to load another posterior."""
    edit(path, format_minor=minor)
    edit(path, part, "options", color="blue")
    with pytest.raises(ValueError, match=r"unknown options of .*: \['color'\]\. Known names: "):
        sp.Posterior.from_pretrained(base_model(), path)


def test_newer_minor_format_without_new_fields_is_read_in_silence(path, posterior):
    edit(path, format_minor=FORMAT_MINOR + 1)
    assert torch.equal(sp.Posterior.from_pretrained(base_model(), path).mean(), posterior.mean())


def test_newer_major_format_is_refused(path):
    edit(path, format_version=FORMAT_VERSION + 1)
    with pytest.raises(ValueError, match=rf"has format_version {FORMAT_VERSION + 1}; .* reads {FORMAT_VERSION}"):
        sp.Posterior.from_pretrained(base_model(), path)


def test_newer_minor_format_does_not_excuse_a_missing_or_wrong_field(path):
    edit(path, format_minor=FORMAT_MINOR + 1, gauge=3)
    with pytest.raises(ValueError, match="'gauge' must be of type str"):
        sp.Posterior.from_pretrained(base_model(), path)


@pytest.mark.parametrize("minor", [-1, "0", True, 1.5, None])
def test_format_minor_is_a_number(path, minor):
    edit(path, format_minor=minor)
    with pytest.raises(ValueError, match="'format_minor' must be a number from 0"):
        sp.Posterior.from_pretrained(base_model(), path)
