"""Hidden folders of work that is not finished yet, and the removal of those that a killed process left behind.

    .NAME-1a2b3c4d/                  holder, beside the folder that is written or deleted; NAME is how its name begins
        .scalabl_pyro-unfinished     marker: holds the whole name, and is locked while its process lives
        new/                         new content
        old/                         former content

The holder has only the beginning of a name, because a file system that allows 255 bytes would refuse a longer one. A
holder is removed only if it has the marker, and only if the lock of the marker is free: the system frees it when the
process ends, however it ends. A folder that only looks alike by its name is left alone, unless it is empty and would be
the holder of the same folder.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MARKER = ".scalabl_pyro-unfinished"
_NAME = re.compile(r"\.(.+)-[0-9a-f]{8}", re.DOTALL)
#: Length of the beginning of a name that a holder has, in characters: at most 200 bytes.
_BEGINNING = 50
#: Seconds after which a holder is left behind where its lock says nothing: from another host, or on Windows.
_OLD = 24 * 3600


@contextmanager
def holder(path: Path) -> Iterator[Path]:
    """Yield a new hidden folder beside ``path``, and remove it when the context ends.

    Holders that killed processes left in the same parent are removed first.

    Args:
        path: Folder that is about to be written or deleted.
    """
    remove_left_behind(path.parent)
    for folder in _alike(path.parent):
        if folder.name[:-9] == f".{path.name[:_BEGINNING]}":
            with contextlib.suppress(OSError):
                folder.rmdir()  # killed before it had a marker, so it is empty
    folder, marker = _create(path)
    try:
        yield folder
    finally:
        _remove(folder)
        os.close(marker)  # frees the lock


def discard(path: Path) -> None:
    """Delete a folder that a killed process must not leave in part.

    Raises:
        OSError: It cannot be moved. It is complete then.
    """
    with holder(path) as folder:
        os.replace(path, former_content(folder))


def new_content(folder: Path) -> Path:
    """Path of the new content in a holder."""
    return folder / "new"


def former_content(folder: Path) -> Path:
    """Path of the former content in a holder."""
    return folder / "old"


def remove_left_behind(parent: Path) -> None:
    """Remove the holders in a folder whose processes have ended; put former content back where it is the only one."""
    for folder in _alike(parent):
        with contextlib.suppress(OSError):
            _remove_if_left_behind(folder)


def _alike(parent: Path) -> list[Path]:
    """Folders that may be holders by their names."""
    with contextlib.suppress(OSError):
        return [Path(e.path) for e in os.scandir(parent) if _NAME.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    return []


def _create(path: Path) -> tuple[Path, int]:
    """Create a holder with a locked marker. Another process may remove it before it is locked; then make another."""
    while True:
        folder = path.with_name(f".{path.name[:_BEGINNING]}-{uuid.uuid4().hex[:8]}")
        os.mkdir(folder)
        marker = None
        try:
            marker = os.open(folder / MARKER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            if _lock(marker) is not False and (folder / MARKER).exists():
                written = {"host": socket.gethostname(), "pid": os.getpid(), "name": path.name}
                os.write(marker, json.dumps(written).encode())
                return folder, marker
        except FileNotFoundError:
            continue
        except BaseException:
            _remove(folder)
            if marker is not None:
                os.close(marker)
            raise
        os.close(marker)


def _remove_if_left_behind(folder: Path) -> None:
    if not stat.S_ISREG(os.lstat(folder / MARKER).st_mode):
        return
    marker = os.open(folder / MARKER, os.O_RDWR)
    try:
        locked = _lock(marker)
        is_old = time.time() - os.fstat(marker).st_mtime > _OLD
        if locked is False or not (is_old or (locked and _was_written_here(marker))):
            return
        if former_content(folder).is_dir() and new_content(folder).is_dir():  # killed between two renames
            target = _target(folder, (_read(marker) or {}).get("name"))
            if target is None:
                return  # somebody has changed the marker; the former content may be the only one
            if not target.exists():
                os.replace(former_content(folder), target)
        _remove(folder)
    finally:
        os.close(marker)


def _lock(marker: int) -> bool | None:
    """Lock a file. False: another process, or another handle, holds the lock. None: the system has no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _was_written_here(marker: int) -> bool:
    """Tell whether a process of this host wrote a marker, or was killed before it had written all of it."""
    written = _read(marker)
    return written is None or written.get("host") == socket.gethostname()


def _read(marker: int) -> dict[str, Any] | None:
    """Read what a marker says; None if its process was killed before it had written all of it."""
    try:
        written: Any = json.loads(os.pread(marker, 4096, 0))
    except ValueError:
        return None
    return written if isinstance(written, dict) else {}


def _target(folder: Path, name: Any) -> Path | None:
    """Find the folder that a holder was made for, or None if a name in its marker cannot be that of this folder."""
    if not isinstance(name, str) or os.path.basename(name) != name or name in (".", ".."):
        return None
    return folder.with_name(name) if folder.name[1:-9] == name[:_BEGINNING] else None


def _remove(folder: Path) -> None:
    """Remove a holder, its marker last: what a kill leaves in between is still known as ours."""
    for _ in range(2):  # a second try, in case the first met a temporary error
        for content in (new_content(folder), former_content(folder)):
            shutil.rmtree(content, ignore_errors=True)
    with contextlib.suppress(OSError):
        if not any(entry.name != MARKER for entry in os.scandir(folder)):
            (folder / MARKER).unlink(missing_ok=True)
            folder.rmdir()
