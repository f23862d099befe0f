"""Fine-tunes an LLM that says how sure each of its answers is, in minutes on two CPU cores.

    python examples/quickstart.py                      # SmolLM2-135M on movie reviews; needs no network
    python examples/quickstart.py --data hf://allenai/openbookqa --test-split validation
    python examples/quickstart.py --data train.jsonl --test-data test.jsonl --ood-data other.jsonl

The script fine-tunes plain LoRA and ScalaBL on the same rows and steps, each with the library's default rates, and
prints a table. It writes pictures, the posterior and an ArviZ file to runs/quickstart/. Rows of your own data look like
{"question": ..., "choices": [...], "answer": 0}.
"""

import argparse
import logging
import time
import warnings
from pathlib import Path

import matplotlib
import pandas as pd
import torch
from _support.datasets import pick, word_task
from _support.demo_report import STORED, Run, compare, draw, store, stored_runs
from _support.models import demo_llm, hub_llm, upper_blocks
from _support.opinions import OPINION, movie_reviews, neutral_sentences, product_reviews
from matplotlib import pyplot as plt

import scalabl_pyro as sp
from scalabl_pyro import plots
from scalabl_pyro.data import read_rows

matplotlib.use("Agg")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="causal LM of the Hugging Face hub, or a local folder (default: SmolLM2-135M)")
    parser.add_argument(
        "--data", help="training rows: a JSONL file, or hf://owner/name of the hub (default: movie reviews)"
    )
    parser.add_argument("--test-data", help="test rows (default: the test split of --data)")
    parser.add_argument("--test-split", default="test", help="name of the test split on the hub")
    parser.add_argument("--ood-data", help="rows from another source, for out-of-distribution detection")
    parser.add_argument("--train-rows", type=int, default=100, help="number of training rows")
    parser.add_argument("--test-rows", type=int, default=240, help="number of test rows")
    parser.add_argument("--other-rows", type=int, default=100, help="number of rows of each other source")
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    parser.add_argument("--batch-size", type=int, default=4, help="rows per step")
    parser.add_argument("--draws", type=int, default=4, help="posterior draws per prediction, in mirrored pairs")
    parser.add_argument("--blocks", type=int, default=0, help="number of upper blocks to adapt (0: all)")
    parser.add_argument("--max-length", type=int, default=40, help="tokens per prompt; longer texts are cut")
    parser.add_argument("--loo-rows", type=int, default=24, help="training rows whose likelihood is stored for LOO")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows and of the training")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="use a random model and few rows, to test the script")
    parser.add_argument("--store", action="store_true", help=f"also keep this run in {STORED.name}/ for later tables")
    args = parser.parse_args()
    if args.tiny:
        args.train_rows, args.test_rows, args.other_rows, args.steps, args.blocks = 16, 12, 8, 4, 1
    return args


def load_model(args: argparse.Namespace):
    """Load the model of the demo, or any causal LM of the Hugging Face hub, and its tokenizer."""
    if args.tiny or args.model is None:
        return demo_llm(tiny=args.tiny)
    cuda = torch.cuda.is_available()
    llm, tokenizer = hub_llm(args.model, dtype=torch.bfloat16 if cuda else torch.float32)
    return llm.to("cuda" if cuda else "cpu"), tokenizer


def load_data(args: argparse.Namespace) -> tuple[list[dict], dict[str, list[dict]]]:
    """Read training rows, and by name the rows to predict; the first of these are from the training rows' source."""
    if args.data is None:
        train = movie_reviews("train", count=args.train_rows, seed=args.seed)
        test = movie_reviews("test", count=args.test_rows, seed=args.seed)
        products = product_reviews(count=args.other_rows, seed=args.seed)
        neutral = neutral_sentences(count=args.other_rows, seed=args.seed)
        return train, {"movie reviews": test, "product reviews": products, "neutral sentences": neutral}
    train = pick(read_rows(args.data), args.train_rows, args.seed)
    test = pick(read_rows(args.test_data or args.data, split=args.test_split), args.test_rows, args.seed)
    if not args.ood_data:
        return train, {"test rows": test}
    elsewhere = pick(read_rows(args.ood_data, split=args.test_split), args.other_rows, args.seed)
    return train, {"test rows": test, "other rows": elsewhere}


def make_task(args: argparse.Namespace, tokenizer, train: list[dict]) -> sp.MultipleChoice:
    """Make the task: a review is answered with a word, other data with the letter of a choice."""
    if args.data is not None:
        return sp.MultipleChoice(tokenizer, max_length=args.max_length)
    return word_task(tokenizer, train, OPINION, args.max_length)


def predict(result: sp.FitResult, sources: dict[str, list[dict]], *, num_draws: int, prefix: bool) -> Run:
    """Predict the rows of all sources with the result of a fit."""
    options = {"num_draws": num_draws, "design": "antithetic", "seed": 0, "cache_prefix": prefix, "progress": True}
    found = {name: result.posterior.predict(rows, **options) for name, rows in sources.items()}
    return Run(found, float(result.history["seconds"].iloc[-1]))


def save(ax: plt.Axes, path: Path) -> None:
    """Write the figure of ``ax``."""
    ax.figure.savefig(path, dpi=150)
    plt.close(ax.figure)


def main() -> None:
    """Fit LoRA and ScalaBL, print the table, and write the results."""
    args, start = arguments(), time.perf_counter()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)  # no warning about texts that are cut: printed below

    print("Loading model and data ...")
    llm, tokenizer = load_model(args)
    train, sources = load_data(args)
    task = make_task(args, tokenizer, train)
    lora = {"layers_to_transform": upper_blocks(llm, args.blocks) if args.blocks else None}
    prefix = args.blocks > 0  # the blocks below the adapted ones run once per row
    budget = {"num_steps": args.steps, "batch_size": args.batch_size, "seed": args.seed}
    budget["hardware"] = {"cache_prefix": prefix}
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in sources.items())
    print(f"{len(train)} rows for training; to predict: {counts}.")
    print(f"Prompts have at most {args.max_length} tokens; longer texts are cut.")

    print("\nPlain LoRA (maximum likelihood)")
    plain = sp.baselines.mle(llm, task, train, lora=lora, **budget)
    runs = {"LoRA": predict(plain, sources, num_draws=0, prefix=prefix)}
    plain.posterior.blora().unload()

    print("\nScalaBL (a posterior over a random vector in the middle of each LoRA layer)")
    blora = sp.bayesian_lora(llm, **lora)
    size = blora.num_parameters()
    print(f"Parameters: {size['lora']:,} of LoRA, {size['variational']:,} of the posterior.")
    result = sp.fit(blora, task, train, **budget)
    runs["ScalaBL, mean"] = predict(result, sources, num_draws=0, prefix=prefix)
    runs[f"ScalaBL, {args.draws} draws"] = predict(result, sources, num_draws=args.draws, prefix=prefix)

    if args.store:
        store(args, runs)
    earlier = stored_runs(args)
    args.out.mkdir(parents=True, exist_ok=True)
    tables = compare(runs, earlier)
    for name, table in tables.items():
        print(f"\n{name}\n{table.to_string()}")
    pd.concat(tables).to_csv(args.out / "tables.csv")
    draw(runs, earlier, args.out / "demo.png")
    save(plots.history(result.history), args.out / "elbo.png")
    save(plots.posterior_by_layer(result.posterior), args.out / "posterior_by_layer.png")

    result.history.to_csv(args.out / "history.csv", index=False)
    seen = result.posterior.predict(train[: args.loo_rows], num_draws=20, seed=0)  # LOO needs training rows
    result.posterior.to_arviz(num_draws=500, prediction=seen).to_netcdf(args.out / "posterior.nc")
    result.posterior.save_pretrained(args.out / "posterior")
    print(f"Pictures, posterior.nc and the saved posterior are in {args.out}/.")
    print(f"{time.perf_counter() - start:.0f} seconds in total.")


if __name__ == "__main__":
    main()
