"""Measures requests to a posterior in a service: one row or many, one thread or several, the mean or ten draws.

    python examples/benchmarks/serving.py           # SmolLM2-135M, upper third adapted; minutes on a CPU
    python examples/benchmarks/serving.py --tiny    # a random model: seconds

All rows have prompts of the same kind (Reuters news). A posterior of a few training steps is enough, because the time
of a prediction does not depend on what was learned.
"""

import argparse
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import scalabl_pyro as sp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from _support.datasets import NEWS, reuters_r8, word_task
from _support.models import demo_llm, upper_blocks


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="rows of a large request, and number of small requests")
    parser.add_argument("--threads", type=int, default=2, help="threads that send small requests")
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 10], help="numbers of draws; 0 is the mean")
    parser.add_argument("--repeats", type=int, default=5, help="calls per figure; the median counts")
    parser.add_argument("--out", type=Path, default=Path("serving.json"), help="JSON file of the results")
    parser.add_argument("--tiny", action="store_true", help="use a random model, to test the script")
    args = parser.parse_args()
    if args.tiny:
        args.rows, args.repeats, args.draws = 4, 2, [0, 3]
    return args


def learn(args: argparse.Namespace) -> sp.Posterior:
    """Fit a posterior in the upper third of the blocks and the head."""
    llm, tokenizer = demo_llm(tiny=args.tiny)
    train = reuters_r8("train", count=8, seed=0)
    blora = sp.bayesian_lora(llm, layers_to_transform=upper_blocks(llm, -(-llm.config.num_hidden_layers // 3)))
    return sp.fit(blora, word_task(tokenizer, train, NEWS, 48), train, num_steps=2, progress=False).posterior


def milliseconds(fn: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after one call of warm-up."""
    fn()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    """Time one small request, many small requests in threads, and one large request."""
    args = arguments()
    logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)  # no warning about articles that are cut
    posterior = learn(args)
    rows = reuters_r8("test", count=args.rows, seed=0)
    lines = []
    with ThreadPoolExecutor(args.threads) as pool:
        for draws in args.draws:

            def predict(rows: list[dict], draws: int = draws) -> sp.Prediction:
                return posterior.predict(rows, num_draws=draws, seed=0)

            line = {
                "draws": draws,
                "one_row_ms": milliseconds(lambda: predict(rows[:1]), args.repeats),
                "small_requests_ms": milliseconds(lambda: [predict([row]) for row in rows], args.repeats),
                "in_threads_ms": milliseconds(lambda: list(pool.map(predict, [[row] for row in rows])), args.repeats),
                "one_request_ms": milliseconds(lambda: predict(rows), args.repeats),
            }
            lines.append(line)
            print("  ".join(f"{name} {value:.0f}" for name, value in line.items()), flush=True)
    setting = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    machine = {"torch_threads": torch.get_num_threads(), "machine": platform.machine(), "version": sp.__version__}
    args.out.write_text(json.dumps({"setting": setting, **machine, "lines": lines}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
