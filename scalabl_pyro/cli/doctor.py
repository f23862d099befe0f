"""What is wrong with an installation or a saved posterior, in words that one can act on."""

import math
import platform
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from .. import tasks
from .._process.random_state import scoped_seed
from .._version import __version__
from ..model.bayesian_lora import bayesian_lora
from ..posterior.config import CONFIG_FILE, SavedConfig, read_config
from ..posterior.posterior import Posterior
from ..posterior.restore import ADAPTER, POSTERIOR, TOKENIZER, check_adapter_keys, read_tokenizer
from ..storage.tensor_files import read_tensors
from ..storage.untrusted_files import check_file
from ..tasks import MultipleChoice
from ..training.checkpoint_files import CheckpointFolder
from ..training.fit import fit

DISTRIBUTION = "scalabl-pyro"
PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
#: A tensor file that is larger is not read without the model that it must belong to.
MAX_TENSORS = 2**33


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis.

    Attributes:
        ok: whether all is well.
        text: what was found.
        advice: what to do about it.
    """

    ok: bool
    text: str
    advice: str = ""

    def __str__(self) -> str:
        mark = "ok     " if self.ok else "PROBLEM"
        return f"{mark}  {self.text}" + (f"\n         -> {self.advice}" if self.advice else "")


def examine_installation() -> Iterator[Finding]:
    """Versions, devices, and a small model learned, saved and read back on each kind of device."""
    yield Finding(True, f"scalabl_pyro {__version__}, Python {platform.python_version()} on {platform.platform()}")
    for requirement in requirements():
        yield _version(requirement)
    yield Finding(True, _arviz())
    for device in devices():
        yield Finding(True, f"device {_describe_device(device)}")
        yield _trial(device)


def examine_posterior(path: Path, model: str | None = None) -> Iterator[Finding]:
    """Files, configuration, hashes and numbers of a saved posterior, and whether it belongs to a base model.

    Args:
        path: directory that ``save_pretrained`` wrote.
        model: hub name or directory of the base model; None leaves the comparison out.
    """
    try:
        config = read_config(path)
    except (FileNotFoundError, ValueError) as error:
        yield Finding(False, str(error), _advice_on_configuration(path))
        return
    yield Finding(True, _describe_posterior(config))
    healthy = True
    for finding in (*_files(path, config), *_tensors(path, config), *_tokenizer(path, config)):
        healthy = healthy and finding.ok
        yield finding
    if model is not None and not healthy:
        yield Finding(
            False, f"not compared with {model}, because of what is said above", "mend that first, then ask again"
        )
    elif model is not None:
        yield _with_model(path, config, model)
    else:
        yield Finding(True, "not compared with its base model; to do that, add --model NAME")


def requirements() -> list[Requirement]:
    """What this package needs: of the checkout that it runs from, else of the installed package."""
    if PYPROJECT.is_file():
        project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == DISTRIBUTION:
            return [Requirement(line) for line in project["dependencies"]]
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    return [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate({"extra": ""})]


def devices() -> list[torch.device]:
    """The CPU, and the first GPU where there is one."""
    return [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]


def _version(requirement: Requirement) -> Finding:
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        advice = f"pip install '{requirement.name}{requirement.specifier}'"
        return Finding(False, f"{requirement.name} is not installed", advice)
    if not requirement.specifier.contains(found, prereleases=True):
        advice = f"pip install --upgrade '{requirement.name}{requirement.specifier}'"
        return Finding(False, f"{requirement.name} {found}, needed {requirement.specifier}", advice)
    return Finding(True, f"{requirement.name} {found} ({requirement.specifier or 'any'})")


def _arviz() -> str:
    try:
        found = metadata.version("arviz")
    except metadata.PackageNotFoundError:
        return "no arviz: to_arviz() gives an xarray.DataTree"
    container = "InferenceData" if Version(found) < Version("1") else "DataTree"
    return f"arviz of generation {Version(found).major}.x: to_arviz() gives {container}"


def _describe_device(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    facts = torch.cuda.get_device_properties(device)
    return f"{device}: {facts.name}, {facts.total_memory / 2**30:.0f} GiB, torch for CUDA {torch.version.cuda}"


def _trial(device: torch.device) -> Finding:
    what = f"a small random model on {device}"
    try:
        loss = _learn_and_read_back(device)
    except Exception as error:  # whatever it is, it is what the user wants to know
        advice = "this installation cannot be used here; report it with the lines above if all of them are ok"
        return Finding(False, f"{what}: {type(error).__name__}: {error}", advice)
    return Finding(True, f"{what} was learned (loss {loss:.2f}), asked, saved and read back")


def _learn_and_read_back(device: torch.device) -> float:
    words = [f"w{i}" for i in range(20)] + ["A", "B", ":", ".", "Answer"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", *words])}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")
    size: dict[str, Any] = {"vocab_size": 26, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    with scoped_seed(0):
        llm: Any = LlamaForCausalLM(LlamaConfig(**size, num_hidden_layers=1, pad_token_id=0))
    llm.to(device)
    before = {name: value.clone() for name, value in llm.state_dict().items()}
    rows = [{"question": f"w{i} w{i + 1}", "choices": ["w1", "w2"], "answer": i % 2} for i in range(8)]
    task = MultipleChoice(tokenizer, labels=["A", "B"])
    result = fit(bayesian_lora(llm, r=2), task, rows, num_steps=3, progress=False)
    loss = float(result.history["loss"].iloc[-1])
    prediction = result.posterior.predict(rows, num_draws=2)
    result.posterior.to_arviz(num_draws=4, prediction=prediction)
    base = result.posterior.blora().unload()
    if not all(torch.equal(value, before[name]) for name, value in base.state_dict().items()):
        raise RuntimeError("the base model was changed")
    with tempfile.TemporaryDirectory() as folder:
        result.posterior.save_pretrained(Path(folder) / "posterior")
        again = Posterior.from_pretrained(base, Path(folder) / "posterior")
    if not torch.equal(again.sample(3).s, result.posterior.sample(3).s):
        raise RuntimeError("a posterior that was saved draws other numbers than before")
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss is {loss}")
    return loss


def _advice_on_configuration(path: Path) -> str:
    if not path.exists():
        return "check the path"
    if not path.is_dir():
        return "give the directory, not a file in it"
    if not (path / CONFIG_FILE).exists():
        if CheckpointFolder(path, keep=1).paths():
            return f"these are checkpoints of a run: fit(..., checkpoint_dir={str(path)!r}) goes on with it"
        inside = [p.parent for p in path.glob(f"*/{CONFIG_FILE}")]
        return f"did you mean {inside[0]}?" if inside else "copy the whole directory from where it was saved"
    return "copy the directory again from where it was saved, or update scalabl_pyro if a newer version wrote it"


def _describe_posterior(config: SavedConfig) -> str:
    latents = sum(layer["rank"] for layer in config.layers)
    prior = config.prior.get("family") or config.prior.get("class")
    guide = config.guide.get("options", {}).get("class", config.guide.get("class"))
    return (
        f"written by scalabl_pyro {config.library_version}: {latents} latents in {len(config.layers)} layers of a "
        f"{config.base_model.get('class')}; guide {guide}, prior {prior}, task {config.task['class']}"
    )


def _files(path: Path, config: SavedConfig) -> Iterator[Finding]:
    for name, expected in config.files.items():
        try:
            check_file(path, name, expected)
        except (FileNotFoundError, ValueError) as error:
            yield Finding(False, str(error), "copy the file again from where the posterior was saved")
        else:
            yield Finding(True, f"{name}: {expected['bytes']:,} bytes, SHA-256 as saved")
    known = {CONFIG_FILE, *config.files}
    surplus = sorted(f.relative_to(path).as_posix() for f in path.rglob("*") if not f.is_dir())
    if surplus := [name for name in surplus if name not in known]:
        more = "1 more file that was" if len(surplus) == 1 else f"{len(surplus)} more files that were"
        yield Finding(True, f"{more} not saved with it, such as {surplus[0]!r}: never read")


def _tensors(path: Path, config: SavedConfig) -> Iterator[Finding]:
    for name in (ADAPTER, POSTERIOR):
        try:
            tensors = read_tensors(path, name, limit=MAX_TENSORS)
            if name == ADAPTER:
                check_adapter_keys(config, tensors)
        except (FileNotFoundError, ValueError) as error:
            yield Finding(False, str(error), "save the posterior again; a file whose hash is right was saved like this")
        else:
            numbers = sum(t.numel() for t in tensors.values())
            yield Finding(True, f"{name}: {len(tensors)} tensors, {numbers:,} numbers, all finite")


def _tokenizer(path: Path, config: SavedConfig) -> Iterator[Finding]:
    name = config.task["class"]
    if name not in tasks.TASKS:
        yield Finding(True, f"the task {name} is your own class: pass task={name}(...) to from_pretrained")
        return
    try:
        tokenizer = read_tokenizer(path / TOKENIZER)
        tasks.from_options(name, tokenizer, config.task["options"])
    except Exception as error:  # of the tokenizer at work: the tokenizers library raises bare Exceptions
        advice = "copy its files again, or pass a task with a tokenizer of your own: from_pretrained(..., task=...)"
        yield Finding(False, f"tokenizer and task: {error}", advice)
    else:
        yield Finding(True, f"tokenizer of {len(tokenizer)} tokens, and the task {name} on it")


def _with_model(path: Path, config: SavedConfig, model: str) -> Finding:
    own = [part for part in ("guide", "prior") if getattr(config, part).get("family") is None]
    if own or config.task["class"] not in tasks.TASKS:
        return Finding(True, f"not compared with {model}: parts of it are classes of your own")
    try:
        llm = _base_model(config, model)
    except (OSError, ValueError) as error:
        return Finding(False, f"the base model {model} cannot be read: {error}", "give its hub name or its directory")
    try:
        with _restored(Posterior.from_pretrained(llm, path)) as posterior:
            drawn = posterior.sample(10).s
    except (FileNotFoundError, ValueError) as error:
        return Finding(False, str(error), "load the very model that the posterior was learned on, in any precision")
    return Finding(True, f"it belongs to {model}; 10 draws have a mean sd of {drawn.std(0).mean():.3g}")


@contextmanager
def _restored(posterior: Posterior) -> Iterator[Posterior]:
    try:
        yield posterior
    finally:
        posterior.blora().unload()


def _base_model(config: SavedConfig, model: str) -> nn.Module:
    if str(config.base_model.get("class")).endswith("ForSequenceClassification"):
        classes = config.task["options"].get("classes")
        outputs = len(classes) if isinstance(classes, list) else 1
        return AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=outputs, dtype="auto", trust_remote_code=False
        )
    return AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=False)
