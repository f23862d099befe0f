"""Measures how long the import of the library takes, beside the import of PEFT, which it needs.

    python examples/benchmarks/start_up.py                # a minute
    python examples/benchmarks/start_up.py --repeats 3    # seconds

Each import runs in a process of its own, in turns. The figures are seconds of the CPU (user and system).
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

PROGRAMS = {"peft": "import peft", "scalabl_pyro": "import scalabl_pyro"}


def cpu_seconds(program: str) -> float:
    """Run a program in a process of its own; return its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], check=True, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure both imports in turns, and write medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="number of processes per import")
    parser.add_argument("--out", type=Path, default=Path("start_up.json"), help="JSON file of the result")
    args = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for turn in range(args.repeats + 1):
        for name, program in PROGRAMS.items():
            seconds = cpu_seconds(program)
            if turn:  # the first turn fills the cache of files
                times[name].append(round(seconds, 3))
    medians = {name: round(statistics.median(found), 3) for name, found in times.items()}
    ratio = round(statistics.median(a / b for a, b in zip(times["scalabl_pyro"], times["peft"], strict=True)), 3)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    result = {"median_cpu_s": medians, "median_ratio": ratio, "cpu_s": times, **machine}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"peft {medians['peft']} s, scalabl_pyro {medians['scalabl_pyro']} s, ratio {ratio}")


if __name__ == "__main__":
    main()
