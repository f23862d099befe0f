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
from ..training.fit import fit as fit_posterior
from .loading import device_of, reading
from .terminal import say, say_json


def fit(
    data: str,
    model: str,
    out: Path,
    text: str | None,
    label: str | None,
    max_length: int | None,
    num_steps: int,
    batch_size: int,
    rank: int,
    seed: int,
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
        num_steps: Number of optimizer steps.
        batch_size: Rows per step.
        rank: Rank of the LoRA layers.
        seed: Seed of the training.
        device: Device of the model.
        as_json: Whether to print JSON.

    Returns:
        0.

    Raises:
        FileExistsError: ``out`` exists and is not empty.
        ValueError: The task cannot be guessed, or the model cannot be read.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"--out {out} exists and is not empty: choose a new directory.")
    rows = read_rows(data)
    with reading(model):
        tokenizer, shape = _tokenizer(model), _shape(model)
    named: dict[str, Any] = {"text": text, "target": label, "max_length": max_length}
    task = from_data(tokenizer, rows, llm=shape, **{name: value for name, value in named.items() if value is not None})
    with reading(model):
        llm = _llm(model, task, tokenizer).to(device_of(device))
    blora = bayesian_lora(llm, r=rank, seed=seed)
    options: Any = {"num_steps": num_steps, "batch_size": batch_size, "seed": seed, "progress": not as_json}
    result = fit_posterior(blora, task, rows, **options)
    result.posterior.save_pretrained(out)
    _tell(result.history["nll"], task, len(rows), out, as_json)
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


def _tell(nll: Any, task: Task, num_rows: int, out: Path, as_json: bool) -> None:
    last = max(len(nll) // 10, 1)
    first, final = float(nll[:last].mean()), float(nll[-last:].mean())
    if as_json:
        found = {"rows": num_rows, "steps": len(nll), "task": type(task).__name__, "guessed": task.guessed}
        say_json(found | {"nll_first_tenth": first, "nll_last_tenth": final, "out": str(out)})
    else:
        say(f"{type(task).__name__}: {task.guessed}")
        say(f"{num_rows} rows, {len(nll)} steps. NLL per row: {first:.3f} in the first tenth, {final:.3f} in the last.")
        say(f"Posterior saved: {out}")
