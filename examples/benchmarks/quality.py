"""Are the uncertainties any good? Accuracy and calibration of ScalaBL and the baselines on one budget.

    python examples/benchmarks/quality.py --data-dir DATA --datasets trec sst2 rte r8 --seeds 0 1 2 3 4
    python examples/benchmarks/quality.py --report --out runs/quality        # tables and pictures of what is there
    python examples/benchmarks/quality.py --datasets r8 --methods mle scalabl --tiny    # a random model: seconds

One line a run is appended to a table under --out. Stop it at any time: the same command goes on from there. Several
processes share the work with --shard 0/3, 1/3, 2/3. The protocol, and what each column means, is in
docs/howto/benchmark.md.

Options of a method are JSON: --set 'blob={"prior_scale": 0.1}' changes them everywhere, and
--variant 'cold=scalabl:{"kl_weight": 0.3}' adds a line of its own.
"""

import argparse
import logging
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quality_data
import quality_methods
import quality_scores
import sources
from quality_data import DataSet
from quality_methods import BASES, Budget, Workbench
from quality_options import Run, arguments, budget_of, identity, methods_of, shard_of
from quality_table import Table, run_key
from random_llms import fuse_elementwise

import scalabl_pyro as sp


def open_runs(runs: Sequence[Run], args: argparse.Namespace, budget: Budget, table: Table) -> Iterator[Run]:
    """Runs of this shard that the table lacks, as long as there is time for them."""
    done = {run_key(row) for row in table.rows()}
    i, n = shard_of(args.shard)
    longest: dict[tuple[str, str], float] = {}
    groups = [(run.dataset, run.seed, shared_base(run)) for run in runs]
    order = list(dict.fromkeys(groups))  # a process does whole groups, whose base is trained once
    for run, group in zip(runs, groups, strict=True):
        if order.index(group) % n != i or run_key(identity(run, args, budget)) in done:
            continue
        kind = (run.dataset, run.method.kind)
        expected = longest.get(kind, max(longest.values(), default=0.0))
        if args.time_limit is not None and time.perf_counter() - args.start + 1.2 * expected > args.time_limit:
            print("The time is up; the same command goes on from here.", flush=True)
            return
        began = time.perf_counter()
        yield run
        longest[kind] = max(longest.get(kind, 0.0), time.perf_counter() - began)


def shared_base(run: Run) -> str:
    """What a run trains or starts from, if others may start from it too; else its own name."""
    base = BASES.get(run.method.kind, run.method.kind)
    return base if base in BASES.values() else run.method.name


def execute(run: Run, data: DataSet, bench: Workbench, args: argparse.Namespace) -> dict[str, Any]:
    """Train and score a run. Validation gives the temperature; test is predicted last."""
    start = time.perf_counter()
    row = identity(run, args, bench.budget)
    learned = bench.learn(run.method, data, run.seed)
    validation = bench.predict(learned, data.val, seed=run.seed)
    row |= {"parameters": quality_methods.num_parameters(learned.posterior), "train_seconds": learned.seconds}
    row |= {"peak_bytes": learned.peak, "val_nll": quality_scores.scores(validation)["nll"]}
    provenance = {k: v for k, v in learned.posterior.provenance.items() if isinstance(v, str | int | float)}
    row["provenance"] = {k: v for k, v in provenance.items() if k != "seconds"}
    scored, outside = validation, {}
    if args.split == "test":
        scored = bench.predict(learned, data.test, seed=run.seed)
        outside = {name: bench.predict(learned, rows, seed=run.seed) for name, rows in data.ood.items()}
        row |= quality_scores.scaled_scores(scored, validation)
        row["ood"] = {name: quality_scores.ood_scores(scored, other) for name, other in outside.items()}
    row |= quality_scores.scores(scored) | {"predict_seconds": scored.seconds, "predict_rows": len(scored.probs)}
    if not args.no_probs:
        file = f"probs/{row['dataset']}-{row['method']}-{run.seed}-{args.split}-{run_key(row)[:6]}.npz"
        quality_scores.keep(args.out / file, scored, outside)
        row["probs"] = file
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    return row | {"device": device, "version": sp.__version__, "seconds": time.perf_counter() - start}


def run_all(args: argparse.Namespace, llm: Any, tokenizer: Any) -> int:
    """Do what the table lacks; the number of runs that could not be done."""
    budget = budget_of(args)
    bench = Workbench(llm, budget, predict_batch=args.predict_batch)
    table = Table(args.out, shard_of(args.shard))
    methods = methods_of(args.methods, args.set, args.variant)
    runs = [Run(d, method, seed) for seed in args.seeds for d in args.datasets for method in methods]
    data = {
        name: load_data(name, tokenizer, args) for name in args.datasets
    }  # here, so that a wrong name shows at once
    failed = 0
    for run in open_runs(runs, args, budget, table):
        try:
            row = execute(run, data[run.dataset], bench, args)
        except FloatingPointError as error:  # a training that diverged is a result
            row = identity(run, args, budget) | {"error": str(error).splitlines()[0], "seconds": 0.0}
            bench.clear()
        except Exception:  # one method that fails must not end the night
            traceback.print_exc()
            failed += 1
            bench.clear()
            continue
        table.append(row)
        print(describe(row), flush=True)
    bench.clear()
    return failed


def load_data(name: str, tokenizer: Any, args: argparse.Namespace) -> DataSet:
    """A data set as the command line asks for it."""
    sizes = {n: getattr(args, n) for n in ("train_rows", "val_rows", "test_rows", "ood_rows", "split_seed")}
    return quality_data.load(name, tokenizer, data_dir=args.data_dir, **sizes)


def describe(row: Mapping[str, Any]) -> str:
    """A run in a line."""
    named = f"{row['dataset']:>12} {row['method']:>16} seed {row['seed']}"
    if "error" in row:
        return f"{named}  {row['error']}"
    figures = "  ".join(f"{name} {row[name]:.4f}" for name in ("accuracy", "nll", "ece", "brier"))
    return f"{named}  {figures}  train {row['train_seconds']:.1f} s  predict {row['predict_seconds']:.1f} s"


def load_model(name: str, dtype: str, device: str, *, liger: bool = False) -> tuple[Any, Any]:
    """The LLM and its tokenizer."""
    if name in ("tiny", "smollm2"):
        llm, tokenizer = sources.tiny_llm() if name == "tiny" else sources.smollm2()
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        llm, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    llm = llm.to(device=device, dtype=getattr(torch, dtype)).eval()
    if liger:
        fuse_elementwise(llm)
    return llm, tokenizer


def main() -> None:
    args = arguments(__doc__)
    logging.getLogger("scalabl_pyro.data").setLevel(logging.ERROR)  # long prompts are cut in every run alike
    failed = 0
    if not args.report:
        if args.device == "cuda":
            torch.set_float32_matmul_precision("high")
        failed = run_all(args, *load_model(args.model, args.dtype, args.device, liger=args.liger))
    if args.report or args.shard == "0/1":
        import quality_report

        print(quality_report.write(args.out))
    sys.exit(f"{failed} runs failed; see above." if failed else 0)


if __name__ == "__main__":
    main()
