"""Find the layers to adapt: turn names, patterns and defaults into module paths."""

import logging
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from .._errors import ScalaBLWarning, nearest, stacklevel_outside
from .._values import plain
from .default_targets import attention_layers, suitable, summary, used_layers
from .module_paths import block_of, has_suffix, last_name, lies_in

logger = logging.getLogger(__name__)

TargetModules = str | Iterable[str] | Callable[[str, nn.Module], bool] | None
ExcludedModules = str | Iterable[str] | Callable[[str, nn.Module], bool]

#: Parts of the names of Hugging Face classes that add a new head to a backbone.
CLASSIFIERS = ("Classif", "ForMultipleChoice", "ForQuestionAnswering", "Reward")
#: Usual names of new heads, for classifiers that do not name their backbone.
NEW_HEADS = ("classifier", "score")


def resolve_targets(
    module: nn.Module,
    target_modules: TargetModules = None,
    *,
    layers_to_transform: int | Iterable[int] | None = None,
    exclude_modules: ExcludedModules | None = None,
    r: int | None = None,
) -> list[str]:
    """Return the paths of the layers that get LoRA factors and latents, in module order.

    Args:
        module: Module whose layers are searched.
        target_modules: Layers to adapt: names that end the layers' paths (``["q_proj", "lm_head"]``), one regular
            expression that matches whole paths, ``"all-linear"``, or a predicate ``(path, module) -> bool``. None
            stands for the query and value projections and the LM head, as in the paper (Samplawski et al., 2025).
            None and ``"all-linear"`` leave out what :func:`~scalabl_pyro.lora.default_targets.suitable` names.
        layers_to_transform: Indices of the blocks whose layers are adapted. Layers outside numbered blocks are always
            kept.
        exclude_modules: Layers to leave out of those above: names, one regular expression, or a predicate.
        r: Rank of the factors; None if it is not known.

    Returns:
        Path of each layer to adapt.

    Raises:
        TypeError: If ``module`` is not an ``nn.Module``, or ``target_modules`` or ``exclude_modules`` has a wrong
            type.
        ValueError: If a name or pattern matches no layer, or matches a layer that cannot carry LoRA, or no layer is
            left.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"Expected a torch.nn.Module such as AutoModelForCausalLM.from_pretrained(...), got {module!r}."
        )
    linear = {name: m for name, m in module.named_modules() if name and is_linear(m)}
    if not linear:
        raise ValueError(
            f"{type(module).__name__} contains no linear layer below its top level. "
            "Wrap a bare layer in nn.Sequential(layer), or pass a model that has linear layers."
        )
    if target_modules is None:
        chosen = _default_targets(module, used_layers(module, linear), r=r)
    elif target_modules == "all-linear":
        chosen = _all_linear(module, used_layers(module, linear), r=r)
        _warn_of_fused_experts(module)
    else:
        chosen = _match("target_modules", target_modules, module, linear)
    if not chosen:
        raise ValueError(
            f"target_modules={target_modules!r} matches no linear layer. "
            + nearest(str(target_modules), _suffixes(linear))
        )
    if layers_to_transform is not None:
        chosen = _keep_blocks(chosen, layers_to_transform)
    if exclude_modules is not None:
        chosen = _leave_out(exclude_modules, module, {name: linear[name] for name in chosen})
    if target_modules is None or target_modules == "all-linear":
        logger.info("target_modules=%r adapts %d layers: %s", target_modules, len(chosen), summary(chosen))
    return chosen


def _match(option: str, given: object, module: nn.Module, linear: dict[str, nn.Module]) -> list[str]:
    """Return the paths of the layers that names, a pattern or a predicate match."""
    if callable(given):
        return [name for name, m in linear.items() if given(name, m)]
    if isinstance(given, str):
        return _match_pattern(option, given, linear)
    if isinstance(given, Iterable):
        return _match_suffixes(option, module, list(given), linear)
    all_linear = "'all-linear', " if option == "target_modules" else ""
    raise TypeError(
        f"{option}={given!r}: expected a list of names, a regular expression, {all_linear}a predicate or None."
    )


def _leave_out(excluded: ExcludedModules, module: nn.Module, chosen: dict[str, nn.Module]) -> list[str]:
    """Return the chosen layers without the excluded ones."""
    out = set(_match("exclude_modules", excluded, module, chosen))
    if not out:
        raise ValueError(
            f"exclude_modules={excluded!r} matches none of the layers to adapt. "
            + nearest(str(excluded), _suffixes(chosen))
        )
    if len(out) == len(chosen):
        raise ValueError(
            f"exclude_modules={excluded!r} leaves no layer to adapt. The layers were: {summary(list(chosen))}."
        )
    return [name for name in chosen if name not in out]


def _match_pattern(option: str, pattern: str, linear: dict[str, nn.Module]) -> list[str]:
    try:
        chosen = [name for name in linear if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ValueError(f"{option}={pattern!r} is not a valid regular expression ({error}).") from None
    if not chosen and any(has_suffix(name, pattern) for name in linear):
        raise ValueError(
            f"{option}={pattern!r} is a regular expression that must match a whole path, and it matches none. "
            f"To choose layers by name, pass a list: [{pattern!r}]."
        )
    return chosen


def new_heads(module: nn.Module) -> list[str]:
    """Return the names of a Hugging Face classifier's heads, whose weights are all trained and saved.

    These are all modules outside of the backbone, because checkpoints of base models hold the backbone alone.
    """
    if not _is_classifier(module):
        return []
    backbone = backbone_name(module)
    children = {name: m for name, m in module.named_children() if next(m.parameters(), None) is not None}
    return [name for name in children if (name in NEW_HEADS if backbone is None else name != backbone)]


def backbone_name(module: nn.Module) -> str | None:
    """Return the name of the backbone inside a Hugging Face classifier; None if the module is none, or names none."""
    prefix = getattr(module, "base_model_prefix", None)
    children = dict(module.named_children())
    return prefix if _is_classifier(module) and isinstance(prefix, str) and prefix in children else None


def _is_classifier(module: nn.Module) -> bool:
    classes = [c.__name__ for c in type(module).__mro__]
    return any(part in name for part in CLASSIFIERS for name in classes) and output_head(module) is None


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer, GPT-2's Conv1D, or a quantized layer that looks like a linear one."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention reads the weight of this layer and never calls the layer
    if isinstance(module, nn.Linear | Conv1D):
        return True
    looks_linear = hasattr(module, "in_features") and hasattr(module, "out_features")
    return looks_linear and (hasattr(module, "qweight") or hasattr(module, "W_q") or hasattr(module, "weight"))


def text_config(module: nn.Module) -> Any:
    """Return the configuration of the part of a model that reads text; None if the model has no configuration."""
    config: Any = getattr(module, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def is_encoder_decoder(module: nn.Module) -> bool:
    """Tell whether a module is an encoder-decoder, such as T5, by its configuration."""
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def output_head(module: nn.Module) -> nn.Module | None:
    """Return the layer that turns hidden states into logits over the vocabulary, or None if the module names none."""
    return _named_by(module, "get_output_embeddings")  # encoders have no language-model head


def input_embeddings(module: nn.Module) -> nn.Module | None:
    """Return the layer that embeds tokens, or None if the module names none (Canine hashes its characters)."""
    return _named_by(module, "get_input_embeddings")


def _named_by(module: nn.Module, method: str) -> nn.Module | None:
    get = getattr(module, method, None)
    try:
        return get() if callable(get) else None
    except (AttributeError, NotImplementedError):
        return None


def _default_targets(module: nn.Module, linear: dict[str, nn.Module], *, r: int | None) -> list[str]:
    model_type = getattr(getattr(module, "config", None), "model_type", "")
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type, ())
    if isinstance(known, str):  # PEFT names some families by a regular expression
        inner = [name for name in linear if re.fullmatch(known, name)]
    else:
        inner = [name for name in linear if any(has_suffix(name, suffix) for suffix in known)]
    chosen = set(inner or attention_layers(list(linear)))
    if not chosen:
        return _all_linear(module, linear, r=r)
    head = output_head(module)
    new = new_heads(module)
    return [
        name
        for name, m in linear.items()
        if m is head or (name in chosen and not any(lies_in(name, part) for part in new))
    ]


def _all_linear(module: nn.Module, linear: dict[str, nn.Module], *, r: int | None) -> list[str]:
    heads = new_heads(module)
    outside = {name: m for name, m in linear.items() if not any(lies_in(name, head) for head in heads)}
    return suitable(module, outside, r=r)


def _warn_of_fused_experts(module: nn.Module) -> None:
    """Warn if experts share one three-dimensional parameter: they are not layers, so they cannot be adapted."""
    fused = [name for name, p in module.named_parameters() if p.dim() == 3 and "expert" in name]
    if fused:
        total = sum(p.numel() for p in module.parameters())
        share = sum(module.get_parameter(name).numel() for name in fused) / total
        warnings.warn(
            f"'all-linear' leaves out {len(fused)} parameters of fused experts, such as {fused[0]!r}. They hold "
            f"{share:.0%} of the model's weights and cannot carry LoRA.",
            ScalaBLWarning,
            stacklevel=stacklevel_outside(),
        )


def _match_suffixes(option: str, module: nn.Module, targets: list[str], linear: dict[str, nn.Module]) -> list[str]:
    chosen = set()
    for target in targets:
        if not isinstance(target, str):
            raise TypeError(f"{option} contains {target!r}: expected only strings, the names of layers.")
        hits = [name for name in linear if has_suffix(name, target)]
        if not hits:
            raise ValueError(_no_match(option, module, target, linear))
        chosen.update(hits)
    return [name for name in linear if name in chosen]


def _no_match(option: str, module: nn.Module, target: str, linear: dict[str, nn.Module]) -> str:
    if option == "exclude_modules":
        return f"{option}: {target!r} matches none of the layers to adapt. {nearest(target, _suffixes(linear))}"
    for name, m in module.named_modules():
        if has_suffix(name, target):
            return (
                f"{option}: {target!r} is a {type(m).__name__}, which cannot carry a LoRA subspace. "
                f"Name linear layers instead. {nearest(target, _suffixes(linear))}"
            )
    return f"{option}: {target!r} matches no layer. {nearest(target, _suffixes(linear))}"


def _suffixes(names: Iterable[str]) -> set[str]:
    return {last_name(name) for name in names}


def _keep_blocks(names: list[str], blocks: int | Iterable[int]) -> list[str]:
    blocks = plain(blocks)
    given = list(blocks) if isinstance(blocks, Iterable) and not isinstance(blocks, str) else [blocks]
    wanted = {plain(block) for block in given}
    if not all(isinstance(block, int) and not isinstance(block, bool) for block in wanted):
        raise TypeError(f"layers_to_transform={blocks!r}: expected the index of a block, or a list of them.")
    present = {block.index for name in names if (block := block_of(name)) is not None}
    if missing := wanted - present:
        exist = f"blocks {min(present)} to {max(present)} exist" if present else "no targeted layer lies in a block"
        raise ValueError(
            f"layers_to_transform={sorted(wanted)}: no targeted layer lies in block(s) {sorted(missing)}; {exist}."
        )
    kept = [name for name in names if (block := block_of(name)) is None or block.index in wanted]
    if not kept:
        raise ValueError(f"layers_to_transform={sorted(wanted)} leaves no layer to adapt. Name at least one block.")
    return kept
