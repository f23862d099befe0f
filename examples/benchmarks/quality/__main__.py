"""Measures accuracy and calibration of ScalaBL and the baselines on one budget.

    python examples/benchmarks/quality --data-dir DATA --datasets trec sst2 rte r8 --seeds 0 1 2 3 4
    python examples/benchmarks/quality --report --out runs/quality        # only tables and pictures
    python examples/benchmarks/quality --datasets r8 --methods mle scalabl --tiny    # a random model: seconds

Each run appends one line to a table in --out. You can stop the script at any time: the same command continues where it
stopped. Several processes share the work with --shard 0/3, 1/3, 2/3. The protocol and the columns are described in
docs/benchmark.md.

Options of a method are JSON. --set 'blob={"prior_scale": 0.1}' changes the options of a method everywhere, and
--variant 'cold=scalabl:{"kl_weight": 0.3}' adds a variant as a line of its own.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # makes _support importable
from benchmarks.quality import report
from benchmarks.quality.options import arguments
from benchmarks.quality.runner import run_command


def main() -> None:
    """Do the runs that the table lacks, and write the report."""
    args = arguments(__doc__)
    failed = run_command(args)
    if args.report or args.shard == "0/1":
        print(report.write(args.out))
    sys.exit(f"{failed} runs failed; see above." if failed else 0)


if __name__ == "__main__":
    main()
