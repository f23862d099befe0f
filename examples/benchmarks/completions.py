"""What completions cost: a step of ``fit`` beside PEFT with Trainer, and 8 draws that write beside one.

    python examples/benchmarks/completions.py --shape smollm2-135m --out completions.json
    python examples/benchmarks/completions.py --shape qwen2.5-7b --dtype bfloat16 --out completions.json

All sides train LoRA of rank 8 on the same layers of a model with random weights, on the same rows, with the same batch
size. Half of the tokens of a row belong to its completion. Each side runs in a process of its own, which gives its peak
memory: that of the GPU if there is one, else that of the process. One process writes with 1 and 8 draws in turn.
"""

import argparse
import itertools
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

import scalabl_pyro as sp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from _support.random_llms import SHAPES, random_llm
from _support.timing import TARGETS

#: Words of the texts, one token each.
WORDS = 400
#: Seconds of each run, by the name of the work.
Seconds = dict[str, list[float]]
#: Steps that warm up before the timed ones.
WARM = 3


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="shape of the model")
    parser.add_argument("--dtype", default="float32", help="type of the weights")
    parser.add_argument("--rows", type=int, default=8, help="rows per step")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per row")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--steps", type=int, default=10, help="number of timed steps")
    parser.add_argument("--out", type=Path, default=Path("completions.json"), help="JSON file of the figures")
    return parser.parse_args()


def main() -> None:
    """Run each side in a process of its own, and write the ratios."""
    args = arguments()
    context = multiprocessing.get_context("spawn")
    found: dict[str, dict[str, float]] = {}
    for name in SIDES:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found |= pool.submit(measure, name, vars(args)).result()
        print(found, flush=True)
    ratios = {
        "step": found["fit"]["seconds"] / found["PEFT and Trainer"]["seconds"],
        "memory": found["fit"]["peak_bytes"] / found["PEFT and Trainer"]["peak_bytes"],
        "8 draws": found["generate, 8 draws"]["seconds"] / found["generate, 1 draw"]["seconds"],
    }
    print(ratios)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = {module.__name__: module.__version__ for module in (sp, torch, transformers)}
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    figures = {"sides": found, "ratios": ratios, "settings": settings, "device": device, "versions": versions}
    args.out.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def measure(name: str, given: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Run one side; return the median seconds of each of its works and the peak memory in bytes."""
    args = argparse.Namespace(**given)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    llm = random_llm(args.shape, device, getattr(torch, args.dtype))
    seconds = SIDES[name](llm, args)
    of_process = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else of_process
    return {work: {"seconds": statistics.median(s[WARM:]), "peak_bytes": float(peak)} for work, s in seconds.items()}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per word."""
    vocabulary = {"<pad>": 0, "<end>": 1, **{f"w{i}": i + 2 for i in range(WORDS)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def texts(args: argparse.Namespace) -> list[dict]:
    """Make rows of random words, half prompt and half completion."""
    half = args.tokens // 2
    words = torch.randint(WORDS, (args.rows, args.tokens - 1)).tolist()
    return [
        {"prompt": " ".join(f"w{i}" for i in row[:half]), "completion": " " + " ".join(f"w{i}" for i in row[half:])}
        for row in words
    ]


def train_ours(llm, args: argparse.Namespace) -> Seconds:
    """Return the seconds of each step of ``fit``."""
    task = sp.Completion(word_tokenizer())
    blora = sp.bayesian_lora(llm, target_modules=TARGETS)
    ends: list[float] = []
    options = {"num_steps": args.steps + WARM, "batch_size": args.rows, "progress": False}
    sp.fit(blora, task, texts(args), callbacks=[lambda row: ends.append(now())], **options)
    return {"fit": [after - before for before, after in itertools.pairwise(ends)]}


def train_peft(llm, args: argparse.Namespace) -> Seconds:
    """Return the seconds of each step of Trainer, with the loss on the completion only."""
    task = sp.Completion(word_tokenizer())
    rows = []
    for example in map(task.encode, texts(args)):
        ids = example.inputs["input_ids"]
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - len(example.target)) + example.target})
    model = get_peft_model(llm, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *given: Any, **options: Any) -> None:
            ends.append(now())

    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            max_steps=args.steps + WARM,
            per_device_train_batch_size=args.rows,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        collator = DataCollatorForSeq2Seq(task.tokenizer)
        Trainer(model, options, train_dataset=rows, data_collator=collator, callbacks=[Clock()]).train()
    return {"PEFT and Trainer": [after - before for before, after in itertools.pairwise(ends)]}


def write(llm, args: argparse.Namespace) -> Seconds:
    """Return the seconds of each text that 1 draw and 8 draws write, in turn."""
    task = sp.Completion(word_tokenizer())
    blora = sp.bayesian_lora(llm, target_modules=TARGETS)
    posterior = sp.fit(blora, task, texts(args), num_steps=1, batch_size=1, progress=False).posterior
    prompts = [texts(args)[0]["prompt"]]
    seconds: Seconds = {"generate, 1 draw": [], "generate, 8 draws": []}
    options = {"do_sample": True, "max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
    for seed in range(args.steps + WARM):
        for work, num_draws in zip(seconds, (1, 8), strict=True):
            start = now()
            posterior.generate(prompts, num_draws=num_draws, seed=seed, **options)
            seconds[work].append(now() - start)
    return seconds


def now() -> float:
    """Return the time once the GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


SIDES: dict[str, Callable[..., Seconds]] = {"PEFT and Trainer": train_peft, "fit": train_ours, "generate": write}

if __name__ == "__main__":
    main()
