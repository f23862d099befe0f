"""Which score tells that a written answer is wrong? SmolLM2 on quiz questions with short answers.

    python examples/benchmarks/quiz.py --seed 0 --out runs/quiz

Every method is trained on the same questions. Its learning rates are the library's defaults times a factor, which has
the lowest NLL on validation questions among ``FACTORS``; these come from the training questions. The answers to the
test questions are those that the maximum likelihood adapter writes greedily, so all scores judge the same texts. AUROC
is the probability that a wrong answer gets a higher score than a right one. The error at a coverage is the share of
wrong answers among the most certain ones. The length of the answer alone is the reference. The questions come from the
Debian package bsdgames. One JSON line per method and score goes to the folder ``--out``.
"""

import argparse
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import scalabl_pyro as sp
from scalabl_pyro.baselines.factor_posterior import FactorPosterior, as_function, plain_factors
from scalabl_pyro.data import encode
from scalabl_pyro.prediction.mixture import log_mean_exp
from scalabl_pyro.prediction.score import score

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from _support.datasets import pick
from _support.models import demo_llm, upper_blocks
from _support.quiz import QUIZ, is_right, quiz_rows

Scores = dict[str, np.ndarray]
Method = Callable[..., tuple[Any, Callable[[list[dict]], Scores]]]
#: Factors of the default learning rates that each method tries.
FACTORS = (0.25, 1.0, 4.0, 16.0)
#: Share of the training questions that choose the factor.
VALIDATION = 1 / 6
#: Shares of the answers, the most certain first, whose errors are counted.
COVERAGES = (0.25, 0.5, 0.75, 1.0)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quiz", type=Path, default=QUIZ, help="folder of the quiz files of bsdgames")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of the training")
    parser.add_argument("--train-rows", type=int, default=360, help="number of training questions")
    parser.add_argument("--test-rows", type=int, default=220, help="number of test questions")
    parser.add_argument("--steps", type=int, default=150, help="training steps per method")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per step")
    parser.add_argument("--blocks", type=int, default=12, help="number of upper blocks to adapt")
    parser.add_argument("--draws", type=int, default=8, help="draws per text")
    parser.add_argument("--tiny", action="store_true", help="use a random model and few rows, to test the script")
    parser.add_argument("--out", type=Path, default=Path("runs/quiz"), help="folder of the results")
    args = parser.parse_args()
    if args.tiny:
        args.train_rows, args.test_rows, args.steps, args.blocks, args.draws = 8, 8, 2, 1, 2
    return args


def main() -> None:
    """Train each method, and score the answers of maximum likelihood."""
    args = arguments()
    rows = pick(quiz_rows(args.quiz), args.train_rows + args.test_rows, args.seed)
    train, test = rows[: args.train_rows], rows[args.train_rows :]
    llm, tokenizer = demo_llm(tiny=args.tiny)
    task = sp.Completion(tokenizer, chat=False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "quiz")} | {"device": device}
    versions = {m.__name__: m.__version__ for m in (sp, torch, transformers)}
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"quiz-{args.seed}.jsonl").open("w") as file:

        def write(method: str, name: str, **numbers: Any) -> None:
            line = {"method": method, "score": name, "seed": args.seed, **numbers}
            file.write(json.dumps(line | {"settings": settings, "versions": versions}) + "\n")
            file.flush()
            print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else str(v) for k, v in line.items()))

        judged, wrong = [], np.zeros(0)
        for method, train_it in methods(args).items():
            factor, tried = best_factor(train_it, llm, task, train)
            start = time.perf_counter()
            posterior, found = train_it(llm, task, train, factor)
            seconds = time.perf_counter() - start
            if not judged:
                answers = posterior.generate(test, num_draws=1, decode="mean", max_new_tokens=10).answers
                judged = [
                    {"prompt": row["prompt"], "completion": text or " "}
                    for row, text in zip(test, answers, strict=True)
                ]
                wrong = np.array([not is_right(text, row) for text, row in zip(answers, test, strict=True)])
                write("all", "length", **judge(np.array([len(a) for a in answers], dtype=float), wrong))
            right = found(test)
            own = {"seconds": seconds, "nll_per_token": nll_per_token(right), "factor": factor, "validation": tried}
            if isinstance(posterior, sp.Posterior):
                texts = posterior.generate(test, num_draws=args.draws, decode="mixture", max_new_tokens=10).answers
                own["exact_match"] = float(np.mean([is_right(t, r) for t, r in zip(texts, test, strict=True)]))
            write(method, "test questions", **own)
            for name, values in found(judged).items():
                if name != "num_tokens":
                    write(method, name, **judge(-values if name.startswith("log_prob") else values, wrong))
            posterior.blora().unload()


def best_factor(train_it: Method, llm, task: sp.Completion, rows: list[dict]) -> tuple[float, dict[str, float]]:
    """Return the factor with the lowest NLL per token on the last rows, after training on the others, and all NLLs."""
    count = round(len(rows) * (1 - VALIDATION))
    tried: dict[str, float] = {}
    for factor in FACTORS:
        posterior, found = train_it(llm, task, rows[:count], factor)
        tried[str(factor)] = nll_per_token(found(rows[count:]))
        posterior.blora().unload()
    return min(FACTORS, key=lambda factor: tried[str(factor)]), tried


def nll_per_token(found: Scores) -> float:
    """Return the NLL of right answers, in nats per token."""
    return float(-found["log_prob"].sum() / found["num_tokens"].sum())


def judge(values: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    """Return how well a score finds the wrong answers: AUROC, area under the risk-coverage curve, and points of it."""
    answered, is_right = np.eye(2)[np.ones(len(wrong), dtype=int)], 1 - wrong.astype(int)  # class 1 is "right"
    coverage, risk = sp.metrics.risk_coverage(answered, is_right, uncertainty=values)
    at = {f"error_at_{c:.0%}": float(np.interp(c, coverage, risk)) for c in COVERAGES}
    aurc = sp.metrics.aurc(answered, is_right, uncertainty=values)
    return {"auroc": sp.metrics.auroc(values, wrong.astype(bool)), "aurc": float(aurc), **at}


def methods(args: argparse.Namespace) -> dict[str, Method]:
    """Return a function per method, which trains it and returns its posterior and a function that scores rows."""
    options = {"num_steps": args.steps, "batch_size": args.batch_size, "seed": args.seed, "progress": False}
    # The blocks below the adapted ones run once per row. On a GPU, captured steps are faster.
    options["hardware"] = {"cache_prefix": not torch.cuda.is_available()}

    def lora(llm) -> dict[str, Any]:
        return {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": upper_blocks(llm, args.blocks)}

    def ours(llm, task, train, factor):
        rates = {"lr": factor * default(sp.fit, "lr"), "lr_A": factor * default(sp.fit, "lr_A")}
        posterior = sp.fit(sp.bayesian_lora(llm, **lora(llm)), task, train, **rates, **options).posterior
        return posterior, lambda rows: by_tokens(posterior.score(rows, num_draws=args.draws))

    def point(llm, task, train, factor):
        rate = factor * default(sp.baselines.mle, "lr")
        posterior = sp.baselines.mle(llm, task, train, lora=lora(llm), lr=rate, **options).posterior
        return posterior, lambda rows: by_tokens(posterior.score(rows, num_draws=0))

    def baseline(function, **own):
        def run(llm, task, train, factor):
            rate = factor * default(function, "lr")
            posterior = function(llm, task, train, lora=lora(llm), lr=rate, **own, **options).posterior
            return posterior, lambda rows: by_draws(posterior, rows, args)

        return run

    return {
        "maximum likelihood": point,
        "ScalaBL": ours,
        "deep ensemble": baseline(sp.baselines.deep_ensemble, num_members=3),
        "MC dropout": baseline(sp.baselines.mc_dropout),
        "BLoB": baseline(sp.baselines.blob),
    }


def default(function: Callable, name: str) -> float:
    """Return the default of a function's argument."""
    return inspect.signature(function).parameters[name].default


def by_tokens(scored: Any) -> Scores:
    """Return the scores of texts that come from the probabilities of whole vocabularies."""
    frame = scored.to_frame()
    names = ["num_tokens", "log_prob", "log_prob_per_token", "total_per_token"]
    names += ["epistemic", "epistemic_per_token"] if scored.num_draws else []
    found = {name: frame[name].to_numpy(dtype=float) for name in names}
    return found | (disagreement(scored.log_probs, found["num_tokens"]) if scored.num_draws else {})


def by_draws(posterior: Any, rows: list[dict], args: argparse.Namespace) -> Scores:
    """Return the scores of texts that come from their probabilities under each draw of a baseline."""
    examples = encode(rows, posterior.task.encode, need_target=True)
    scored = [score(llm, posterior.task, s, examples, batch_size=16) for llm, s in functions(posterior, args)]
    log_probs = np.concatenate([one.log_probs for one in scored])
    count = scored[0].num_tokens.astype(float)
    mixture = log_mean_exp(log_probs)
    found = {"num_tokens": count, "log_prob": mixture, "log_prob_per_token": mixture / count}
    return found | disagreement(log_probs, count)


def disagreement(log_probs: np.ndarray, num_tokens: np.ndarray) -> Scores:
    """Return log mean p - mean log p over the draws per text, which is 0 where all draws agree; log_probs (S, N)."""
    gap = log_mean_exp(log_probs) - log_probs.mean(axis=0)
    return {"disagreement": gap, "disagreement_per_token": gap / num_tokens}


def functions(posterior: Any, args: argparse.Namespace) -> Iterator[tuple[Any, torch.Tensor]]:
    """Yield the LLM and its latents (1, D) for each draw of a baseline."""
    if isinstance(posterior, FactorPosterior):
        draws = posterior.noise.draws(plain_factors(posterior.center), torch.Generator().manual_seed(0))
        for _ in range(args.draws):
            llm, s = as_function(posterior.center, next(draws))
            yield llm, s.unsqueeze(0)
    else:
        for member in posterior.members:
            yield member.llm(), member.mean().unsqueeze(0)


if __name__ == "__main__":
    main()
