"""A posterior as a directory of safetensors and JSON; no pickle is written or read.

    scalabl_config.json         what was adapted, families of guide, prior and task, fingerprint of the base model
    adapter_model.safetensors   A and B of each layer, trained heads
    posterior.safetensors       tensors of guide, prior and task
    tokenizer/                  the tokenizer of the task

Reading is strict: every key and shape must be the expected one, the base model must be the one that the posterior was
learned on, no file may have changed since, and a failed load leaves the model as it was.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import guides, priors, tasks
from .._process.lock import LOCK
from .._version import __version__
from ..guides import Guide
from ..lora.adapter import Adapter
from ..lora.attach import find_adapter
from ..lora.fingerprint import check_fingerprint, describe_layers, fingerprint
from ..lora.inject import reattach
from ..model.bayesian_lora import BayesianLoRA
from ..priors import Prior
from ..storage.directories import staged
from ..storage.tensor_files import check_keys, read_tensors, write_tensors
from ..storage.untrusted_files import check_file, describe_files
from ..tasks import Task, copy_task
from .config import CONFIG_FILE, SavedConfig, read_config
from .restore import (
    ADAPTER,
    POSTERIOR,
    TOKENIZER,
    check_adapter_keys,
    check_heads,
    check_override,
    checked_mean,
    load_strict,
    saved_factors,
    saved_guide,
    saved_heads,
    saved_prior,
    saved_task,
    write_tokenizer,
)
from .state import PosteriorState

#: Tensor files may be this large, or as large as the base model in double precision.
MIN_LIMIT = 2**30


def save(path: str | Path, posterior: PosteriorState) -> None:
    """Write ``posterior`` to the directory ``path``; a posterior that was there is replaced whole, or kept whole.

    Raises:
        FileExistsError: ``path`` holds something else.
        ValueError: a guide or task with options that JSON cannot hold.
    """
    path = Path(path).resolve()
    if path.exists() and not (path / CONFIG_FILE).exists() and (path.is_file() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and holds no posterior: give the path of a new directory.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as folder:
        write_tensors(folder / ADAPTER, _adapter_tensors(posterior))
        write_tensors(folder / POSTERIOR, _posterior_tensors(posterior.guide, posterior.prior, posterior.task))
        if posterior.task.tokenizer is not None:
            write_tokenizer(folder / TOKENIZER, posterior.task.tokenizer)
        _describe(posterior, describe_files(folder)).write(folder)


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
    check_override("task", task, Task)
    check_override("prior", prior, Prior)
    if guide is not None and not isinstance(guide, Guide) and not callable(guide):
        raise TypeError(f"guide={guide!r}: expected a scalabl_pyro.guides.Guide, or a callable blora -> Guide.")
    with LOCK, errors_name(path):
        return _load(path, llm, task, prior, guide)


def _load(
    path: Path,
    llm: nn.Module,
    task: Task | None,
    prior: Prior | None,
    guide: Guide | Callable[[BayesianLoRA], Guide] | None,
) -> dict[str, Any]:
    config = read_config(path)
    limit = max(MIN_LIMIT, 8 * sum(p.numel() for p in llm.parameters()))
    adapter_tensors, tensors = (read_tensors(path, name, limit=limit) for name in (ADAPTER, POSTERIOR))
    check_adapter_keys(config, adapter_tensors)
    check_heads(config.heads, adapter_tensors, llm)

    carried = find_adapter(llm)
    adapter = carried or reattach(llm, config.layers, gauge=config.gauge, heads=config.heads)
    try:
        if carried is not None:
            _check_carried(carried, config, path)
        check_fingerprint(config.base_model, fingerprint(adapter))
        factors = saved_factors(adapter, adapter_tensors)
        heads = saved_heads(adapter, config.heads, adapter_tensors)
        own_prior = (
            saved_prior(config, tensors, adapter)
            if prior is None
            else priors.as_prior(copy.deepcopy(prior), adapter.subspace)
        )
        own_task = saved_task(config, path) if task is None else copy_task(task)
        own_guide = saved_guide(config, guide, own_prior, adapter, tensors)
        for part, module in {"guide": own_guide, "prior": own_prior, "task": own_task}.items():
            state = {k[len(part) + 1 :]: v for k, v in tensors.items() if k.startswith(part + ".")}
            load_strict(f"{POSTERIOR}: {part}", module, state)
        check_keys(POSTERIOR, {k for k in tensors if k.split(".")[0] not in ("guide", "prior", "task")}, set())
        mean = checked_mean(own_guide, adapter.subspace.dim)
        _check_unchanged(path, config, with_tokenizer=task is None)
    except BaseException:
        if carried is None:
            adapter.unload()
        raise
    if carried is None:
        adapter.rest_at(mean, factors=factors, heads=heads)
    return {
        "adapter": adapter,
        "task": own_task.requires_grad_(False),
        "prior": own_prior.requires_grad_(False),
        "guide": own_guide.requires_grad_(False).eval(),
        "factors": factors,
        "heads": heads,
        "provenance": config.provenance,
    }


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Every error about a posterior says where it lies."""
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def _check_unchanged(path: Path, config: SavedConfig, *, with_tokenizer: bool) -> None:
    """Hashes come last: where a check above fails too, it says more."""
    if missing := {ADAPTER, POSTERIOR} - set(config.files):
        raise ValueError(f"{path / CONFIG_FILE}: 'files' does not describe {sorted(missing)}.")
    for name, expected in config.files.items():
        if with_tokenizer or not name.startswith(TOKENIZER + "/"):
            check_file(path, name, expected)


# what is written ------------------------------------------------------------------------------------------


def _describe(posterior: PosteriorState, files: dict[str, dict[str, Any]]) -> SavedConfig:
    return SavedConfig(
        library_version=__version__,
        layers=describe_layers(posterior.adapter),
        gauge=posterior.adapter.gauge,
        heads=sorted(posterior.heads),
        guide=guides.to_config(posterior.guide),
        prior=priors.to_config(posterior.prior),
        task=tasks.to_config(posterior.task),
        base_model=fingerprint(posterior.adapter),
        provenance=dict(posterior.provenance),
        files=files,
    )


def _adapter_tensors(posterior: PosteriorState) -> dict[str, Tensor]:
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
