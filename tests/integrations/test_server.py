"""A real uvicorn process answers many clients, and ends without losing a request."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import served
import tiny
import torch

for package in ("fastapi", "uvicorn"):
    pytest.importorskip(package, reason="the service needs FastAPI and uvicorn (`make install` brings them)")

HELPER = Path(served.__file__)
ROWS = tiny.question_rows(32, seed=3)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ask(connection, body: bytes, path="/predict", method="POST"):
    connection.request(method, path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def head(length: int) -> bytes:
    """First lines of a request with a body of so many bytes."""
    lines = ["POST /predict HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@pytest.fixture(scope="module")
def server():
    port = free_port()
    root = HELPER.parents[2]
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen([sys.executable, str(HELPER), str(port)], env=environment, stderr=subprocess.PIPE)
    for _ in range(600):
        if process.poll() is not None:
            pytest.fail(process.stderr.read().decode())
        try:
            status, found = ask(http.client.HTTPConnection("127.0.0.1", port, timeout=5), b"", "/health", "GET")
            assert (status, found["ready"]) == (200, True)
            break
        except OSError:
            time.sleep(0.1)
    yield process, port
    process.kill()
    process.communicate()


def test_a_thousand_requests_of_sixteen_clients(server):
    _, port = server
    frame = served.questions(torch.float32).predict(ROWS, num_draws=4, seed=0).to_frame()
    bodies = [json.dumps({"rows": ROWS[i : i + 1 + i % 3]}).encode() for i in range(29)]

    def client(number: int) -> list[float]:
        connection, times = http.client.HTTPConnection("127.0.0.1", port, timeout=60), []
        for k in range(63):
            i = (5 * number + k) % len(bodies)
            start = time.perf_counter()
            status, answer = ask(connection, bodies[i])
            times.append(time.perf_counter() - start)
            assert status == 200, answer
            assert len(answer["predictions"]) == 1 + i % 3
            for place, line in enumerate(answer["predictions"]):
                wanted = frame.iloc[i + place]
                assert line["prediction"] == wanted["prediction"]
                for name in ("probability", "total", "aleatoric", "epistemic"):
                    assert abs(line[name] - wanted[name]) < 1e-5
        return times

    with ThreadPoolExecutor(16) as pool:
        times = [t for part in pool.map(client, range(16)) for t in part]
    assert len(times) == 1008
    status, found = ask(http.client.HTTPConnection("127.0.0.1", port, timeout=5), b"", "/health", "GET")
    assert (status, found["num_open"], found["num_requests"]) == (200, 0, 1008)


def test_a_large_body_is_refused_before_it_is_sent(server):
    _, port = server
    with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
        raw.sendall(head(9_999_999_999))
        assert raw.recv(100).startswith(b"HTTP/1.1 413")


def test_a_client_that_leaves_harms_nobody(server):
    _, port = server
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
            raw.sendall(head(99) + b"{")
    body = json.dumps({"rows": ROWS[:1]}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
        raw.sendall(head(len(body)) + body)
    assert ask(http.client.HTTPConnection("127.0.0.1", port, timeout=60), body)[0] == 200
    for _ in range(100):
        found = ask(http.client.HTTPConnection("127.0.0.1", port, timeout=5), b"", "/health", "GET")[1]
        if found["num_open"] == 0:
            return
        time.sleep(0.1)
    pytest.fail(f"requests of clients that left are still open: {found}")


def test_a_signal_ends_the_server_after_its_last_answer(server):
    process, port = server
    body = json.dumps({"rows": ROWS[:32]}).encode()

    def client(_: int) -> int:
        return ask(http.client.HTTPConnection("127.0.0.1", port, timeout=60), body)[0]

    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(client, i) for i in range(8)]
        for _ in range(1000):
            health = ask(http.client.HTTPConnection("127.0.0.1", port, timeout=5), b"", "/health", "GET")[1]
            if health["num_open"] >= 4:
                break
        process.send_signal(signal.SIGTERM)
        statuses = []
        for one in waiting:
            try:
                statuses.append(one.result())
            except ConnectionError:  # it came after the signal
                statuses.append(None)
    assert statuses.count(200) >= 4
    assert set(statuses) <= {200, None}
    errors = process.communicate(timeout=30)[1].decode()
    assert process.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in errors, errors
