"""Fine-tunes an LLM that knows what it does not know, in a few minutes on two CPU cores.

    python examples/quickstart.py                      # SmolLM2-135M on Reuters news; needs no network
    python examples/quickstart.py --data hf://allenai/openbookqa --test-split validation
    python examples/quickstart.py --data train.jsonl --test-data test.jsonl --ood-data other.jsonl

The script fine-tunes plain LoRA and ScalaBL on the same budget and prints one table. It writes pictures, the posterior
and an ArviZ file to runs/quickstart/. Rows of your own data look like
{"question": ..., "choices": [...], "answer": 0}.
"""

import argparse
import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pandas as pd
import torch
from _support.datasets import NEWS, R8_TOPICS, newsgroups, pick, reuters_r8
from _support.models import demo_llm, hub_llm, upper_blocks
from matplotlib import pyplot as plt

import scalabl_pyro as sp
from scalabl_pyro import metrics, plots
from scalabl_pyro.data import read_rows

matplotlib.use("Agg")


@dataclass(frozen=True)
class Score:
    """How well one posterior predicts.

    Attributes:
        row: Line of the table.
        inside: Prediction of the test rows.
        outside: Prediction of rows from another source, if there are any.
    """

    row: pd.Series
    inside: sp.Prediction
    outside: sp.Prediction | None


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="causal LM of the Hugging Face hub, or a local folder (default: SmolLM2-135M)")
    parser.add_argument(
        "--data", help="training rows: a JSONL file, or hf://owner/name of the hub (default: Reuters news)"
    )
    parser.add_argument("--test-data", help="test rows (default: the test split of --data)")
    parser.add_argument("--test-split", default="test", help="name of the test split on the hub")
    parser.add_argument("--ood-data", help="rows from another source, for out-of-distribution detection")
    parser.add_argument("--train-rows", type=int, default=200, help="number of training rows")
    parser.add_argument("--test-rows", type=int, default=160, help="number of test rows")
    parser.add_argument("--steps", type=int, default=100, help="training steps")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per step")
    parser.add_argument("--draws", type=int, default=10, help="posterior draws per prediction")
    parser.add_argument("--blocks", type=int, default=10, help="number of upper blocks to adapt (0: all)")
    parser.add_argument("--max-length", type=int, default=48, help="tokens per prompt; longer texts are cut")
    parser.add_argument("--loo-rows", type=int, default=40, help="training rows whose likelihood is stored for LOO")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="use a random model and few rows, to test the script")
    args = parser.parse_args()
    if args.tiny:
        args.train_rows, args.test_rows, args.steps, args.blocks = 16, 12, 4, 1
    return args


def load_model(args: argparse.Namespace):
    """Load the model of the demo, or any causal LM of the Hugging Face hub, and its tokenizer."""
    if args.tiny or args.model is None:
        return demo_llm(tiny=args.tiny)
    cuda = torch.cuda.is_available()
    llm, tokenizer = hub_llm(args.model, dtype=torch.bfloat16 if cuda else torch.float32)
    return llm.to("cuda" if cuda else "cpu"), tokenizer


def load_data(args: argparse.Namespace) -> tuple[list, list, list]:
    """Read training rows, test rows, and rows from another source."""
    if args.data is None:
        train = reuters_r8("train", count=args.train_rows, seed=args.seed)
        test = reuters_r8("test", count=args.test_rows, seed=args.seed)
        return train, test, newsgroups(count=args.test_rows, seed=args.seed)
    train = pick(read_rows(args.data), args.train_rows, args.seed)
    test = pick(read_rows(args.test_data or args.data, split=args.test_split), args.test_rows, args.seed)
    elsewhere = read_rows(args.ood_data, split=args.test_split) if args.ood_data else []
    return train, test, pick(elsewhere, args.test_rows, args.seed)


def make_task(args: argparse.Namespace, tokenizer) -> sp.MultipleChoice:
    """Make the task: news is answered with the word of a topic, other data with the letter of a choice."""
    if args.data is not None:
        return sp.MultipleChoice(tokenizer, max_length=args.max_length)
    words = list(R8_TOPICS.values())
    return sp.MultipleChoice(tokenizer, labels=words, template=NEWS, chat=False, max_length=args.max_length)


def score(name: str, result: sp.FitResult, test: list, ood: list, *, num_draws: int) -> Score:
    """Predict with the result of a fit, and compute its line of the table."""
    options = {"num_draws": num_draws, "seed": 0, "progress": True}
    inside = result.posterior.predict(test, **options)
    outside = result.posterior.predict(ood, **options) if ood else None
    row = inside.metrics().loc["value", ["accuracy", "nll", "ece", "brier"]].to_dict()
    row["ood_auroc"] = metrics.ood_auroc(inside.total, outside.total) if outside else float("nan")
    row["fit_s"] = result.history["seconds"].iloc[-1]
    row["predict_s"] = inside.seconds + (outside.seconds if outside else 0)
    return Score(pd.Series(row, name=name), inside, outside)


def draw_pictures(lora: Score, scalabl: Score, result: sp.FitResult, folder: Path) -> None:
    """Draw reliability, training, latents by layer, and uncertainty of the two sources."""
    ax = plots.reliability(lora.inside, label="LoRA", color=plots.WARM)
    save(plots.reliability(scalabl.inside, ax=ax, label="ScalaBL"), folder / "reliability.png")
    save(plots.history(result.history), folder / "elbo.png")
    save(plots.posterior_by_layer(result.posterior), folder / "posterior_by_layer.png")
    if scalabl.outside:
        _, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharex=True, sharey=True)
        for ax, (name, found) in zip(axes, {"LoRA": lora, "ScalaBL": scalabl}.items(), strict=True):
            plots.uncertainty_histogram(found.inside, found.outside, ax=ax)
            ax.set_title(f"{name}: {ax.get_title()}")
        axes[1].set_ylabel("")
        save(axes[0], folder / "uncertainty.png")


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
    train, test, ood = load_data(args)
    task = make_task(args, tokenizer)
    lora = {"layers_to_transform": upper_blocks(llm, args.blocks) if args.blocks else None}
    budget = {"num_steps": args.steps, "batch_size": args.batch_size, "seed": args.seed}
    print(f"Rows: {len(train)} for training, {len(test)} for test, {len(ood)} from another source.")
    print(f"Prompts have at most {args.max_length} tokens; longer texts are cut.")

    print("\nPlain LoRA (maximum likelihood)")
    plain = sp.baselines.mle(llm, task, train, lr=5e-3, lora=lora, **budget)  # its default is too slow for 100 steps
    lora_score = score("LoRA", plain, test, ood, num_draws=0)
    plain.posterior.blora().unload()

    print("\nScalaBL (a posterior over the bottleneck of each LoRA layer)")
    blora = sp.bayesian_lora(llm, **lora)
    print(f"{blora.num_parameters()} parameters")
    result = sp.fit(blora, task, train, **budget)
    mean_score = score("ScalaBL, mean", result, test, ood, num_draws=0)
    draw_score = score(f"ScalaBL, {args.draws} draws", result, test, ood, num_draws=args.draws)

    table = pd.DataFrame([lora_score.row, mean_score.row, draw_score.row])
    print(f"\n{table.round(3).to_string()}\n")

    args.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out / "table.csv")
    result.history.to_csv(args.out / "history.csv", index=False)
    draw_pictures(lora_score, draw_score, result, args.out)
    seen = result.posterior.predict(train[: args.loo_rows], num_draws=30, seed=0)  # LOO needs training rows
    result.posterior.to_arviz(num_draws=500, prediction=seen).to_netcdf(args.out / "posterior.nc")
    result.posterior.save_pretrained(args.out / "posterior")
    print(f"Pictures, posterior.nc and the saved posterior are in {args.out}/.")
    print(f"{time.perf_counter() - start:.0f} seconds in total.")


if __name__ == "__main__":
    main()
