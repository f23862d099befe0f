"""One training in several processes. Each process computes a part of every batch.

    torchrun --nproc_per_node 2 examples/distributed.py            # SmolLM2-135M on Reuters news, on 2 GPUs or the CPU
    accelerate launch --num_processes 2 examples/distributed.py    # the same
    torchrun --nproc_per_node 2 examples/distributed.py --check    # compare with one process
    python examples/distributed.py                                 # one process

``--random`` uses a random model of the same shape and made-up rows, so that no packages with data are needed.
``--tiny`` uses a very small random model.
"""

import argparse
import os
import time
from datetime import timedelta

import numpy as np
import torch
from _support.datasets import NEWS, reuters_r8, word_task
from _support.models import smollm2
from torch import distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

import scalabl_pyro as sp

#: Width, number of blocks, number of heads, and width of the MLP.
SHAPES = {"smollm2": (576, 30, 9, 1536), "tiny": (64, 2, 4, 128)}
WORDS = ["red", "green", "blue", "black", "the", "sky", "grass", "rose", "night", "is", "colour", "of", "?", ":"]


def start() -> torch.device:
    """Join the processes that torchrun or accelerate started, if any.

    Returns:
        The device of this process.
    """
    if "RANK" in os.environ:
        dist.init_process_group(timeout=timedelta(minutes=5))
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def random_model(shape: str):
    """Make a random causal LM, and a tokenizer that knows a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<unk>", *WORDS])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    width, blocks, heads, inner = SHAPES[shape]
    torch.manual_seed(0)  # Every process makes the same model.
    config = LlamaConfig(
        vocab_size=49_152 if shape == "smollm2" else 64,
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        intermediate_size=inner,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config), tokenizer


def made_up_rows(count: int, seed: int) -> list[dict]:
    """Make questions of different lengths. Their answer is a fixed color for each noun."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        which, fill = int(random.integers(4)), int(random.integers(1, 40))
        question = f"colour of {'the ' * fill}{WORDS[5 + which]} ?"
        rows.append({"question": question, "choices": WORDS[:4], "answer": which})
    return rows


def load(args: argparse.Namespace):
    """Load model, task, training rows and test rows."""
    if args.tiny or args.random:
        llm, tokenizer = random_model("tiny" if args.tiny else "smollm2")
        task = sp.MultipleChoice(tokenizer, labels=WORDS[:4], template="{question} :", chat=False)
        return llm, task, made_up_rows(args.rows, 0), made_up_rows(args.rows // 2, 1)
    llm, tokenizer = smollm2()
    train, test = (reuters_r8(part, count=args.rows, seed=0) for part in ("train", "test"))
    return llm, word_task(tokenizer, train, NEWS, 48), train, test


def run(args: argparse.Namespace, device: torch.device, **options):
    """Fit and predict.

    Args:
        args: Command line.
        device: Device of the model.
        **options: More options of ``fit``.

    Returns:
        Result of ``fit``, prediction, seconds per step, and seconds of the prediction.
    """
    llm, task, train, test = load(args)
    llm.to(device)
    blora = sp.bayesian_lora(llm)
    result = sp.fit(
        blora,
        task,
        train,
        num_steps=args.steps,
        batch_size=args.batch_size,  # rows of all processes together
        lr=5e-3,
        progress=False,
        **options,
    )
    began = time.perf_counter()
    prediction = result.posterior.predict(test, num_draws=args.draws)
    seconds = result.history["seconds"]
    first = len(seconds) // 3  # earlier steps warm up
    per_step = (seconds.iloc[-1] - seconds.iloc[first]) / max(len(seconds) - 1 - first, 1)
    return result, prediction, per_step, time.perf_counter() - began


def learned(posterior: sp.Posterior) -> torch.Tensor:
    """Collect everything that was learned in one vector."""
    tensors = [*posterior.guide.state_dict().values(), *(t for pair in posterior.factors for t in pair)]
    return torch.cat([t.detach().flatten().double().cpu() for t in tensors])


def check(args: argparse.Namespace, device: torch.device, size: int) -> None:
    """Print the difference between several processes and one, and the time of each."""
    eager = {"hardware": {"cuda_graph": False}}
    several = run(args, device, **eager)
    parts = {f"{size} processes": several}
    if device.type == "cuda" and size > 1:
        parts[f"{size} processes, CUDA graphs"] = run(args, device)
    if not dist.is_initialized() or dist.get_rank() == 0:
        with sp.distributed.single_process():
            parts["1 process"] = one = run(args, device, **eager)
            if device.type == "cuda":
                parts["1 process, CUDA graphs"] = run(args, device)
        for name, (_, _, per_step, seconds) in parts.items():
            print(f"{name}: {1000 * per_step:.1f} ms per step, {seconds:.2f} s for the prediction")
        (a, p, *_), (b, q, *_) = several, one
        print(f"largest difference of a parameter: {(learned(a.posterior) - learned(b.posterior)).abs().max():.2e}")
        print(f"largest difference of a loss:      {(a.history['loss'] - b.history['loss']).abs().max():.2e}")
        print(f"largest difference of a probability: {np.abs(p.probs - q.probs).max():.2e}")


def main() -> None:
    """Run the training, or the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200, help="number of training rows")
    parser.add_argument("--steps", type=int, default=60, help="training steps")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per step of all processes together")
    parser.add_argument("--draws", type=int, default=10, help="draws of the prediction")
    parser.add_argument("--out", help="folder of the saved posterior")
    parser.add_argument("--check", action="store_true", help="compare with one process")
    parser.add_argument("--random", action="store_true", help="use a random model with the shape of SmolLM2-135M")
    parser.add_argument("--tiny", action="store_true", help="use a very small random model and few rows")
    args = parser.parse_args()
    if args.tiny:
        args.rows, args.steps, args.draws = 24, 6, 3
    device = start()
    size = dist.get_world_size() if dist.is_initialized() else 1
    if args.check:
        check(args, device, size)
    else:
        result, prediction, per_step, _ = run(args, device)
        if not dist.is_initialized() or dist.get_rank() == 0:  # All processes hold the same; one writes.
            print(f"{size} processes: {1000 * per_step:.1f} ms per step")
            print(prediction.metrics().round(3).to_string())
            if args.out:
                result.posterior.save_pretrained(args.out)
    if dist.is_initialized():
        dist.barrier()  # No process leaves while another still works.
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
