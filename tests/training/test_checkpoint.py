"""A checkpoint is whole or ignored, whatever stops its writing or damages it; no pickle is read."""

import errno
import json
import logging
import os
import pickle
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import scalabl_pyro as sp
from scalabl_pyro.storage import directories as storage
from scalabl_pyro.training.checkpoint_files import MANIFEST, RECORD, TENSORS, CheckpointFolder, read

TENSOR = {"a": torch.arange(3.0), "b": torch.full((2, 2), torch.nan)}


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of the steps 10 and 20."""
    folder = CheckpointFolder(tmp_path / "run", keep=2)
    for step in (10, 20):
        folder.write(step, {**TENSOR, "step": torch.tensor(step)}, {"step": step})
    return folder


def names(folder):
    return sorted(p.name for p in folder.path.iterdir())


def test_what_was_written_comes_back(folder):
    found = folder.newest()
    assert (found.step, found.record) == (20, {"step": 20})
    assert torch.equal(found.tensors["a"], TENSOR["a"])
    assert found.tensors["b"].isnan().all()
    assert sorted(p.name for p in found.path.iterdir()) == sorted([MANIFEST, RECORD, TENSORS])


def test_the_last_ones_are_kept(folder):
    folder.write(30, TENSOR, {})
    assert names(folder) == ["step-00000020", "step-00000030"]


def test_a_run_killed_before_it_deleted_the_oldest_one_leaves_none_too_many(folder):
    CheckpointFolder(folder.path, keep=3).write(30, TENSOR, {})
    folder.set_aside(30)
    assert names(folder) == ["step-00000020", "step-00000030"]


def test_steps_are_ordered_as_numbers(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (99_999_999, 100_000_000, 100_000_001):
        folder.write(step, TENSOR, {})
    assert folder.newest().step == 100_000_001
    assert names(folder) == ["step-100000000", "step-100000001"]


def test_other_files_in_the_folder_are_left_alone(folder):
    (folder.path / "notes.txt").write_text("mine")
    (folder.path / "step-final").mkdir()
    folder.set_aside(20)
    folder.write(30, TENSOR, {})
    assert names(folder) == ["notes.txt", "step-00000020", "step-00000030", "step-final"]


def rewrite(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "no manifest": lambda c: (c / MANIFEST).unlink(),
    "empty manifest": lambda c: (c / MANIFEST).write_text(""),
    "manifest of half the length": lambda c: (c / MANIFEST).write_bytes((c / MANIFEST).read_bytes()[:40]),
    "manifest that is a list": lambda c: (c / MANIFEST).write_text("[]"),
    "manifest without end": lambda c: (c / MANIFEST).write_text("[" * 10**5),
    "huge manifest": lambda c: (c / MANIFEST).write_text(" " * 2**17),
    "manifest of another step": lambda c: rewrite(c / MANIFEST, lambda m: m.update(step=19)),
    "manifest that names other files": lambda c: rewrite(c / MANIFEST, lambda m: m["files"].update({"../x": {}})),
    "no tensors": lambda c: (c / TENSORS).unlink(),
    "no record": lambda c: (c / RECORD).unlink(),
    "tensors cut short": lambda c: os.truncate(c / TENSORS, 50),
    "one bit of the tensors": lambda c: flip(c / TENSORS),
    "one bit of the record": lambda c: flip(c / RECORD),
    "an empty folder": lambda c: [f.unlink() for f in c.iterdir()],
    "a file instead": lambda c: (shutil.rmtree(c), c.write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(damage, folder, caplog):
    damage(folder.path / "step-00000020")
    assert folder.newest().step == 10
    assert "step-00000020 cannot be used; the one before it is tried next" in caplog.text


def test_if_all_are_damaged_there_is_none(folder, caplog):
    for step in (10, 20):
        flip(folder.path / f"step-000000{step}" / TENSORS)
    assert folder.newest() is None
    assert len(caplog.records) == 2


def test_a_newer_format_is_refused_rather_than_passed_over(folder):
    rewrite(folder.path / "step-00000020" / MANIFEST, lambda m: m.update(format_version=1))
    with pytest.raises(ValueError, match=r"format_version 1; this version of scalabl_pyro reads 2\. Resume with the"):
        folder.newest()


def test_a_damaged_one_is_set_aside_so_that_it_does_not_push_out_whole_ones(folder):
    flip(folder.path / "step-00000020" / TENSORS)
    folder.set_aside(folder.newest().step)
    folder.write(15, TENSOR, {})
    folder.write(20, TENSOR, {})
    kept, *others = names(folder)
    assert kept.startswith("damaged-step-00000020")
    assert others == ["step-00000015", "step-00000020"]
    assert folder.newest().step == 20


def test_no_pickle_is_read(folder, monkeypatch):
    (folder.path / "step-00000020" / "optimizer.pt").write_bytes(pickle.dumps({}))
    for module, name in [(torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")]:
        monkeypatch.setattr(module, name, None)
    assert folder.newest().step == 20


# what is not ours -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".step-notes", ".step-00000010-0123abcd", ".step-00000010-gone", "step-00000001"])
@pytest.mark.parametrize("kind", ["file", "folder", "empty folder"])
def test_files_of_a_user_stay_whatever_their_names(tmp_path, name, kind):
    mine = tmp_path / name
    if kind == "file":
        mine.write_text("years of work")
    else:
        mine.mkdir()
        if kind == "folder":
            (mine / "notes.txt").write_text("years of work")
    folder = CheckpointFolder(tmp_path, keep=1)
    for step in (10, 20, 30):
        folder.write(step, TENSOR, {})
    folder.set_aside(30)
    if kind != "empty folder" or "notes" in name:  # these are a checkpoint, and a holder of one, without their files
        assert mine.exists() and (kind != "folder" or (mine / "notes.txt").read_text() == "years of work")
    assert [p.name for p in folder.paths() if p != mine] == ["step-00000030"]


def test_a_folder_of_a_user_is_not_replaced_by_a_checkpoint(tmp_path):
    mine = tmp_path / "step-00000010"
    mine.mkdir()
    (mine / "notes.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"step-00000010 is not a checkpoint: rename it"):
        CheckpointFolder(tmp_path, keep=2).write(10, TENSOR, {})
    assert (mine / "notes.txt").read_text() == "years of work"


# a disk that fails at the n-th call -----------------------------------------------------------------------------------

CALLS = ("mkdir", "open", "write", "fsync", "replace")


class FailingDisk:
    """Stands in for the module ``os``: its ``n``-th call of CALLS raises, and all later ones if it ``stays``."""

    def __init__(self, n, *, stays=False):
        self.n, self.stays, self.made = n, stays, []

    def __getattr__(self, name):
        original = getattr(os, name)
        if name not in CALLS:
            return original

        def call(*args, **kwargs):
            self.made.append(name)
            if len(self.made) == self.n or (self.stays and len(self.made) > self.n):
                if name == "write":  # a full disk takes what still fits
                    original(args[0], bytes(args[1])[: len(args[1]) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args, **kwargs)

        return call


def calls_of_a_write(tmp_path):
    disk = FailingDisk(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "os", disk)
        CheckpointFolder(tmp_path / "clean", keep=2).write(30, TENSOR, {})
    return disk.made


def test_a_write_makes_the_calls_that_are_made_to_fail(tmp_path):
    made = calls_of_a_write(tmp_path)
    assert {name: made.count(name) for name in CALLS} == {
        "mkdir": 1,
        "open": 8,  # three files; each again to sync; the folder, and the one above
        "write": 3,
        "fsync": 8,
        "replace": 1,
    }
    assert len(made) == 21
    assert made[-3:] == ["replace", "open", "fsync"]  # last of all, the name


@pytest.mark.parametrize("stays", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("n", range(1, 22))
def test_a_disk_that_fails_at_any_call_leaves_the_checkpoints_before(n, stays, folder, monkeypatch):
    before = names(folder)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "os", FailingDisk(n, stays=stays))
        try:
            folder.write(30, TENSOR, {})
            failed = False
        except OSError:
            failed = True
    if failed:
        assert names(folder) == before
        assert folder.newest().step == 20
    else:  # syncing the names in a folder is as good as the file system can
        assert names(folder) == ["step-00000020", "step-00000030"]
        assert folder.newest().step == 30
    for path in folder.paths():
        read(path)
    folder.write(40, TENSOR, {})
    assert folder.newest().step == 40


def fit(path, **options):
    made = sp.bayesian_lora(tiny.causal_lm()), sp.MultipleChoice(tiny.tokenizer())
    options = {"num_steps": 6, "batch_size": 4, "checkpoint": {"every": 2}, "progress": False, **options}
    return sp.fit(*made, tiny.question_rows(8), checkpoint_dir=path, **options)


def full_disk(monkeypatch, *, from_step, to_step=100):
    """Checkpoints of these steps cannot be written."""
    original = storage.write_file

    def write_file(path, data):
        step = int(path.parent.parent.name.split("-")[1])  # .step-00000004-…/new/file
        if from_step <= step <= to_step:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(path, data)

    monkeypatch.setattr(storage, "write_file", write_file)


def test_a_disk_that_fills_up_does_not_end_the_training(tmp_path, monkeypatch, caplog):
    full_disk(monkeypatch, from_step=4)
    with pytest.warns(
        sp.ScalaBLWarning, match="The last checkpoint is that of step 2; later ones could not be written"
    ):
        result = fit(tmp_path)
    assert len(result.history) == 6
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 2
    assert "the checkpoint of step 4 could not be written: [Errno 28] No space left on device" in caplog.text
    assert CheckpointFolder(tmp_path, keep=2).newest().step == 2


def test_a_disk_that_has_room_again_is_written_to(tmp_path, monkeypatch, caplog):
    full_disk(monkeypatch, from_step=2, to_step=4)
    fit(tmp_path)
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 2
    assert CheckpointFolder(tmp_path, keep=2).newest().step == 6


def test_a_folder_that_cannot_be_written_to_is_found_out_before_training(tmp_path, monkeypatch):
    full_disk(monkeypatch, from_step=0)
    steps = []
    with pytest.raises(OSError, match="No space left on device"):
        fit(tmp_path, callbacks=[steps.append])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        fit(tmp_path / "file", callbacks=[steps.append])
    assert steps == []


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, caplog):
    whole = fit(tmp_path / "whole")
    fit(tmp_path / "run", callbacks=[lambda row: row["step"] == 3])
    assert names(CheckpointFolder(tmp_path / "run", keep=2)) == ["step-00000002", "step-00000004"]
    flip(tmp_path / "run" / "step-00000004" / TENSORS)
    resumed = fit(tmp_path / "run")
    assert "step-00000004 cannot be used" in caplog.text
    assert torch.equal(resumed.posterior.guide.loc, whole.posterior.guide.loc)
    assert whole.history.drop(columns="seconds").equals(resumed.history.drop(columns="seconds"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("module.guide.guide.loc"), r"missing \['module.guide.guide.loc'\]"),
        (lambda t: t.update(more=torch.zeros(1)), r"unexpected \['more'\]"),
        (lambda t: t.update({"module.guide.guide.loc": torch.zeros(3)}), r"was saved as torch.float32 \(3,\), and is"),
        (lambda t: t.update({"optimizer.99.exp_avg": torch.zeros(3)}), r"unexpected \['optimizer.99.exp_avg'\]"),
    ],
)
def test_a_whole_checkpoint_with_tensors_of_another_program_changes_nothing(change, message, tmp_path):
    """One that somebody wrote by hand: sizes and sums are right."""
    fit(tmp_path, num_steps=3)
    found = CheckpointFolder(tmp_path, keep=2).newest()
    tensors = load_file(found.path / TENSORS)
    change(tensors)
    save_file(tensors, found.path / TENSORS)
    forged = CheckpointFolder(tmp_path / "forged", keep=1)
    forged.write(found.step, tensors, found.record)
    blora = sp.bayesian_lora(tiny.causal_lm())
    before = {n: p.detach().clone() for n, p in blora.point_estimates.named_parameters()}
    with pytest.raises(ValueError, match=message):
        sp.fit(
            blora,
            sp.MultipleChoice(tiny.tokenizer()),
            tiny.question_rows(8),
            num_steps=3,
            batch_size=4,
            checkpoint_dir=forged.path,
            progress=False,
        )
    for name, parameter in blora.point_estimates.named_parameters():
        assert torch.equal(parameter, before[name]) or name.endswith("/A"), name
