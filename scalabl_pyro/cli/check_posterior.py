"""Check a saved posterior: its configuration, files, numbers and tokenizer, and whether it belongs to a base model."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from ..posterior.adapter_file import ADAPTER, check_adapter_keys
from ..posterior.config import CONFIG_FILE, SavedConfig, read_config
from ..posterior.posterior import Posterior
from ..posterior.restore import POSTERIOR
from ..posterior.tokenizer_files import TOKENIZER, read_tokenizer
from ..storage.budget import Budget
from ..storage.tensor_files import scan_tensors
from ..tasks.registry import TASKS, from_options
from ..training.checkpoint_files import CheckpointFolder
from .finding import Finding
from .loading import base_model

#: Bytes that may be read and hashed. The model, which could give a tighter limit, is not loaded yet.
MAX_BYTES = 2**33
#: Number of surplus files that are counted.
MAX_SURPLUS = 1000


def examine_posterior(path: Path, model: str | None = None) -> Iterator[Finding]:
    """Check the files of a saved posterior, and whether it belongs to a base model.

    Args:
        path: Directory that ``save_pretrained`` wrote.
        model: Hub name or directory of the base model. Without it, the posterior is not compared with a model.
    """
    try:
        config = read_config(path)
    except (OSError, ValueError) as error:
        yield Finding(False, str(error), _advice_on_configuration(path))
        return
    yield Finding(True, _describe_posterior(config))
    healthy, budget = True, Budget(bytes=MAX_BYTES)
    checks = (_files(path, config, budget), _tensors(path, config, budget), _tokenizer(path, config, budget))
    for finding in itertools.chain(*checks):
        healthy = healthy and finding.ok
        yield finding
    if model is not None and not healthy:
        text = f"not compared with {model}, because of the problems above"
        yield Finding(False, text, "solve those first, then run this check again")
    elif model is not None:
        yield _with_model(path, config, model)
    else:
        yield Finding(True, "not compared with its base model; add --model NAME to compare them")


def _advice_on_configuration(path: Path) -> str:
    if not path.exists():
        return "check the path"
    if not path.is_dir():
        return "give the directory, not a file in it"
    if not (path / CONFIG_FILE).exists():
        if CheckpointFolder(path, keep=1).paths():
            return f"these are checkpoints of a training run: fit(..., checkpoint_dir={str(path)!r}) resumes it"
        inside = [p.parent for p in path.glob(f"*/{CONFIG_FILE}")]
        return f"did you mean {inside[0]}?" if inside else "copy the whole directory from where it was saved"
    return "copy the directory again from the place where it was saved; update scalabl_pyro if a newer version wrote it"


def _describe_posterior(config: SavedConfig) -> str:
    latents = sum(layer["rank"] for layer in config.layers)
    prior = config.prior.get("family") or config.prior.get("class")
    guide = config.guide.get("options", {}).get("class", config.guide.get("class"))
    return (
        f"written by scalabl_pyro {config.library_version}: {latents} latents in {len(config.layers)} layers of a "
        f"{config.base_model.get('class')}; guide {guide}, prior {prior}, task {config.task['class']}"
    )


def _files(path: Path, config: SavedConfig, budget: Budget) -> Iterator[Finding]:
    for name, expected in config.files.entries.items():
        try:
            config.files.check_file(path, name, budget=budget)
        except (FileNotFoundError, ValueError) as error:
            yield Finding(False, str(error), "copy the file again from the place where the posterior was saved")
        else:
            yield Finding(True, f"{name}: {expected.bytes:,} bytes, SHA-256 as saved")
    known = {CONFIG_FILE, *config.files.entries}
    found = itertools.islice((f for f in path.rglob("*") if not f.is_dir()), len(known) + MAX_SURPLUS)
    surplus = sorted(f.relative_to(path).as_posix() for f in found)
    if surplus := [name for name in surplus if name not in known]:
        more = "1 more file that was" if len(surplus) == 1 else f"{len(surplus)} more files that were"
        yield Finding(True, f"{more} not saved with the posterior, such as {surplus[0]!r}; ignored on loading")


def _tensors(path: Path, config: SavedConfig, budget: Budget) -> Iterator[Finding]:
    for name in (ADAPTER, POSTERIOR):
        if _has_grown(path, config, name):  # said above; a file of gigabytes would be read in vain
            continue
        try:
            tensors = scan_tensors(path, name, budget=budget)
            if name == ADAPTER:
                check_adapter_keys(config, tensors)
        except (FileNotFoundError, ValueError) as error:
            advice = "copy the file again if its SHA-256 has changed; otherwise train and save the posterior again"
            yield Finding(False, str(error), advice)
        else:
            numbers = sum(math.prod(tensor.shape) for tensor in tensors.values())
            yield Finding(True, f"{name}: {len(tensors)} tensors, {numbers:,} numbers, all finite")


def _has_grown(path: Path, config: SavedConfig, name: str) -> bool:
    """Tell whether a file is larger than it was when it was saved."""
    expected, file = config.files.entries.get(name), path / name
    return expected is not None and file.is_file() and file.stat().st_size > expected.bytes


def _tokenizer(path: Path, config: SavedConfig, budget: Budget) -> Iterator[Finding]:
    name = config.task["class"]
    if name not in TASKS:
        yield Finding(True, f"the task {name} is a class of your own: pass task={name}(...) to from_pretrained")
        return
    try:
        tokenizer = read_tokenizer(path / TOKENIZER, budget=budget)
        from_options(name, tokenizer, config.task["options"], budget=budget)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        advice = "copy its files again, or pass a task with another tokenizer: from_pretrained(..., task=...)"
        yield Finding(False, f"tokenizer and task: {error}", advice)
    else:
        yield Finding(True, f"tokenizer with {len(tokenizer)} tokens, used by the task {name}")


def _with_model(path: Path, config: SavedConfig, model: str) -> Finding:
    own = [part for part in ("guide", "prior") if getattr(config, part).get("family") is None]
    own += [] if config.task["class"] in TASKS else ["task"]
    if own:
        return Finding(True, f"not compared with {model}: classes of your own: {', '.join(own)}")
    try:
        llm = base_model(config, model)
    except (OSError, ValueError) as error:
        return Finding(False, f"the base model {model} cannot be read: {error}", "give its hub name or its directory")
    try:
        with _loaded(llm, path) as posterior:
            draws = posterior.sample(10).s
    except (FileNotFoundError, ValueError) as error:
        return Finding(False, str(error), "load the model that the posterior was learned on; its precision may differ")
    spread = draws.std(0).mean()
    return Finding(True, f"it belongs to {model}; 10 draws have a standard deviation of {spread:.3g} on average")


@contextmanager
def _loaded(llm: nn.Module, path: Path) -> Iterator[Posterior]:
    posterior = Posterior.from_pretrained(llm, path)
    try:
        yield posterior
    finally:
        posterior.blora().unload()
