"""Manifests name every change of a file, and are read as untrusted input."""

import doctest
import importlib
import json

import pytest
import torch

from scalabl_pyro.storage.manifest import Manifest
from scalabl_pyro.storage.tensor_files import below, load_strict

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # SHA-256 of "abc", FIPS 180-2


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("")
    return tmp_path


def test_manifest_has_size_and_sum_of_every_file_below_the_folder(folder):
    json_form = Manifest.of_folder(folder).to_json()
    assert list(json_form) == ["b.txt", "inner/a.txt"]
    assert json_form["inner/a.txt"] == {"bytes": 3, "sha256": ABC}


def test_manifest_is_the_same_after_json(folder):
    manifest = Manifest.of_folder(folder)
    again = Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
    assert again == manifest
    again.check(folder)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda file: file.unlink(), FileNotFoundError, r"a\.txt is missing"),
        (lambda file: file.write_text("abcd"), ValueError, r"a\.txt has changed .* 4 bytes, not 3"),
        (lambda file: file.write_text("abd"), ValueError, r"a\.txt has changed .* SHA-256 is another"),
    ],
    ids=["missing", "longer", "other content"],
)
def test_changed_file_is_named(folder, damage, error, message):
    manifest = Manifest.of_folder(folder)
    damage(folder / "inner" / "a.txt")
    with pytest.raises(error, match=message):
        manifest.check(folder)
    manifest.check_file(folder, "b.txt")


GOOD = {"bytes": 3, "sha256": ABC}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "'files' must be an object, found NoneType"),
        ([], "'files' must be an object, found list"),
        ({"../a": GOOD}, r"names '\.\./a', which is not a path inside"),
        ({"/a": GOOD}, "names '/a', which is not a path inside"),
        ({"": GOOD}, "names '', which is not a path inside"),
        ({"a\\b": GOOD}, "which is not a path inside"),
        ({"a": 3}, "must give an object for 'a', found int"),
        ({"a": {"bytes": 3}}, r"must give 'bytes' \(int\) and 'sha256' \(str\) for 'a'"),
        ({"a": {"bytes": True, "sha256": ABC}}, "must give 'bytes'"),
        ({"a": {"bytes": "3", "sha256": ABC}}, "must give 'bytes'"),
        ({"a": {"bytes": 3, "sha256": 1}}, "must give 'bytes'"),
        ({"c": GOOD}, r"'files' names 'c'; expected only \['a', 'b'\]"),
    ],
    ids=str,
)
def test_json_that_is_not_a_manifest_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        Manifest.from_json(value, names=["b", "a"])


def test_below_cuts_the_prefix_once_and_leaves_other_names_out():
    assert below({"guide.guide.loc": 1, "guides.x": 2, "prior": 3}, "guide.") == {"guide.loc": 1}


def test_load_strict_takes_one_other_precision_and_nothing_else():
    layer = torch.nn.Linear(2, 3)
    halves = {name: tensor.half() for name, tensor in layer.state_dict().items()}
    load_strict("layer", layer, halves)
    assert layer.weight.dtype is torch.float16
    for wrong, message in (
        ({"weight": halves["weight"]}, r"missing \['bias'\]"),
        ({**halves, "bias": torch.zeros(2)}, r"'bias' is \(2,\), expected \(3,\)"),
        ({**halves, "bias": torch.zeros(3, dtype=torch.long)}, "'bias' is torch.int64, expected"),
        ({**halves, "bias": torch.zeros(3)}, "both must be saved in one precision"),
    ):
        with pytest.raises(ValueError, match=message):
            load_strict("layer", layer, wrong)


@pytest.mark.parametrize("name", ["directories", "json_reader", "manifest", "tensor_files"])
def test_examples_of_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(f"scalabl_pyro.storage.{name}"))
    assert result.attempted and not result.failed
