"""Load what the commands work on: a base model, and a posterior on top of it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from ..data.rows import Row, read_rows
from ..posterior.config import SavedConfig, read_config
from ..posterior.posterior import Posterior
from .terminal import say

#: Tasks with classes that read a single output.
ONE_OUTPUT = ("OrderedClassification",)


def base_model(config: SavedConfig, model: str) -> nn.Module:
    """Load the base model of a saved posterior, with the kind of head that its task reads.

    Args:
        config: Configuration of the posterior.
        model: Hub name or directory of the base model. No code of a stranger runs.

    Raises:
        OSError, ValueError: The model cannot be read.
    """
    if str(config.base_model.get("class")).endswith("ForSequenceClassification"):
        classes = config.task["options"].get("classes")
        has_each = isinstance(classes, list) and config.task["class"] not in ONE_OUTPUT
        outputs = len(classes) if has_each else 1
        return AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=outputs, dtype="auto", trust_remote_code=False
        )
    kind = AutoModelForSeq2SeqLM if config.task["options"].get("encoder_decoder") else AutoModelForCausalLM
    return kind.from_pretrained(model, dtype="auto", trust_remote_code=False)


@contextmanager
def reading(model: str) -> Iterator[None]:
    """Name the base model in errors of transformers that cannot read it, and say where it is looked for.

    Without a network, the hub is asked for a minute before transformers gives up.
    """
    if not Path(model).exists() and model.count("/") < 2:
        say(f"There is no folder {model} here, so the model is looked for on the Hugging Face hub.", file=sys.stderr)
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the base model {model} cannot be read: {error} Give its hub name or its directory with --model."
        ) from error


def load_posterior(path: Path, model: str, device: str) -> Posterior:
    """Load a saved posterior on its base model.

    Args:
        path: Directory of the posterior.
        model: Hub name or directory of the base model.
        device: Name of a device, or ``"auto"`` for a GPU if there is one.

    Raises:
        OSError, ValueError: A file is missing or damaged, the posterior belongs to another model, or there is no such
            device.
    """
    config, place = read_config(path), device_of(device)
    try:
        with reading(model):
            llm = base_model(config, model)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"the weights of the base model {model} do not have the shapes that the posterior needs, such as the "
            "number of outputs of its head. Give the model that the posterior was fitted on with --model."
        ) from error
    return Posterior.from_pretrained(llm.to(place).eval(), path)


def predict_table(
    path: Path,
    data: str,
    model: str,
    *,
    num_draws: int,
    seed: int,
    batch_size: int,
    device: str,
    progress: bool = False,
) -> tuple[list[Row], Any]:
    """Predict the rows of a table with a saved posterior.

    Args:
        path: Directory of the posterior.
        data: File of the rows.
        model: Hub name or directory of the base model.
        num_draws: Number of draws.
        seed: Seed of the draws.
        batch_size: Rows per forward pass.
        device: Name of a device, or ``"auto"``.
        progress: Whether a terminal shows how far the prediction is.

    Returns:
        The rows, and their prediction.

    Raises:
        OSError, ValueError: A file cannot be read, or an option is out of range.
    """
    rows = read_rows(data, split="test")
    posterior = load_posterior(path, model, device)
    options: Any = {"num_draws": num_draws, "seed": seed, "batch_size": batch_size}
    return rows, posterior.predict(rows, **options, progress=progress and sys.stderr.isatty())


def device_of(name: str) -> str:
    """Return the name of a device; ``"auto"`` is a GPU if there is one.

    Raises:
        ValueError: torch has no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used ({reason}). Give cpu, cuda, cuda:1, or auto.") from error
    return name
