"""Settings of a Hugging Face configuration that change the function of a model without changing a tensor."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from .._errors import ScalaBLWarning, stacklevel_outside

#: Parts of the names of settings that do not change predictions, or that users set after loading.
_LEFT_OUT: tuple[str, ...] = (
    "name_or_path",
    "architectures",
    "transformers_version",
    "dtype",
    "cache",
    "id2label",
    "label2id",
)
_LEFT_OUT += ("return", "output_", "token_id", "pad_index", "drop", "initializer", "init_", "problem_type")
_LEFT_OUT += ("quantization_config", "attn_implementation", "experts_implementation", "num_labels", "chunk_size")


def settings(module: nn.Module) -> dict[str, Any]:
    """Return the numbers, flags and names in a module's configuration, ready for JSON; {} without a configuration."""
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    found = to_dict() if callable(to_dict) else None
    return dict(_flat(found)) if isinstance(found, Mapping) else {}


def warn_of_other_settings(saved: object, found: Mapping[str, Any]) -> None:
    """Warn if settings differ. Those of one side alone are skipped: another version of transformers may add them.

    Raises:
        ValueError: The saved settings are damaged.
    """
    if not isinstance(saved, Mapping):
        raise ValueError("The saved fingerprint is damaged: 'settings' is not a mapping.")
    other = [name for name in sorted(saved.keys() & found.keys()) if saved[name] != found[name]]
    if other:
        changes = ", ".join(f"{name}={found[name]!r} (in training {saved[name]!r})" for name in other[:5])
        warnings.warn(
            f"The base model has other settings than in training: {changes}. Its weights are the same, but predictions "
            "may differ. Build the base model with the configuration of training.",
            ScalaBLWarning,
            stacklevel=stacklevel_outside(),
        )


def _flat(values: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{path}{key}"
        if str(key).startswith("_") or any(part in str(key) for part in _LEFT_OUT):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, list | tuple) and all(_is_simple(v) for v in value):
            yield name, list(value)
        elif _is_simple(value):
            yield name, value


def _is_simple(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
