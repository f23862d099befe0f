"""Check an installation: versions of the packages, devices, and a small training run on each kind of device."""

import math
import platform
import tempfile
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .._process.random_state import scoped_seed
from .._version import __version__
from ..model.bayesian_lora import bayesian_lora
from ..posterior.posterior import Posterior
from ..tasks import MultipleChoice
from ..training.fit import fit
from .finding import Finding

DISTRIBUTION = "scalabl-pyro"
#: Found only where the package runs from a checkout.
PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def examine_installation() -> Iterator[Finding]:
    """Check versions and devices, and train, save and load a small model on each kind of device."""
    yield Finding(True, f"scalabl_pyro {__version__}, Python {platform.python_version()} on {platform.platform()}")
    for requirement in requirements():
        yield _version(requirement)
    yield Finding(True, _arviz())
    for device in devices():
        yield Finding(True, f"device {_describe_device(device)}")
        yield _trial(device)


def requirements() -> list[Requirement]:
    """Return the packages that scalabl_pyro needs, from pyproject.toml in a checkout, else from its metadata."""
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
    """Return the CPU, and the first GPU if there is one."""
    return [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]


def _version(requirement: Requirement) -> Finding:
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        advice = f"pip install '{requirement.name}{requirement.specifier}'"
        return Finding(False, f"{requirement.name} is not installed", advice)
    if not requirement.specifier.contains(found, prereleases=True):
        advice = f"pip install --upgrade '{requirement.name}{requirement.specifier}'"
        return Finding(False, f"{requirement.name} {found} is installed, needed {requirement.specifier}", advice)
    return Finding(True, f"{requirement.name} {found} (needed: {requirement.specifier or 'any version'})")


def _arviz() -> str:
    try:
        found = metadata.version("arviz")
    except metadata.PackageNotFoundError:
        return "arviz is not installed: to_arviz() returns an xarray.DataTree"
    container = "InferenceData" if Version(found) < Version("1") else "DataTree"
    return f"arviz {Version(found).major}.x: to_arviz() returns an {container}"


def _describe_device(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return f"{device}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda} of torch"


def _trial(device: torch.device) -> Finding:
    what = f"a small random model on {device}"
    try:
        loss = _train_save_and_load(device)
    except Exception as error:  # whatever it is, it is what the user wants to know
        advice = "if all checks above are ok, report this problem together with the lines above"
        return Finding(False, f"{what}: {type(error).__name__}: {error}", advice)
    return Finding(True, f"{what} was trained (loss {loss:.2f}), predicted, and was saved and loaded again")


def _train_save_and_load(device: torch.device) -> float:
    tokenizer, llm = _small_tokenizer(), _small_model().to(device)
    before = {name: value.clone() for name, value in llm.state_dict().items()}
    rows = [{"question": f"w{i} w{i + 1}", "choices": ["w1", "w2"], "answer": i % 2} for i in range(8)]
    task = MultipleChoice(tokenizer, labels=["A", "B"])
    result = fit(bayesian_lora(llm, r=2), task, rows, num_steps=3, progress=False)
    loss = float(result.history["loss"].iloc[-1])
    prediction = result.posterior.predict(rows, num_draws=2)
    result.posterior.to_arviz(num_draws=4, prediction=prediction)
    base = result.posterior.blora().unload()
    if not all(torch.equal(value, before[name]) for name, value in base.state_dict().items()):
        raise RuntimeError("training changed the base model")
    with tempfile.TemporaryDirectory() as folder:
        result.posterior.save_pretrained(Path(folder) / "posterior")
        again = Posterior.from_pretrained(base, Path(folder) / "posterior")
    if not torch.equal(again.sample(3).s, result.posterior.sample(3).s):
        raise RuntimeError("a loaded posterior gives other draws than the one that was saved")
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss is {loss}")
    return loss


def _small_tokenizer() -> PreTrainedTokenizerFast:
    words = [f"w{i}" for i in range(20)] + ["A", "B", ":", ".", "Answer"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", *words])}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")


def _small_model() -> Any:
    size: dict[str, Any] = {"vocab_size": 26, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    with scoped_seed(0):
        return LlamaForCausalLM(LlamaConfig(**size, num_hidden_layers=1, pad_token_id=0))
