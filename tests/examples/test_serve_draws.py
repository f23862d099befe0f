"""Draws behind an OpenAI-compatible engine: the client averages probabilities, with bounds that hold."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import scalabl_pyro as sp
from scalabl_pyro.guides import NormalGuide

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import serve_draws
from _support import draw_averages
from _support.draw_averages import Bounds, TopTokens
from _support.peft_engine import PeftEngine

NAMES = ["draw-0", "draw-1", "draw-2"]
VOCABULARY = len(tiny.VOCABULARY)
PROMPT = "what colour is the sky ?"
ROW = {"question": PROMPT, "choices": tiny.COLORS}


@pytest.fixture(scope="module")
def posterior():
    blora = sp.bayesian_lora(tiny.causal_lm(), r=2, target_modules=["q_proj", "v_proj"])
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for _, B in blora.adapter.factors():
            B.normal_(0, 1.0)
    guide = NormalGuide(blora.adapter.loc, torch.full_like(blora.adapter.loc, 1.0))
    return sp.Posterior.capture(blora, sp.MultipleChoice(tiny.tokenizer()), guide, provenance={})


class Engine(PeftEngine):
    """The engine whose answers depend on the path: paths other than /v1 take other forms, or fail."""

    def text_of(self, token):
        return " " + tiny.VOCABULARY[token]

    def reply(self, path, body):
        status, content = super().reply(path, body)
        kind = path.split("/")[1]
        if status == 200 and kind != "v1":
            choice = content["choices"][0]
            top = choice["logprobs"]["top_logprobs"][0]
            if kind == "chat":
                pairs = [{"token": token, "logprob": value} for token, value in top.items()]
                choice["logprobs"] = {"content": [{"top_logprobs": pairs}]}
            elif kind == "other" and body["model"] != NAMES[0]:
                choice["logprobs"] = {"top_logprobs": [{"other" + token: value for token, value in top.items()}]}
            elif kind in ("silent", "ended"):
                choice["logprobs"] = {"silent": None, "ended": {"top_logprobs": []}}[kind]
            elif kind == "text":
                content = "hello"
        return status, content


@pytest.fixture(scope="module")
def server(posterior, tmp_path_factory):
    folders = posterior.export_peft(tmp_path_factory.mktemp("out") / "adapters", draws=len(NAMES), for_engine="vllm")
    with Engine(tiny.causal_lm(), tiny.tokenizer(), dict(zip(NAMES, folders, strict=True))) as engine:
        yield engine


@pytest.fixture(scope="module")
def engine(server):
    return server.url


def draws_of(url: str, count: int = VOCABULARY, prompt: str = PROMPT) -> list[TopTokens]:
    return serve_draws.top_tokens(serve_draws.endpoints_of([url], NAMES), prompt, count=count)


def exact(posterior, prompt: str) -> np.ndarray:
    """Log probabilities of each draw, (K, V)."""
    ids = tiny.tokenizer()(prompt, return_tensors="pt")["input_ids"]
    rows = []
    for draw in range(len(NAMES)):
        with posterior.draw(draw) as llm, torch.no_grad():
            rows.append(llm(input_ids=ids).logits[0, -1].double().log_softmax(-1).numpy())
    return np.stack(rows)


def test_a_batch_with_an_adapter_per_row_equals_the_draws(posterior, server):
    ids = tiny.tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = server.model(input_ids=ids.repeat(len(NAMES), 1), adapter_names=NAMES).logits[:, -1]
    np.testing.assert_allclose(logits.double().log_softmax(-1).numpy(), exact(posterior, PROMPT), atol=1e-5)


@pytest.mark.parametrize("form", ["/v1", "/chat"])
def test_the_average_of_served_adapters_is_that_of_the_posterior(posterior, engine, form):
    found = draw_averages.average(draws_of(engine.replace("/v1", form) + "/"))
    each = np.exp(exact(posterior, PROMPT))
    assert np.abs(each - each.mean(0)).max() > 1e-3  # the draws differ
    assert len(found) == VOCABULARY
    for word, expected in zip(tiny.VOCABULARY, each.mean(0), strict=True):
        assert found[" " + word].lower == pytest.approx(expected, abs=1e-5)
        assert found[" " + word].upper == pytest.approx(expected, abs=1e-5)


def test_labels_have_the_probabilities_of_predict(posterior, engine):
    labels = [" " + label for label in posterior.task.labels[: len(tiny.COLORS)]]
    expected = posterior.predict([ROW], num_draws=len(NAMES), seed=0).probs[0]
    prompt = posterior.task.prompt(ROW)
    found = draw_averages.average_labels(draws_of(engine, prompt=prompt), labels)
    for label, p in zip(labels, expected, strict=True):
        assert found[label].lower == pytest.approx(p, abs=1e-5)
        assert found[label].upper == pytest.approx(p, abs=1e-5)
    few = draw_averages.average_labels(draws_of(engine, count=20, prompt=prompt), labels)
    for label, p in zip(labels, expected, strict=True):
        assert few[label].lower - 1e-6 <= p <= few[label].upper + 1e-6


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
        assert bounds.lower == pytest.approx(probs[best], abs=1e-5)
        assert bounds.upper == pytest.approx(probs[best], abs=1e-5)
        totals, prompt, mixture = totals + log_probs[:, best], prompt + token, mixture + math.log(probs[best])
    assert len(written) == 3
    assert mixture == pytest.approx(np.log(np.exp(totals).mean()), abs=1e-6)  # the probability of the whole text


def random_draws(rng, draws: int, size: int, count: int) -> tuple[np.ndarray, list[TopTokens]]:
    logits = rng.normal(0, rng.uniform(0.1, 4), (draws, size))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    tops = [{str(i): math.log(p[i]) for i in np.argsort(-p)[:count]} for p in probs]
    return probs, [TopTokens.of(top, count) for top in tops]


@pytest.mark.parametrize("count", [1, 3, 7, 12])
def test_the_bounds_hold_and_are_tight_with_all_tokens(count):
    rng = np.random.default_rng(count)
    labels, index = ["0", "5", "11"], [0, 5, 11]
    for _ in range(100):
        probs, draws = random_draws(rng, 4, 12, count)
        given_label = (probs[:, index] / probs[:, index].sum(1, keepdims=True)).mean(0)
        found = draw_averages.average(draws) | draw_averages.average_labels(draws, labels)
        true = {str(i): p for i, p in enumerate(probs.mean(0))} | dict(zip(labels, given_label, strict=True))
        for token, bounds in found.items():
            assert bounds.lower - 1e-12 <= true[token] <= bounds.upper + 1e-12
            assert count < 12 or bounds.upper - bounds.lower < 1e-12


@pytest.mark.parametrize("count", [2, 5, 12])
def test_the_bounds_hold_after_tokens_that_some_draws_did_not_name(count):
    rng = np.random.default_rng(count)
    wide = 0.0
    for _ in range(50):
        weights, bounds = np.full(4, 1 / 4), draw_averages.equal_weights(4)
        for _ in range(4):
            probs, draws = random_draws(rng, 4, 12, count)
            found = draw_averages.average(draws, bounds)
            for token, b in found.items():
                assert b.lower - 1e-12 <= weights @ probs[:, int(token)] <= b.upper + 1e-12
                wide = max(wide, b.upper - b.lower)
            token = rng.choice(list(found))
            bounds = draw_averages.weights_after(draws, token, bounds)
            weights = weights * probs[:, int(token)] / (weights @ probs[:, int(token)])
    assert (wide < 1e-9) == (count == 12)


def test_a_weighted_mean_is_bounded_as_by_all_corners():
    rng = np.random.default_rng(0)
    for _ in range(100):
        low, weight_low = rng.uniform(0, 0.5, 3), rng.uniform(0, 0.5, 3)
        high, weight_high = low + rng.uniform(0, 0.5, 3), weight_low + rng.uniform(0.01, 0.5, 3)
        corners = [
            [np.where([corner >> i & 1 for i in range(3)], b, a) for corner in range(8)]
            for a, b in ((low, high), (weight_low, weight_high))
        ]
        means = [w @ p / w.sum() for p in corners[0] for w in corners[1]]
        found = draw_averages.weighted(
            [Bounds(*pair) for pair in zip(low, high, strict=True)],
            [Bounds(*pair) for pair in zip(weight_low, weight_high, strict=True)],
        )
        assert (found.lower, found.upper) == pytest.approx((min(means), max(means)))


def test_what_a_draw_can_give_to_other_tokens():
    probs = {"a": 0.6, "b": 0.3}
    draw = TopTokens.of({token: math.log(p) for token, p in probs.items()}, 2)
    assert (draw.left, draw.other) == pytest.approx((0.1, 0.1))
    draw = TopTokens.of({"a": math.log(0.3), "b": math.log(0.2)}, 2)
    assert (draw.left, draw.other) == pytest.approx((0.5, 0.2))
    # An engine may add the sampled token: place 2 of 3 has 0.2, and not 0.01.
    draw = TopTokens.of({"a": math.log(0.3), "b": math.log(0.2), "sampled": math.log(0.01)}, 2)
    assert (draw.left, draw.other) == pytest.approx((0.49, 0.2))
    assert draw.among(["c", "d"]) == dict.fromkeys("cd", Bounds(0.0, 1.0))


def test_probabilities_are_averaged_and_not_logits():
    sure, unsure = ({"a": math.log(p), "b": math.log(1 - p)} for p in (0.999, 0.5))
    draws = [TopTokens.of(sure, 2), TopTokens.of(unsure, 2)]
    assert draw_averages.average(draws)["a"].lower == pytest.approx(0.7495)
    after = draw_averages.weights_after(draws, "b", draw_averages.equal_weights(2))
    assert [w.lower for w in after] == pytest.approx([0.002, 1.0])


def test_errors_say_what_to_do(engine):
    with pytest.raises(SystemExit, match=r"has no adapter 'other', only draw-0, .*--lora-modules other=PATH"):
        serve_draws.check_names([serve_draws.Endpoint(engine, "other")])
    serve_draws.check_names(serve_draws.endpoints_of([engine], [*NAMES, "base:draw-1", ""]))
    with pytest.raises(SystemExit, match=r"other at http.* refused the request \(HTTP 404\).*does not exist"):
        serve_draws.top_tokens([serve_draws.Endpoint(engine, "other")], PROMPT)
    with pytest.raises(SystemExit, match=r"returned no log probabilities.*--max-logprobs 20.*--logits_all"):
        draws_of(engine.replace("/v1", "/silent"), 20)
    with pytest.raises(SystemExit, match="ended the text"):
        draws_of(engine.replace("/v1", "/ended"))
    with pytest.raises(SystemExit, match=r"draw-1 at .* has other tokens than draw-0 .*share 0 tokens"):
        draws_of(engine.replace("/v1", "/other"))
    with pytest.raises(SystemExit, match="returned no log probabilities"):
        draws_of(engine.replace("/v1", "/text"))
    with pytest.raises(SystemExit, match=r"does not answer .*Start the engine"):
        serve_draws.top_tokens([serve_draws.Endpoint("http://127.0.0.1:9/v1")], PROMPT)
    with pytest.raises(SystemExit, match="2 addresses and 3 names"):
        serve_draws.endpoints_of(["a", "b"], NAMES)


def test_addresses_and_names_are_paired():
    pairs = [*serve_draws.endpoints_of(["a", "b/"], []), *serve_draws.endpoints_of(["a"], ["x", "y"])]
    assert [(e.url, e.model) for e in pairs] == [("a", ""), ("b", ""), ("a", "x"), ("a", "y")]


def test_parts_of_characters_stay_apart():
    assert serve_draws.text_of({"token": " sky"}) == " sky"
    assert serve_draws.text_of({"token": " sky", "bytes": list(b" sky")}) == " sky"
    assert serve_draws.text_of({"token": "", "bytes": [0xE2, 0x82]}) == "bytes:e282"


def test_equal_answers_are_told(engine, capsys):
    serve_draws.top_tokens(serve_draws.endpoints_of([engine], [NAMES[0]] * 2), PROMPT)
    assert "answers exactly as" in capsys.readouterr().err


def test_the_command_line(engine, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve_draws.py", "--url", engine, *NAMES, "--prompt", PROMPT, "--tokens", "2"])
    serve_draws.main()
    out = capsys.readouterr().out
    assert "average of 3 draws" in out and "Continuation:" in out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--labels", " red", " blue", "--top", "30"])
    serve_draws.main()
    assert capsys.readouterr().out.count(" to ") == 2
