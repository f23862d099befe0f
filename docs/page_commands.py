"""Run the commands that a page shows: ``scalabl-pyro`` and ``curl``. The service runs until the page ends."""

import contextlib
import io
import json
import os
import shlex
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path
from types import TracebackType

from scalabl_pyro.cli import main as cli

ROOT = Path(__file__).resolve().parents[1]
#: Port that pages name. The service listens at a free one.
PORT = "8000"
#: Lines of the error output that belong on a page. The others show progress.
TOLD = ("error:", "warning:")
#: Width of a terminal.
WIDTH = 78
#: How long the service may take to load the model, in seconds.
PATIENCE = 120


def is_run(code: str) -> bool:
    """Tell whether a block of shell code is run: its commands are ``scalabl-pyro`` or ``curl``."""
    programs = {words[0] for words in commands(code)}
    return bool(programs) and programs <= {"scalabl-pyro", "curl"}


def commands(code: str) -> list[list[str]]:
    """Return the words of each command of a block."""
    lines = code.replace("\\\n", " ").strip()
    if lines.startswith("curl"):  # its JSON may have several lines
        return [shlex.split(lines)]
    return [shlex.split(line) for line in lines.splitlines() if line and not line.startswith("#")]


class Commands:
    """Runs commands in this process, but the service and ``curl`` in processes of their own.

    Raises:
        RuntimeError: A command fails, and the page does not show an error.
    """

    def __init__(self) -> None:
        self.services: list[subprocess.Popen[str]] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for service in self.services:
            service.terminate()
            service.communicate(timeout=60)

    def run(self, code: str, *, may_fail: bool) -> str:
        """Run a block, and return what the terminal shows besides the progress, in lines that a page has room for."""
        shown = ""
        for words in commands(code):
            words = [word.replace(PORT, self.port) for word in words]
            if words[0] == "curl":
                done = subprocess.run([words[0], "--silent", *words[1:]], capture_output=True, text=True, check=True)
                shown += json.dumps(json.loads(done.stdout), indent=1) + "\n"
            elif words[1] == "serve":
                self._serve(words[1:])
            else:
                shown += self._run_here(words[1:], may_fail=may_fail)
        return "".join(_wrap(line) + "\n" for line in shown.splitlines())

    def _run_here(self, words: list[str], *, may_fail: bool) -> str:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(words)
        if status and not may_fail:
            raise RuntimeError(f"{shlex.join(words)} ended with {status}: {err.getvalue()}")
        told = [line + "\n" for line in err.getvalue().splitlines() if line.startswith(TOLD)]
        return out.getvalue() + "".join(told)

    def _serve(self, words: list[str]) -> None:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "scalabl_pyro", *words]
        options = {"env": {**os.environ, "PYTHONPATH": path}, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        service = subprocess.Popen(command, text=True, **options)
        self.services.append(service)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and service.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health"):
                return
            time.sleep(0.1)
        service.kill()
        raise RuntimeError(f"the service did not start: {service.communicate()[0]}")


def _wrap(line: str) -> str:
    """Break a long line, as a terminal does, but between words."""
    return line if len(line) <= WIDTH else textwrap.fill(line, WIDTH, break_long_words=False, break_on_hyphens=False)
