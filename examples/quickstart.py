"""An LLM that knows what it does not know, in a few minutes on two CPU cores.

    python examples/quickstart.py                      # SmolLM2-135M on Reuters news; needs no network
    python examples/quickstart.py --model Qwen/Qwen2.5-0.5B-Instruct --data allenai/openbookqa --test-split validation
    python examples/quickstart.py --data train.jsonl --test-data test.jsonl --ood-data other.jsonl

It fine-tunes plain LoRA and ScalaBL on the same budget, prints one table, and leaves pictures, the posterior and an
ArviZ file under runs/quickstart/. Rows of your own data look like {"question": ..., "choices": [...], "answer": 0}.
"""

import argparse
import logging
import time
import warnings
from pathlib import Path

import matplotlib
import pandas as pd
import sources
import torch
from matplotlib import pyplot as plt

import scalabl_pyro as sp
from scalabl_pyro import metrics, plots
from scalabl_pyro.data import read_rows

matplotlib.use("Agg")


def load_model(name: str | None, *, tiny: bool):
    """The model of the demo, or any causal LM of the Hugging Face hub."""
    if tiny:
        return sources.tiny_llm()
    if name is None:
        return sources.smollm2()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), tokenizer


def load_data(args: argparse.Namespace) -> tuple[list, list, list]:
    """Rows to train on, to test on, and from elsewhere."""
    if args.data is None:
        train = sources.reuters_r8("train", count=args.train_rows, seed=args.seed)
        test = sources.reuters_r8("test", count=args.test_rows, seed=args.seed)
        return train, test, sources.newsgroups(count=args.test_rows, seed=args.seed)
    train = sources.pick(read_rows(args.data), args.train_rows, args.seed)
    test = sources.pick(read_rows(args.test_data or args.data, split=args.test_split), args.test_rows, args.seed)
    elsewhere = read_rows(args.ood_data, split=args.test_split) if args.ood_data else []
    return train, test, sources.pick(elsewhere, args.test_rows, args.seed)


def make_task(args: argparse.Namespace, tokenizer) -> sp.MultipleChoice:
    """News is asked for by one word; other data by the letter of a choice."""
    if args.data is not None:
        return sp.MultipleChoice(tokenizer, max_length=args.max_length)
    words = list(sources.R8_TOPICS.values())
    return sp.MultipleChoice(tokenizer, labels=words, template=sources.NEWS, chat=False, max_length=args.max_length)


def score(name: str, posterior: sp.Posterior, test: list, ood: list, *, num_draws: int, seconds: float) -> tuple:
    """A line of the table, and the two predictions behind it."""
    options = {"num_draws": num_draws, "seed": 0, "progress": True}
    inside = posterior.predict(test, **options)
    outside = posterior.predict(ood, **options) if ood else None
    row = inside.metrics().loc["value", ["accuracy", "nll", "ece", "brier"]].to_dict()
    row["ood_auroc"] = metrics.ood_auroc(inside.total, outside.total) if outside else float("nan")
    row |= {"fit_s": seconds, "predict_s": inside.seconds + (outside.seconds if outside else 0)}
    return pd.Series(row, name=name), inside, outside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal LM of the Hugging Face hub, or a local folder")
    parser.add_argument("--data", help="a data set of the hub, or a JSONL file")
    parser.add_argument("--test-data", help="rows to test on, if not the test split of --data")
    parser.add_argument("--test-split", default="test")
    parser.add_argument("--ood-data", help="rows from elsewhere, for out-of-distribution detection")
    parser.add_argument("--train-rows", type=int, default=200)
    parser.add_argument("--test-rows", type=int, default=160)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--blocks", type=int, default=10, help="adapt this many of the upper blocks (0: all)")
    parser.add_argument("--max-length", type=int, default=48, help="tokens of a prompt; longer texts are cut")
    parser.add_argument("--loo-rows", type=int, default=40, help="training rows whose likelihood is kept for LOO")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--tiny", action="store_true", help="a random model and few rows, to try that it runs")
    args = parser.parse_args()
    if args.tiny:
        args.train_rows, args.test_rows, args.steps, args.blocks = 16, 12, 4, 1
    start = time.perf_counter()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)  # that long articles are cut is said once, below

    print("Loading model and data ...")
    llm, tokenizer = load_model(args.model, tiny=args.tiny)
    llm.to("cuda" if torch.cuda.is_available() else "cpu")
    train, test, ood = load_data(args)
    task = make_task(args, tokenizer)
    depth = llm.config.get_text_config().num_hidden_layers
    lora = {"layers_to_transform": range(depth - args.blocks, depth) if args.blocks else None}
    budget = {"num_steps": args.steps, "batch_size": args.batch_size, "seed": args.seed}
    print(f"Rows: {len(train)} to train on, {len(test)} to test on, {len(ood)} from elsewhere.")
    print(f"Prompts have at most {args.max_length} tokens; longer texts are cut.")

    print("\nPlain LoRA (maximum likelihood)")
    plain = sp.baselines.mle(llm, task, train, lr=5e-3, lora=lora, **budget)  # its default is too slow for 100 steps
    seconds = plain.history["seconds"].iloc[-1]
    lora_row, lora_inside, lora_outside = score("LoRA", plain.posterior, test, ood, num_draws=0, seconds=seconds)
    plain.posterior.blora().unload()

    print("\nScalaBL (a posterior over the bottleneck of each LoRA layer)")
    blora = sp.bayesian_lora(llm, **lora)
    print(f"{blora.num_parameters()} parameters")
    result = sp.fit(blora, task, train, **budget)
    posterior, history = result.posterior, result.history
    seconds = history["seconds"].iloc[-1]
    mean_row, *_ = score("ScalaBL, mean", posterior, test, ood, num_draws=0, seconds=seconds)
    name = f"ScalaBL, {args.draws} draws"
    draw_row, inside, outside = score(name, posterior, test, ood, num_draws=args.draws, seconds=seconds)

    table = pd.DataFrame([lora_row, mean_row, draw_row])
    print(f"\n{table.round(3).to_string()}\n")

    args.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out / "table.csv")
    history.to_csv(args.out / "history.csv", index=False)
    ax = plots.reliability(lora_inside, label="LoRA", color=plots.WARM)
    save(plots.reliability(inside, ax=ax, label="ScalaBL"), args.out / "reliability.png")
    save(plots.history(history), args.out / "elbo.png")
    save(plots.posterior_by_layer(posterior), args.out / "posterior_by_layer.png")
    if outside:
        _, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharex=True, sharey=True)
        plots.uncertainty_histogram(lora_inside, lora_outside, ax=axes[0])
        plots.uncertainty_histogram(inside, outside, ax=axes[1])
        axes[0].set_title("LoRA: " + axes[0].get_title())
        axes[1].set_title("ScalaBL: " + axes[1].get_title())
        axes[1].set_ylabel("")
        save(axes[0], args.out / "uncertainty.png")
    seen = posterior.predict(train[: args.loo_rows], num_draws=30, seed=0)  # LOO belongs to training rows
    posterior.to_arviz(num_draws=500, prediction=seen).to_netcdf(args.out / "posterior.nc")
    posterior.save_pretrained(args.out / "posterior")
    print(f"Pictures, posterior.nc and the saved posterior are in {args.out}/.")
    print(f"{time.perf_counter() - start:.0f} seconds in all.")


def save(ax: plt.Axes, path: Path) -> None:
    """Write the figure of ``ax``."""
    ax.figure.savefig(path, dpi=150)
    plt.close(ax.figure)


if __name__ == "__main__":
    main()
