"""Ask K draws of a posterior, served as K adapters by an OpenAI-compatible engine, and average their probabilities.

    python examples/serve_draws.py --url http://localhost:8000/v1 draw-0 draw-1 --prompt "The sky is"    # vLLM, SGLang
    python examples/serve_draws.py --url http://localhost:8000/v1 --url http://localhost:8001/v1 --prompt "The sky is"

In the first form one engine serves all adapters, and the names are those of ``--lora-modules``. In the second form
there is one server per draw, as with llama.cpp. ``posterior.export_peft(path, draws=K)`` writes the adapters.

An engine returns only the top log probabilities. A token outside the list of a draw has at most the smallest
probability of the list, and at most the probability that the list leaves over. So the average of a token lies between
two bounds.
"""

import argparse
import json
import math
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Endpoint:
    """A draw behind an engine.

    Attributes:
        url: Address of the API, such as ``http://localhost:8000/v1``.
        model: Name of the adapter; empty where a server has one model only.
    """

    url: str
    model: str = ""


@dataclass(frozen=True)
class Averaged:
    """Bounds of the averaged probability of a token.

    Attributes:
        low: Smallest value that the answers of the engine allow.
        high: Largest value.
    """

    low: float
    high: float


def top_log_probs(endpoint: Endpoint, prompt: str, *, count: int = 20, timeout: float = 60.0) -> dict[str, float]:
    """Ask a draw for the most probable next tokens.

    Returns:
        Log probability (nats) of each of the ``count`` most probable tokens, by its text.
    """
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": count}
    if endpoint.model:
        body["model"] = endpoint.model
    request = urllib.request.Request(
        f"{endpoint.url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")[:300]
        raise SystemExit(
            f"{endpoint.url} refused the request for {endpoint.model or 'its model'!r} (HTTP {error.code}): {text}\n"
            "Is the adapter loaded under this name? vLLM: --enable-lora --lora-modules draw-0=adapters/draw-0"
        ) from error
    except OSError as error:
        raise SystemExit(f"{endpoint.url} does not answer ({error}). Start the engine, or correct --url.") from error
    try:
        (top,) = answer["choices"][0]["logprobs"]["top_logprobs"]
    except (KeyError, TypeError, ValueError) as error:
        raise SystemExit(
            f"{endpoint.url} returned no log probabilities. Allow them in the engine: vLLM needs --max-logprobs "
            f"{count}, llama.cpp's server needs --logits_all true."
        ) from error
    return {token: float(value) for token, value in top.items()}


def average(draws: Sequence[Mapping[str, float]], weights: Sequence[float] | None = None) -> dict[str, Averaged]:
    """Average the probabilities of K draws, never their logits or log probabilities.

    Args:
        draws: Top log probabilities of each draw, by token.
        weights: Weight of each draw, which sum to 1; None for equal ones. See :func:`weights_after`.

    Returns:
        Bounds by token, for each token that a draw named, the largest lower bound first.
    """
    weights = [1 / len(draws)] * len(draws) if weights is None else weights
    known = [{token: math.exp(value) for token, value in draw.items()} for draw in draws]
    rest = [max(min(min(p.values()), 1 - sum(p.values())), 0.0) for p in known]  # largest value outside of the list
    found = {
        token: Averaged(
            sum(w * p.get(token, 0.0) for w, p in zip(weights, known, strict=True)),
            sum(w * p.get(token, outside) for w, p, outside in zip(weights, known, rest, strict=True)),
        )
        for token in dict.fromkeys(token for p in known for token in p)
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].low))


def weights_after(log_probs: Sequence[float]) -> list[float]:
    """Weigh the draws after some tokens: w_k is proportional to the product of p_k(token) over these tokens.

    A draw is one function for the whole text. So a draw that found the text so far improbable counts less for the next
    token. Equal weights would be the prediction of draws that change at each token.

    Args:
        log_probs: Sum of log p_k over the tokens so far, of each draw.
    """
    largest = max(log_probs)
    parts = [math.exp(value - largest) for value in log_probs]
    return [part / sum(parts) for part in parts]


def continue_text(
    endpoints: Sequence[Endpoint], prompt: str, *, max_tokens: int, count: int = 20
) -> list[tuple[str, Averaged]]:
    """Write the most probable token of the average, again and again.

    If a token is not in the list of a draw, the draw gets the largest probability that it can have.
    """
    log_probs, written = [0.0] * len(endpoints), []
    for _ in range(max_tokens):
        draws = [top_log_probs(endpoint, prompt, count=count) for endpoint in endpoints]
        token, bounds = next(iter(average(draws, weights_after(log_probs)).items()))
        written.append((token, bounds))
        prompt += token
        log_probs = [total + draw.get(token, min(draw.values())) for total, draw in zip(log_probs, draws, strict=True)]
    return written


def endpoints_of(urls: Sequence[str], names: Sequence[str]) -> list[Endpoint]:
    """Pair addresses and names: several names on one address, or one address per draw."""
    if len(urls) == 1:
        return [Endpoint(urls[0].rstrip("/"), name) for name in names or [""]]
    if names and len(names) != len(urls):
        raise SystemExit(f"{len(urls)} addresses and {len(names)} names: give one address, or one per name.")
    return [Endpoint(url.rstrip("/"), name) for url, name in zip(urls, names or [""] * len(urls), strict=True)]


def main() -> None:
    """Print the averaged probabilities of the next token, and a continuation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names of the adapters in the engine")
    parser.add_argument("--url", action="append", required=True, help="address of the engine, or one per draw")
    parser.add_argument("--prompt", default="The capital of France is", help="text to continue")
    parser.add_argument("--top", type=int, default=20, help="log probabilities to ask for, per draw")
    parser.add_argument("--tokens", type=int, default=5, help="tokens to write")
    args = parser.parse_args()
    endpoints = endpoints_of(args.url, args.names)
    draws = [top_log_probs(endpoint, args.prompt, count=args.top) for endpoint in endpoints]
    print(f"Next token after {args.prompt!r}, average of {len(draws)} draws:")
    for token, bounds in list(average(draws).items())[:5]:
        single = ", ".join(f"{math.exp(draw[token]):.3f}" if token in draw else "?" for draw in draws)
        print(f"  {token!r:12} {bounds.low:.4f} to {bounds.high:.4f}   draws: {single}")
    written = continue_text(endpoints, args.prompt, max_tokens=args.tokens, count=args.top)
    print("Continuation:", "".join(token for token, _ in written))


if __name__ == "__main__":
    main()
