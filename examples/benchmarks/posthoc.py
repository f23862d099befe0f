"""How good the posteriors of a trained adapter are: NLL, ECE and seconds before and after each post-hoc method.

    python examples/benchmarks/posthoc.py --data r8 --seed 0 --out runs/posthoc                 # on validation rows
    python examples/benchmarks/posthoc.py --data trec --seed 0 --out runs/posthoc --test --trec ../shared/data/text

An adapter of SmolLM2 is trained by maximum likelihood until it overfits, exported as a PEFT adapter, and brought back
with ``from_peft``. Each method then gives it a posterior. Validation rows come from the training split. Temperature
scaling is a reference: it reads the validation rows, the methods read only the training rows. The adapter is trained as
PEFT does it, so all blocks run at each step. One JSON line per method goes to the folder ``--out``.
"""

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import scalabl_pyro as sp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from _support.datasets import NEWS, TREC, distinct, pick, reuters_r8, trec, word_task
from _support.models import demo_llm, upper_blocks

#: Options of each line of the table. ``rows`` is the number of training rows that the method reads, and ``linearized``
#: says how its draws predict; the others are those of ``posthoc``.
LINES: dict[str, dict[str, Any]] = {
    "laplace": {"method": "laplace"},
    "vi": {"method": "vi"},
    "mcmc": {"method": "mcmc", "num_samples": 8, "warmup_steps": 8, "num_chains": 1, "max_tree_depth": 3},
    "tfb": {"method": "tfb"},
}
#: Other options, tried on validation rows.
TRIALS: dict[str, dict[str, Any]] = {
    "laplace, evidence": {"method": "laplace", "prior_scale": "evidence"},
    "laplace, evidence, linearized": {"method": "laplace", "prior_scale": "evidence", "linearized": True},
    "laplace, evidence, 40 rows": {"method": "laplace", "prior_scale": "evidence", "rows": 40},
    "laplace, evidence, 40 rows, linearized": {
        "method": "laplace",
        "prior_scale": "evidence",
        "rows": 40,
        "linearized": True,
    },
    "laplace, scale 1": {"method": "laplace", "prior_scale": 1.0},
    "laplace, scale 0.5": {"method": "laplace", "prior_scale": 0.5},
    "laplace, scale 0.3": {"method": "laplace", "prior_scale": 0.3},
    "laplace, scale 0.2": {"method": "laplace", "prior_scale": 0.2},
    "laplace, scale 0.1": {"method": "laplace", "prior_scale": 0.1},
    "laplace, scale 0.5, linearized": {"method": "laplace", "prior_scale": 0.5, "linearized": True},
    "laplace, scale 0.3, linearized": {"method": "laplace", "prior_scale": 0.3, "linearized": True},
    "laplace, 1 Newton step": {"method": "laplace", "prior_scale": "evidence", "newton_steps": 1},
    "vi, lr 3e-2": {"method": "vi", "lr": 3e-2},
    "vi, lr 1e-1": {"method": "vi", "lr": 1e-1},
    "tfb, 40 rows": {"method": "tfb", "rows": 40},
    "tfb, tolerance 1": {"method": "tfb", "tolerance": 1.0},
    "tfb, tolerance 10": {"method": "tfb", "tolerance": 10.0},
}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["r8", "trec"], default="r8", help="data set")
    parser.add_argument("--trec", type=Path, default=Path("../shared/data/text"), help="folder of TREC's JSONL files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows and of the training")
    parser.add_argument("--train-rows", type=int, default=160, help="number of training rows")
    parser.add_argument("--validation-rows", type=int, default=150, help="number of validation rows")
    parser.add_argument("--test-rows", type=int, default=300, help="number of test rows")
    parser.add_argument("--steps", type=int, default=300, help="training steps of the adapter")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per step")
    parser.add_argument("--lr", type=float, default=6e-3, help="learning rate of the adapter")
    parser.add_argument("--blocks", type=int, default=3, help="number of upper blocks to adapt")
    parser.add_argument("--max-length", type=int, default=40, help="tokens per prompt; longer texts are cut")
    parser.add_argument("--draws", type=int, default=10, help="draws per prediction")
    parser.add_argument("--test", action="store_true", help="score test rows instead of validation rows")
    parser.add_argument("--trials", action="store_true", help="try other options too")
    parser.add_argument("--lines", nargs="*", default=list(LINES), choices=LINES | TRIALS, help="lines of the table")
    parser.add_argument("--spectrum", action="store_true", help="start s at the singular values of the adapter")
    parser.add_argument("--tiny", action="store_true", help="use a random model and few rows, to test the script")
    parser.add_argument("--out", type=Path, default=Path("runs/posthoc"), help="folder of the results")
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[list[dict], list[dict], list[dict], str]:
    """Read training rows, validation rows, the rows to score, and the prompt."""
    wanted = args.train_rows + args.validation_rows
    if args.data == "r8":
        prompt, balance = NEWS, "answer"
        known, unseen = (reuters_r8(split, count=10**6, seed=args.seed) for split in ("train", "test"))
    else:
        prompt, balance = TREC, None
        known, unseen = (trec(args.trec, split) for split in ("train", "test"))
    pool = pick(distinct(known), wanted, args.seed, balance=balance)
    test = pick(distinct(unseen, but=known), args.test_rows, args.seed, balance=balance) if args.test else []
    train, validation = pool[: args.train_rows], pool[args.train_rows :]
    return train, validation, test or validation, prompt


def lines_of(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the options of the lines to run, by name."""
    known = LINES | TRIALS
    return {name: known[name] for name in args.lines} | (TRIALS if args.trials else {})


def timed(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Call a function; return its result, the seconds of the processor and those of the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = function()
    return result, {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - wall}


def train_adapter(llm, task: sp.Task, train: list[dict], args: argparse.Namespace, folder: Path) -> Path:
    """Train an adapter by maximum likelihood, and write it as PEFT would. The model is plain again afterwards."""
    point = sp.baselines.mle(
        llm,
        task,
        train,
        lr=args.lr,
        lora={"target_modules": ["q_proj", "v_proj"], "layers_to_transform": upper_blocks(llm, args.blocks)},
        num_steps=args.steps,
        batch_size=args.batch_size,
        seed=args.seed,
        progress=False,
    ).posterior
    (path,) = point.export_peft(folder / "adapter")
    point.blora().unload()
    return path


def main() -> None:
    """Train one adapter, and score the adapter and each method."""
    args = arguments()
    if args.tiny:
        args.train_rows, args.validation_rows, args.test_rows, args.steps, args.blocks = 12, 8, 8, 3, 1
    llm, tokenizer = demo_llm(tiny=args.tiny)
    train, validation, scored, prompt = load(args)
    task = word_task(tokenizer, train, prompt, max_length=args.max_length)
    versions = {m.__name__: m.__version__ for m in (sp, torch, transformers, peft)}
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "trec", "trials", "lines")}
    settings["threads"] = torch.get_num_threads()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = "test" if args.test else "validation"
    with (
        tempfile.TemporaryDirectory() as folder,
        (args.out / f"{args.data}-{args.seed}-{rows}.jsonl").open("w") as file,
    ):
        path, training = timed(lambda: train_adapter(llm, task, train, args, Path(folder)))
        blora = sp.from_peft(llm, path, spectrum=args.spectrum)
        guide = sp.guides.DeltaGuide(blora.adapter.loc, learn=False)
        point = sp.Posterior.capture(blora, task, guide, provenance={"num_data": len(train)})

        def write(name: str, prediction: sp.Prediction, cost: dict[str, float], options: dict, found: dict) -> None:
            table = prediction.metrics()
            metrics = {key: float(table.loc["value", key]) for key in ("nll", "ece", "accuracy", "brier")}
            line = {"line": name, "rows": rows, **metrics, **cost, "options": options, "found": found}
            trained = {f"training_{key}": value for key, value in training.items()}
            file.write(json.dumps(line | trained | {"settings": settings, "versions": versions}) + "\n")
            file.flush()
            share = cost["cpu_seconds"] / training["cpu_seconds"]
            shown = "  ".join(f"{k} {v:.4f}" for k, v in metrics.items())
            print(f"{args.data} {name:24s} {cost['cpu_seconds']:7.1f} s ({share:5.1%} of the training)  {shown}")

        free = {"cpu_seconds": 0.0, "seconds": 0.0}
        predict = {"seed": 0, "batch_size": 32, "cache_prefix": True}
        adapter = point.predict(scored, num_draws=0, **predict)
        write("adapter", adapter, free, {}, {"train_nll": nll_of(point.predict(train, num_draws=0, **predict))})
        known = point.predict(validation, num_draws=0, **predict)
        scaled, cost = timed(lambda: sp.baselines.temperature_scaling(adapter, known))
        write("temperature scaling", scaled, cost, {}, {"validation_rows": len(validation)})
        for name, line in lines_of(args).items():
            options = dict(line)
            linearized, count = options.pop("linearized", False), options.pop("rows", len(train))
            quiet = {"progress": False} if options["method"] in ("vi", "mcmc") else {}
            call = functools.partial(sp.posthoc, blora, task, train[:count], seed=args.seed, **options, **quiet)
            posterior, cost = timed(call)
            found = {k: posterior.provenance.get(k) for k in ("prior_scale", "scale", "r_hat", "anchor_nll")}
            if linearized:
                prediction = posterior.predict_linearized(scored, num_draws=args.draws, seed=0)
            else:
                prediction = posterior.predict(scored, num_draws=args.draws, **predict)
            write(name, prediction, cost, line, found)


def nll_of(prediction: sp.Prediction) -> float:
    """Return the NLL of a prediction, in nats per row."""
    return float(prediction.metrics().loc["value", "nll"])


if __name__ == "__main__":
    main()
