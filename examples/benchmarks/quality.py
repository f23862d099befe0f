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
import json
import logging
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quality_data
import quality_methods
import quality_scores
import sources
from quality_data import DataSet
from quality_methods import BASES, METHODS, Budget, Method, Workbench
from quality_table import Table, run_key

import scalabl_pyro as sp

PAPER = ["winogrande_s", "winogrande_m", "arc_c", "arc_e", "openbookqa", "boolq"]


@dataclass(frozen=True)
class Run:
    """One line of the table to be.

    Attributes:
        dataset: as it was asked for.
        method: what is trained.
        seed: of factors, order and noise.
    """

    dataset: str
    method: Method
    seed: int


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, a causal LM of the hub, or a local folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the frozen LLM (GPU: bfloat16)")
    parser.add_argument("--datasets", nargs="+", default=PAPER, help="names, or name=train.jsonl,test.jsonl")
    parser.add_argument("--data-dir", type=Path, help="folder where NAME_train.jsonl and NAME_test.jsonl are found")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--set", nargs="+", default=[], metavar="METHOD=JSON", help="options of a method")
    parser.add_argument("--variant", nargs="+", default=[], metavar="NAME=METHOD:JSON", help="a line of its own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--split", choices=("test", "val"), default="test", help="what is scored")
    parser.add_argument("--split-seed", type=int, default=0, help="of the split of the data, one for all runs")
    parser.add_argument("--train-rows", type=int, default=500, help="0: all that validation leaves")
    parser.add_argument("--val-rows", type=int, default=250)
    parser.add_argument("--test-rows", type=int, default=0, help="0: all")
    parser.add_argument("--ood-rows", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lora-alpha", type=float, default=16.0)
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj", "lm_head"])
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--widths", type=int, default=3, help="widths that prompts are padded to in training")
    parser.add_argument("--predict-batch", type=int, help="rows of a forward pass (GPU: 256, CPU: 16)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--time-limit", type=float, help="seconds after which no run begins that would not end")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th part of the runs, from the I-th")
    parser.add_argument("--no-probs", action="store_true", help="do not keep the probabilities of each run")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--report", action="store_true", help="write tables and pictures of the runs in --out")
    parser.add_argument("--tiny", action="store_true", help="a random model, few rows and steps: does it run at all?")
    args = parser.parse_args(given)
    if args.tiny:
        args.model, args.steps, args.train_rows, args.val_rows, args.test_rows, args.ood_rows = (
            "tiny",
            3,
            24,
            12,
            12,
            12,
        )
        args.batch_size, args.rank, args.draws, args.seeds = 4, 2, 2, args.seeds[:2]
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.predict_batch = args.predict_batch or (256 if args.device == "cuda" else 16)
    return args


def methods_of(names: Sequence[str], changes: Sequence[str], variants: Sequence[str]) -> list[Method]:
    """The lines asked for, those that start from one and the same training next to each other.

    Raises:
        ValueError: something that cannot be read.
    """
    options = {}
    for change in changes:
        kind, _, text = change.partition("=")
        options[_known(kind)] = _json(text, change)
    found = [Method(name, name, options.get(name, {})) for name in names]
    for variant in variants:
        name, _, rest = variant.partition("=")
        kind, _, text = rest.partition(":")
        found.append(Method(name, _known(kind), options.get(kind, {}) | _json(text or "{}", variant)))
    if len({method.name for method in found}) < len(found):
        raise ValueError(f"Two lines share a name: {', '.join(method.name for method in found)}.")
    return sorted(found, key=lambda method: METHODS.index(BASES.get(method.kind, method.kind)))


def settings_of(args: argparse.Namespace, budget: Budget, method: Method) -> dict[str, Any]:
    """All that a run depends on beside data set, method, seed and what is scored."""
    data = {name: getattr(args, name) for name in ("train_rows", "val_rows", "test_rows", "ood_rows", "split_seed")}
    model = {"model": args.model, "dtype": args.dtype}
    return model | data | asdict(budget) | {"kind": method.kind, "options": dict(method.options)}


def open_runs(runs: Sequence[Run], args: argparse.Namespace, budget: Budget, table: Table) -> Iterator[Run]:
    """Runs of this shard that the table lacks, as long as there is time for them."""
    done = {run_key(row) for row in table.rows()}
    i, n = shard_of(args.shard)
    longest: dict[tuple[str, str], float] = {}
    start = time.perf_counter()
    groups = [(run.dataset, run.seed, BASES.get(run.method.kind, run.method.kind)) for run in runs]
    order = list(dict.fromkeys(groups))  # a process does whole groups, whose base is trained once
    for run, group in zip(runs, groups, strict=True):
        if order.index(group) % n != i or run_key(identity(run, args, budget)) in done:
            continue
        kind = (run.dataset, run.method.kind)
        expected = longest.get(kind, max(longest.values(), default=0.0))
        if args.time_limit is not None and time.perf_counter() - start + 1.2 * expected > args.time_limit:
            print("The time is up; the same command goes on from here.", flush=True)
            return
        began = time.perf_counter()
        yield run
        longest[kind] = max(longest.get(kind, 0.0), time.perf_counter() - began)


def identity(run: Run, args: argparse.Namespace, budget: Budget) -> dict[str, Any]:
    """The columns that tell a run from others."""
    named = {"dataset": run.dataset.partition("=")[0], "method": run.method.name, "seed": run.seed}
    return named | {"split": args.split, "settings": settings_of(args, budget, run.method)}


def execute(run: Run, data: DataSet, bench: Workbench, args: argparse.Namespace) -> dict[str, Any]:
    """Train and score a run. Validation gives the temperature; test is predicted last."""
    start = time.perf_counter()
    row = identity(run, args, bench.budget)
    learned = bench.learn(run.method, data, run.seed)
    validation = bench.predict(learned, data.val, seed=run.seed)
    row |= {"parameters": quality_methods.num_parameters(learned.posterior), "train_seconds": learned.seconds}
    row |= {"peak_bytes": learned.peak, "val_nll": quality_scores.scores(validation)["nll"]}
    row["provenance"] = {k: v for k, v in learned.posterior.provenance.items() if isinstance(v, str | int | float)}
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
    targets = tuple(args.targets)
    budget = Budget(args.steps, args.batch_size, args.lr, args.rank, args.lora_alpha, targets, args.draws, args.widths)
    bench = Workbench(llm, budget, predict_batch=args.predict_batch)
    table = Table(args.out, shard_of(args.shard))
    methods = methods_of(args.methods, args.set, args.variant)
    runs = [Run(d, method, seed) for seed in args.seeds for d in args.datasets for method in methods]
    loaded: dict[str, DataSet] = {}
    failed = 0
    for run in open_runs(runs, args, budget, table):
        try:
            if run.dataset not in loaded:
                loaded[run.dataset] = load_data(run.dataset, tokenizer, args)
            row = execute(run, loaded[run.dataset], bench, args)
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


def shard_of(text: str) -> tuple[int, int]:
    """(i, n) of ``"i/n"``."""
    try:
        i, n = (int(part) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"--shard {text}: expected I/N, such as 0/3.") from None
    if not 0 <= i < n:
        raise ValueError(f"--shard {text}: I counts from 0 to N - 1.")
    return i, n


def load_model(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """The LLM and its tokenizer."""
    if name in ("tiny", "smollm2"):
        llm, tokenizer = sources.tiny_llm() if name == "tiny" else sources.smollm2()
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        llm, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return llm.to(device=device, dtype=getattr(torch, dtype)).eval(), tokenizer


def main() -> None:
    args = arguments()
    logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)  # long prompts are cut in every run alike
    failed = 0
    if not args.report:
        if args.device == "cuda":
            torch.set_float32_matmul_precision("high")
        failed = run_all(args, *load_model(args.model, args.dtype, args.device))
    if args.report or args.shard == "0/1":
        import quality_report

        print(quality_report.write(args.out))
    sys.exit(f"{failed} runs failed; see above." if failed else 0)


def _known(kind: str) -> str:
    if kind not in METHODS:
        raise ValueError(f"The method {kind!r} is unknown: use {', '.join(METHODS)}.")
    return kind


def _json(text: str, whole: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{whole!r}: the options are not JSON ({error}).") from None
    if not isinstance(value, dict):
        raise ValueError(f'{whole!r}: the options must be a JSON object, such as {{"kl_weight": 0.3}}.')
    return value


if __name__ == "__main__":
    main()
