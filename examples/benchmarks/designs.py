"""How many passes does a prediction need? Monte Carlo error of independent, antithetic and Sobol draws.

    python examples/benchmarks/designs.py             # SmolLM2-135M on Reuters news, upper blocks; minutes on a CPU
    python examples/benchmarks/designs.py --tiny      # a random model: seconds

One posterior is fitted. The error of a prediction is the root mean square, over articles, classes and repetitions, of
its averaged probabilities minus those of a long run of independent draws. The error of the long run itself is
subtracted in squares.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import scalabl_pyro as sp
from scalabl_pyro.prediction.quasi_monte_carlo import DESIGNS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sources


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200, help="training articles")
    parser.add_argument("--test-rows", type=int, default=24)
    parser.add_argument("--blocks", type=int, default=2, help="adapt this many of the upper blocks")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--draws", type=int, nargs="+", default=[2, 4, 10, 20])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--long", type=int, default=1000, help="draws of the long run")
    parser.add_argument("--out", type=Path, default=Path("designs.json"))
    parser.add_argument("--tiny", action="store_true", help="a random model and few rows, to try that it runs")
    args = parser.parse_args()
    if args.tiny:
        args.rows, args.test_rows, args.blocks, args.steps, args.draws = 8, 4, 1, 3, [2, 4]
        args.repetitions, args.long = 2, 20
    return args


def learn(args: argparse.Namespace) -> tuple[sp.Posterior, list[dict]]:
    """A mean-field posterior, and articles that it has not seen."""
    llm, tokenizer = sources.tiny_llm() if args.tiny else sources.smollm2()
    llm.to("cuda" if torch.cuda.is_available() else "cpu")
    train = sources.reuters_r8("train", count=args.rows, seed=0)
    test = sources.reuters_r8("test", count=args.test_rows, seed=0)
    task = sources.word_task(tokenizer, train, sources.NEWS, 48)
    depth = llm.config.get_text_config().num_hidden_layers
    blora = sp.bayesian_lora(llm, layers_to_transform=range(depth - args.blocks, depth))
    options = {"lr": 5e-3, "lr_A": 5e-3, "lr_scale": 5e-2}  # as the results kept were made
    options |= {"num_steps": args.steps, "cache_prefix": True, "progress": False}
    return sp.fit(blora, task, train, **options).posterior, test


def main() -> None:
    """Fit, predict again and again, compare."""
    args = arguments()
    logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)  # that long articles are cut is known here
    posterior, test = learn(args)

    def probs(num_draws: int, seed: int, design: str) -> np.ndarray:
        options = {"batch_size": len(test), "draws_per_pass": 50}
        return posterior.predict(test, num_draws=num_draws, seed=seed, design=design, **options)

    exact = probs(args.long, 10_000, "independent")
    of_long_run = (np.exp(exact.log_probs).var(axis=0, ddof=1) / args.long).mean()
    rows = []
    for design in DESIGNS:
        for count in args.draws:
            squares = [
                ((probs(count, seed, design).probs - exact.probs) ** 2).mean() for seed in range(args.repetitions)
            ]
            error = float(np.sqrt(max(np.mean(squares) - of_long_run, 0.0)))
            rows.append({"design": design, "draws": count, "error": error})
            print(f"{design:>12} {count:4} draws: error {error:.5f}", flush=True)
    table = pd.DataFrame(rows).pivot_table(index="draws", columns="design", values="error")[list(DESIGNS)]
    print(f"\n{table.round(5).to_string()}")
    setting = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    record = {"setting": setting, "latents": posterior.subspace.dim, "lines": rows}
    args.out.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
