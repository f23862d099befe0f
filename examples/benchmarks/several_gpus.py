"""Measures a training step and ten draws on one GPU and on several, in one run that starts its own processes.

    python examples/benchmarks/several_gpus.py --out several_gpus.json                     # two GPUs, two models
    python examples/benchmarks/several_gpus.py --shape tiny --device cpu --out tiny.json   # runs anywhere

Weights are random, because times depend on shapes only. *Strong scaling*: all GPUs together have the rows that one GPU
has, and the efficiency is t(1) / (n t(n)). *Weak scaling*: each GPU has as many rows as the one, and the efficiency is
t(1) / t(n). Steps are timed as ``fit`` runs them: the host waits for the GPU after all timed steps, not after each.
"""

import argparse
import datetime
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

import scalabl_pyro as sp
from scalabl_pyro.data import Example
from scalabl_pyro.distributed.processes import current_processes
from scalabl_pyro.lora.forward import AdaptedLLM
from scalabl_pyro.prediction.predict import predict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from _support.random_llms import SHAPES, random_llm
from _support.timing import TARGETS, AnswerTokens, fit_step, random_batch

#: Steps before the clock starts: one eager, one that is captured, and one replay.
WARM_UP = 3
REPEATS = 3


def clock(fn: Callable[[], object], steps: int, device: torch.device) -> dict[str, float]:
    """Time a function: milliseconds per call, as the median of a few runs of many calls, and their range."""
    for _ in range(WARM_UP):
        fn()
    found = []
    for _ in range(REPEATS):
        _wait(device)
        start = time.perf_counter()
        for _ in range(steps):
            fn()
        _wait(device)
        found.append(1000 * (time.perf_counter() - start) / steps)
    return {"ms": statistics.median(found), "fastest_ms": min(found), "slowest_ms": max(found)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_times(llm, rows: int, args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, float]]:
    """Time a step of all processes together on some rows, eager and captured."""
    figures = {}
    for mode in ("eager", "captured") if device.type == "cuda" else ("eager",):
        torch.manual_seed(0)  # the same batch, and the same noise, in all processes
        blora = sp.bayesian_lora(llm, target_modules=TARGETS)
        batch = random_batch(rows, args.tokens)  # on the host, as the batches of ``fit`` are
        step = fit_step(blora, batch, graph=mode == "captured", processes=current_processes())
        figures[mode] = clock(step, args.steps, device)
        blora.unload()
        del step, blora
        gc.collect()
    return figures


def draw_times(llm, rows: int, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Time ``predict`` of all processes together for some rows under all draws."""
    blora = sp.bayesian_lora(llm, target_modules=TARGETS)
    torch.manual_seed(0)
    s = torch.randn(args.draws, blora.subspace.dim, device=device)
    batch = random_batch(rows, args.tokens)
    examples = [Example({"input_ids": ids}, 0) for ids in batch.inputs["input_ids"].tolist()]
    adapted = AdaptedLLM(blora.adapter, factors=blora.adapter.factors())
    task = AnswerTokens().to(device)
    figures = clock(lambda: predict(adapted, task, s, examples, batch_size=rows), max(args.steps // 3, 1), device)
    blora.unload()
    return figures


def measure_shape(shape: str, args: argparse.Namespace, device: torch.device, save: Callable) -> None:
    """Measure one model: first in the first process alone, then in all processes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    llm = random_llm(shape, str(device), dtype)
    few = args.rows // args.size
    if args.rank == 0:
        with sp.distributed.single_process():
            for rows in (args.rows, few):
                save(shape, f"1 process, {rows} rows", step_times(llm, rows, args, device))
            save(shape, "1 process, draws", draw_times(llm, few, args, device))
    dist.barrier()
    save(shape, f"{args.size} processes, {args.rows} rows", step_times(llm, args.rows, args, device))
    save(shape, f"{args.size} processes, draws", draw_times(llm, few, args, device))
    del llm
    gc.collect()


def efficiencies(figures: dict[str, Any], rows: int, size: int) -> dict[str, dict[str, float]]:
    """Strong and weak scaling of the eager and of the captured step, and of the draws."""
    one, few, all_ = (figures[name] for name in (f"1 process, {rows} rows", f"1 process, {rows // size} rows",
                                                 f"{size} processes, {rows} rows"))  # fmt: skip
    found = {
        mode: {"strong": one[mode]["ms"] / (size * all_[mode]["ms"]), "weak": few[mode]["ms"] / all_[mode]["ms"]}
        for mode in all_
    }
    draws = figures["1 process, draws"]["ms"] / (size * figures[f"{size} processes, draws"]["ms"])
    return found | {"draws": {"strong": draws}}


def work(args: argparse.Namespace) -> None:
    """Measure in one of the processes; the first one writes the figures after each of them."""
    cuda = args.device == "cuda"
    device = torch.device("cuda", args.rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    limit = datetime.timedelta(minutes=5)
    dist.init_process_group(
        "nccl" if cuda else "gloo", f"file://{args.store}", rank=args.rank, world_size=args.size, timeout=limit
    )
    names = current_processes().all_gather(lambda: torch.cuda.get_device_name(device) if cuda else "cpu")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    out: dict[str, Any] = {"date": today, "devices": names, "torch": torch.__version__, "tokens": args.tokens}
    out |= {"rows": args.rows, "draws": args.draws, "shapes": {}}

    def save(shape: str, name: str, figures: dict) -> None:
        if args.rank:
            return
        out["shapes"].setdefault(shape, {})[name] = figures
        print(shape, name, json.dumps(figures), flush=True)
        args.out.write_text(json.dumps(out, indent=1))

    for shape in args.shape:
        measure_shape(shape, args, device, save)
        if args.rank == 0:
            save(shape, "efficiency", efficiencies(out["shapes"][shape], args.rows, args.size))
    dist.barrier()
    dist.destroy_process_group()


def start(args: argparse.Namespace) -> int:
    """Start the processes, and wait for them; the exit status."""
    if args.device == "cuda" and torch.cuda.device_count() < args.size:
        print(f"This needs {args.size} GPUs, and there are {torch.cuda.device_count()}.", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--size", str(args.size), "--store", f"{folder}/store"]
        children = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(args.size)]
        while all(child.poll() is None for child in children):
            time.sleep(0.1)
        if any(child.poll() for child in children):  # one has failed: nobody waits for it
            for child in children:
                child.terminate()
        return max(abs(child.wait()) for child in children)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["qwen2.5-7b", "smollm2-135m"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=2, help="number of processes, one per GPU")
    parser.add_argument("--rows", type=int, default=8, help="rows per step of all processes together")
    parser.add_argument("--tokens", type=int, default=300, help="tokens per row")
    parser.add_argument("--draws", type=int, default=10, help="draws of a prediction")
    parser.add_argument("--steps", type=int, default=20, help="number of steps between two looks at the clock")
    parser.add_argument("--out", type=Path, required=True, help="write the figures to this JSON file")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is None:
        sys.exit(start(args))
    work(args)


if __name__ == "__main__":
    main()
