"""Parts of a posterior from what was read of its files: each is refused unless it is exactly what it must be."""

import copy
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from .. import guides, priors, tasks
from ..guides import Guide
from ..lora.adapter import Adapter
from ..lora.factors import Factors
from ..model.bayesian_lora import BayesianLoRA
from ..prediction.draws import sample
from ..priors import Prior
from ..storage import json_reader
from ..storage.tensor_files import check_keys, check_like
from ..storage.untrusted_files import check_tree, read_file
from ..tasks import Task
from .config import CONFIG_FILE, SavedConfig

ADAPTER = "adapter_model.safetensors"
POSTERIOR = "posterior.safetensors"
TOKENIZER = "tokenizer"
#: Tokenizers of large vocabularies have 50 MB.
MAX_TOKENIZER = 2**29
TOKENIZER_CONFIG = "tokenizer_config.json"
#: What transformers adds to it on loading.
NOTES = ("files_loaded", "is_local", "local_files_only", "name_or_path")
#: Options such as ``init_scale=1`` that are no sizes.
SLACK = 16


def check_override(name: str, value: object, kind: type) -> None:
    """An argument of from_pretrained is of its class."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name}={value!r}: expected an instance of scalabl_pyro's {kind.__name__}.")


def check_adapter_keys(config: SavedConfig, tensors: Mapping[str, Tensor]) -> None:
    """Exactly A and B of each layer; keys within a head are checked against the head."""
    of_heads = {k for k in tensors if any(k.startswith(f"heads.{name}.") for name in config.heads)}
    expected = {f"{layer['name']}.lora_{x}.weight" for layer in config.layers for x in "AB"}
    check_keys(ADAPTER, set(tensors) - of_heads, expected)


def check_heads(names: list[str], tensors: Mapping[str, Tensor], llm: nn.Module) -> None:
    """The trained heads fit the modules they replace; checked before any of those is copied."""
    modules = dict(llm.named_modules())
    for name in names:
        if name in modules:
            prefix = f"heads.{name}."
            own = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            _check_state(f"{ADAPTER}: head {name!r}", own, modules[name].state_dict())


def saved_factors(adapter: Adapter, tensors: Mapping[str, Tensor]) -> Factors:
    """A and B of each layer, on the devices of the layers."""
    factors = []
    for layer, live in zip(adapter.subspace, adapter.factors(), strict=True):
        pair = [tensors[f"{layer.name}.lora_{x}.weight"] for x in "AB"]
        for x, saved, own in zip("AB", pair, live, strict=True):
            check_like(f"{ADAPTER}: lora_{x} of {layer.name!r}", saved, own)
        factors.append((pair[0].to(live[0].device), pair[1].to(live[1].device)))
    return tuple(factors)


def saved_heads(adapter: Adapter, names: list[str], tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Trained heads, frozen."""
    if set(names) != set(adapter.heads):
        raise ValueError(f"{CONFIG_FILE}: trained heads are {names}, the module trains {sorted(adapter.heads)}.")
    heads = {}
    for name in names:
        head, prefix = copy.deepcopy(adapter.heads[name]), f"heads.{name}."
        own = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        load_strict(f"{ADAPTER}: head {name!r}", head, own)
        heads[name] = head.to(next(adapter.heads[name].parameters()).device).requires_grad_(False)
    return heads


def saved_prior(config: SavedConfig, tensors: Mapping[str, Tensor], adapter: Adapter) -> Prior:
    """A prior of a family of this library."""
    if config.prior.get("family") is None:
        raise ValueError(_needs_help("prior", config.prior))
    own = {k.removeprefix("prior."): v for k, v in tensors.items() if k.startswith("prior.")}
    try:
        prior = priors.from_saved(config.prior, own, adapter.subspace)
    except (ValueError, TypeError, RuntimeError) as error:  # of the distribution's own checks
        raise ValueError(f"{POSTERIOR}: prior {config.prior['family']!r}: {error}") from error
    _check_options("prior", config.prior["options"], priors.to_config(prior)["options"])
    return prior


def saved_task(config: SavedConfig, path: Path) -> Task:
    """A task of this library with the saved tokenizer."""
    name = config.task["class"]
    if name not in tasks.TASKS:
        raise ValueError(_needs_help("task", config.task))
    tokenizer = read_tokenizer(path / TOKENIZER)
    try:
        return tasks.from_options(name, tokenizer, config.task["options"])
    except Exception as error:  # of the tokenizer at work: the tokenizers library raises bare Exceptions
        raise ValueError(
            f"{path / CONFIG_FILE}: task {name}, with the tokenizer in {path / TOKENIZER}: {error}"
        ) from error


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Save a tokenizer without what it remembers of the files that it was read from."""
    tokenizer.save_pretrained(folder)
    file = folder / TOKENIZER_CONFIG
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key not in NOTES and not _names_a_file(key, value)}
        if kept != config:
            file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in a directory, read by transformers from files inside of it alone.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its files are damaged, lead out of the directory, or name others.
    """
    check_tree(folder, limit=MAX_TOKENIZER)
    try:
        if (folder / TOKENIZER_CONFIG).is_file():
            content = read_file(folder.parent, f"{TOKENIZER}/{TOKENIZER_CONFIG}", limit=MAX_TOKENIZER)
            config = json_reader.loads(content)
            if named := [key for key, value in config.items() if _names_a_file(key, value)]:
                raise ValueError(f"{TOKENIZER_CONFIG} names files of its own choice: {named}")
        return AutoTokenizer.from_pretrained(folder.resolve(), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"The tokenizer {folder} is damaged ({error}).") from error


def _names_a_file(key: str, value: Any) -> bool:
    """Whether an entry of tokenizer_config.json would become the path of a file that its class opens."""
    is_file = key in ("vocab", "merges", "init_inputs") or key.endswith(("_file", "_files", "_spm"))
    return is_file and bool(value) and not isinstance(value, int | float)


def saved_guide(
    config: SavedConfig,
    override: Guide | Callable[[BayesianLoRA], Guide] | None,
    prior: Prior,
    adapter: Adapter,
    tensors: Mapping[str, Tensor],
) -> Guide:
    """A guide of the saved family on the CPU, its tensors still to be filled."""
    blora = BayesianLoRA(adapter, prior=copy.deepcopy(prior))
    if isinstance(override, Guide):
        return override.snapshot()
    if override is not None:
        built: Any = guides.wrap_autoguide(override(blora))
        check_override("guide", built, Guide)
        return built.cpu()
    family = config.guide.get("family")
    if family is None or not isinstance(family, str):
        raise ValueError(_needs_help("guide", config.guide))
    numbers = sum(t.numel() for name, t in tensors.items() if name.startswith("guide."))
    needed = _numbers_needed(config.guide["options"], adapter.subspace.dim)
    if needed > numbers + SLACK * adapter.subspace.dim:  # before memory is spent on it
        raise ValueError(
            f"{CONFIG_FILE}: the options of the guide, {_short(config.guide['options'])}, ask for a guide of at least "
            f"{needed} numbers, but {POSTERIOR} holds {numbers}."
        )
    try:
        guide = guides.from_options(family, config.guide["options"], blora).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{CONFIG_FILE}: guide: {error}") from error
    _check_options("guide", config.guide["options"], guides.to_config(guide)["options"])
    return guide


def _check_options(part: str, saved: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """An option that is not known here, of a newer format too, would give other numbers were it ignored."""
    if unknown := sorted(set(saved) - set(known)):
        names = ", ".join(map(repr, sorted(known))) or "none"
        raise ValueError(f"{CONFIG_FILE}: unknown options of the {part}: {unknown[:5]}. Known names: {names}.")


def _numbers_needed(options: Any, dim: int) -> int:
    """At least how many parameters a guide with these options has: a rank, width or depth of k needs k D and more."""
    if isinstance(options, dict):
        shapes = options.get("shapes")
        rest = [v for k, v in options.items() if k != "shapes"]
        points = [math.prod(n for n in s if isinstance(n, int)) for s in _values(shapes) if isinstance(s, list)]
        return sum(points) + sum(_numbers_needed(value, dim) for value in rest)
    if isinstance(options, list):
        return len(options) * dim + sum(_numbers_needed(value, dim) for value in options)
    return max(options, 0) * dim if isinstance(options, int) and not isinstance(options, bool) else 0


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else []


def _short(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def _needs_help(part: str, entry: Mapping[str, Any]) -> str:
    name = entry.get("class")
    return f"The posterior was learned with the {part} {name!r}: pass from_pretrained(..., {part}={name}(...))."


def load_strict(what: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fill a module with exactly these tensors, in the precision they were saved in."""
    _check_state(what, tensors, module.state_dict())
    module.load_state_dict(tensors, assign=True)


def _check_state(what: str, saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    check_keys(what, set(saved), set(own))
    first: dict[torch.dtype, tuple[str, torch.dtype]] = {}
    for name, tensor in saved.items():
        check_like(f"{what}: {name!r}", tensor, own[name])
        like, dtype = first.setdefault(own[name].dtype, (name, tensor.dtype))
        if tensor.dtype != dtype:  # a matrix product of both would fail, perhaps in the draws of one component alone
            raise ValueError(
                f"{what}: {name!r} is {tensor.dtype} and {like!r} {dtype}: they are saved in one precision."
            )


def checked_mean(guide: Guide, dim: int) -> Tensor:
    """(D,) posterior mean of a filled guide, if it and a draw are finite numbers of the right shape."""
    try:
        mean, draw = sample(guide, 0, seed=0).s[0], sample(guide, 1, seed=0).s[0]
    except (RuntimeError, ValueError) as error:  # of torch and of the distribution's own checks
        raise ValueError(f"{POSTERIOR}: the guide cannot be drawn from ({error}).") from None
    for what, value in (("mean", mean), ("draws", draw)):
        if value.shape != (dim,):
            raise ValueError(f"{POSTERIOR}: the guide's {what} have shape {tuple(value.shape)}, expected ({dim},).")
        if not torch.isfinite(value).all():
            raise ValueError(f"{POSTERIOR}: the guide's {what} are not finite.")
    return mean
