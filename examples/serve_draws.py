"""Ask K draws of a posterior, served as K adapters by an OpenAI-compatible engine, and average their probabilities.

    python examples/serve_draws.py --url http://localhost:8000/v1 draw-0 draw-1 --prompt "The sky is"    # one engine
    python examples/serve_draws.py --url http://localhost:8000/v1 --url http://localhost:8001/v1 --prompt "The sky is"

In the first form one engine serves all adapters, and the names are those of its ``--lora-modules``. In the second form
there is one server per draw. ``posterior.export_peft(path, draws=K)`` writes the adapters. With ``--labels " A" " B"``
the answer is the probability of each label, as ``posterior.predict`` computes it.

An engine returns only the top log probabilities, so the average of a token is known up to bounds
(``_support/draw_averages.py`` computes them). The script needs only the standard library.
"""

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from _support.draw_averages import Bounds, TopTokens, average, average_labels, equal_weights, weights_after

#: Tokens that end a text.
END = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>", "")


@dataclass(frozen=True)
class Endpoint:
    """A draw behind an engine.

    Attributes:
        url: Address of the API, such as ``http://localhost:8000/v1``.
        model: Name of the adapter; empty where a server has one model only.
        extra: Further fields of each request, which only this engine knows.
    """

    url: str
    model: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.model or 'the model'} at {self.url}"


def call(endpoint: Endpoint, path: str, body: Mapping[str, Any] | None = None, *, timeout: float = 60.0) -> Any:
    """Send a request, and return the JSON of the answer."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(endpoint.url + path, data, headers), timeout=timeout
        ) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")[:300]
        raise SystemExit(f"{endpoint} refused the request (HTTP {error.code}): {text}") from error
    except OSError as error:
        raise SystemExit(f"{endpoint.url} does not answer ({error}). Start the engine, or correct --url.") from error
    except ValueError as error:
        raise SystemExit(f"{endpoint.url} did not answer with JSON ({error}). Does --url end in /v1?") from error


def check_names(endpoints: Sequence[Endpoint]) -> None:
    """Check that each engine lists its adapters, because some engines answer an unknown name with the base model."""
    for endpoint in endpoints:
        names = [str(entry.get("id")) for entry in call(endpoint, "/models").get("data", [])]
        if endpoint.model and not {endpoint.model, endpoint.model.split(":")[-1]} & set(names):  # SGLang: base:adapter
            raise SystemExit(
                f"{endpoint.url} has no adapter {endpoint.model!r}, only {', '.join(names) or 'none'}. Give one of "
                f"these names, or load the adapter. vLLM: --enable-lora --lora-modules {endpoint.model}=PATH"
            )


def top_tokens(endpoints: Sequence[Endpoint], prompt: str, *, count: int = 20) -> list[TopTokens]:
    """Ask each draw for the ``count`` most probable next tokens, all draws at the same time.

    Raises:
        SystemExit: An engine does not answer, returns no log probabilities, or reads the prompt as other tokens.
    """

    def ask(endpoint: Endpoint) -> tuple[TopTokens, int | None]:
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": count, **endpoint.extra}
        answer = call(endpoint, "/completions", body | ({"model": endpoint.model} if endpoint.model else {}))
        return TopTokens.of(read_log_probs(answer, endpoint, count), count), answer.get("usage", {}).get(
            "prompt_tokens"
        )

    with ThreadPoolExecutor(len(endpoints)) as pool:
        answers = list(pool.map(ask, endpoints))
    first, length = answers[0]
    for endpoint, (draw, other) in zip(endpoints[1:], answers[1:], strict=True):
        if other != length or (count >= 5 and not first.probs.keys() & draw.probs.keys()):
            raise SystemExit(
                f"{endpoint} has other tokens than {endpoints[0]}: the prompt is {other} and {length} tokens long, and "
                f"the lists share {len(first.probs.keys() & draw.probs.keys())} tokens. Serve all draws with one base "
                "model and one tokenizer."
            )
        if draw.probs == first.probs:
            print(f"{endpoint} answers exactly as {endpoints[0]}. Are the adapters applied?", file=sys.stderr)
    return [draw for draw, _ in answers]


def read_log_probs(answer: Mapping[str, Any], endpoint: Endpoint, count: int) -> dict[str, float]:
    """Return the log probabilities in an answer, by token: OpenAI's form for completions, or that for chats."""
    try:
        choice = answer["choices"][0]
        told = choice["logprobs"]
        if "content" in told:
            top = {text_of(entry): float(entry["logprob"]) for entry in told["content"][0]["top_logprobs"]}
        else:
            top = {token: float(value) for token, value in told["top_logprobs"][0].items()}
    except IndexError as error:
        raise SystemExit(f"{endpoint} ended the text: its most probable token is the end of the text.") from error
    except (KeyError, TypeError, AttributeError):
        top = {}
    if not top:
        raise SystemExit(
            f"{endpoint} returned no log probabilities. Allow them in the engine: vLLM needs --max-logprobs {count} "
            "where this exceeds 20, llama_cpp.server needs --logits_all true."
        )
    return top


def text_of(entry: Mapping[str, Any]) -> str:
    """Return the text of a token, or its bytes where they are only a part of a character."""
    text, data = entry["token"], entry.get("bytes")
    return text if data is None or text.encode() == bytes(data) else f"bytes:{bytes(data).hex()}"


def continue_text(
    endpoints: Sequence[Endpoint], prompt: str, *, max_tokens: int, count: int = 20
) -> list[tuple[str, Bounds]]:
    """Write the most probable token of the average, again and again.

    The first token has equal weights. Later, each draw is weighed by the probability that it gave to the text so far
    (see ``weights_after``). The text is sent again for each token.

    Returns:
        Each token with its averaged probability, given the tokens before it.
    """
    weights, written = equal_weights(len(endpoints)), []
    for _ in range(max_tokens):
        draws = top_tokens(endpoints, prompt, count=count)
        token, bounds = next(iter(average(draws, weights).items()))
        written.append((token, bounds))
        if token in END or "\ufffd" in token or token.startswith("bytes:"):  # a part of a character ends it too
            break
        weights, prompt = weights_after(draws, token, weights), prompt + token
    return written


def endpoints_of(urls: Sequence[str], names: Sequence[str], extra: Mapping[str, Any] | None = None) -> list[Endpoint]:
    """Pair addresses and names: several names on one address, or one address per draw."""
    if len(urls) == 1:
        urls = list(urls) * max(1, len(names))
    if names and len(names) != len(urls):
        raise SystemExit(f"{len(urls)} addresses and {len(names)} names: give one address, or one per name.")
    pairs = zip(urls, names or [""] * len(urls), strict=True)
    return [Endpoint(url.rstrip("/"), name, extra or {}) for url, name in pairs]


def main() -> None:
    """Print the averaged probabilities of the next token or of labels, and a continuation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names of the adapters in the engine")
    parser.add_argument("--url", action="append", required=True, help="address of the engine; repeat it per server")
    parser.add_argument("--prompt", default="The capital of France is", help="text to continue")
    parser.add_argument("--labels", nargs="+", help="tokens to choose from, with their leading space")
    parser.add_argument("--top", type=int, default=20, help="log probabilities to ask for, per draw")
    parser.add_argument("--tokens", type=int, default=5, help="tokens to write")
    parser.add_argument("--extra", type=json.loads, help="JSON of further fields of a request")
    args = parser.parse_args()
    endpoints = endpoints_of(args.url, args.names, args.extra)
    check_names(endpoints)
    draws = top_tokens(endpoints, args.prompt, count=args.top)
    found = average_labels(draws, args.labels) if args.labels else average(draws)
    print(f"Next token after {args.prompt!r}, average of {len(draws)} draws:")
    for token, bounds in list(found.items())[: len(args.labels or range(5))]:
        singles = [draw.among(args.labels)[token] if args.labels else draw.bounds(token) for draw in draws]
        each = ", ".join(f"{p.lower:.3f}" if p.lower == p.upper else f"{p.lower:.3f}-{p.upper:.3f}" for p in singles)
        print(f"  {token!r:12} {bounds.lower:.4f} to {bounds.upper:.4f}   draws: {each}")
    if not args.labels:
        written = continue_text(endpoints, args.prompt, max_tokens=args.tokens, count=args.top)
        print("Continuation:", "".join(token for token, _ in written))


if __name__ == "__main__":
    main()
