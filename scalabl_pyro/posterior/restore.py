"""Restore prior, task and guide of a saved posterior, and refuse whatever is not exactly what it must be."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import guides, priors
from ..guides import Guide
from ..guides.saved_shapes import check_saved_shapes, saved_shapes
from ..lora.adapter import Adapter
from ..model.bayesian_lora import BayesianLoRA
from ..prediction.draws import sample
from ..priors import Prior
from ..storage.budget import Budget
from ..storage.tensor_files import below, check_keys, load_strict
from ..tasks import Task, copy_task, registry
from .config import CONFIG_FILE, SavedConfig
from .tokenizer_files import TOKENIZER, read_tokenizer

POSTERIOR = "posterior.safetensors"


class Overrides(NamedTuple):
    """Parts that the user passes to ``from_pretrained`` instead of the saved ones.

    Attributes:
        task: A task, or None for the saved one.
        prior: A prior, or None for the saved one.
        guide: A guide, a callable ``blora -> guide``, or None for the saved one.
    """

    task: Task | None = None
    prior: Prior | None = None
    guide: Guide | Callable[[BayesianLoRA], Guide] | None = None

    def check(self) -> None:
        """Raise TypeError unless each part has its class."""
        _check_class("task", self.task, Task)
        _check_class("prior", self.prior, Prior)
        if self.guide is not None and not isinstance(self.guide, Guide) and not callable(self.guide):
            raise TypeError(
                f"guide={self.guide!r}: expected a scalabl_pyro.guides.Guide, or a callable blora -> Guide."
            )


class Parts(NamedTuple):
    """Restored parts of a posterior, filled with the saved tensors."""

    task: Task
    prior: Prior
    guide: Guide


def posterior_tensors(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the tensors of task, prior and guide, by their names in the file."""
    return {f"{part}.{k}": v for part, module in parts.items() for k, v in module.state_dict().items()}


def restore_parts(
    config: SavedConfig,
    path: Path,
    adapter: Adapter,
    tensors: Mapping[str, Tensor],
    overrides: Overrides,
    budget: Budget,
) -> Parts:
    """Build prior, task and guide and load their tensors.

    Args:
        config: Configuration of the saved posterior.
        path: Its directory.
        adapter: Adapter that carries the saved layers.
        tensors: Content of the file ``posterior.safetensors``.
        overrides: Parts that replace the saved ones.
        budget: Budget that all parts are drawn from.

    Raises:
        ValueError: A part cannot be built, or its tensors are not the expected ones.
    """
    prior = (
        saved_prior(config, below(tensors, "prior."), adapter)
        if overrides.prior is None
        else priors.as_prior(copy.deepcopy(overrides.prior), adapter.subspace)
    )
    task = saved_task(config, path, budget) if overrides.task is None else copy_task(overrides.task)
    guide = saved_guide(config, overrides.guide, prior, adapter, below(tensors, "guide."), budget)
    parts = Parts(task=task, prior=prior, guide=guide)
    for name in ("guide", "prior", "task"):
        load_strict(f"{POSTERIOR}: {name}", getattr(parts, name), below(tensors, name + "."))
    check_keys(POSTERIOR, {name for name in tensors if name.split(".")[0] not in Parts._fields}, set())
    return parts


def saved_prior(config: SavedConfig, tensors: Mapping[str, Tensor], adapter: Adapter) -> Prior:
    """Build a prior whose class is one of this library, from its own tensors."""
    if config.prior.get("family") is None:
        raise ValueError(_pass_it_again("prior", config.prior))
    try:
        prior = priors.from_saved(config.prior, tensors, adapter.subspace)
    except (ValueError, TypeError, RuntimeError) as error:  # the distribution's own checks
        raise ValueError(f"{POSTERIOR}: prior {config.prior['family']!r}: {error}") from error
    _check_options("prior", config.prior["options"], priors.to_config(prior)["options"])
    return prior


def saved_task(config: SavedConfig, path: Path, budget: Budget) -> Task:
    """Build a task whose class is one of this library, with the saved tokenizer, which is not run yet."""
    name = config.task["class"]
    if name not in registry.TASKS:
        raise ValueError(_pass_it_again("task", config.task))
    tokenizer = read_tokenizer(path / TOKENIZER, budget=budget)
    try:
        return registry.from_options(name, tokenizer, config.task["options"], budget=budget)
    except Exception as error:  # a task asks the tokenizer, and the tokenizers library raises bare Exceptions
        raise ValueError(
            f"{path / CONFIG_FILE}: task {name}, with the tokenizer in {path / TOKENIZER}: {error}"
        ) from error


def saved_guide(
    config: SavedConfig,
    override: Guide | Callable[[BayesianLoRA], Guide] | None,
    prior: Prior,
    adapter: Adapter,
    tensors: Mapping[str, Tensor],
    budget: Budget,
) -> Guide:
    """Build a guide on the CPU. Its tensors are not loaded yet.

    Args:
        config: Configuration of the saved posterior.
        override: Guide, or function that builds one; None for the saved guide.
        prior: Restored prior.
        adapter: Adapter that carries the saved layers.
        tensors: Saved tensors of the guide. Their names and shapes must be those that its options ask for.
        budget: Budget that the guide is drawn from.
    """
    blora = BayesianLoRA(adapter, prior=copy.deepcopy(prior))
    if isinstance(override, Guide):
        return override.snapshot()
    if override is not None:
        built: Any = guides.wrap_autoguide(override(blora))
        _check_class("guide", built, Guide)
        return built.cpu()
    family = config.guide.get("family")
    if family is None or not isinstance(family, str):
        raise ValueError(_pass_it_again("guide", config.guide))
    ranks = adapter.subspace.ranks
    try:
        expected = saved_shapes(family, config.guide["options"], prior, ranks, budget=budget, file=CONFIG_FILE)
    except ValueError as error:
        raise ValueError(f"{CONFIG_FILE}: guide: {error}") from None
    check_saved_shapes(f"{POSTERIOR}: guide", tensors, expected)
    try:
        guide = guides.from_options(family, config.guide["options"], blora).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{CONFIG_FILE}: guide: {error}") from error
    _check_options("guide", config.guide["options"], guides.to_config(guide)["options"])
    return guide


def checked_mean(guide: Guide, dim: int) -> Tensor:
    """Return the (D,) posterior mean of a loaded guide.

    Raises:
        ValueError: The mean or a draw cannot be computed, has another shape, or is not finite.
    """
    try:
        mean, draw = sample(guide, 0, seed=0).s[0], sample(guide, 1, seed=0).s[0]
    except (RuntimeError, ValueError) as error:  # checks of torch and of the distribution
        raise ValueError(f"{POSTERIOR}: sampling from the guide fails ({error}).") from None
    for what, value in (("means", mean), ("draws", draw)):
        if value.shape != (dim,):
            raise ValueError(f"{POSTERIOR}: the guide's {what} have shape {tuple(value.shape)}, expected ({dim},).")
        if not torch.isfinite(value).all():
            raise ValueError(f"{POSTERIOR}: the guide's {what} are NaN or infinite. Save the posterior again.")
    return mean


def _check_class(name: str, value: object, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name}={value!r}: expected an instance of scalabl_pyro's {kind.__name__}.")


def _check_options(part: str, saved: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse unknown options, also those of a newer format: without them the numbers would be others."""
    if unknown := sorted(set(saved) - set(known)):
        names = ", ".join(map(repr, sorted(known))) or "none"
        raise ValueError(f"{CONFIG_FILE}: unknown options of the {part}: {unknown[:5]}. Known names: {names}.")


def _pass_it_again(part: str, entry: Mapping[str, Any]) -> str:
    name = entry.get("class")
    return f"The posterior was learned with the {part} {name!r}: pass from_pretrained(..., {part}={name}(...))."
