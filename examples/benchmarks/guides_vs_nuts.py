"""Measures how close each guide is to the true posterior: all guides and NUTS on the same p(s | y, A, B) of a real LLM.

    python examples/benchmarks/guides_vs_nuts.py             # SmolLM2-135M, two Reuters topics, 200 rows; use a GPU
    python examples/benchmarks/guides_vs_nuts.py --tiny      # a random model with two blocks: seconds

One mean-field fit learns the factors A and B. They are then held fixed, and each guide and NUTS infer s from the same
200 articles. Columns of the table:

    mean_error   root mean square of (mean - NUTS mean) / NUTS sd over the latents
    sd_ratio     median of sd / NUTS sd over the latents; sd_ratio_5 and sd_ratio_95 are the 5 and 95 % quantiles
    prob_error   mean absolute difference from NUTS of the predicted probabilities of test articles
    nll, ece, epistemic, elbo, pareto_k, seconds

The line "NUTS, other chains" compares one half of the chains with the other half. Differences of that size are Monte
Carlo noise.
"""

import argparse
import json
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import scalabl_pyro as sp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes _support importable
from _support.datasets import NEWS, reuters_r8, word_task
from _support.models import demo_llm, upper_blocks

GUIDES = ["normal", "layer_covariance", "lowrank", "full_covariance", "flow", "svgd", "delta"]
TOPICS = ["earn", "acq"]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200, help="training articles")
    parser.add_argument("--test-rows", type=int, default=200, help="test articles")
    parser.add_argument("--blocks", type=int, default=3, help="number of upper blocks to adapt")
    parser.add_argument("--rank", type=int, default=8, help="rank of LoRA")
    parser.add_argument("--max-length", type=int, default=48, help="tokens per prompt; longer texts are cut")
    parser.add_argument("--fit-steps", type=int, default=200, help="training steps of the factors")
    parser.add_argument("--refit-steps", type=int, default=600, help="training steps of each guide")
    parser.add_argument("--samples", type=int, default=300, help="samples per chain of NUTS")
    parser.add_argument("--warmup", type=int, default=200, help="warm-up steps per chain of NUTS")
    parser.add_argument("--chains", type=int, default=4, help="number of chains of NUTS")
    parser.add_argument("--draws", type=int, default=1000, help="number of draws for moments and Pareto k")
    parser.add_argument("--guides", nargs="+", default=GUIDES, choices=GUIDES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/guides_vs_nuts"), help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="use a random model and few rows, to test the script")
    args = parser.parse_args()
    if args.tiny:
        args.rows, args.test_rows, args.blocks, args.rank, args.fit_steps, args.refit_steps = 16, 8, 1, 2, 5, 5
        args.samples, args.warmup, args.chains, args.draws = 8, 8, 2, 50
    return args


def learn_factors(args: argparse.Namespace):
    """Fit the mean-field posterior whose factors all others share.

    Returns:
        The posterior, the training rows and the test rows.
    """
    llm, tokenizer = demo_llm(tiny=args.tiny)
    train = reuters_r8("train", count=args.rows, seed=args.seed, topics=TOPICS)
    test = reuters_r8("test", count=args.test_rows, seed=args.seed, topics=TOPICS)
    task = word_task(tokenizer, train, NEWS, args.max_length)
    blora = sp.bayesian_lora(llm, r=args.rank, layers_to_transform=upper_blocks(llm, args.blocks))
    # The stored results were made with these options.
    options = {"lr": 5e-3, "lr_A": 5e-3, "optimizer": {"lr_scale": 5e-2}, "init_scale": 0.3}
    options |= {"num_steps": args.fit_steps, "seed": args.seed, "hardware": {"cache_prefix": True}, "progress": False}
    return sp.fit(blora, task, train, **options).posterior, train, test


def against(posterior: sp.Posterior, reference: dict, train: list, test: list, args: argparse.Namespace) -> dict:
    """Compute the line of one posterior.

    Args:
        posterior: Posterior to compare.
        reference: Moments and probabilities of NUTS, from :func:`moments`.
        train: Training rows, for the ELBO and Pareto k.
        test: Test rows.
        args: Command line.
    """
    s = posterior.sample(args.draws, seed=1).s.numpy()
    prediction = posterior.predict(test, num_draws=min(args.draws, 200), seed=1, batch_size=100)
    scores = prediction.metrics().loc["value"]
    weights = posterior.log_weights(train, num_draws=args.draws, seed=1, batch_size=100)
    found = {"mean": s.mean(0), "sd": s.std(0), "probs": prediction.probs}
    return distances(found, reference, unit=reference["sd"]) | {
        "nll": scores["nll"],
        "ece": scores["ece"],
        "epistemic": float(prediction.epistemic.mean()),
        "elbo": weights.elbo(),
        "pareto_k": weights.pareto_k()[0],
    }


def distances(one: dict, other: dict, *, unit: np.ndarray) -> dict[str, float]:
    """Compare two sets of moments and probabilities; means are compared in units of ``unit``, one per latent."""
    ratio = one["sd"] / other["sd"]
    return {
        "mean_error": float(np.sqrt(np.mean(((one["mean"] - other["mean"]) / unit) ** 2))),
        "sd_ratio": float(np.median(ratio)),
        "sd_ratio_5": float(np.quantile(ratio, 0.05)),
        "sd_ratio_95": float(np.quantile(ratio, 0.95)),
        "prob_error": float(np.abs(one["probs"] - other["probs"]).mean()),
    }


def moments(posterior: sp.Posterior, test: list, draws: slice) -> dict:
    """Compute mean and standard deviation of some draws of a chain, and what these draws predict."""
    s = posterior.guide.points("s").detach()[draws]
    part = replace(posterior, guide=sp.guides.EmpiricalGuide({"s": s}))
    prediction = part.predict(test, num_draws=min(len(s), 400), seed=1, batch_size=100)
    scores = prediction.metrics().loc["value"]
    epistemic = float(prediction.epistemic.mean())
    found = {"mean": s.mean(0).numpy(), "sd": s.std(0).numpy(), "probs": prediction.probs, "epistemic": epistemic}
    return found | {"nll": scores["nll"], "ece": scores["ece"]}


def run_nuts(base: sp.Posterior, train: list, args: argparse.Namespace) -> sp.Posterior:
    """Sample the posterior of s on the factors of ``base``."""
    return sp.mcmc(
        base,
        train,
        num_samples=args.samples,
        warmup_steps=args.warmup,
        num_chains=args.chains,
        batch_size=args.rows,
        max_tree_depth=3 if args.tiny else 6,
        seed=args.seed,
        progress=False,
    )


def infer(guide: str, base: sp.Posterior, train: list, args: argparse.Namespace) -> sp.Posterior:
    """Fit a guide, or the Laplace approximation, on the factors of ``base``."""
    options = {
        "lr": 1e-2,
        "optimizer": {"lr_scale": 3e-2},
        "init_scale": 0.3,
        "batch_size": 100,
        "num_steps": args.refit_steps,
    }
    options |= {"seed": args.seed, "hardware": {"cache_prefix": True}, "progress": False}
    if guide == "laplace":
        mode = sp.refit(base, train, guide="delta", **options).posterior
        return sp.laplace(mode, train, newton_steps=3, batch_size=50)
    return sp.refit(base, train, guide=guide, **options).posterior


def main() -> None:
    """Run NUTS, then each guide, and print the table as it grows."""
    args = arguments()
    logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)
    args.out.mkdir(parents=True, exist_ok=True)
    base, train, test = learn_factors(args)
    start = time.perf_counter()
    nuts = run_nuts(base, train, args)
    seconds = time.perf_counter() - start
    found = {name: nuts.provenance[name] for name in ("r_hat", "ess", "divergences")}
    print(f"NUTS: {base.subspace.dim} latents, {seconds:.0f} s, {found}", flush=True)
    half = args.samples * (args.chains // 2)
    reference = moments(nuts, test, slice(None))
    one, other = moments(nuts, test, slice(0, half)), moments(nuts, test, slice(half, None))
    rows = {
        "NUTS": {k: reference[k] for k in ("nll", "ece", "epistemic")} | {"seconds": seconds},
        "NUTS, other chains": distances(one, other, unit=reference["sd"]),
    }
    for guide in [*args.guides, "laplace"]:
        start = time.perf_counter()
        posterior = infer(guide, base, train, args)
        seconds = time.perf_counter() - start
        rows[guide] = against(posterior, reference, train, test, args) | {"seconds": seconds}
        table = pd.DataFrame.from_dict(rows, orient="index")
        table.to_csv(args.out / "table.csv")
        print(table.loc[[guide]].round(3).to_string(), flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    setting = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    record = {"setting": setting, "device": device, "latents": base.subspace.dim, "nuts": found, "table": rows}
    (args.out / "result.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"\n{table.round(3).to_string()}\n\nThe table and its settings are in {args.out}/.")


if __name__ == "__main__":
    main()
