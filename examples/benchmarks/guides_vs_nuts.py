"""How near is each guide to the true posterior? Every family against NUTS on the same p(s | y, A, B) of a real LLM.

    python examples/benchmarks/guides_vs_nuts.py             # SmolLM2-135M, two Reuters topics, 200 rows; wants a GPU
    python examples/benchmarks/guides_vs_nuts.py --tiny      # a random model of two blocks: runs in seconds

One mean-field fit learns the factors A and B. With them held fixed, each guide and NUTS infer s anew from the same 200
articles. Columns: ``mean_error``, root mean square of (mean - NUTS mean) / NUTS sd over the latents; ``sd_ratio``,
median of sd / NUTS sd, with its 5 and 95 % quantiles; ``prob_error``, mean absolute difference of the predicted
probability of a held-out article from that of NUTS; and the scores on held-out articles. The line "NUTS, other chains"
compares one half of the chains with the other: differences of that size are Monte Carlo noise.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sources

GUIDES = ["normal", "layer_covariance", "lowrank", "full_covariance", "flow", "svgd", "delta"]
TOPICS = ["earn", "acq"]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=3, help="adapt this many of the upper blocks")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--fit-steps", type=int, default=200, help="steps that learn the factors")
    parser.add_argument("--refit-steps", type=int, default=600, help="steps of each guide on the fixed factors")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--draws", type=int, default=1000, help="behind moments and k-hat")
    parser.add_argument("--guides", nargs="+", default=GUIDES, choices=GUIDES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/guides_vs_nuts"))
    parser.add_argument("--tiny", action="store_true", help="a random model and few rows, to try that it runs")
    args = parser.parse_args()
    if args.tiny:
        args.rows, args.test_rows, args.blocks, args.rank, args.fit_steps, args.refit_steps = 16, 8, 1, 2, 5, 5
        args.samples, args.warmup, args.chains, args.draws = 8, 8, 2, 50
    return args


def learn_factors(args: argparse.Namespace):
    """A mean-field posterior whose factors everything else shares, and the rows."""
    llm, tokenizer = sources.tiny_llm() if args.tiny else sources.smollm2()
    llm.to("cuda" if torch.cuda.is_available() else "cpu")
    train = sources.reuters_r8("train", count=args.rows, seed=args.seed, topics=TOPICS)
    test = sources.reuters_r8("test", count=args.test_rows, seed=args.seed, topics=TOPICS)
    task = sources.word_task(tokenizer, train, sources.NEWS, args.max_length)
    depth = llm.config.get_text_config().num_hidden_layers
    blora = sp.bayesian_lora(llm, r=args.rank, layers_to_transform=range(depth - args.blocks, depth))
    options = {"lr": 5e-3, "lr_A": 5e-3, "lr_scale": 5e-2, "init_scale": 0.3}  # as the results kept were made
    options |= {"num_steps": args.fit_steps, "seed": args.seed, "cache_prefix": True, "progress": False}
    return sp.fit(blora, task, train, **options).posterior, train, test


def against(posterior: sp.Posterior, reference: dict, train: list, test: list, args: argparse.Namespace) -> dict:
    """The line of one posterior."""
    s = posterior.sample(args.draws, seed=1).s.numpy()
    ratio = s.std(0) / reference["sd"]
    prediction = posterior.predict(test, num_draws=min(args.draws, 200), seed=1, batch_size=100)
    scores = prediction.metrics().loc["value"]
    weights = posterior.log_weights(train, num_draws=args.draws, seed=1, batch_size=100)
    return {
        "mean_error": float(np.sqrt(np.mean(((s.mean(0) - reference["mean"]) / reference["sd"]) ** 2))),
        "sd_ratio": float(np.median(ratio)),
        "sd_ratio_5": float(np.quantile(ratio, 0.05)),
        "sd_ratio_95": float(np.quantile(ratio, 0.95)),
        "prob_error": float(np.abs(prediction.probs - reference["probs"]).mean()),
        "nll": scores["nll"],
        "ece": scores["ece"],
        "epistemic": float(prediction.epistemic.mean()),
        "elbo": weights.elbo(),
        "pareto_k": weights.pareto_k()[0],
    }


def moments(posterior: sp.Posterior, test: list, draws: slice) -> dict:
    """Mean and sd of some of the draws of a chain, and what they predict."""
    s = posterior.guide.points("s").detach()[draws]
    part = replace(posterior, guide=sp.guides.EmpiricalGuide({"s": s}))
    prediction = part.predict(test, num_draws=min(len(s), 400), seed=1, batch_size=100)
    scores = prediction.metrics().loc["value"]
    epistemic = float(prediction.epistemic.mean())
    found = {"mean": s.mean(0).numpy(), "sd": s.std(0).numpy(), "probs": prediction.probs, "epistemic": epistemic}
    return found | {"nll": scores["nll"], "ece": scores["ece"]}


def main() -> None:
    """Run NUTS, then each guide, and print the table as it grows."""
    args = arguments()
    logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)
    args.out.mkdir(parents=True, exist_ok=True)
    base, train, test = learn_factors(args)
    start = time.perf_counter()
    nuts = sp.mcmc(
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
    seconds = time.perf_counter() - start
    found = {name: nuts.provenance[name] for name in ("r_hat", "ess", "divergences")}
    print(f"NUTS: {base.subspace.dim} latents, {seconds:.0f} s, {found}", flush=True)
    half = args.samples * (args.chains // 2)
    reference = moments(nuts, test, slice(None))
    one, other = moments(nuts, test, slice(0, half)), moments(nuts, test, slice(half, None))
    ratio = one["sd"] / other["sd"]
    rows = {
        "NUTS": {k: reference[k] for k in ("nll", "ece", "epistemic")} | {"seconds": seconds},
        "NUTS, other chains": {
            "mean_error": float(np.sqrt(np.mean(((one["mean"] - other["mean"]) / reference["sd"]) ** 2))),
            "sd_ratio": float(np.median(ratio)),
            "sd_ratio_5": float(np.quantile(ratio, 0.05)),
            "sd_ratio_95": float(np.quantile(ratio, 0.95)),
            "prob_error": float(np.abs(one["probs"] - other["probs"]).mean()),
        },
    }
    options = {"lr": 1e-2, "lr_scale": 3e-2, "init_scale": 0.3, "batch_size": 100}
    options |= {"cache_prefix": True, "progress": False}
    for guide in [*args.guides, "laplace"]:
        start = time.perf_counter()
        if guide == "laplace":
            mode = sp.refit(base, train, guide="delta", num_steps=args.refit_steps, seed=args.seed, **options).posterior
            posterior = sp.laplace(mode, train, newton_steps=3, batch_size=50)
        else:
            posterior = sp.refit(
                base, train, guide=guide, num_steps=args.refit_steps, seed=args.seed, **options
            ).posterior
        seconds = time.perf_counter() - start
        rows[guide] = against(posterior, reference, train, test, args) | {"seconds": seconds}
        table = pd.DataFrame.from_dict(rows, orient="index")
        table.to_csv(args.out / "table.csv")
        print(table.loc[[guide]].round(3).to_string(), flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    setting = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    record = {"setting": setting, "device": device, "latents": base.subspace.dim, "nuts": found, "table": rows}
    (args.out / "result.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"\n{table.round(3).to_string()}\n\nThe table and its setting are in {args.out}/.")


if __name__ == "__main__":
    main()
