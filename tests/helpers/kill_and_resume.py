"""Kill training runs that write checkpoints (SIGKILL) at random moments, resume each, and compare the last bits.

    python tests/kill_and_resume.py 200 /tmp/runs

Each run is a forked child of this process, each resumption another one. A run is a success if its resumption ends with
the same posterior and history, bit for bit, as a run that nothing happened to.
"""

import collections
import hashlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import tiny
import torch

import scalabl_pyro as sp

STEPS, EVERY = 24, 2
ROWS = tiny.question_rows(12)


def train(folder: Path, parts: tuple) -> str:
    """Digest of all that a run in ``folder`` learned and recorded, but for the time."""
    blora, task = parts
    options = {"num_steps": STEPS, "batch_size": 4, "lr": 1e-2, "progress": False, "checkpoint": {"every": EVERY}}
    result = sp.fit(blora, task, ROWS, checkpoint_dir=folder, **options)
    digest = hashlib.sha256(result.history.drop(columns="seconds").to_json(double_precision=15).encode())
    tensors = [*result.posterior.guide.state_dict().values(), *(t for pair in result.posterior.factors for t in pair)]
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def child(folder: Path, parts: tuple, answer: Path | None) -> int:
    """Fork a run; its digest goes into the file ``answer``."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        digest = train(folder, parts)
        if answer is not None:
            answer.write_text(digest)
        status = 0
    finally:
        os._exit(status)


def finished(folder: Path, parts: tuple, answer: Path) -> str:
    """Digest of a run that is let finish."""
    pid, deadline = child(folder, parts, answer), time.monotonic() + 120
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise RuntimeError(f"the run in {folder} did not end within two minutes")
        time.sleep(0.005)
    if status != 0:
        raise RuntimeError(f"the run in {folder} failed with wait status {status}")
    return answer.read_text()


def killed_and_resumed(count: int, root: Path, *, seed: int = 0) -> dict[str, float]:
    """Kill and resume ``count`` runs; how many did what.

    Raises:
        RuntimeError: a run that cannot be resumed, or leaves something behind.
    """
    parts = sp.bayesian_lora(tiny.causal_lm()), sp.MultipleChoice(tiny.tokenizer())
    began = time.perf_counter()
    expected = finished(root / "whole", parts, root / "digest")
    duration = time.perf_counter() - began
    if finished(root / "again", parts, root / "digest") != expected:
        raise RuntimeError("two runs that nothing happened to differ: there is nothing to compare with")
    moments, seen = random.Random(seed), collections.Counter()
    for number in range(count):
        folder = root / f"run-{number}"
        pid = child(folder, parts, None)
        time.sleep(moments.uniform(0, 0.8 * duration))  # later, most have ended
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        seen["killed"] += os.WIFSIGNALED(status)
        seen["with a checkpoint to resume from"] += any(folder.glob("step-*"))
        seen["in the middle of writing"] += any(folder.glob(".step-*"))
        seen["same bits"] += finished(folder, parts, root / "digest") == expected
        left = sorted(p.name for p in folder.iterdir())
        if left != [f"step-{STEPS - EVERY:08d}", f"step-{STEPS:08d}"]:
            raise RuntimeError(f"{folder} is left with {left}")
        shutil.rmtree(folder)
    return {**seen, "seconds": round(time.perf_counter() - began, 1)}


if __name__ == "__main__":
    torch.set_num_threads(1)  # no threads: a child has only the one that forked
    sys.stdout.write(f"{killed_and_resumed(int(sys.argv[1]), Path(sys.argv[2]))}\n")
