"""Measures how many draws a prediction needs: Monte Carlo error of independent, antithetic and Sobol draws.

    python examples/benchmarks/designs.py             # SmolLM2-135M on Reuters news, upper blocks; minutes on a CPU
    python examples/benchmarks/designs.py --tiny      # a random model: seconds

One posterior is fitted. The reference is a prediction with very many independent draws, the long run. The error of a
prediction is the root mean square difference of its averaged probabilities from the reference, over articles, classes
and repetitions. The variance of the long run itself is subtracted from the mean square.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import scalabl_pyro as sp
from scalabl_pyro.prediction.quasi_monte_carlo import DESIGNS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from _support.datasets import NEWS, reuters_r8, word_task
from _support.models import demo_llm, upper_blocks


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200, help="training articles")
    parser.add_argument("--test-rows", type=int, default=24, help="test articles")
    parser.add_argument("--blocks", type=int, default=2, help="number of upper blocks to adapt")
    parser.add_argument("--steps", type=int, default=150, help="training steps")
    parser.add_argument("--draws", type=int, nargs="+", default=[2, 4, 10, 20], help="numbers of draws to compare")
    parser.add_argument("--repetitions", type=int, default=20, help="predictions per design and number")
    parser.add_argument("--long", type=int, default=1000, help="draws of the long run")
    parser.add_argument("--out", type=Path, default=Path("designs.json"), help="JSON file of the results")
    parser.add_argument("--tiny", action="store_true", help="use a random model and few rows, to test the script")
    args = parser.parse_args()
    if args.tiny:
        args.rows, args.test_rows, args.blocks, args.steps, args.draws = 8, 4, 1, 3, [2, 4]
        args.repetitions, args.long = 2, 20
    return args


def learn(args: argparse.Namespace) -> tuple[sp.Posterior, list[dict]]:
    """Fit a mean-field posterior, and read test articles."""
    llm, tokenizer = demo_llm(tiny=args.tiny)
    train = reuters_r8("train", count=args.rows, seed=0)
    test = reuters_r8("test", count=args.test_rows, seed=0)
    task = word_task(tokenizer, train, NEWS, 48)
    blora = sp.bayesian_lora(llm, layers_to_transform=upper_blocks(llm, args.blocks))
    # The stored results were made with these rates.
    options = {"lr": 5e-3, "lr_A": 5e-3, "optimizer": {"lr_scale": 5e-2}}
    options |= {"num_steps": args.steps, "hardware": {"cache_prefix": True}, "progress": False}
    return sp.fit(blora, task, train, **options).posterior, test


def main() -> None:
    """Fit once, predict many times, compare."""
    args = arguments()
    logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)  # no warning about articles that are cut
    posterior, test = learn(args)

    def predict(num_draws: int, seed: int, design: str) -> sp.Prediction:
        options = {"batch_size": len(test), "draws_per_pass": 50}
        return posterior.predict(test, num_draws=num_draws, seed=seed, design=design, **options)

    exact = predict(args.long, 10_000, "independent")
    variance_of_long_run = (np.exp(exact.log_probs).var(axis=0, ddof=1) / args.long).mean()
    rows = []
    for design in DESIGNS:
        for count in args.draws:
            squares = [
                ((predict(count, seed, design).probs - exact.probs) ** 2).mean() for seed in range(args.repetitions)
            ]
            error = float(np.sqrt(max(np.mean(squares) - variance_of_long_run, 0.0)))
            rows.append({"design": design, "draws": count, "error": error})
            print(f"{design:>12} {count:4} draws: error {error:.5f}", flush=True)
    table = pd.DataFrame(rows).pivot_table(index="draws", columns="design", values="error")[list(DESIGNS)]
    print(f"\n{table.round(5).to_string()}")
    setting = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    record = {"setting": setting, "latents": posterior.subspace.dim, "lines": rows}
    args.out.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
