"""A budget is drawn from until nothing is left, and says what to do then."""

import doctest

import pytest

from scalabl_pyro.storage import budget as module
from scalabl_pyro.storage import json_reader
from scalabl_pyro.storage.budget import COUNTED, Budget
from scalabl_pyro.storage.manifest import Manifest
from scalabl_pyro.storage.untrusted_files import check_tree, read_file


def test_every_part_is_counted_and_refused_when_nothing_is_left():
    assert set(COUNTED) == set(vars(Budget()))
    for part in COUNTED:
        budget = Budget(**{part: 3})
        budget.spend(part, 2, "a/file")
        with pytest.raises(ValueError, match=rf"^a/file asks for 2 .*; only 1 more .* budget=Budget\({part}=\.\.\.\)"):
            budget.spend(part, 2, "a/file")
        budget.spend(part, 1, "a/file")
        assert getattr(budget, part) == 0


def test_budget_grows_with_the_model():
    small, large = Budget.beside(0), Budget.beside(10**9)
    assert small == Budget() and large.numbers - small.numbers == 10**9 and large.bytes - small.bytes == 8 * 10**9
    assert large.files == small.files and large.members == small.members


@pytest.mark.parametrize("value", [-1, 1.5, None, "3", True])
def test_part_that_counts_nothing_is_refused(value):
    with pytest.raises(ValueError, match="numbers="):
        Budget(numbers=value)


def test_size_is_compared_before_a_file_is_read(tmp_path):
    with (tmp_path / "x").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="x asks for 1,099,511,627,776 bytes"):
        read_file(tmp_path, "x", budget=Budget())
    manifest = Manifest.from_json({"x": {"bytes": 2**40, "sha256": "0" * 64}})
    with pytest.raises(ValueError, match="x asks for 1,099,511,627,776 bytes"):
        manifest.check(tmp_path, budget=Budget())


def test_files_of_a_folder_are_counted(tmp_path):
    for i in range(5):
        (tmp_path / str(i)).touch()
    assert len(check_tree(tmp_path, limit=10, budget=Budget(files=6))) == 5  # and the folder itself
    with pytest.raises(ValueError, match="asks for 1 files; only 0 more"):
        check_tree(tmp_path, limit=10, budget=Budget(files=5))


@pytest.mark.parametrize("text", ["[1, 2, 3]", '{"a": 1, "b": [2]}', b"[[], 1]"])
def test_values_are_counted_before_they_are_parsed(text):
    json_reader.loads(text, max_values=4)
    with pytest.raises(ValueError, match="values, more than the 2 that are allowed"):
        json_reader.loads(text, max_values=2)


@pytest.mark.parametrize("name", ["./a", "a//b", "a/", "a/./b", "x" * 256])
def test_file_has_one_name(name):
    with pytest.raises(ValueError, match=r"write it as|a name of more than 255 bytes"):
        Manifest.from_json({name: {"bytes": 1, "sha256": ""}})


def test_example_of_the_budget_runs():
    assert doctest.testmod(module).attempted >= 4 and not doctest.testmod(module).failed
