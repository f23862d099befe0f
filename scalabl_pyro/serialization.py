"""A posterior as a directory of safetensors and JSON; no pickle is written or read.

    scalabl_config.json         what was adapted, families of guide, prior and task, fingerprint of the base model
    adapter_model.safetensors   A and B of each layer, trained heads
    posterior.safetensors       tensors of guide, prior and task
    tokenizer/                  the tokenizer of the task

Reading is strict: every key and shape must be the expected one, the base model must be the one that the posterior was
learned on, and a failed load leaves the model as it was.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from . import guides, likelihoods, priors, saved_config
from ._version import __version__
from .attach import find_adapter, reattach
from .fingerprint import check_fingerprint, describe_layers, fingerprint
from .guides import Guide
from .likelihoods import Task
from .lora import Adapter, Factors
from .model import BayesianLoRA
from .priors import Prior
from .saved_config import SavedConfig
from .storage import check_keys, check_like, read_tensors, save_file, staged

if TYPE_CHECKING:
    from .posterior import Posterior

ADAPTER = "adapter_model.safetensors"
POSTERIOR = "posterior.safetensors"
TOKENIZER = "tokenizer"


def save(path: str | Path, posterior: "Posterior") -> None:
    """Write ``posterior`` to the directory ``path``; a posterior that was there is replaced whole, or kept whole.

    Raises:
        FileExistsError: ``path`` holds something else.
        ValueError: a guide or task with options that JSON cannot hold.
    """
    path = Path(path).resolve()  # write through links
    if path.exists() and not (path / saved_config.NAME).exists() and (path.is_file() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and holds no posterior: give the path of a new directory.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as staging:
        _describe(posterior).write(staging)
        save_file(_adapter_tensors(posterior), staging / ADAPTER)
        save_file(_posterior_tensors(posterior.guide, posterior.prior, posterior.task), staging / POSTERIOR)
        if posterior.task.tokenizer is not None:
            posterior.task.tokenizer.save_pretrained(staging / TOKENIZER)


def load(
    path: str | Path,
    llm: nn.Module,
    *,
    task: Task | None = None,
    prior: Prior | None = None,
    guide: Guide | Callable[[BayesianLoRA], Guide] | None = None,
) -> dict[str, Any]:
    """Fields of the posterior saved at ``path``; ``llm`` gets its layers unless it carries the same already."""
    path = Path(path)
    _check_override("task", task, Task)
    _check_override("prior", prior, Prior)
    if guide is not None and not isinstance(guide, Guide) and not callable(guide):
        raise TypeError(f"guide={guide!r}: expected a scalabl_pyro.guides.Guide, or a callable blora -> Guide.")
    config = saved_config.read(path)
    adapter_tensors, tensors = read_tensors(path / ADAPTER), read_tensors(path / POSTERIOR)
    _check_adapter_keys(config, adapter_tensors)

    carried = find_adapter(llm)
    adapter = carried or reattach(llm, config.layers, gauge=config.gauge, heads=config.heads)
    try:
        if carried is not None:
            _check_carried(carried, config, path)
        check_fingerprint(config.base_model, fingerprint(adapter))
        factors = _factors(adapter, adapter_tensors)
        heads = _heads(adapter, config.heads, adapter_tensors)
        own_prior = (
            _saved_prior(config, tensors, adapter)
            if prior is None
            else priors.as_prior(copy.deepcopy(prior), adapter.subspace)
        )
        own_task = _saved_task(config, path) if task is None else copy_task(task)
        own_guide = _guide(config, guide, own_prior, adapter)
        for part, module in {"guide": own_guide, "prior": own_prior, "task": own_task}.items():
            state = {k[len(part) + 1 :]: v for k, v in tensors.items() if k.startswith(part + ".")}
            _load_strict(f"{POSTERIOR}: {part}", module, state)
        check_keys(POSTERIOR, {k for k in tensors if k.split(".")[0] not in ("guide", "prior", "task")}, set())
        with torch.no_grad(), pyro.settings.context(module_local_params=True):
            mean = own_guide.mean()["s"].detach().clone()
    except BaseException:
        if carried is None:
            adapter.unload()
        raise
    if carried is None:
        _rest_at(adapter, mean, factors, heads)
    return {
        "adapter": adapter,
        "task": own_task.requires_grad_(False),
        "prior": own_prior.requires_grad_(False),
        "guide": own_guide.requires_grad_(False).eval(),
        "factors": factors,
        "heads": heads,
        "provenance": config.provenance,
    }


def copy_task(task: Task) -> Task:
    """A copy of a task and its parameters that shares the tokenizer."""
    return copy.deepcopy(task, {id(task.tokenizer): task.tokenizer})


# what is written ------------------------------------------------------------------------------------------


def _describe(posterior: "Posterior") -> SavedConfig:
    return SavedConfig(
        library_version=__version__,
        layers=describe_layers(posterior.adapter),
        gauge=posterior.adapter.gauge,
        heads=sorted(posterior.heads),
        guide=guides.describe(posterior.guide),
        prior=priors.describe(posterior.prior),
        task=likelihoods.describe(posterior.task),
        base_model=fingerprint(posterior.adapter),
        provenance=dict(posterior.provenance),
    )


def _adapter_tensors(posterior: "Posterior") -> dict[str, Tensor]:
    tensors = {}
    for layer, (A, B) in zip(posterior.subspace, posterior.factors, strict=True):
        tensors[f"{layer.name}.lora_A.weight"] = A
        tensors[f"{layer.name}.lora_B.weight"] = B
    for name, head in posterior.heads.items():
        tensors |= {f"heads.{name}.{k}": v for k, v in head.state_dict().items()}
    return tensors


def _posterior_tensors(guide: Guide, prior: Prior, task: Task) -> dict[str, Tensor]:
    parts = {"guide": guide, "prior": prior, "task": task}
    return {f"{part}.{k}": v for part, module in parts.items() for k, v in module.state_dict().items()}


# what is read ---------------------------------------------------------------------------------------------


def _check_override(name: str, value: object, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name}={value!r}: expected an instance of scalabl_pyro's {kind.__name__}.")


def _check_adapter_keys(config: SavedConfig, tensors: Mapping[str, Tensor]) -> None:
    """Exactly A and B of each layer; keys within a head are checked against the head."""
    of_heads = {k for k in tensors if any(k.startswith(f"heads.{name}.") for name in config.heads)}
    expected = {f"{layer['name']}.lora_{x}.weight" for layer in config.layers for x in "AB"}
    check_keys(ADAPTER, set(tensors) - of_heads, expected)


def _check_carried(carried: Adapter, config: SavedConfig, path: Path) -> None:
    if describe_layers(carried) != config.layers:
        raise ValueError(
            f"The module already carries Bayesian LoRA on {len(carried.subspace)} layers that are not those of "
            f"{path}: call .unload() first, or load into another copy of the model."
        )
    if carried.gauge != config.gauge:
        raise ValueError(
            f"The module already carries Bayesian LoRA with gauge={carried.gauge!r}, but {path} was learned with "
            f"gauge={config.gauge!r}: call .unload() first, or load into another copy of the model."
        )


def _factors(adapter: Adapter, tensors: Mapping[str, Tensor]) -> Factors:
    factors = []
    for layer, live in zip(adapter.subspace, adapter.factors(), strict=True):
        pair = [tensors[f"{layer.name}.lora_{x}.weight"] for x in "AB"]
        for x, saved, own in zip("AB", pair, live, strict=True):
            check_like(f"{ADAPTER}: lora_{x} of {layer.name!r}", saved, own)
        factors.append((pair[0].to(live[0].device), pair[1].to(live[1].device)))
    return tuple(factors)


def _heads(adapter: Adapter, names: list[str], tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    if set(names) != set(adapter.heads):
        raise ValueError(f"{saved_config.NAME}: trained heads are {names}, the module trains {sorted(adapter.heads)}.")
    heads = {}
    for name in names:
        head, prefix = copy.deepcopy(adapter.heads[name]), f"heads.{name}."
        own = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        _load_strict(f"{ADAPTER}: head {name!r}", head, own)
        heads[name] = head.to(next(adapter.heads[name].parameters()).device).requires_grad_(False)
    return heads


def _saved_prior(config: SavedConfig, tensors: Mapping[str, Tensor], adapter: Adapter) -> Prior:
    if config.prior.get("family") is None:
        raise ValueError(_needs_help("prior", config.prior))
    own = {k.removeprefix("prior."): v for k, v in tensors.items() if k.startswith("prior.")}
    try:
        return priors.from_saved(config.prior, own, adapter.subspace)
    except (ValueError, TypeError, RuntimeError) as error:  # of the distribution's own checks
        raise ValueError(f"{POSTERIOR}: prior {config.prior['family']!r}: {error}") from None


def _saved_task(config: SavedConfig, path: Path) -> Task:
    name = config.task["class"]
    if name not in likelihoods.TASKS:
        raise ValueError(_needs_help("task", config.task))
    folder = path / TOKENIZER
    if not folder.is_dir():
        raise FileNotFoundError(f"The tokenizer {folder} is missing.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder.resolve(), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"The tokenizer {folder} is damaged ({error}).") from None
    try:
        return likelihoods.from_options(name, tokenizer, config.task["options"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{saved_config.NAME}: task {name}: {error}") from None


def _guide(
    config: SavedConfig, override: Guide | Callable[[BayesianLoRA], Guide] | None, prior: Prior, adapter: Adapter
) -> Guide:
    """A guide of the saved family on the CPU, its tensors still to be filled."""
    blora = BayesianLoRA(adapter, prior=copy.deepcopy(prior))
    if isinstance(override, Guide):
        return override.snapshot()
    if override is not None:
        built = override(blora)
        _check_override("guide", built, Guide)
        return built.cpu()
    family = config.guide.get("family")
    if family is None or not isinstance(family, str):
        raise ValueError(_needs_help("guide", config.guide))
    try:
        return guides.from_options(family, config.guide["options"], blora).cpu()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{saved_config.NAME}: guide: {error}") from None


def _needs_help(part: str, entry: Mapping[str, Any]) -> str:
    name = entry.get("class")
    return f"The posterior was learned with the {part} {name!r}: pass from_pretrained(..., {part}={name}(...))."


def _load_strict(what: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fill a module with exactly these tensors, in the precision they were saved in."""
    state = module.state_dict()
    check_keys(what, set(tensors), set(state))
    for name, tensor in tensors.items():
        check_like(f"{what}: {name!r}", tensor, state[name])
    module.load_state_dict(tensors, assign=True)


@torch.no_grad()
def _rest_at(adapter: Adapter, mean: Tensor, factors: Factors, heads: Mapping[str, nn.Module]) -> None:
    """Give a freshly adapted module what was loaded, for calls outside of any draw."""
    for (A, B), (saved_A, saved_B) in zip(adapter.factors(), factors, strict=True):
        A.copy_(saved_A)
        B.copy_(saved_B)
    for name, head in heads.items():
        adapter.heads[name].load_state_dict(head.state_dict())
    adapter.loc = mean
