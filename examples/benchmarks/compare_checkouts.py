"""Compares the time of a training step between two checkouts of this library.

    git worktree add /tmp/before <commit>
    python examples/benchmarks/compare_checkouts.py /tmp/before .                # tiny model, CPU
    python examples/benchmarks/compare_checkouts.py /tmp/before . --width 576    # layers of SmolLM2-135M

One process per checkout stays alive. The two take turns: each round trains some steps in one and then in the other, in
an order that alternates, so that a busy machine slows both. The figure is the median over rounds of the ratio
after / before, with a 95 % interval from a bootstrap over rounds.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

WORDS = [f"w{i}" for i in range(400)]


def build(width: int, layers: int):
    """Make a random Llama, a task, and rows of 48 words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import scalabl_pyro as sp

    core = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<pad>", *map(chr, range(65, 91)), *WORDS])}, unk_token="<pad>")
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<pad>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=8,
    )
    rng = random.Random(0)
    rows = [
        {"question": " ".join(rng.choices(WORDS, k=48)), "choices": rng.sample(WORDS, 4), "answer": i % 4}
        for i in range(32)
    ]
    return sp.bayesian_lora(LlamaForCausalLM(config)), sp.MultipleChoice(tokenizer), rows


def work(width: int, layers: int, steps: int) -> None:
    """Train on each line of standard input; write the median seconds per step to standard output."""
    import scalabl_pyro as sp

    blora, task, rows = build(width, layers)
    print(json.dumps({"package": str(Path(sp.__file__).parent)}), flush=True)
    for _ in sys.stdin:
        history = sp.fit(blora, task, rows, num_steps=steps, batch_size=8, progress=False).history
        print(json.dumps({"seconds": history["seconds"].diff().iloc[2:].median()}), flush=True)


class Worker:
    """A process that imports the package of one checkout."""

    def __init__(self, checkout: Path, args: argparse.Namespace) -> None:
        options = {"width": args.width, "layers": args.layers, "steps": args.steps}
        command = [sys.executable, __file__, "--worker", *(f"--{k}={v}" for k, v in options.items())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout, env=environment
        )
        self.package = Path(self._read()["package"])
        if self.package != checkout / "scalabl_pyro":
            raise RuntimeError(f"{checkout} imports the package from {self.package}.")

    def __call__(self) -> float:
        """Train once; return the median seconds per step."""
        print(file=self.process.stdin, flush=True)
        return self._read()["seconds"]

    def _read(self) -> dict:
        return json.loads(self.process.stdout.readline())


def interval(ratios: list[float]) -> tuple[float, float]:
    """A 95 % bootstrap interval of the median."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[49], medians[1949]


def main() -> None:
    """Compare, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, help="folders of the two checkouts: before, after")
    parser.add_argument("--rounds", type=int, default=40, help="rounds; each trains both")
    parser.add_argument("--steps", type=int, default=20, help="steps per training")
    parser.add_argument("--width", type=int, default=64, help="width of the hidden states")
    parser.add_argument("--layers", type=int, default=2, help="number of blocks")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.width, args.layers, args.steps)
        return
    if len(args.checkouts) != 2:
        parser.error("give two folders: the checkout before and the one after")
    before, after = (Worker(path.resolve(), args) for path in args.checkouts)
    before(), after()  # warm up
    times = []
    for number in range(args.rounds):
        first, second = (before, after) if number % 2 else (after, before)
        taken = {first: first(), second: second()}
        times.append((taken[before], taken[after]))
    ratios = [b / a for a, b in times]
    low, high = interval(ratios)
    figures = {
        "width": args.width,
        "layers": args.layers,
        "rounds": args.rounds,
        "before_ms": 1000 * statistics.median(a for a, _ in times),
        "after_ms": 1000 * statistics.median(b for _, b in times),
        "ratio": statistics.median(ratios),
        "ratio_interval": [low, high],
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
