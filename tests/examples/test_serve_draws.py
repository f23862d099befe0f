"""Draws behind an OpenAI-compatible engine: the client averages probabilities, with bounds that hold."""

import importlib.util
import itertools
import json
import math
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel

import scalabl_pyro as sp
from scalabl_pyro.guides import NormalGuide

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "serve_draws.py"
SPEC = importlib.util.spec_from_file_location("serve_draws", SCRIPT)
serve_draws = importlib.util.module_from_spec(SPEC)
sys.modules["serve_draws"] = serve_draws
SPEC.loader.exec_module(serve_draws)

NAMES = ["draw-0", "draw-1", "draw-2"]
VOCABULARY = len(tiny.VOCABULARY)


@pytest.fixture(scope="module")
def posterior():
    blora = sp.bayesian_lora(tiny.causal_lm(), r=2, target_modules=["q_proj", "v_proj"])
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for _, B in blora.adapter.factors():
            B.normal_(0, 1.0)
    guide = NormalGuide(blora.adapter.loc, torch.full_like(blora.adapter.loc, 1.0))
    return sp.Posterior.capture(blora, sp.MultipleChoice(tiny.tokenizer()), guide, provenance={})


def next_token(llm, prompt: str) -> torch.Tensor:
    """Log probabilities of the next token, (V,)."""
    ids = tiny.tokenizer()(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return llm(input_ids=ids).logits[0, -1].double().log_softmax(-1)


@pytest.fixture(scope="module")
def engine(posterior, tmp_path_factory):
    """An engine that speaks OpenAI's protocol over plain PEFT, with one adapter per draw in a batch."""
    folders = posterior.export_peft(tmp_path_factory.mktemp("out") / "adapters", draws=len(NAMES), for_engine="vllm")
    model = PeftModel.from_pretrained(tiny.causal_lm(), str(folders[0]), adapter_name=NAMES[0])
    for name, folder in zip(NAMES[1:], folders[1:], strict=True):
        model.load_adapter(str(folder), adapter_name=name)
    model.eval()
    tokenizer = tiny.tokenizer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if body.get("model", NAMES[0]) not in NAMES:
                return self.answer(404, {"error": {"message": f"The model {body['model']!r} does not exist."}})
            ids = tokenizer(body["prompt"], return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=ids, adapter_names=[body.get("model", NAMES[0])]).logits[0, -1]
            top = logits.double().log_softmax(-1).topk(min(body["logprobs"], VOCABULARY))
            texts = [" " + tiny.VOCABULARY[i] for i in top.indices]
            top = dict(zip(texts, top.values.tolist(), strict=True))
            logprobs = None if self.path.startswith("/silent") else {"top_logprobs": [top]}
            return self.answer(200, {"choices": [{"text": texts[0], "logprobs": logprobs}]})

        def answer(self, status, content):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


PROMPT = "what colour is the sky ?"


def exact(posterior, prompt: str) -> np.ndarray:
    """Log probabilities of each draw, (K, V)."""
    rows = []
    for draw in range(len(NAMES)):
        with posterior.draw(draw) as llm:
            rows.append(next_token(llm, prompt).numpy())
    return np.stack(rows)


def test_the_average_of_served_adapters_is_that_of_the_posterior(posterior, engine):
    endpoints = serve_draws.endpoints_of([engine + "/"], NAMES)
    draws = [serve_draws.top_log_probs(endpoint, PROMPT, count=VOCABULARY) for endpoint in endpoints]
    expected = np.exp(exact(posterior, PROMPT)).mean(0)
    assert np.abs(np.exp(exact(posterior, PROMPT)) - expected).max() > 1e-3  # the draws differ
    found = serve_draws.average(draws)
    assert len(found) == VOCABULARY
    for i, word in enumerate(tiny.VOCABULARY):
        assert found[" " + word].low == pytest.approx(expected[i], abs=1e-5)
        assert found[" " + word].high == pytest.approx(expected[i], abs=1e-5)


def test_few_log_probabilities_give_bounds_around_the_average(posterior, engine):
    endpoints = serve_draws.endpoints_of([engine], NAMES)
    draws = [serve_draws.top_log_probs(endpoint, PROMPT, count=5) for endpoint in endpoints]
    expected = dict(zip(tiny.VOCABULARY, np.exp(exact(posterior, PROMPT)).mean(0), strict=True))
    for token, bounds in serve_draws.average(draws).items():
        assert bounds.low - 1e-6 <= expected[token.strip()] <= bounds.high + 1e-6


def test_a_continuation_weighs_the_draws_by_what_they_said_before(posterior, engine):
    endpoints = serve_draws.endpoints_of([engine], NAMES)
    written = serve_draws.continue_text(endpoints, PROMPT, max_tokens=3, count=VOCABULARY)
    prompt, totals, mixture = PROMPT, np.zeros(len(NAMES)), 0.0
    for token, bounds in written:
        log_probs = exact(posterior, prompt)
        weights = np.exp(totals) / np.exp(totals).sum()
        probs = weights @ np.exp(log_probs)
        best = int(probs.argmax())
        assert token == " " + tiny.VOCABULARY[best]
        assert bounds.low == pytest.approx(probs[best], abs=1e-5)
        totals, prompt, mixture = totals + log_probs[:, best], prompt + token, mixture + math.log(probs[best])
    assert mixture == pytest.approx(np.log(np.exp(totals).mean()), abs=1e-6)  # the probability of the whole text


@pytest.mark.parametrize("count", [1, 3, 7, 12])
def test_the_bounds_hold_and_are_tight_with_all_tokens(count):
    rng = np.random.default_rng(count)
    for _ in range(100):
        logits = rng.normal(0, rng.uniform(0.1, 4), (4, 12))
        probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        weights = rng.dirichlet(np.ones(4))
        tops = [{str(i): math.log(p[i]) for i in np.argsort(-p)[:count]} for p in probs]
        for token, bounds in serve_draws.average(tops, weights).items():
            true = weights @ probs[:, int(token)]
            assert bounds.low - 1e-12 <= true <= bounds.high + 1e-12
            if count == 12:
                assert bounds.high - bounds.low < 1e-12


def test_probabilities_are_averaged_and_not_logits():
    sure, unsure = {"a": math.log(0.999), "b": math.log(0.001)}, {"a": math.log(0.5), "b": math.log(0.5)}
    found = serve_draws.average([sure, unsure])
    assert found["a"].low == pytest.approx(0.7495)
    assert serve_draws.weights_after([-1000.0, -1000.0 + math.log(3)]) == pytest.approx([0.25, 0.75])


def test_errors_say_what_to_do(engine):
    with pytest.raises(
        SystemExit, match=r"refused the request for 'other' \(HTTP 404\).*does not exist.*\n.*lora-modules"
    ):
        serve_draws.top_log_probs(serve_draws.Endpoint(engine, "other"), PROMPT)
    silent = engine.replace("/v1", "/silent")
    with pytest.raises(SystemExit, match=r"returned no log probabilities.*--max-logprobs 20.*--logits_all"):
        serve_draws.top_log_probs(serve_draws.Endpoint(silent, NAMES[0]), PROMPT)
    with pytest.raises(SystemExit, match=r"does not answer .*Start the engine"):
        serve_draws.top_log_probs(serve_draws.Endpoint("http://127.0.0.1:9/v1"), PROMPT, timeout=5)
    with pytest.raises(SystemExit, match="2 addresses and 3 names"):
        serve_draws.endpoints_of(["a", "b"], NAMES)
    pairs = itertools.chain(serve_draws.endpoints_of(["a", "b/"], []), serve_draws.endpoints_of(["a"], ["x"]))
    assert [(e.url, e.model) for e in pairs] == [("a", ""), ("b", ""), ("a", "x")]


def test_the_command_line(engine, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve_draws.py", "--url", engine, *NAMES, "--prompt", PROMPT, "--tokens", "2"])
    serve_draws.main()
    out = capsys.readouterr().out
    assert "average of 3 draws" in out and "Continuation:" in out
