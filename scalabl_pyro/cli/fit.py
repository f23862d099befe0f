"""The command ``fit``: a table with answers becomes a saved posterior."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from ..data.rows import read_rows
from ..lora.targets import text_config
from ..model.bayesian_lora import bayesian_lora
from ..tasks.base import Task
from ..tasks.from_data import from_data
from ..tasks.text import TextTask
from ..tasks.windows import Rule
from ..training.fit import fit as fit_posterior
from .fitted import tell
from .held_out import check_options, hold_out, in_words_of_the_command
from .loading import device_of, reading
from .tables import WRITE, check_name, write_table


def fit(
    data: str,
    model: str,
    out: Path,
    text: str | None,
    label: str | None,
    max_length: int | None,
    windows: Rule | None,
    overlap: int | None,
    num_steps: int,
    batch_size: int,
    rank: int,
    lr: float | None,
    lr_A: float | None,
    seed: int,
    eval_data: str | None,
    eval_every: int | None,
    patience: int | None,
    history: Path | None,
    device: str,
    as_json: bool,
) -> int:
    """Guess the task of a table, train, and save the posterior.

    Args:
        data: File of the rows.
        model: Base model.
        out: New directory of the posterior.
        text: Column of the text; None guesses it.
        label: Column of the answer; None guesses it.
        max_length: Longest text in tokens; None cuts nothing.
        windows: Rule that combines the windows of a longer text; None reads no windows.
        overlap: Tokens that a window shares with the one before it; None is 0.
        num_steps: Number of optimizer steps.
        batch_size: Rows per step.
        rank: Rank of the LoRA layers.
        lr: Learning rate of B; None is the default of ``fit``.
        lr_A: Learning rate of A and of new heads; None is the default of ``fit``.
        seed: Seed of the training, and of the choice of held-out rows.
        eval_data: Table of held-out rows, or the share of the rows to hold out; None scores none.
        eval_every: Number of steps between two evaluations; None is a tenth of the steps.
        patience: Number of evaluations without a lower NLL after which the training ends; None does not end it.
        history: File for the numbers of each step; None writes none.
        device: Device of the model.
        as_json: Whether to print JSON.

    Returns:
        0.

    Raises:
        FileExistsError: ``out`` exists and is not empty.
        ValueError: The task cannot be guessed, the model cannot be read, or the held-out rows do not fit the table.
    """
    check_name(history, WRITE, option="--history")
    check_options(eval_data, eval_every=eval_every, patience=patience)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"--out {out} exists and is not empty: choose a new directory.")
    place = device_of(device)
    rows = read_rows(data)
    with reading(model):
        tokenizer, shape = _tokenizer(model), _shape(model)
    named: dict[str, Any] = {"text": text, "target": label, "max_length": max_length}
    named |= {"windows": windows, "overlap": overlap}
    task = from_data(tokenizer, rows, llm=shape, **{name: value for name, value in named.items() if value is not None})
    held_out = hold_out(rows, eval_data, task, data=data, seed=seed)
    with reading(model):
        llm = _llm(model, task, tokenizer)
    blora = bayesian_lora(llm.to(place), r=rank, seed=seed)
    options: Any = {"num_steps": num_steps, "batch_size": batch_size, "seed": seed, "progress": not as_json}
    options |= {name: rate for name, rate in {"lr": lr, "lr_A": lr_A}.items() if rate is not None}
    if held_out.rows is not None:
        options |= {"eval_data": held_out.rows, "eval_every": eval_every, "patience": patience}
    with in_words_of_the_command(held_out, task, data=data, given=eval_data):
        result = fit_posterior(blora, task, held_out.train, **options)
    result.posterior.save_pretrained(out)
    if history is not None:
        write_table(result.history, history)
    tell(result, task, held_out, out=out, history=history, as_json=as_json)
    return 0


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _shape(model: str) -> nn.Module:
    """Return the model without its weights. It says whether it is a causal LM."""
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    names = getattr(config, "architectures", None) or [""]
    kind = AutoModelForSequenceClassification if "Classification" in names[0] else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config)


def _llm(model: str, task: Task, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """Load the model with the head that the task reads."""
    if not isinstance(task, TextTask):
        return AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=False)
    is_one = task.classes is None or type(task).__name__ == "OrderedClassification"
    outputs = 1 if is_one else len(task.classes or ())
    llm = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=outputs, dtype="auto", trust_remote_code=False
    )
    text_config(llm).pad_token_id = tokenizer.pad_token_id
    return llm
