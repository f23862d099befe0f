"""The layers that are adapted if the user names none: the default, and ``"all-linear"``."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from .layer_checks import shape_of
from .module_paths import has_suffix, last_name, lies_in

logger = logging.getLogger(__name__)

#: Names of query and value projections in different families. The first entry counts of which all names are present.
ATTENTION_NAMES: tuple[tuple[str, ...], ...] = (
    ("q_proj", "v_proj"),
    ("q_proj", "kv_b_proj"),  # latent attention (DeepSeek)
    ("q_b_proj", "kv_b_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),  # DistilBERT, XLM
    ("query_proj", "value_proj"),
    ("q", "v"),
    ("qkv_proj",),  # Phi-3
    ("Wqkv",),  # ModernBERT
    ("query_key_value",),
    ("c_attn",),
    ("Wq", "Wv"),
    ("q_head", "v_head"),
    ("project_q", "project_v"),
)

#: Layers of a Mamba mixer whose weights a fused kernel, or the mixer itself, reads without calling the layers.
_READ_BY_MIXER = ("x_proj", "dt_proj", "out_proj")

#: Parts of classifiers whose outputs the class does not use, by class.
_UNUSED = {"CanineForSequenceClassification": "canine.final_char_encoder"}


def used_layers(module: nn.Module, linear: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the linear layers without those of parts that the class of the module does not use."""
    unused = _UNUSED.get(type(module).__name__)
    return {name: m for name, m in linear.items() if unused is None or not lies_in(name, unused)}


def attention_layers(names: Sequence[str]) -> list[str]:
    """Return the query and value projections among linear layers.

    If the names of the projections are unknown, return the input projections of Mamba mixers. The list is empty if the
    model has neither.

    Args:
        names: Paths of linear layers.
    """
    last_names = set(map(last_name, names))
    for wanted in (*ATTENTION_NAMES, ("in_proj",)):
        if last_names.issuperset(wanted):
            return [name for name in names if any(has_suffix(name, w) for w in wanted)]
    return []


def suitable(module: nn.Module, linear: Mapping[str, nn.Module], *, r: int | None) -> list[str]:
    """Return the linear layers that can carry LoRA of rank ``r``, without those that the model does not call.

    Left out are gates with one output in Hugging Face models, if ``r`` is larger than 1, and layers of Mamba mixers
    whose weights are read by fused kernels.

    Args:
        module: Module that contains the layers.
        linear: Its linear layers, by path.
        r: Rank; None means that gates are kept.
    """
    is_transformer = hasattr(getattr(module, "config", None), "model_type")
    gates = [name for name, m in linear.items() if is_transformer and (r or 1) > 1 and min(shape_of(m)) == 1]
    read = [name for name in linear if last_name(name) in _READ_BY_MIXER and is_in_mixer(module, name)]
    for reason, left_out in (("have a single input or output", gates), ("may be read without being called", read)):
        if left_out:
            logger.info("not adapted, because these layers %s: %s", reason, summary(left_out))
    return [name for name in linear if name not in {*gates, *read}]


def summary(names: Sequence[str]) -> str:
    """Summarize layers by the last part of their paths, such as ``2 q_proj, 2 v_proj, 1 lm_head``."""
    return ", ".join(f"{count} {name}" for name, count in Counter(map(last_name, names)).items())


def is_in_mixer(module: nn.Module, name: str) -> bool:
    """Tell whether the parent of a layer is a Mamba mixer, by the path of the layer in the module."""
    parent = module.get_submodule(name.rpartition(".")[0])
    return hasattr(parent, "conv1d") and hasattr(parent, "in_proj")
