"""Hidden folders of a killed process go away with the next write; those of a living one, and a user's own, stay."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from scalabl_pyro.storage import directories, unfinished
from scalabl_pyro.storage.directories import staged, write_file
from scalabl_pyro.storage.unfinished import MARKER, discard, holder, remove_left_behind

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def write(path: Path, text: str = "hello") -> None:
    with staged(path) as folder:
        write_file(folder / "a.txt", text.encode())


def killed_at(n: int, work) -> bool:
    """Do the work in a child that dies at its n-th call of the system that changes files; tell whether it did."""
    pid = os.fork()
    if pid == 0:
        made = 0

        def audit(event: str, args: tuple) -> None:
            nonlocal made
            is_write = event == "open" and isinstance(args[2], int) and args[2] & (os.O_CREAT | os.O_RDWR)
            if is_write or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
                made += 1
                if made == n:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


#: The longest names that a file system of 255 bytes allows.
LONGEST = ["n" * 255, "\u00e9" * 127, "\U0001f339" * 63]


@pytest.mark.parametrize("name", ["saved", *LONGEST], ids=len)
@pytest.mark.parametrize("can_exchange", [True, False])
def test_the_next_write_removes_what_a_kill_at_any_call_left(tmp_path, monkeypatch, can_exchange, name):
    if not can_exchange:
        monkeypatch.setattr(directories, "exchange", lambda a, b: False)
    kills = 0
    for n in range(1, 100):
        parent = tmp_path / str(n)
        parent.mkdir()
        write(parent / name, "old")
        if not killed_at(n, lambda parent=parent: write(parent / name, "new")):
            break
        kills += 1
        remove_left_behind(parent)  # puts the old folder back where a kill came between two renames
        assert (parent / name / "a.txt").read_text() in ("old", "new")
        write(parent / name, "newest")
        assert names(parent) == [name]
        assert names(parent / name) == ["a.txt"]
    assert kills >= 8


def test_the_next_write_removes_what_a_kill_in_a_deletion_left(tmp_path):
    kills = 0
    for n in range(1, 100):
        write(tmp_path / "gone")
        if not killed_at(n, lambda: discard(tmp_path / "gone")):
            break
        kills += 1
        write(tmp_path / "gone")
        assert names(tmp_path) == ["gone"]
    assert kills >= 4


def test_a_folder_with_the_same_beginning_of_its_name_is_not_put_in_the_place_of_another(tmp_path, monkeypatch):
    monkeypatch.setattr(directories, "exchange", lambda a, b: False)
    mine, other = tmp_path / ("n" * 254 + "a"), tmp_path / ("n" * 254 + "b")
    for n in range(1, 100):
        write(mine, "mine")
        if not killed_at(n, lambda: write(mine, "new")):
            break
        write(other, "other")  # removes what the killed process left, and puts mine back
        assert (mine / "a.txt").read_text() in ("mine", "new")
        assert names(tmp_path) == [mine.name, other.name]
        shutil.rmtree(other)
    assert n >= 8


@pytest.mark.parametrize("name", ["../elsewhere", "/elsewhere", "..", "", 3, None, "another"])
def test_a_marker_that_names_another_folder_moves_and_deletes_nothing(tmp_path, name):
    parent = tmp_path / "parent"
    folder = parent / ".saved-0123abcd"
    for content in ("new", "old"):
        (folder / content).mkdir(parents=True)
    (folder / MARKER).write_text(json.dumps({"host": socket.gethostname(), "pid": 1, "name": name}))
    before = sorted(tmp_path.rglob("*"))
    remove_left_behind(parent)
    assert sorted(tmp_path.rglob("*")) == before


def test_work_of_a_living_process_stays(tmp_path):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with holder(tmp_path / "saved") as folder:
            (folder / "new").mkdir()
            os.write(writing, b"1")
            time.sleep(60)
        os._exit(0)
    os.read(reading, 1)
    try:
        write(tmp_path / "saved")
        write(tmp_path / "another")
        (living,) = [name for name in names(tmp_path) if name.startswith(".")]
        assert (tmp_path / living / "new").is_dir()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    write(tmp_path / "another")
    assert names(tmp_path) == ["another", "saved"]


def test_work_of_another_thread_or_host_stays(tmp_path):
    with holder(tmp_path / "saved") as folder:
        remove_left_behind(tmp_path)
        assert folder.is_dir()
    foreign = tmp_path / ".saved-0123abcd"
    foreign.mkdir()
    (foreign / MARKER).write_text('{"host": "another host", "pid": 1}')
    remove_left_behind(tmp_path)
    assert foreign.is_dir()
    yesterday = time.time() - 2 * unfinished._OLD
    os.utime(foreign / MARKER, (yesterday, yesterday))
    remove_left_behind(tmp_path)
    assert not foreign.exists()


def test_what_only_looks_alike_stays(tmp_path):
    """Files and folders of users, links, and a holder into which a user has put a file."""
    (tmp_path / ".saved-00000001").mkdir()
    (tmp_path / ".saved-00000001" / "notes.txt").write_text("years of work")
    (tmp_path / ".saved-00000002").write_text("years of work")
    (tmp_path / ".notes-00000003").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / MARKER).write_text("{}")
    (tmp_path / ".saved-00000004").symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".saved-00000005").mkdir()
    (tmp_path / ".saved-00000005" / MARKER).symlink_to(tmp_path / "elsewhere" / MARKER)
    (tmp_path / ".saved-00000006").mkdir()
    (tmp_path / ".saved-00000006" / MARKER).write_text("")
    (tmp_path / ".saved-00000006" / "notes.txt").write_text("years of work")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    write(tmp_path / "saved")
    after = sorted(str(p) for p in tmp_path.rglob("*") if tmp_path / "saved" not in (p, *p.parents))
    assert after == before
