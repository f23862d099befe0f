"""Measures how the cost of a step and of draws grows with one setting at a time.

    python examples/benchmarks/growth.py --out growth                  # Qwen2.5-7B shape, random weights; one GPU
    python examples/benchmarks/growth.py --quick --device cpu --out growth

One setting changes at a time; the others stay at 4 rows of 128 tokens, rank 8, 10 draws. Steps are those of ``fit``, in
a CUDA graph on a GPU. Each line also has the floor: the arithmetic at the matrix rate measured in the same run.
``growth.json`` holds the lines, ``growth.png`` the picture.
"""

import argparse
import gc
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

import scalabl_pyro as sp
from scalabl_pyro.lora.forward import AdaptedLLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from _support.models import upper_blocks
from _support.random_llms import SHAPES, num_weights, random_llm
from _support.timing import TARGETS, AnswerTokens, fit_step, matmul_rate, measure, random_batch

GRID = {
    "rows": [1, 2, 4, 8, 16, 32],
    "tokens": [32, 64, 128, 256, 512, 1024],
    "rank": [2, 8, 32, 128],
    "draws": [1, 2, 5, 10, 20, 40],
    "blocks": [1, 4, 7, 14, 28],
    "shape": ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b", "qwen2.5-14b"],
}
CENTER = {"rows": 4, "tokens": 128, "rank": 8, "draws": 10}
LABELS = {"rows": "rows", "tokens": "tokens per row", "rank": "rank", "draws": "draws", "blocks": "adapted blocks",
          "shape": "weights of the blocks (billions)"}  # fmt: skip


def cost(llm, rate: float, weights: int, device: str, steps: int, **setting) -> dict:
    """Measure the milliseconds of a step and of draws at one setting, and compute the floors of both."""
    depth = llm.config.num_hidden_layers
    blocks = setting.get("blocks", depth)
    upper = upper_blocks(llm, blocks)
    blora = sp.bayesian_lora(llm, r=setting["rank"], target_modules=TARGETS, layers_to_transform=upper)
    batch = random_batch(setting["rows"], setting["tokens"], device)
    step = measure(fit_step(blora, batch, graph=device == "cuda"), device, steps)["ms"]
    task, adapted = AnswerTokens().to(device), AdaptedLLM(blora.adapter, factors=blora.adapter.factors())
    s = torch.randn(setting["draws"], 1, blora.subspace.dim, device=device)
    with torch.no_grad():
        draws = measure(lambda: task.outputs(adapted, batch, s), device, steps)["ms"]
    blora.unload()
    forward = 2 * weights * setting["rows"] * setting["tokens"] / rate * 1000
    above = blocks / depth
    return {
        "step_ms": step,
        "draws_ms": draws,
        "step_floor_ms": forward * (1 + above),
        "draws_floor_ms": forward * (1 - above + setting["draws"] * above),
        "latents": blora.subspace.dim,
    }


def sweep(args: argparse.Namespace) -> dict:
    """Measure all lines; the file is written after each."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    rate = matmul_rate(args.device, dtype)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    found = {"device": device, "shape": args.shape, "tflops": rate / 1e12, "center": args.center, "lines": []}
    held = None
    for knob, values in args.grid.items():
        for value in values:
            shape = value if knob == "shape" else args.shape
            if held is None or held[0] != shape:
                held = None
                gc.collect()
                held = (shape, random_llm(shape, args.device, dtype), num_weights(shape, embeddings=False))
            setting = args.center | ({} if knob == "shape" else {knob: value})
            line = {"knob": knob, "value": value, "weights": held[2]}
            gc.collect()  # frees the CUDA graphs of the previous line
            line |= cost(held[1], rate, held[2], args.device, args.steps, **setting)
            found["lines"].append(line)
            print(
                f"{knob:>7} {value!s:>13}: step {line['step_ms']:8.1f} ms, draws {line['draws_ms']:8.1f} ms", flush=True
            )
            (args.out / "growth.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def picture(found: dict, path: Path) -> None:
    """Draw a panel for each setting: measured times and floors, both axes logarithmic."""
    knobs = list(dict.fromkeys(line["knob"] for line in found["lines"]))
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.2), layout="constrained")
    for axis, knob in zip(axes.flat, knobs, strict=False):
        lines = [line for line in found["lines"] if line["knob"] == knob]
        x = [line["weights"] / 1e9 if knob == "shape" else line["value"] for line in lines]
        for name, color in (("step", "tab:blue"), ("draws", "tab:orange")):
            axis.loglog(x, [line[f"{name}_ms"] for line in lines], "o-", color=color, label=name, markersize=4)
            axis.loglog(x, [line[f"{name}_floor_ms"] for line in lines], ":", color=color, label=f"floor of {name}")
        axis.set_xlabel(LABELS[knob])
        axis.grid(alpha=0.3, which="both")
    for axis in axes[:, 0]:
        axis.set_ylabel("milliseconds")
    axes.flat[0].legend(frameon=False, fontsize=8)
    for axis in list(axes.flat)[len(knobs) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-7b", help="shape of the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=7, help="number of timed calls")
    parser.add_argument("--knobs", nargs="+", choices=GRID, default=list(GRID), help="settings to change")
    parser.add_argument("--out", type=Path, default=Path("growth"), help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="use a tiny shape and few values, to test the script")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.center, args.grid = CENTER, {knob: GRID[knob] for knob in args.knobs}
    if args.quick:
        args.shape, args.steps, args.center = "tiny", 2, {"rows": 2, "tokens": 8, "rank": 2, "draws": 2}
        args.grid = {knob: ["tiny"] if knob == "shape" else [1, 2] for knob in args.knobs}
    picture(sweep(args), args.out / "growth.png")


if __name__ == "__main__":
    main()
