"""How good the posteriors of a trained adapter are: NLL, ECE and seconds before and after each post-hoc method.

    python examples/benchmarks/posthoc.py --data r8 --seed 0 --out runs/posthoc                 # on validation rows
    python examples/benchmarks/posthoc.py --data trec --seed 0 --out runs/posthoc --test --trec ../shared/data/text

An adapter of SmolLM2 is trained by maximum likelihood until it overfits, exported as a PEFT adapter, and brought back
with ``from_peft``. Each method then gives it a posterior. Validation rows come from the training split. One JSON line
per method goes to the folder ``--out``.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import peft
import torch
import transformers

import scalabl_pyro as sp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from _support.datasets import NEWS, TREC, pick, reuters_r8, trec, word_task
from _support.models import demo_llm, upper_blocks

#: Options of each line of the table, by method.
LINES = {
    "laplace": {"method": "laplace"},
    "vi": {"method": "vi"},
    "mcmc": {"method": "mcmc", "num_samples": 20, "warmup_steps": 20, "num_chains": 1, "max_tree_depth": 4},
    "tfb": {"method": "tfb"},
}
#: Other options, tried on validation rows.
TRIALS = {
    "laplace, own prior": {"method": "laplace", "prior_scale": None},
    "laplace, scale 0.3": {"method": "laplace", "prior_scale": 0.3},
    "laplace, scale 0.1": {"method": "laplace", "prior_scale": 0.1},
    "laplace, 1 Newton step": {"method": "laplace", "newton_steps": 1},
    "vi, lr 3e-2": {"method": "vi", "lr": 3e-2},
    "vi, 4 passes": {"method": "vi", "num_steps": 100, "batch_size": 8},
    "tfb, tolerance 0.03": {"method": "tfb", "tolerance": 0.03},
    "tfb, tolerance 0.3": {"method": "tfb", "tolerance": 0.3},
    "tfb, tolerance 1": {"method": "tfb", "tolerance": 1.0},
}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["r8", "trec"], default="r8", help="data set")
    parser.add_argument("--trec", type=Path, default=Path("../shared/data/text"), help="folder of TREC's JSONL files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows and of the training")
    parser.add_argument("--train-rows", type=int, default=200, help="number of training rows")
    parser.add_argument("--score-rows", type=int, default=300, help="number of validation or test rows")
    parser.add_argument("--steps", type=int, default=300, help="training steps of the adapter")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per step")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the adapter")
    parser.add_argument("--blocks", type=int, default=10, help="number of upper blocks to adapt")
    parser.add_argument("--max-length", type=int, default=40, help="tokens per prompt; longer texts are cut")
    parser.add_argument("--draws", type=int, default=10, help="draws per prediction")
    parser.add_argument("--test", action="store_true", help="score test rows instead of validation rows")
    parser.add_argument("--trials", action="store_true", help="try other options too")
    parser.add_argument("--lines", nargs="*", default=list(LINES), help="methods to run")
    parser.add_argument("--tiny", action="store_true", help="use a random model and few rows, to test the script")
    parser.add_argument("--out", type=Path, default=Path("runs/posthoc"), help="folder of the results")
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[list[dict], list[dict], str]:
    """Read training rows, rows to score, and the prompt."""
    wanted = args.train_rows + args.score_rows
    if args.data == "r8":
        pool, prompt = reuters_r8("train", count=wanted, seed=args.seed), NEWS
        test = reuters_r8("test", count=args.score_rows, seed=args.seed, balanced=False) if args.test else []
    else:
        pool, prompt = pick(trec(args.trec, "train"), wanted, args.seed), TREC
        test = pick(trec(args.trec, "test"), args.score_rows, args.seed) if args.test else []
    return pool[: args.train_rows], test or pool[args.train_rows :], prompt


def trained_adapter(llm, task: sp.Task, train: list[dict], args: argparse.Namespace, folder: str) -> tuple[Path, float]:
    """Train an adapter by maximum likelihood, and write it as PEFT would. The model is plain again afterwards."""
    lora = {"target_modules": ["q_proj", "v_proj"]} | ({"layers_to_transform": upper_blocks(llm, args.blocks)})
    options = {"num_steps": args.steps, "batch_size": args.batch_size, "seed": args.seed, "progress": False}
    start = time.perf_counter()
    point = sp.baselines.mle(llm, task, train, lr=args.lr, lora=lora, **options).posterior
    seconds = time.perf_counter() - start
    (path,) = point.export_peft(Path(folder) / "adapter")
    point.blora().unload()
    return path, seconds


def main() -> None:
    """Train one adapter, and score the adapter and each method."""
    args = arguments()
    if args.tiny:
        args.train_rows, args.score_rows, args.steps, args.blocks = 12, 8, 3, 1
    llm, tokenizer = demo_llm(tiny=args.tiny)
    train, scored, prompt = load(args)
    task = word_task(tokenizer, train, prompt, max_length=args.max_length)
    versions = {m.__name__: m.__version__ for m in (sp, torch, transformers, peft)}
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "trec", "trials", "lines")}
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, (args.out / f"{args.data}-{args.seed}.jsonl").open("a") as file:
        path, training = trained_adapter(llm, task, train, args, folder)
        blora = sp.from_peft(llm, path)

        def write(name: str, posterior: sp.Posterior, num_draws: int, seconds: float, options: dict) -> None:
            table = posterior.predict(scored, num_draws=num_draws, seed=0, batch_size=32).metrics()
            metrics = {key: float(table.loc["value", key]) for key in ("nll", "ece", "accuracy", "brier")}
            known = {k: posterior.provenance.get(k) for k in ("prior_scale", "scale", "r_hat")}
            line = {"line": name, **metrics, "seconds": seconds, "training_seconds": training, "options": options}
            file.write(json.dumps(line | {"found": known, "settings": settings, "versions": versions}) + "\n")
            file.flush()
            print(f"{args.data} {name:24s} {seconds:7.1f} s  " + "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()))

        point = sp.posthoc(blora, task, train[:8], method="tfb", num_draws=1, num_bisections=1)  # only its mean is used
        write("adapter", point, 0, 0.0, {})
        lines = {name: LINES[name] for name in args.lines}
        for name, options in (lines | (TRIALS if args.trials else {})).items():
            extra = {} if options["method"] in ("laplace", "tfb") else {"progress": False}
            start = time.perf_counter()
            posterior = sp.posthoc(blora, task, train, seed=args.seed, **options, **extra)
            write(name, posterior, args.draws, time.perf_counter() - start, options)


if __name__ == "__main__":
    main()
