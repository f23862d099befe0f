"""``scalabl_config.json``: a bounded, typed reader that believes nothing it has not checked."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
NAME = "scalabl_config.json"
MAX_BYTES = 16 * 2**20
PRIOR = {"family": str, "parameters": list, "options": dict}


@dataclass(frozen=True)
class SavedConfig:
    """What a saved posterior says of itself.

    Attributes:
        library_version: version that wrote it.
        layers: name, rank, in_features, out_features, scaling of each adapted layer.
        gauge: gauge of the factors.
        heads: paths of the modules trained in full.
        guide: ``family`` (None for a class of the user's own), ``class``, ``options``.
        prior: ``family`` (None for a class of the user's own), ``class``, ``parameters``.
        task: ``class``, ``options``.
        base_model: fingerprint.
        provenance: how the posterior came about.
    """

    library_version: str
    layers: list[dict[str, Any]]
    gauge: str
    heads: list[str]
    guide: dict[str, Any]
    prior: dict[str, Any]
    task: dict[str, Any]
    base_model: dict[str, Any]
    provenance: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write it to ``folder``.

        Raises:
            ValueError: an option that JSON cannot hold, by name.
        """
        for part, options in (("guide", self.guide["options"]), ("task", self.task["options"])):
            for name, value in options.items():
                try:
                    json.dumps(value, allow_nan=False)
                except (TypeError, ValueError):
                    raise ValueError(f"The {part} has the option {name}={value!r}, which JSON cannot hold.") from None
        text = json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2)
        (folder / NAME).write_text(text + "\n", encoding="utf-8")


def read(folder: Path) -> SavedConfig:
    """Read and check the configuration of ``folder``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, of another version, or an entry has the wrong type; the entry is named.
    """
    config = _parse(folder)
    version = config.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ValueError(
            f"{folder / NAME} has format_version {version!r}; this version of scalabl_pyro reads {FORMAT_VERSION}."
        )
    guide, prior, task = (get(config, part, dict) for part in ("guide", "prior", "task"))
    heads = get(config, "heads", list)
    if not all(isinstance(name, str) for name in heads):
        raise ValueError(f"{NAME}: 'heads' must be a list of module paths, found {heads}.")
    return SavedConfig(
        library_version=str(config.get("library_version")),
        layers=_layers(get(config, "layers", list)),
        gauge=get(config, "gauge", str),
        heads=heads,
        guide=guide if guide.get("family") is None else {**guide, "options": get(guide, "options", dict)},
        prior=prior
        if prior.get("family") is None
        else {k: get({"options": {}, **prior}, k, t) for k, t in PRIOR.items()},
        task={"class": get(task, "class", str), "options": get(task, "options", dict)},
        base_model=get(config, "base_model", dict),
        provenance=get(config, "provenance", dict),
    )


def get(config: Mapping[str, Any], key: str, kind: type) -> Any:
    """The entry ``key``, which must be of type ``kind``."""
    value = config.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{NAME}: {key!r} must be a {kind.__name__}, found {type(value).__name__}.")
    return value


def _parse(folder: Path) -> dict[str, Any]:
    file = folder / NAME
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {NAME}: it is not a directory that save_pretrained() wrote.")
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, more than any configuration needs.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not text, nested or endless
        raise ValueError(f"{file} is damaged: not JSON ({error}).") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} is damaged: expected a JSON object.")
    return config


def _layers(layers: list[Any]) -> list[dict[str, Any]]:
    fields = {"name": str, "rank": int, "in_features": int, "out_features": int, "scaling": float}
    if not layers or not all(isinstance(layer, dict) for layer in layers):
        raise ValueError(f"{NAME}: 'layers' must be a list of objects.")
    parsed = [{key: get(layer, key, kind) for key, kind in fields.items()} for layer in layers]
    if len({layer["name"] for layer in parsed}) < len(parsed):
        raise ValueError(f"{NAME}: a layer is listed twice.")
    if any(min(layer["rank"], layer["in_features"], layer["out_features"]) < 1 for layer in parsed):
        raise ValueError(f"{NAME}: ranks and shapes of layers must be positive.")
    if not all(math.isfinite(layer["scaling"]) for layer in parsed):
        raise ValueError(f"{NAME}: 'scaling' of each layer must be finite.")
    return parsed
