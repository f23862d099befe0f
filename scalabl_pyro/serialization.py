"""A posterior as a directory of safetensors and JSON; no pickle is written or read.

    scalabl_config.json         what was adapted, families of guide, prior and task, fingerprint of the base model
    adapter_model.safetensors   A and B of each layer, trained heads
    posterior.safetensors       tensors of guide, prior and task
    tokenizer/                  the tokenizer of the task

Reading is strict: every key and shape must be the expected one, and the base model must be the one that the
posterior was learned on.
"""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from pyro.infer import autoguide
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from . import likelihoods
from ._errors import nearest
from ._version import __version__
from .attach import find_adapter, reattach
from .guides import AutoFamily, DeltaGuide, Guide, NormalGuide
from .likelihoods import Task
from .lora import Adapter, Factors
from .model import BayesianLoRA
from .priors import FixedPrior, Prior

if TYPE_CHECKING:
    from .posterior import Posterior

FORMAT_VERSION = 1
CONFIG = "scalabl_config.json"
ADAPTER = "adapter_model.safetensors"
POSTERIOR = "posterior.safetensors"
TOKENIZER = "tokenizer"
MAX_CONFIG_BYTES = 16 * 2**20
PROBES = 64


def save(path: str | Path, posterior: "Posterior") -> None:
    """Write ``posterior`` to the directory ``path``, in one rename at the end."""
    path = Path(path)
    if path.exists() and not (path / CONFIG).exists() and (path.is_file() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and holds no posterior: give the path of a new directory.")
    config = {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "layers": _describe_layers(posterior.adapter),
        "gauge": posterior.adapter.gauge,
        "heads": sorted(posterior.heads),
        "guide": {
            "family": posterior.guide.family,
            "class": type(posterior.guide).__name__,
            "options": posterior.guide.options(),
        },
        "prior": _describe_prior(posterior.prior),
        "task": _describe_task(posterior.task),
        "base_model": fingerprint(posterior.adapter),
        "provenance": dict(posterior.provenance),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(_own(_adapter_tensors(posterior)), staging / ADAPTER)
        save_file(_own(_posterior_tensors(posterior.guide, posterior.prior, posterior.task)), staging / POSTERIOR)
        if posterior.task.tokenizer is not None:
            posterior.task.tokenizer.save_pretrained(staging / TOKENIZER)
        staging.chmod(0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
            os.replace(path, old / path.name)
            os.replace(staging, path)
            shutil.rmtree(old)
        else:
            os.replace(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def load(
    path: str | Path,
    llm: nn.Module,
    *,
    task: Task | None = None,
    prior: Prior | None = None,
    guide: Guide | None = None,
) -> dict[str, Any]:
    """Fields of the posterior saved at ``path``; ``llm`` gets its layers unless it carries the same already."""
    path = Path(path)
    config = _read_config(path)
    adapter_tensors, tensors = _read_tensors(path / ADAPTER), _read_tensors(path / POSTERIOR)
    layers = _parse_layers(config)
    heads = [str(name) for name in _get(config, "heads", list)]
    expected = {f"{layer['name']}.lora_{x}.weight" for layer in layers for x in "AB"}
    _check_keys(ADAPTER, {k for k in adapter_tensors if not k.startswith("heads.")}, expected)

    carried = find_adapter(llm)
    adapter = carried or reattach(llm, layers, gauge=_get(config, "gauge", str), heads=heads)
    try:
        if carried is not None and _describe_layers(carried) != layers:
            raise ValueError(
                f"The module already carries Bayesian LoRA on {len(carried.subspace)} layers that are not those of "
                f"{path}: call .unload() first, or load into another copy of the model."
            )
        _check_fingerprint(_get(config, "base_model", dict), fingerprint(adapter))
        factors = _factors(adapter, adapter_tensors)
        frozen_heads = _heads(adapter, heads, adapter_tensors)
        task = _task(_get(config, "task", dict), path, tensors) if task is None else task
        prior = _prior(_get(config, "prior", dict), tensors) if prior is None else prior
        guide = _guide(_get(config, "guide", dict), prior, adapter, tensors) if guide is None else guide
        _load_state(guide, prior, task, tensors)
    except BaseException:
        if carried is None:
            adapter.unload()
        raise
    if carried is None:
        with torch.no_grad():
            for (A, B), (saved_A, saved_B) in zip(adapter.factors(), factors, strict=True):
                A.copy_(saved_A)
                B.copy_(saved_B)
            for name, head in frozen_heads.items():
                adapter.heads[name].load_state_dict(head.state_dict())
            adapter.loc = guide.mean()["s"].detach().clone()
    return {
        "adapter": adapter,
        "task": task.requires_grad_(False),
        "prior": prior.requires_grad_(False),
        "guide": guide.cpu().requires_grad_(False),
        "factors": factors,
        "heads": frozen_heads,
        "provenance": _get(config, "provenance", dict),
    }


def fingerprint(adapter: Adapter) -> dict[str, Any]:
    """What tells base models apart: class, type, and a few values of the input embeddings (or first weight)."""
    base = adapter.module
    embeddings = getattr(base, "get_input_embeddings", lambda: None)()
    weight = getattr(embeddings, "weight", None)
    if weight is None:
        own = {id(p) for pair in adapter.factors() for p in pair}
        weight = next(p for p in base.parameters() if id(p) not in own and p.is_floating_point())
    flat = weight.detach().reshape(-1)
    where = torch.linspace(0, flat.numel() - 1, PROBES, device=flat.device).long()
    return {
        "class": type(base).__name__,
        "model_type": getattr(getattr(base, "config", None), "model_type", None),
        "embedding_shape": list(weight.shape),
        "probes": [] if weight.is_meta else flat[where].float().cpu().tolist(),
    }


def _check_fingerprint(saved: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for key in ("class", "model_type", "embedding_shape"):
        if saved.get(key) != found[key]:
            raise ValueError(
                f"Another base model: {key} is {found[key]!r}, but the posterior was learned on {saved.get(key)!r}."
            )
    a, b = torch.tensor(saved["probes"]), torch.tensor(found["probes"])
    if a.shape != b.shape or not torch.allclose(a, b, rtol=2e-2, atol=1e-2 * a.abs().max().item()):
        raise ValueError(
            "Another base model: it has the right shape, but its embedding weights are not those that the posterior "
            "was learned on (another checkpoint, or a randomly initialised model)."
        )


# what is written ------------------------------------------------------------------------------------------


def _describe_layers(adapter: Adapter) -> list[dict[str, Any]]:
    return [
        {
            "name": layer.name,
            "rank": layer.rank,
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "scaling": float(module.scaling[adapter.adapter_name]),
        }
        for layer, module in zip(adapter.subspace, adapter.layers, strict=True)
    ]


def _describe_prior(prior: Prior) -> dict[str, Any]:
    if isinstance(prior, FixedPrior):
        return {"family": prior.family.__name__, "parameters": list(prior.parameter_names)}
    return {"family": None, "class": type(prior).__name__}


def _describe_task(task: Task) -> dict[str, Any]:
    return {"class": type(task).__name__, "options": {name: _jsonable(getattr(task, name)) for name in task.options}}


def _jsonable(value: Any) -> Any:
    return value.item() if torch.is_tensor(value) else list(value) if isinstance(value, tuple) else value


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


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies: safetensors refuses tensors that share memory."""
    return {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}


# what is read ---------------------------------------------------------------------------------------------


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no {CONFIG}: it is not a directory that save_pretrained() wrote.")
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, more than any configuration needs.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: not JSON ({error}).") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} is damaged: expected a JSON object.")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{file} has format_version {version!r}; this version of scalabl_pyro reads {FORMAT_VERSION}.")
    return config


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing.")
    try:
        tensors = load_file(file)
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{file} is damaged: not a whole safetensors file ({error}).") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: tensor {name!r} holds values that are not finite.")
    return tensors


def _get(config: Mapping[str, Any], key: str, kind: type) -> Any:
    value = config.get(key)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{CONFIG}: {key!r} must be a {kind.__name__}, found {type(value).__name__}.")
    return value


def _parse_layers(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    layers = _get(config, "layers", list)
    fields = {"name": str, "rank": int, "in_features": int, "out_features": int, "scaling": float}
    if not layers or not all(isinstance(layer, dict) for layer in layers):
        raise ValueError(f"{CONFIG}: 'layers' must be a list of objects.")
    parsed = [{key: _get(layer, key, kind) for key, kind in fields.items()} for layer in layers]
    if len({layer["name"] for layer in parsed}) < len(parsed):
        raise ValueError(f"{CONFIG}: a layer is listed twice.")
    if any(min(layer["rank"], layer["in_features"], layer["out_features"]) < 1 for layer in parsed):
        raise ValueError(f"{CONFIG}: ranks and shapes of layers must be positive.")
    return parsed


def _check_keys(what: str, found: set[str], expected: set[str]) -> None:
    if found != expected:
        missing, surplus = sorted(expected - found)[:5], sorted(found - expected)[:5]
        raise ValueError(f"{what} does not hold what its configuration says: missing {missing}, unexpected {surplus}.")


def _factors(adapter: Adapter, tensors: Mapping[str, Tensor]) -> Factors:
    factors = []
    for layer, live in zip(adapter.subspace, adapter.factors(), strict=True):
        pair = [tensors[f"{layer.name}.lora_{x}.weight"] for x in "AB"]
        for x, saved, own in zip("AB", pair, live, strict=True):
            if saved.shape != own.shape:
                raise ValueError(
                    f"{ADAPTER}: lora_{x} of {layer.name!r} is {tuple(saved.shape)}, expected {tuple(own.shape)}."
                )
        factors.append((pair[0].to(live[0].device), pair[1].to(live[1].device)))
    return tuple(factors)


def _heads(adapter: Adapter, names: list[str], tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    if set(names) != set(adapter.heads):
        raise ValueError(f"{CONFIG}: trained heads are {names}, the module trains {sorted(adapter.heads)}.")
    heads = {}
    for name in names:
        head = copy.deepcopy(adapter.heads[name])
        prefix = f"heads.{name}."
        _load_strict(
            f"{ADAPTER}: head {name!r}", head, {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        )
        heads[name] = head.requires_grad_(False)
    return heads


def _task(config: Mapping[str, Any], path: Path, tensors: Mapping[str, Tensor]) -> Task:
    name = _get(config, "class", str)
    known = {
        c.__name__: c for c in (likelihoods.MultipleChoice, likelihoods.SequenceClassification, likelihoods.Regression)
    }
    if name not in known:
        raise ValueError(
            f"The posterior was learned with the task {name!r}: pass from_pretrained(..., task={name}(...))."
        )
    options = _get(config, "options", dict)
    if unknown := sorted(set(options) - set(known[name].options)):
        raise ValueError(f"{CONFIG}: unknown options of {name}: {unknown}. {nearest(unknown[0], known[name].options)}")
    tokenizer = AutoTokenizer.from_pretrained(path / TOKENIZER, local_files_only=True, trust_remote_code=False)
    return known[name](tokenizer, **options)


def _prior(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Prior:
    if config.get("family") is None:
        name = config.get("class")
        raise ValueError(
            f"The posterior was learned with the prior {name!r}: pass from_pretrained(..., prior={name}(...))."
        )
    family: Any = getattr(dist, _get(config, "family", str), None)
    names = [str(n) for n in _get(config, "parameters", list)]
    is_family = isinstance(family, type) and issubclass(family, torch.distributions.Distribution)
    allowed = getattr(family, "arg_constraints", None) if is_family else None
    if not isinstance(allowed, dict) or not set(names) <= set(allowed):
        raise ValueError(f"{CONFIG}: {config.get('family')!r} with parameters {names} is no known prior.")
    _check_keys(f"{POSTERIOR} (prior)", {k for k in tensors if k.startswith("prior.")}, {f"prior.{n}" for n in names})
    return FixedPrior(family, {n: tensors[f"prior.{n}"] for n in names})


def _guide(config: Mapping[str, Any], prior: Prior, adapter: Adapter, tensors: Mapping[str, Tensor]) -> Guide:
    family = config.get("family")
    dim = adapter.subspace.dim
    zeros = torch.zeros(dim, dtype=adapter.loc.dtype)
    if family == NormalGuide.family:
        return NormalGuide(zeros, zeros + 1)
    if family == DeltaGuide.family:
        return DeltaGuide(zeros)
    if family == AutoFamily.family:
        options = dict(_get(config, "options", dict))
        auto_class = getattr(autoguide, str(options.pop("class", None)), None)
        if not (isinstance(auto_class, type) and issubclass(auto_class, autoguide.AutoGuide)):
            raise ValueError(f"{CONFIG}: {config.get('options')} names no class of pyro.infer.autoguide.")
        return AutoFamily(prior, auto_class, init_loc_fn=BayesianLoRA(adapter).init_loc, **options)
    name = config.get("class")
    raise ValueError(
        f"The posterior was learned with the guide {name!r}: pass from_pretrained(..., guide={name}(...))."
    )


def _load_state(guide: Guide, prior: Prior, task: Task, tensors: Mapping[str, Tensor]) -> None:
    surplus = {k for k in tensors if k.split(".")[0] not in ("guide", "prior", "task")}
    _check_keys(POSTERIOR, surplus, set())
    for part, module in {"guide": guide, "prior": prior, "task": task}.items():
        own = {k[len(part) + 1 :]: v for k, v in tensors.items() if k.startswith(part + ".")}
        _load_strict(f"{POSTERIOR}: {part}", module, own)


def _load_strict(what: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    state = module.state_dict()
    _check_keys(what, set(tensors), set(state))
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise ValueError(f"{what}: {name!r} is {tuple(tensor.shape)}, expected {tuple(state[name].shape)}.")
    module.load_state_dict(tensors)
