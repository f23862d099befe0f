"""The HTTP service gives the predictions of the posterior, whatever else it is asked at the same time."""

import dataclasses
import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pyro.distributions as dist
import pytest
import served
import tiny
import torch

import scalabl_pyro as sp
from scalabl_pyro.data import Example
from scalabl_pyro.integrations import make_app
from scalabl_pyro.lora import binding

pytest.importorskip("fastapi", reason="the service needs FastAPI (`make install` brings it)")
from fastapi.testclient import TestClient

ROWS = tiny.question_rows(12, seed=3)


@pytest.fixture(scope="module")
def posterior():
    return served.questions()


@pytest.fixture(scope="module")
def texts():
    return served.texts()


def client_of(posterior, **options):
    return TestClient(make_app(posterior, **{"num_draws": 4, **options}), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(posterior):
    with client_of(posterior, max_chars=300, max_bytes=20_000) as client:
        yield client


def post(client, path, **body):
    return client.post(path, json=body)


def same(given, wanted, tolerance=1e-10):
    """Two JSON values with equal names and equal numbers."""
    assert type(given) is type(wanted) or {type(given), type(wanted)} == {int, float}
    if isinstance(given, dict):
        assert given.keys() == wanted.keys()
        for name in given:
            same(given[name], wanted[name], tolerance)
    elif isinstance(given, list):
        assert len(given) == len(wanted)
        for one, other in zip(given, wanted, strict=True):
            same(one, other, tolerance)
    elif isinstance(given, float):
        assert given == pytest.approx(wanted, rel=0, abs=tolerance)
    else:
        assert given == wanted


def expected(posterior, rows, num_draws=4, seed=0):
    """What ``to_frame`` says, line by line."""
    found = posterior.predict(rows, num_draws=num_draws, seed=seed)
    lines = found.to_frame().to_dict("records")
    if isinstance(found, sp.Prediction):
        for line, probs in zip(lines, found.probs, strict=True):
            line["probs"] = dict(zip(found.classes, probs.tolist(), strict=True))
    return [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in line.items()} for line in lines]


def test_a_request_gets_what_predict_and_to_frame_say(posterior, client):
    answer = post(client, "/predict", rows=ROWS)
    assert answer.status_code == 200
    lines = answer.json()["predictions"]
    same(lines, expected(posterior, ROWS))
    names = ["prediction", "probability", "total", "aleatoric", "epistemic", "target", "probs"]
    assert sorted(lines[0]) == sorted(names)
    assert sum(lines[0]["probs"].values()) == pytest.approx(1)


@pytest.mark.parametrize("num_draws", [0, 1, 7])
def test_draws_and_seed_are_those_of_the_service(posterior, num_draws):
    with client_of(posterior, num_draws=num_draws, seed=5) as client:
        same(post(client, "/predict", rows=ROWS).json()["predictions"], expected(posterior, ROWS, num_draws, 5))
        assert client.get("/health").json()["num_draws"] == num_draws


def test_answers_may_be_missing(posterior, client):
    bare = [{k: v for k, v in row.items() if k != "answer"} for row in ROWS]
    lines = post(client, "/predict", rows=bare).json()["predictions"]
    assert "target" not in lines[0]
    same(lines, expected(posterior, bare))
    mixed = [ROWS[0], bare[1]]
    lines = post(client, "/predict", rows=mixed).json()["predictions"]
    assert [line["target"] for line in lines] == [expected(posterior, ROWS[:1])[0]["target"], None]


def gathered(posterior, requests, path="/predict", **options):
    """Answers to requests that wait together, and the number of rows of each batch."""
    app = make_app(posterior, **{"num_draws": 4, "max_wait_ms": 2000, **options})
    sizes = []
    call = app.state.service.calls[path]
    run = call.run
    call.run = lambda jobs: sizes.append([len(job.items) for job in jobs]) or run(jobs)
    with TestClient(app, raise_server_exceptions=False) as client, ThreadPoolExecutor(len(requests)) as pool:
        waiting = []
        for i, body in enumerate(requests):
            waiting.append(pool.submit(client.post, path, json=body))
            deadline = time.monotonic() + 5
            while app.state.service.num_requests <= i and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.03)  # it is in the queue before the next one comes
        return [one.result() for one in waiting], sizes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_requests_share_batches_and_get_their_own_numbers(dtype):
    posterior = served.questions(dtype)
    few = [{**row, "choices": row["choices"][:2], "answer": None} for row in ROWS[:2]]
    requests = [{"rows": rows} for rows in (few, ROWS[:3], ROWS[3:4], ROWS[4:6], ROWS[6:12])]
    answers, sizes = gathered(posterior, requests, batch_size=8)
    assert sizes == [[2, 3, 1, 2], [6]]  # in order, and full
    for request, answer in zip(requests, answers, strict=True):
        wanted = expected(posterior, request["rows"])
        same(answer.json()["predictions"], wanted, 1e-10 if dtype == torch.float64 else 1e-5)
    assert list(answers[0].json()["predictions"][0]["probs"]) == ["A", "B"]  # not the choices of its neighbours


def test_numbers_have_a_standard_deviation_and_an_interval():
    posterior = served.numbers()
    rows = tiny.text_rows(6, seed=4)
    answers, sizes = gathered(posterior, [{"rows": rows[:2]}, {"rows": rows[2:]}], batch_size=6)
    assert sizes == [[2, 4]]
    for answer, part in zip(answers, (rows[:2], rows[2:]), strict=True):
        lines = answer.json()["predictions"]
        same(lines, expected(posterior, part), 1e-8)  # the bounds are roots
        assert lines[0]["low"] < lines[0]["prediction"] < lines[0]["high"]
        assert lines[0]["sd"] ** 2 == pytest.approx(lines[0]["total"])


class Counts(sp.Regression):
    """Counts: intervals come from simulated answers, and a negative answer is impossible."""

    def likelihood(self, outputs, batch):
        return dist.Poisson(outputs[..., 0].exp() + 1, validate_args=True)


def test_simulated_intervals_do_not_depend_on_the_neighbours():
    posterior = dataclasses.replace(served.numbers(), task=Counts(tiny.tokenizer()))
    rows = [{**row, "label": abs(row["label"])} for row in tiny.text_rows(6, seed=4)]
    answers, _ = gathered(posterior, [{"rows": rows[:2]}, {"rows": rows[2:]}], batch_size=6, num_draws=40)
    for answer, part in zip(answers, (rows[:2], rows[2:]), strict=True):
        same(answer.json()["predictions"], expected(posterior, part, 40))
        assert answer.json()["predictions"][0]["low"] is not None


def test_nan_never_stands_in_an_answer():
    posterior = dataclasses.replace(served.numbers(), task=Counts(tiny.tokenizer()))
    with client_of(posterior) as client:  # four draws give no interval
        answer = post(client, "/predict", rows=tiny.text_rows(2))
    assert "NaN" not in answer.text
    assert answer.json()["predictions"][0]["low"] is None


def test_a_bad_row_is_refused_at_once_and_its_neighbours_are_answered(posterior):
    bad = {"rows": [{"question": "what ?"}]}
    answers, sizes = gathered(posterior, [{"rows": ROWS[:2]}, bad, {"rows": ROWS[2:5]}], max_wait_ms=300)
    assert [answer.status_code for answer in answers] == [200, 422, 200]
    assert sizes == [[2, 3]]
    assert "Row 0" in answers[1].json()["detail"]
    same(answers[2].json()["predictions"], expected(posterior, ROWS[2:5]))


def test_an_error_inside_a_batch_reaches_its_own_request_only():
    posterior = dataclasses.replace(served.numbers(), task=Counts(tiny.tokenizer()))
    rows = [{**row, "label": 1.0} for row in tiny.text_rows(4)]
    impossible = [{**rows[0], "label": -1.5}]
    requests = [{"rows": rows[:2]}, {"rows": impossible}, {"rows": rows[2:]}]
    answers, _ = gathered(posterior, requests, max_wait_ms=300)
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    assert answers[1].json() == {"detail": "The service failed at this request. Its log says why."}


class Overflows(sp.MultipleChoice):
    """Gives NaN for a question about the night."""

    def encode(self, row):
        example = super().encode(row)
        return Example(example.inputs, example.target, example.extras | {"bad": int("night" in row["question"])})

    def outputs(self, llm, batch, s):
        found = super().outputs(llm, batch, s)
        return found.masked_fill(batch.extras["bad"].bool()[:, None], torch.nan)


def test_nan_of_the_model_is_an_error_of_that_request(posterior):
    broken = dataclasses.replace(posterior, task=Overflows(tiny.tokenizer()))
    night = [{**ROWS[0], "question": "what colour is the night ?"}]
    sky = [{**ROWS[0], "question": "what colour is the sky ?"}]
    answers, _ = gathered(broken, [{"rows": sky}, {"rows": night}], max_wait_ms=300)
    assert [answer.status_code for answer in answers] == [200, 500]
    assert "NaN" in answers[1].json()["detail"]


#: Bodies that are refused: path-independent body, status, and words of the message.
REFUSED = {
    "not JSON": (b"{", 422, "not valid JSON"),
    "not UTF-8": (b'{"rows": "\xff"}', 422, "not valid JSON"),
    "a list": (b"[]", 422, "send an object"),
    "a number": (b"1", 422, "send an object"),
    "nothing": (b"", 422, "not valid JSON"),
    "no rows": (b"{}", 422, "lacks the field 'rows'"),
    "unknown field": (b'{"rows": [], "row": 1}', 422, "Did you mean 'rows'"),
    "two keys": (b'{"rows": [], "rows": []}', 422, "stands twice"),
    "empty": (b'{"rows": []}', 422, "is empty"),
    "one row": (b'{"rows": {"question": "what ?"}}', 422, "expected a list"),
    "a text": (b'{"rows": "hf://owner/name"}', 422, "expected a list"),
    "texts": (b'{"rows": ["what ?"]}', 422, "Row 0 is a str"),
    "null": (b'{"rows": [null]}', 422, "Row 0 is None"),
    "NaN": (b'{"rows": [{"question": NaN}]}', 422, "not JSON"),
    "infinity": (b'{"rows": [{"question": -Infinity}]}', 422, "not JSON"),
    "large number": (b'{"rows": [{"question": 1e999}]}', 422, "too large"),
    "digits": (b'{"rows": [{"question": ' + b"1" * 5000 + b"}]}", 422, "digits"),
    "half a character": (b'{"rows": [{"question": "\\ud800"}]}', 422, "half of a character"),
    "deep": (b'{"rows": [' + b"[" * 5000 + b"]" * 5000 + b"]}", 422, "nested deeper"),
    "nested": (b'{"rows": [' + b'{"question":' * 40 + b"1" + b"}" * 40 + b"]}", 422, "nested deeper"),
    "many rows": (json.dumps({"rows": [{}] * 65}).encode(), 413, "At most 64"),
    "many characters": (json.dumps({"rows": [{"question": "a" * 301}]}).encode(), 413, "300"),
    "long name": (json.dumps({"rows": [{"a" * 301: 1}]}).encode(), 413, "300"),
    "many bytes": (json.dumps({"rows": [{"question": "a"}], "x": "y" * 20_000}).encode(), 413, "20,000 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(client, name):
    body, status, words = REFUSED[name]
    answer = client.post("/predict", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert words in answer.json()["detail"]
    assert len(answer.json()["detail"]) <= 600
    assert "Traceback" not in answer.text and "/work" not in answer.text and ".py" not in answer.text


def test_a_body_without_its_length_is_cut_at_the_limit(client):
    sent = []

    def endless():
        for i in range(10_000):
            sent.append(i)
            yield b" " * 1000

    answer = client.post("/predict", content=endless(), headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_other_kinds_addresses_and_methods_are_refused(client):
    body = json.dumps({"rows": ROWS[:1]})
    assert client.post("/predict", content=body, headers={"content-type": "text/plain"}).status_code == 415
    assert client.post("/predict", content=body).status_code == 415
    assert client.post("/predict/", json={"rows": ROWS}, follow_redirects=False).status_code in (307, 404)
    assert client.get("/predict").status_code == 405
    assert client.get("/").status_code == client.get("/docs").status_code == client.get("/redoc").status_code == 404
    wrong = post(client, "/generate", prompts=["what ?"])
    assert wrong.status_code == 404
    assert wrong.json()["detail"] == "This service has the task MultipleChoice: use POST /predict."


class Secret(sp.MultipleChoice):
    """Speaks of a file of the server."""

    def encode(self, row):
        raise ValueError("cannot read /srv/secret/model/config.json, nor /etc/own of the client")


def test_messages_hold_no_paths_of_the_server(posterior):
    with client_of(dataclasses.replace(posterior, task=Secret(tiny.tokenizer()))) as client:
        answer = post(client, "/predict", rows=[{"question": "/etc/own"}])
    assert answer.status_code == 422
    assert answer.json()["detail"] == "Row 0: cannot read (a path), nor /etc/own of the client"


class Slow(sp.MultipleChoice):
    """Waits inside the batch for a signal of the test."""

    may_go = threading.Event()
    has_begun = threading.Event()

    def outputs(self, llm, batch, s):
        self.has_begun.set()
        assert self.may_go.wait(20)
        return super().outputs(llm, batch, s)


@pytest.fixture
def slow(posterior):
    Slow.may_go.clear()
    Slow.has_begun.clear()
    yield dataclasses.replace(posterior, task=Slow(tiny.tokenizer()))
    Slow.may_go.set()


def test_a_full_queue_and_a_late_answer_give_503(slow):
    with client_of(slow, max_queue=2, timeout=1.0) as client, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(post, client, "/predict", rows=ROWS[i : i + 1]) for i in range(2)]
        assert Slow.has_begun.wait(5)
        deadline = time.monotonic() + 5
        while client.get("/health").json()["num_open"] < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        refused = post(client, "/predict", rows=ROWS[:1])
        assert refused.status_code == 503
        assert "2 requests wait already" in refused.json()["detail"]
        assert refused.headers["retry-after"] == "1"
        late = [one.result() for one in waiting]
        assert [answer.status_code for answer in late] == [503, 503]
        assert "within 1 s" in late[0].json()["detail"]
        Slow.may_go.set()
        assert post(client, "/predict", rows=ROWS[:1]).status_code == 200  # nothing is stuck
        assert client.get("/health").json()["num_open"] == 0


def test_the_end_waits_for_running_requests_and_refuses_new_ones(slow):
    app = make_app(slow, num_draws=2)
    batcher = app.state.service.batcher
    with ThreadPoolExecutor(2) as pool:
        with TestClient(app) as client:
            running = pool.submit(post, client, "/predict", rows=ROWS[:1])
            assert Slow.has_begun.wait(5)
            closing = pool.submit(batcher.close)
            while batcher.is_open:
                time.sleep(0.01)
            assert post(client, "/predict", rows=ROWS[:1]).status_code == 503
            assert client.get("/health").status_code == 503
            Slow.may_go.set()
            closing.result(20)
            assert running.result(20).status_code == 200
        with TestClient(app) as client:  # it can start again
            assert post(client, "/predict", rows=ROWS[:1]).status_code == 200
    assert batcher._thread is None


def test_health(posterior):
    with client_of(posterior) as client:
        post(client, "/predict", rows=ROWS)
        post(client, "/predict", rows=[])
        found = client.get("/health").json()
    assert found["ready"] is True
    assert found["version"] == sp.__version__
    assert found["task"] == "MultipleChoice"
    assert found["base_model"] == "LlamaForCausalLM"
    assert (found["num_draws"], found["seed"], found["num_requests"], found["num_open"]) == (4, 0, 2, 0)
    assert found["paths"] == ["/predict"]
    assert found["limits"]["max_rows"] == 64


def test_the_schema_describes_the_calls(client):
    schema = client.get("/openapi.json").json()
    assert sorted(schema["paths"]) == ["/health", "/predict"]
    body = schema["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["rows"]


def test_the_model_is_as_before(posterior, unchanged_rng):
    module = posterior.adapter.module
    module.train()
    module.model.norm.eval()
    before = [m.training for m in module.modules()], [hash(p.detach().numpy().tobytes()) for p in module.parameters()]
    with client_of(posterior) as client:
        assert post(client, "/predict", rows=ROWS).status_code == 200
        assert post(client, "/predict", rows=[{}]).status_code == 422
    after = [m.training for m in module.modules()], [hash(p.detach().numpy().tobytes()) for p in module.parameters()]
    assert after == before
    assert not binding._BOUND.get()
    module.eval()


def test_a_baseline_is_served_too():
    task = sp.MultipleChoice(tiny.tokenizer())
    point = sp.baselines.mle(tiny.causal_lm(), task, tiny.question_rows(8), num_steps=2, progress=False).posterior
    with client_of(point, num_draws=0) as client:
        same(post(client, "/predict", rows=ROWS).json()["predictions"], expected(point, ROWS, 0), 1e-5)


def test_texts_are_scored(texts):
    rows = served.completions.rows()
    answers, sizes = gathered(texts, [{"rows": rows[:2]}, {"rows": rows[2:], "tokens": True}], path="/score")
    assert sizes == [[2, 4]]
    for answer, part in zip(answers, (rows[:2], rows[2:]), strict=True):
        lines = answer.json()["scores"]
        wanted = texts.score(part, num_draws=4)
        same([{k: v for k, v in line.items() if k != "tokens"} for line in lines], wanted.to_frame().to_dict("records"))
        if "tokens" in lines[0]:
            same(lines[1]["tokens"], wanted.tokens(1).to_dict("records"))
    assert "tokens" not in answers[0].json()["scores"][0]


def test_texts_are_written(texts):
    bodies = [{"prompts": ["the sky is"]}, {"prompts": [{"prompt": "grass is"}, "what is the rose ?"]}]
    bodies = [{**body, "max_new_tokens": 5, "decode": "mixture"} for body in bodies]
    answers, sizes = gathered(texts, bodies, path="/generate")
    assert sizes == [[1, 2]]
    for body, answer in zip(bodies, answers, strict=True):
        wanted = texts.generate(
            [p if isinstance(p, dict) else {"prompt": p} for p in body["prompts"]],
            num_draws=4,
            decode="mixture",
            max_new_tokens=5,
        )
        lines = answer.json()["generations"]
        assert [line["answer"] for line in lines] == wanted.agreement()["answer"].tolist()
        flat = [text for line in lines for text in line["texts"]]
        assert [text["text"] for text in flat] == list(wanted.answers)
        same([text["log_prob"] for text in flat], wanted.scored.log_prob.tolist())


def test_sampled_texts_run_alone_and_are_those_of_generate(texts):
    body = {"prompts": ["the sky is"], "do_sample": True, "max_new_tokens": 4, "num_samples": 2}
    answers, sizes = gathered(texts, [body, body], path="/generate", max_wait_ms=200)
    assert sizes == [[1], [1]]
    wanted = texts.generate(["the sky is"], num_draws=4, do_sample=True, max_new_tokens=4, num_samples=2)
    for answer in answers:
        assert [text["text"] for text in answer.json()["generations"][0]["texts"]] == list(wanted.answers)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"prompts": [""]}, 422, "Prompt 0: the prompt is empty"),
        ({"prompts": [[3]]}, 422, "Prompt 0"),
        ({"prompts": [[{"role": "user"}]]}, 422, "Prompt 0"),
        ({"prompts": ["sky"], "max_new_tokens": 300}, 413, "at most 256"),
        ({"prompts": ["sky"], "max_new_tokens": True}, 422, "whole number"),
        ({"prompts": ["sky"], "decode": "beam"}, 422, "decode='beam' is unknown"),
        ({"prompts": ["sky"], "do_sample": 1}, 422, "expected True or False"),
        ({"prompts": ["sky"], "num_samples": 2}, 422, "do_sample=true"),
        ({"prompts": ["sky"], "num_samples": 65, "do_sample": True}, 413, "At most 64"),
        ({"prompts": ["sky"], "temperature": 0.5}, 422, "do_sample=true"),
        ({"prompts": ["sky"], "temperature": -1, "do_sample": True}, 422, "positive"),
        ({"prompts": ["sky"], "temperature": "1", "do_sample": True}, 422, "positive"),
        ({"prompts": ["sky"], "top_p": 1.5, "do_sample": True}, 422, "top_p=1.5"),
        ({"prompts": ["sky"], "top_k": -1, "do_sample": True}, 422, "top_k=-1"),
        ({"prompts": ["sky"], "num_beams": 4}, 422, "unknown field 'num_beams'"),
        ({"prompts": ["sky"], "max_new_tokens": None}, 422, "whole number"),
    ],
)
def test_what_generate_refuses(texts, body, status, words):
    with client_of(texts) as client:
        answer = post(client, "/generate", **body)
    assert (answer.status_code, words in answer.json()["detail"]) == (status, True), answer.json()


def test_a_text_that_the_table_of_positions_cannot_hold_is_refused():
    task = sp.Completion(served.completions.tokenizer(), chat=False)
    with client_of(served.completions.posterior_of(served.completions.adapted("gpt2"), task)) as client:
        answer = post(client, "/generate", prompts=["sky"], max_new_tokens=200)
    assert answer.status_code == 422
    assert "positions for 128" in answer.json()["detail"]


def test_a_text_to_score_needs_a_completion(texts):
    with client_of(texts) as client:
        answer = post(client, "/score", rows=[{"prompt": "the sky is"}])
        assert answer.status_code == 422
        assert "no answer" in answer.json()["detail"]
        assert post(client, "/predict", rows=[{}]).json()["detail"].endswith("use POST /score and POST /generate.")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_draws": -1}, ValueError, "num_draws"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"max_wait_ms": -1}, ValueError, "max_wait_ms"),
        ({"max_wait_ms": math.nan}, ValueError, "max_wait_ms"),
        ({"max_rows": 0}, ValueError, "max_rows"),
        ({"timeout": 0}, ValueError, "timeout"),
        ({"samples": 3}, TypeError, "Did you mean 'num_draws'"),
    ],
)
def test_wrong_options(posterior, options, error, words):
    with pytest.raises(error, match=words):
        make_app(posterior, **options)


def test_wrong_objects(posterior):
    with pytest.raises(TypeError, match=r"Train it first"):
        make_app(posterior.blora())
