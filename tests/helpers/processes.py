"""Several processes on this machine that train together, forked so that each need not import everything again."""

import datetime
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Outcome(NamedTuple):
    """What became of a process: its result, its error, or the status it ended with."""

    result: Any = None
    error: str | None = None
    status: int = 0


def run_together(
    function: Callable[..., Any],
    folder: Path,
    *args: Any,
    size: int = 2,
    limit: float = 60,
    starts_group: bool = True,
) -> list[Outcome]:
    """Call ``function(rank, *args)`` in forked processes of one gloo group, and wait for all.

    ``starts_group=False`` leaves the group to the function; the environment is then what torchrun makes it.

    Raises:
        AssertionError: one does not end in time.
    """
    store, port = folder / f"store-{time.monotonic_ns()}", None if starts_group else _free_port()
    children = [_fork(function, store, rank, size, args, port) for rank in range(size)]
    deadline, statuses = time.monotonic() + limit, {}
    while len(statuses) < size:
        for rank, pid in enumerate(children):
            if rank not in statuses and os.waitpid(pid, os.WNOHANG) != (0, 0):
                statuses[rank] = None
        if time.monotonic() > deadline:
            for rank in set(range(size)) - set(statuses):
                os.kill(children[rank], signal.SIGKILL)
                os.waitpid(children[rank], 0)
            raise AssertionError(f"processes {sorted(set(range(size)) - set(statuses))} hang")
        time.sleep(0.01)
    return [_read(store, rank) for rank in range(size)]


def results(outcomes: list[Outcome]) -> list[Any]:
    """Return the results of processes, which must all have ended well."""
    for outcome in outcomes:
        assert outcome.error is None and outcome.status == 0, outcome.error or f"status {outcome.status}"
    return [outcome.result for outcome in outcomes]


def _fork(function: Callable[..., Any], store: Path, rank: int, size: int, args: tuple, port: int | None) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        limit = datetime.timedelta(seconds=40)
        if port is None:
            dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size, timeout=limit)
        else:
            said = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": 1,
            }
            os.environ.update({name: str(value) for name, value in said.items()})
        outcome = Outcome(function(rank, *args))
    except SystemExit as end:
        outcome = Outcome(status=int(end.code or 0))
    except BaseException:
        outcome = Outcome(error=traceback.format_exc())
    finally:
        torch.save(tuple(outcome), f"{store}.{rank}")
        if "coverage" in sys.modules and (measured := sys.modules["coverage"].Coverage.current()):
            measured.save()  # coverage run --parallel-mode
        os._exit(0)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _read(store: Path, rank: int) -> Outcome:
    file = Path(f"{store}.{rank}")
    return Outcome(*torch.load(file, weights_only=False)) if file.exists() else Outcome(status=-signal.SIGKILL)
