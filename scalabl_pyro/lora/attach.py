"""Give a module a Bayesian LoRA adapter: check the options, then put in new layers or take those that are there."""

from collections.abc import Iterable, Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .._errors import check_choice, check_flag, check_scale
from .._values import number, plain
from .adapter import GAUGES, Adapter, Gauge
from .adopt import adopt
from .base_module import base_module, check_placement
from .base_tensors import unsaved_tensors
from .inject import inject
from .layer_checks import check_heads, check_rank, ranks_of
from .layers import SubspaceVariant
from .module_paths import lies_in
from .targets import ExcludedModules, TargetModules, new_heads, resolve_targets

DEFAULT_RANK = 8
DEFAULT_ALPHA = 16


def attach(
    module: nn.Module,
    *,
    r: int | None = None,
    lora_alpha: float | None = None,
    target_modules: TargetModules = None,
    exclude_modules: ExcludedModules | None = None,
    layers_to_transform: int | Iterable[int] | None = None,
    cut_rank: bool = False,
    lora_dropout: float = 0.0,
    gauge: Gauge = "unit_rows",
    modules_to_save: Sequence[str] | None = None,
    seed: int = 0,
    spectrum: bool = False,
) -> Adapter:
    """Give ``module`` LoRA layers with latents; the options are those of :func:`scalabl_pyro.bayesian_lora`.

    ``spectrum`` is that of :func:`scalabl_pyro.from_peft`; it concerns layers that the module has already. After an
    error the module may be changed in part: :func:`scalabl_pyro.bayesian_lora` puts it back.
    """
    check_choice("gauge", gauge, GAUGES)
    _check_module(module)
    r, lora_alpha, lora_dropout, seed = map(plain, (r, lora_alpha, lora_dropout, seed))
    _check_numbers(lora_alpha, lora_dropout)
    _check_names(modules_to_save)
    check_flag(cut_rank=cut_rank)
    inner = base_module(module)
    check_placement(inner)
    heads = _default_heads(inner) if modules_to_save is None else list(modules_to_save)
    check_heads(inner, heads)
    if found := {name: m for name, m in inner.named_modules() if isinstance(m, BaseTunerLayer)}:
        _check_left_out(
            r=r,
            lora_alpha=lora_alpha,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            layers_to_transform=layers_to_transform,
            cut_rank=cut_rank or None,
        )
        return adopt(inner, found, gauge=gauge, heads=heads, spectrum=spectrum, original=module)
    r = DEFAULT_RANK if r is None else r
    check_rank(r)
    names = resolve_targets(
        inner,
        target_modules,
        exclude_modules=exclude_modules,
        layers_to_transform=layers_to_transform,
        r=None if cut_rank else r,
    )
    _check_heads_apart(names, heads)
    ranks = dict(zip(names, ranks_of(inner, names, r, cut_rank=cut_rank), strict=True))
    config = LoraConfig(
        lora_alpha=DEFAULT_ALPHA if lora_alpha is None else lora_alpha,  # type: ignore[arg-type]
        lora_dropout=lora_dropout,
    )
    unsaved = unsaved_tensors(inner, heads=heads, warn=modules_to_save is None)
    return inject(inner, ranks, config, gauge=gauge, heads=heads, base_tensors=unsaved, seed=seed, original=module)


def _default_heads(module: nn.Module) -> list[str]:
    """New heads of a classifier, except those that carry PEFT layers: these stay as PEFT trained them."""
    layers = [name for name, m in module.named_modules() if isinstance(m, BaseTunerLayer)]
    return [head for head in new_heads(module) if not any(lies_in(name, head) for name in layers)]


def find_adapter(module: nn.Module) -> Adapter | None:
    """The Bayesian LoRA adapter that a module carries; None if it carries none."""
    for m in module.modules():
        for variant in getattr(m, "lora_variant", {}).values():
            if isinstance(variant, SubspaceVariant):
                return variant.adapter
    return None


def check_no_adapter(module: nn.Module) -> None:
    """Raise ValueError if a module carries a Bayesian LoRA adapter."""
    if find_adapter(module) is not None:
        raise ValueError(
            "This module already carries a Bayesian LoRA adapter. Use the object that bayesian_lora() or from_peft() "
            "returned before, or call its .unload() first."
        )


def _check_module(module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"Expected a torch.nn.Module such as AutoModelForCausalLM.from_pretrained(...), got {module!r}."
        )
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise ValueError(
            f"The model is wrapped in {type(module).__name__}: give bayesian_lora() the model itself, which is its "
            ".module. fit() shares each batch over processes, and adds up their gradients, by itself."
        )
    check_no_adapter(getattr(module, "llm", module))


def _check_numbers(lora_alpha: object, lora_dropout: float) -> None:
    if lora_alpha is not None and not 0 < (number(lora_alpha) or 0.0) < float("inf"):
        raise ValueError(f"lora_alpha={lora_alpha!r}: must be a positive number.")
    if lora_alpha is not None:
        check_scale(lora_alpha=float(lora_alpha))  # type: ignore[arg-type]
    if (chance := number(lora_dropout)) is None or not 0 <= chance < 1:
        raise ValueError(f"lora_dropout={lora_dropout!r}: must be at least 0 and below 1.")


def _check_names(modules_to_save: Sequence[str] | None) -> None:
    """Raise unless ``modules_to_save`` is None or a list of names."""
    given = modules_to_save
    if isinstance(given, str):
        raise TypeError(f"modules_to_save={given!r}: give a list of names, [{given!r}].")
    if given is not None and not (isinstance(given, Iterable) and all(isinstance(name, str) for name in given)):
        raise TypeError(f"modules_to_save={given!r}: expected a list of names, such as ['lm_head'].")


def _check_heads_apart(names: Sequence[str], heads: Sequence[str]) -> None:
    """Raise if a layer to adapt lies in a head that is trained in full."""
    if both := [name for name in names if any(lies_in(name, head) for head in heads)]:
        raise ValueError(
            f"modules_to_save trains {both[0]!r} in full, so it cannot be adapted too: leave it out of "
            "modules_to_save or of target_modules."
        )


def _check_left_out(**given: Any) -> None:
    """Raise if an option was given that existing LoRA layers decide."""
    if extra := [name for name, value in given.items() if value is not None]:
        raise ValueError(
            f"This module already carries PEFT LoRA layers, which decide {', '.join(extra)}. Leave that out to "
            "make those layers Bayesian, or unload them first."
        )
