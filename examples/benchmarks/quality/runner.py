"""Runs the quality benchmark: trains and scores the runs that the table lacks, one after the other."""

import argparse
import logging
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from _support.models import hub_llm, smollm2, tiny_llm
from _support.random_llms import fuse_elementwise

import scalabl_pyro as sp

from . import data, methods, scores
from .data import DataSet
from .methods import BASES, Budget, Workbench
from .options import Run, budget_of, identity, methods_of, shard_of
from .table import Table, run_key


def open_runs(runs: Sequence[Run], args: argparse.Namespace, budget: Budget, table: Table) -> Iterator[Run]:
    """Yield the runs of this shard that the table lacks, as long as there is time for them."""
    done = {run_key(row) for row in table.rows()}
    i, n = shard_of(args.shard)
    longest: dict[tuple[str, str], float] = {}
    groups = [(run.dataset, run.seed, shared_base(run)) for run in runs]
    order = list(dict.fromkeys(groups))  # A process does whole groups, because their base is trained once.
    for run, group in zip(runs, groups, strict=True):
        if order.index(group) % n != i or run_key(identity(run, args, budget)) in done:
            continue
        kind = (run.dataset, run.method.kind)
        expected = longest.get(kind, max(longest.values(), default=0.0))
        if args.time_limit is not None and time.perf_counter() - args.start + 1.2 * expected > args.time_limit:
            print("The time limit is reached. The same command continues from here.", flush=True)
            return
        began = time.perf_counter()
        yield run
        longest[kind] = max(longest.get(kind, 0.0), time.perf_counter() - began)


def shared_base(run: Run) -> str:
    """Name the training that a run shares with other runs; the name of its method if it shares none."""
    base = BASES.get(run.method.kind, run.method.kind)
    return base if base in BASES.values() else run.method.name


def execute(run: Run, data: DataSet, bench: Workbench, args: argparse.Namespace) -> dict[str, Any]:
    """Train and score a run. The temperature is fitted on validation, and test rows are predicted last.

    Without validation rows, nothing is scaled.
    """
    start = time.perf_counter()
    row = identity(run, args, bench.budget)
    learned = bench.learn(run.method, data, run.seed)
    validation = bench.predict(learned, data.val, seed=run.seed) if data.val else None
    row |= {"parameters": methods.num_parameters(learned.posterior), "train_seconds": learned.seconds}
    row |= {"peak_bytes": learned.peak}
    row |= {} if validation is None else {"val_nll": scores.scores(validation)["nll"]}
    provenance = {k: v for k, v in learned.posterior.provenance.items() if isinstance(v, str | int | float)}
    row["provenance"] = {k: v for k, v in provenance.items() if k != "seconds"}
    scored, outside = validation, {}
    if args.split == "test":
        scored = bench.predict(learned, data.test, seed=run.seed)
        outside = {name: bench.predict(learned, rows, seed=run.seed) for name, rows in data.ood.items()}
        row |= {} if validation is None else scores.scaled_scores(scored, validation)
        row["ood"] = {name: scores.ood_scores(scored, other) for name, other in outside.items()}
    row |= scores.scores(scored) | {"predict_seconds": scored.seconds, "predict_rows": len(scored.probs)}
    if not args.no_probs:
        file = f"probs/{row['dataset']}-{row['method']}-{run.seed}-{args.split}-{run_key(row)[:6]}.npz"
        scores.keep(args.out / file, scored, outside)
        row["probs"] = file
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    return row | {"device": device, "version": sp.__version__, "seconds": time.perf_counter() - start}


def run_command(args: argparse.Namespace) -> int:
    """Do what a command line asks for, unless that is the report alone.

    Returns:
        Number of runs that failed.
    """
    logging.getLogger("scalabl_pyro.data").setLevel(logging.ERROR)  # long prompts are cut in every run alike
    if args.report:
        return 0
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")
    return run_all(args, *load_model(args.model, args.dtype, args.device, liger=args.liger))


def run_all(args: argparse.Namespace, llm: Any, tokenizer: Any) -> int:
    """Do all runs that the table lacks.

    Returns:
        Number of runs that failed.
    """
    budget = budget_of(args)
    bench = Workbench(llm, budget, predict_batch=args.predict_batch)
    table = Table(args.out, shard_of(args.shard))
    lines = methods_of(args.methods, args.set, args.variant)
    runs = [Run(name, method, seed) for seed in args.seeds for name in args.datasets for method in lines]
    # All data sets are loaded first, so that a wrong name is reported at once.
    loaded = {name: load_data(name, tokenizer, args) for name in args.datasets}
    failed = 0
    for run in open_runs(runs, args, budget, table):
        try:
            row = execute(run, loaded[run.dataset], bench, args)
        except FloatingPointError as error:  # A training that diverges is a result.
            row = identity(run, args, budget) | {"error": str(error).splitlines()[0], "seconds": 0.0}
            bench.clear()
        except Exception:  # One method that fails must not stop the others.
            traceback.print_exc()
            failed += 1
            bench.clear()
            continue
        table.append(row)
        print(describe(row), flush=True)
    bench.clear()
    return failed


def load_data(name: str, tokenizer: Any, args: argparse.Namespace) -> DataSet:
    """Load a data set with the sizes of the command line."""
    sizes = {n: getattr(args, n) for n in ("train_rows", "val_rows", "test_rows", "ood_rows", "split_seed")}
    return data.load(name, tokenizer, data_dir=args.data_dir, **sizes)


def describe(row: Mapping[str, Any]) -> str:
    """Format a run in one line."""
    named = f"{row['dataset']:>12} {row['method']:>16} seed {row['seed']}"
    if "error" in row:
        return f"{named}  {row['error']}"
    figures = "  ".join(f"{name} {row[name]:.4f}" for name in ("accuracy", "nll", "ece", "brier"))
    return f"{named}  {figures}  train {row['train_seconds']:.1f} s  predict {row['predict_seconds']:.1f} s"


def load_model(name: str, dtype: str, device: str, *, liger: bool = False) -> tuple[Any, Any]:
    """Load the LLM and its tokenizer.

    Args:
        name: ``"smollm2"``, ``"tiny"``, a name on the hub, or a folder.
        dtype: Name of the type of the weights.
        device: Device of the model.
        liger: Whether to use the fused kernels of liger-kernel.
    """
    known = {"tiny": tiny_llm, "smollm2": smollm2}
    llm, tokenizer = known[name]() if name in known else hub_llm(name)
    llm = llm.to(device=device, dtype=getattr(torch, dtype)).eval()
    if liger:
        fuse_elementwise(llm)
    return llm, tokenizer
