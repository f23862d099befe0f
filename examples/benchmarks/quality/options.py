"""The command line of the quality benchmark, and the identity of a run."""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .methods import BASES, METHODS, Budget, Method

PAPER = ["winogrande_s", "winogrande_m", "arc_c", "arc_e", "openbookqa", "boolq"]


@dataclass(frozen=True)
class Run:
    """One run, which becomes a line of the table.

    Attributes:
        dataset: Data set as given on the command line.
        method: Method to train.
        seed: Seed of the initial factors, the order of the rows and the noise.
    """

    dataset: str
    method: Method
    seed: int


def arguments(about: str | None, given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        about: Description of the script.
        given: Words to read instead of the command line.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, a causal LM of the hub, or a local folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="type of the LLM (default on a GPU: bfloat16)")
    parser.add_argument("--datasets", nargs="+", default=PAPER, help="names or name=train.jsonl,test.jsonl")
    parser.add_argument("--data-dir", type=Path, help="folder of NAME_train.jsonl and NAME_test.jsonl")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="METHOD=JSON", help="changes options of a method"
    )
    parser.add_argument(
        "--variant",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=METHOD:JSON",
        help="adds a line to the report",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--split", choices=("test", "val"), default="test", help="rows to score")
    parser.add_argument("--split-seed", type=int, default=0, help="seed of the split, the same for all runs")
    parser.add_argument("--train-rows", type=int, default=500, help="0: all that are left after validation")
    parser.add_argument("--val-rows", type=int, default=250)
    parser.add_argument("--test-rows", type=int, default=0, help="0: all")
    parser.add_argument("--ood-rows", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, help="learning rate of all methods (default: that of each method)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lora-alpha", type=float, default=16.0)
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj", "lm_head"])
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--widths", type=int, default=3, help="number of widths that prompts are padded to")
    parser.add_argument("--predict-batch", type=int, help="rows per forward pass (default: GPU 256, CPU 16)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--liger", action="store_true", help="use the fused kernels of liger-kernel")
    parser.add_argument("--time-limit", type=float, help="seconds; no run starts that would end later")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="do part I of N parts of the runs")
    parser.add_argument("--no-probs", action="store_true", help="do not store the probabilities of each run")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--report", action="store_true", help="only write the report of the runs in --out")
    parser.add_argument("--tiny", action="store_true", help="use a random model and few rows, to test the script")
    args = parser.parse_args(given)
    args.start = time.perf_counter()
    if args.tiny:
        args.model, args.steps, args.batch_size, args.rank, args.draws, args.seeds = "tiny", 3, 4, 2, 2, args.seeds[:2]
        args.train_rows, args.test_rows, args.ood_rows = 24, 12, 12
        args.val_rows = min(args.val_rows, 12)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.predict_batch = args.predict_batch or (256 if args.device == "cuda" else 16)
    return args


def methods_of(names: Sequence[str], changes: Sequence[str], variants: Sequence[str]) -> list[Method]:
    """List the methods to run, sorted so that methods that share a training are neighbors.

    Args:
        names: Names of methods.
        changes: Options of methods, ``METHOD=JSON``.
        variants: Additional lines, ``NAME=METHOD:JSON``.

    Raises:
        ValueError: A method is unknown, options are not a JSON object, or two lines share a name.
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
    """Collect the settings of a run: all that it depends on except data set, method, seed and split."""
    data = {name: getattr(args, name) for name in ("train_rows", "val_rows", "test_rows", "ood_rows", "split_seed")}
    model = {"model": args.model, "dtype": args.dtype}
    if args.liger:  # Not stored otherwise, so that runs of older tables keep their identity.
        model["liger"] = True
    return model | data | asdict(budget) | {"kind": method.kind, "options": dict(method.options)}


def budget_of(args: argparse.Namespace) -> Budget:
    """Read the budget that all methods share from the command line."""
    targets = tuple(args.targets)
    return Budget(args.steps, args.batch_size, args.lr, args.rank, args.lora_alpha, targets, args.draws, args.widths)


def identity(run: Run, args: argparse.Namespace, budget: Budget) -> dict[str, Any]:
    """Make the columns that identify a run."""
    named = {"dataset": run.dataset.partition("=")[0], "method": run.method.name, "seed": run.seed}
    return named | {"split": args.split, "settings": settings_of(args, budget, run.method)}


def shard_of(text: str) -> tuple[int, int]:
    """Parse ``"i/n"`` as (i, n).

    Raises:
        ValueError: The text has another form, or i is not below n.
    """
    try:
        i, n = (int(part) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"--shard {text}: expected I/N, such as 0/3.") from None
    if not 0 <= i < n:
        raise ValueError(f"--shard {text}: I must lie between 0 and N - 1.")
    return i, n


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
