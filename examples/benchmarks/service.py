"""Measures the HTTP service: seconds until the answer, and requests per second, by the number of clients.

    python examples/benchmarks/service.py           # SmolLM2-135M, upper third adapted; minutes on a CPU
    python examples/benchmarks/service.py --tiny    # a random model: seconds

The server is a process of its own. Each client sends requests of one row, one after the other. A posterior of a few
training steps is enough, because the time of a prediction does not depend on what was learned.
"""

import argparse
import http.client
import json
import logging
import platform
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import scalabl_pyro as sp
from scalabl_pyro.integrations import serve

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from _support.datasets import NEWS, reuters_r8, word_task
from _support.models import demo_llm, upper_blocks


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=48, help="requests per figure")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="numbers of clients")
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 10], help="numbers of draws; 0 is the mean")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16], help="rows that may be joined")
    parser.add_argument("--out", type=Path, default=Path("service.json"), help="JSON file of the results")
    parser.add_argument("--tiny", action="store_true", help="use a random model, to test the script")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)  # of the server process
    args = parser.parse_args()
    if args.tiny and args.port is None:
        args.requests, args.clients, args.draws, args.batch_sizes = 16, [1, 4], [3], [8]
    return args


def run_server(args: argparse.Namespace) -> None:
    """Fit a posterior in the upper third of the blocks and the head, and serve it."""
    llm, tokenizer = demo_llm(tiny=args.tiny)
    train = reuters_r8("train", count=8, seed=0)
    blora = sp.bayesian_lora(llm, layers_to_transform=upper_blocks(llm, -(-llm.config.num_hidden_layers // 3)))
    posterior = sp.fit(blora, word_task(tokenizer, train, NEWS, 48), train, num_steps=2, progress=False).posterior
    options = {"num_draws": args.draws[0], "batch_size": args.batch_sizes[0], "timeout": 300.0}
    serve(posterior, port=args.port, log_level="warning", **options)


class Server:
    """The server process, and requests to it."""

    def __init__(self, draws: int, batch_size: int, *, tiny: bool) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        words = ["--draws", draws, "--batch-sizes", batch_size, "--port", self.port, *["--tiny"] * tiny]
        self.process = subprocess.Popen([sys.executable, __file__, *map(str, words)])

    def __enter__(self) -> "Server":
        while self.process.poll() is None:
            try:
                self.ask(self.connect(), "GET", "/health")
                return self
            except ConnectionError:
                time.sleep(0.2)
        raise SystemExit("The server did not start.")

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)

    def ask(self, connection: http.client.HTTPConnection, method: str, path: str, content: object = None) -> float:
        """Send a request; return the seconds until the answer."""
        start = time.perf_counter()
        connection.request(method, path, json.dumps(content), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise SystemExit(f"status {answer.status}: {body.decode()}")
        return time.perf_counter() - start


def measure(server: Server, rows: list[dict], clients: int, requests: int) -> dict[str, float]:
    """Let clients send requests at the same time."""

    def client(number: int) -> list[float]:
        connection = server.connect()
        mine = range(number, requests, clients)
        return [server.ask(connection, "POST", "/predict", {"rows": [rows[i % len(rows)]]}) for i in mine]

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        times = [seconds for part in pool.map(client, range(clients)) for seconds in part]
    whole = time.perf_counter() - start
    p50, p99 = np.percentile(np.asarray(times) * 1000, [50, 99])
    return {"p50_ms": round(p50, 1), "p99_ms": round(p99, 1), "requests_per_s": round(requests / whole, 2)}


def main() -> None:
    """Measure each setting, with a server of its own per number of draws and batch size."""
    args = arguments()
    logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)  # no warning about articles that are cut
    if args.port is not None:
        return run_server(args)
    rows, lines = reuters_r8("test", count=16, seed=0), []
    for draws in args.draws:
        for batch_size in args.batch_sizes:
            with Server(draws, batch_size, tiny=args.tiny) as server:
                measure(server, rows, 1, 2)  # warm-up
                for clients in args.clients:
                    line = {"draws": draws, "batch_size": batch_size, "clients": clients}
                    lines.append(line | measure(server, rows, clients, args.requests))
                    print("  ".join(f"{name} {value:g}" for name, value in lines[-1].items()), flush=True)
    machine = {"torch_threads": torch.get_num_threads(), "machine": platform.machine(), "version": sp.__version__}
    result = {"requests": args.requests, "tiny": args.tiny, **machine, "lines": lines}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
