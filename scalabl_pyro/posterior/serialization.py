"""A posterior as a directory of safetensors and JSON files. Pickle is neither written nor read.

    scalabl_config.json         adapted layers, classes of guide, prior and task, fingerprint of the base model
    adapter_model.safetensors   A and B of each layer, trained heads, tensors that the base checkpoint does not hold
    posterior.safetensors       tensors of guide, prior and task
    tokenizer/                  tokenizer of the task

Loading is strict. Every name and shape must be the expected one, the base model must be the one that the posterior was
learned on, and no file may have changed since it was saved. If loading fails, the model stays as it was.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import guides, priors, tasks
from .._arguments import check_path, check_role, known_arguments
from .._errors import ScalaBLWarning, stacklevel_outside
from .._process.lock import LOCK
from .._version import __version__
from ..guides import Guide
from ..lora.adapter import Adapter
from ..lora.attach import find_adapter
from ..lora.base_module import base_module, check_has_values, check_placement
from ..lora.base_tensors import plain_tensors
from ..lora.fingerprint import check_fingerprint, describe_layers, fingerprint
from ..lora.float8 import BasePrecision, precision_of
from ..lora.float8_convert import check_precision, convert
from ..lora.inject import reattach
from ..lora.targets import new_heads
from ..model.bayesian_lora import BayesianLoRA
from ..priors import Prior
from ..storage.budget import Budget
from ..storage.directories import staged
from ..storage.manifest import Manifest
from ..storage.tensor_files import read_tensors, write_tensors
from ..tasks import Task
from .adapter_file import (
    ADAPTER,
    adapter_tensors,
    check_adapter_keys,
    check_head_names,
    check_heads,
    other_base_tensors,
    saved_base_tensors,
    saved_factors,
    saved_heads,
)
from .config import CONFIG_FILE, SavedConfig, read_config
from .restore import POSTERIOR, Overrides, checked_mean, posterior_tensors, restore_parts
from .state import PosteriorState
from .tokenizer_files import TOKENIZER, write_tokenizer

#: Longest message of a refused file. Longer ones, which show what a file holds, lose their end.
MAX_MESSAGE = 1500


def save(path: str | Path, posterior: PosteriorState) -> None:
    """Write a posterior to a directory.

    A posterior that was saved there before is replaced completely, or kept completely if writing fails.

    Args:
        path: Directory, created if it does not exist.
        posterior: Posterior to write.

    Raises:
        FileExistsError: ``path`` holds something else.
        ValueError: An option of the guide or the task cannot be written as JSON, or numbers are not finite.
    """
    check_path("path", path)
    path = Path(path).resolve()
    if path.exists() and not (path / CONFIG_FILE).exists() and (path.is_file() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and does not hold a posterior: give the path of a new directory.")
    _check_draws(posterior)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {"guide": posterior.guide, "prior": posterior.prior, "task": posterior.task}
    with staged(path) as folder:
        write_tensors(folder / ADAPTER, adapter_tensors(posterior))
        write_tensors(folder / POSTERIOR, posterior_tensors(parts))
        if posterior.task.tokenizer is not None:
            write_tokenizer(folder / TOKENIZER, posterior.task.tokenizer)
        _config(posterior, Manifest.of_folder(folder)).write(folder)


@functools.partial(known_arguments, name="from_pretrained")
def load(
    path: str | Path,
    llm: nn.Module,
    *,
    task: Task | None = None,
    prior: Prior | None = None,
    guide: Guide | Callable[[BayesianLoRA], Guide] | None = None,
    base_precision: BasePrecision | None = None,
    budget: Budget | None = None,
) -> dict[str, Any]:
    """Load the fields of a saved posterior.

    Args:
        path: Directory that :func:`save` wrote.
        llm: Base model. It gets the saved LoRA layers, unless it already carries the same ones.
        task: Replaces the saved task, for a user's class.
        prior: Replaces the saved prior, for a user's class.
        guide: Replaces the saved guide, for a user's class; a guide, or a callable ``blora -> guide``.
        base_precision: Replaces the saved precision of the frozen weights, see :func:`scalabl_pyro.bayesian_lora`.
        budget: What the files may cost, for files that you trust; loading spends it. By default, see
            :meth:`~scalabl_pyro.storage.budget.Budget.beside`.

    Returns:
        Fields of :class:`~scalabl_pyro.posterior.state.PosteriorState`, by name.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The base model is another one, or a file is damaged or exceeds the budget.
    """
    check_role("llm", llm, "llm", call="Posterior.from_pretrained(llm, path)")
    check_path("path", path)
    path, overrides = Path(path), Overrides(task, prior, guide)
    overrides.check()
    if base_precision is not None:
        check_precision(base_precision)
    llm = base_module(llm)
    check_placement(llm)
    check_has_values(llm)
    with LOCK, path_in_errors(path):
        return _load(path, llm, overrides, budget_for(llm, budget), base_precision)


def _load(
    path: Path, llm: nn.Module, overrides: Overrides, budget: Budget, base_precision: BasePrecision | None
) -> dict[str, Any]:
    config = read_config(path)
    precision = cast(BasePrecision, config.base_precision if base_precision is None else base_precision)
    of_adapter, of_parts = (read_tensors(path, name, budget=budget) for name in (ADAPTER, POSTERIOR))
    check_adapter_keys(config, of_adapter)
    check_heads(config.heads, of_adapter, llm)
    carried = find_adapter(llm)
    adapter = carried or reattach(
        llm,
        config.layers,
        gauge=config.gauge,
        heads=config.heads,
        base_tensors=saved_base_tensors(config, of_adapter, llm),
    )
    try:
        if carried is not None:
            _check_carried(carried, config, of_adapter, path)
            _check_precision(carried, precision, path)
        _warn_of_lost_heads(config, llm)
        check_fingerprint(config.base_model, fingerprint(adapter))
        factors = saved_factors(adapter, of_adapter)
        heads = saved_heads(adapter, config.heads, of_adapter)
        parts = restore_parts(config, path, adapter, of_parts, overrides, budget)
        mean = checked_mean(parts.guide, adapter.subspace.dim)
        _check_unchanged(path, config, budget, with_tokenizer=overrides.task is None)
        if carried is None:
            convert(adapter, precision)
    except BaseException:
        if carried is None:
            adapter.unload()
        raise
    if carried is None:
        adapter.rest_at(mean, factors=factors, heads=heads)
    return {
        "adapter": adapter,
        "task": parts.task.requires_grad_(False),
        "prior": parts.prior.requires_grad_(False),
        "guide": parts.guide.requires_grad_(False).eval(),
        "factors": factors,
        "heads": heads,
        "provenance": config.provenance,
    }


def _check_draws(posterior: PosteriorState) -> None:
    """Raise ValueError if a draw is not finite, which finite tensors do not rule out: a scale can be exp(1000)."""
    for num_draws, what in ((0, "mean"), (1, "draw")):
        if not torch.isfinite(posterior.sample(num_draws).s).all():
            raise ValueError(
                f"The posterior is not saved, because a {what} of its guide holds NaN or infinity. Use the "
                f"posterior of an earlier step, or train again with smaller learning rates."
            )


def budget_for(llm: nn.Module, budget: Budget | None) -> Budget:
    """Return the given budget, or the default one beside a model."""
    if budget is None:
        return Budget.beside(sum(t.base.numel() for t in plain_tensors(llm)))
    if not isinstance(budget, Budget):
        raise TypeError(f"budget={budget!r}: expected a scalabl_pyro.storage.budget.Budget, or None.")
    return budget


@contextmanager
def path_in_errors(path: Path) -> Iterator[None]:
    """Turn every error about the content of files into one ValueError that names ``path`` and is not too long.

    Errors of the system about a file, such as one without permission to read it, become ValueErrors too.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except (ValueError, OSError, MemoryError, RecursionError) as error:
        text = str(error) if str(path) in str(error) else f"{path}: {error or type(error).__name__}"
        if isinstance(error, ValueError) and text == str(error) and len(text) <= MAX_MESSAGE:
            raise
        raise ValueError(text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "...") from error


def _check_unchanged(path: Path, config: SavedConfig, budget: Budget, *, with_tokenizer: bool) -> None:
    """Compare the files with the manifest. This comes last: if another check fails too, its message says more."""
    names = config.files.entries
    if missing := {ADAPTER, POSTERIOR} - set(names):
        raise ValueError(f"{path / CONFIG_FILE}: 'files' does not list {sorted(missing)}. Save the posterior again.")
    for name in names:
        if with_tokenizer or not name.startswith(TOKENIZER + "/"):
            config.files.check_file(path, name, budget=budget)


def _warn_of_lost_heads(config: SavedConfig, llm: nn.Module) -> None:
    """Warn of new heads in the file of an older version, which neither saved nor compared them."""
    lost = sorted(set(new_heads(llm)) - set(config.heads))
    if lost and "tensor_probes" not in config.base_model:
        warnings.warn(
            f"scalabl_pyro {config.library_version} did not save the modules {lost} of this classifier. Predictions "
            "are those of training only if the checkpoint of the base model holds them.",
            ScalaBLWarning,
            stacklevel=stacklevel_outside(),
        )


def _config(posterior: PosteriorState, files: Manifest) -> SavedConfig:
    return SavedConfig(
        library_version=__version__,
        layers=describe_layers(posterior.adapter),
        gauge=posterior.adapter.gauge,
        heads=sorted(posterior.heads),
        guide=guides.to_config(posterior.guide),
        prior=priors.to_config(posterior.prior),
        task=tasks.to_config(posterior.task),
        base_model=fingerprint(posterior.adapter),
        base_tensors=sorted(posterior.adapter.base_tensors),
        base_precision=precision_of(posterior.adapter.module),
        provenance=dict(posterior.provenance),
        files=files,
    )


def _check_carried(carried: Adapter, config: SavedConfig, tensors: Mapping[str, Tensor], path: Path) -> None:
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
    check_head_names(carried, config.heads)
    if other := other_base_tensors(carried, config, tensors):
        raise ValueError(
            f"The module already carries Bayesian LoRA, but {other[0]!r} is another tensor in {path}: call .unload() "
            "first, or load into another copy of the model."
        )


def _check_precision(carried: Adapter, precision: str, path: Path) -> None:
    """Raise ValueError if a module that carries the adapter already computes in another precision."""
    if (own := precision_of(carried.module)) != precision:
        raise ValueError(
            f"The module already carries Bayesian LoRA with base_precision={own!r}, but {path} is loaded with "
            f"{precision!r}: call .unload() first, or pass base_precision={own!r} to keep that of the module."
        )
