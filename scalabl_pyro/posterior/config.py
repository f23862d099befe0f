"""The configuration of a saved posterior, ``scalabl_config.json``: written, and read with every entry checked."""

import json
import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .._errors import ScalaBLWarning, stacklevel_outside
from .._values import shown
from ..lora.float8 import BASE_PRECISIONS
from ..storage import directories, json_reader, untrusted_files
from ..storage.manifest import Entry, Manifest

#: Increased when an older version would misread the files. An older version refuses a higher number.
FORMAT_VERSION = 1
#: Increased when fields are added that an older version can ignore. It then warns.
FORMAT_MINOR = 2
CONFIG_FILE = "scalabl_config.json"
#: Largest allowed size of the file.
MAX_BYTES = 8 * 2**20

# Known keys of each part of the file, with the types of their values.
LAYER = {"name": str, "rank": int, "in_features": int, "out_features": int, "scaling": float}
GUIDE = {"family": str, "class": str, "options": dict}
PRIOR = {"family": str, "class": str, "parameters": list, "options": dict}
TASK = {"class": str, "options": dict}
BASE_MODEL = (
    *("class", "model_type", "embedding_shape", "settings", "quantized"),
    *("probes", "layer_probes", "tensor_probes"),
)


@dataclass(frozen=True)
class SavedConfig:
    """Configuration of a saved posterior.

    Attributes:
        library_version: Version of scalabl_pyro that wrote it.
        layers: ``name``, ``rank``, ``in_features``, ``out_features`` and ``scaling`` of each adapted layer.
        gauge: Gauge of the LoRA factors.
        heads: Paths of the modules that were trained in full.
        guide: ``family`` (None for a user's class), ``class`` and ``options``.
        prior: ``family`` (None for a user's class), ``class``, ``parameters`` and ``options``.
        task: ``class`` and ``options``.
        base_model: Fingerprint of the base model.
        base_tensors: Names of saved tensors of the base model that its checkpoint does not hold; since format 1.1.
        base_precision: Precision of the products with the frozen weights, see
            :func:`scalabl_pyro.bayesian_lora`; since format 1.2.
        provenance: How the posterior was made: options, seeds, versions.
        files: Manifest of all other files in the directory.
    """

    library_version: str
    layers: list[dict[str, Any]]
    gauge: str
    heads: list[str]
    guide: dict[str, Any]
    prior: dict[str, Any]
    task: dict[str, Any]
    base_model: dict[str, Any]
    base_tensors: list[str]
    base_precision: str
    provenance: dict[str, Any]
    files: Manifest

    def write(self, folder: Path) -> None:
        """Write the configuration to ``folder``.

        Raises:
            ValueError: An option of the guide or the task cannot be written as JSON.
        """
        for part, options in (("guide", self.guide["options"]), ("task", self.task["options"])):
            for name, value in options.items():
                try:
                    json.dumps(value, allow_nan=False)
                except (TypeError, ValueError):
                    raise ValueError(
                        f"The {part} has the option {name}={value!r}, which cannot be written as JSON."
                    ) from None
        versions = {"format_version": FORMAT_VERSION, "format_minor": FORMAT_MINOR}
        text = json.dumps({**versions, **asdict(self), "files": self.files.to_json()}, indent=2)
        directories.write_file(folder / CONFIG_FILE, (text + "\n").encode())


FIELDS = ("format_version", "format_minor", *SavedConfig.__dataclass_fields__)


def read_config(folder: Path) -> SavedConfig:
    """Read and check the configuration of a saved posterior.

    Args:
        folder: Directory that ``save_pretrained`` wrote.

    Raises:
        FileNotFoundError: The directory has no configuration.
        ValueError: The configuration is damaged, has a newer format, or has an entry of the wrong type.
    """
    try:
        content = untrusted_files.read_file(folder, CONFIG_FILE, limit=MAX_BYTES)
    except FileNotFoundError:
        message = f"{folder} holds no {CONFIG_FILE}: it is not a directory that save_pretrained() wrote."
        raise FileNotFoundError(message) from None
    try:
        return parse_config(content)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}{error}") from None


def parse_config(content: bytes) -> SavedConfig:
    """Parse and check the bytes of a configuration file.

    Raises:
        ValueError: As for :func:`read_config`. The message continues a sentence that begins with the file's name.
    """
    config = _json_object(content)
    version, minor = config.get("format_version"), config.get("format_minor", 0)
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ValueError(
            f" has format_version {version!r}; this version of scalabl_pyro reads {FORMAT_VERSION}. Load it with the "
            "version that saved it."
        )
    if not isinstance(minor, int) or isinstance(minor, bool) or minor < 0:
        raise ValueError(f": 'format_minor' must be a number from 0, found {minor!r}.")
    parsed = SavedConfig(
        library_version=get_entry(config, "library_version", str),
        layers=_layers(get_entry(config, "layers", list)),
        gauge=get_entry(config, "gauge", str),
        heads=_paths("heads", get_entry(config, "heads", list)),
        guide=_part(config, "guide", GUIDE),
        prior=_part(config, "prior", PRIOR),
        task={key: get_entry(get_entry(config, "task", dict), key, kind) for key, kind in TASK.items()},
        base_model=get_entry(config, "base_model", dict),
        base_tensors=_paths("base_tensors", get_entry({"base_tensors": [], **config}, "base_tensors", list)),
        base_precision=_precision(config.get("base_precision", "original")),
        provenance=get_entry(config, "provenance", dict),
        files=_manifest(config.get("files")),
    )
    if unknown := _unknown_fields(config):
        what = f" has fields that this version does not know: {unknown[:5]}"
        if minor <= FORMAT_MINOR:
            raise ValueError(f"{what}. Format {version}.{minor} has no such fields, so the file is damaged.")
        note = f"{CONFIG_FILE}{what}. scalabl_pyro {parsed.library_version} wrote it; these fields are ignored."
        warnings.warn(note, ScalaBLWarning, stacklevel=stacklevel_outside())
    return parsed


def get_entry(config: Mapping[str, Any], key: str, kind: type) -> Any:
    """Return the entry ``key`` of a part of the configuration, and check that it has the type ``kind``."""
    value = config.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f": {key!r} must be of type {kind.__name__}, found {type(value).__name__}.")
    return value


def _json_object(content: bytes) -> dict[str, Any]:
    try:
        config = json_reader.loads(content)
    except ValueError as error:  # not JSON, not text, nested or endless
        raise ValueError(f" is damaged: not JSON ({error}).") from None
    if not isinstance(config, dict):
        raise ValueError(" is damaged: expected a JSON object.")
    return config


def _part(config: Mapping[str, Any], name: str, fields: Mapping[str, type]) -> dict[str, Any]:
    """Return the entry of the guide or the prior, with all its fields if its class is one of this library."""
    part = get_entry(config, name, dict)
    if part.get("family") is None:  # a user's class, which the user must pass again
        known = {"class": "", "parameters": [], "options": {}, **part}
        return {"family": None} | {key: get_entry(known, key, fields[key]) for key in fields if key != "family"}
    return {key: get_entry({"class": "", "options": {}, **part}, key, kind) for key, kind in fields.items()}


def _layers(layers: list[Any]) -> list[dict[str, Any]]:
    if not layers or not all(isinstance(layer, dict) for layer in layers):
        raise ValueError(": 'layers' must be a list of objects.")
    parsed = [{key: get_entry(layer, key, kind) for key, kind in LAYER.items()} for layer in layers]
    if len({layer["name"] for layer in parsed}) < len(parsed):
        raise ValueError(": a layer is listed twice in 'layers'.")
    if any(min(layer["rank"], layer["in_features"], layer["out_features"]) < 1 for layer in parsed):
        raise ValueError(": ranks and sizes of layers must be positive.")
    if not all(math.isfinite(layer["scaling"]) for layer in parsed):
        raise ValueError(": 'scaling' of each layer must be finite.")
    return parsed


def _paths(key: str, paths: list[Any]) -> list[str]:
    if not all(isinstance(name, str) and name for name in paths) or len(set(paths)) < len(paths):
        raise ValueError(f": {key!r} must be a list of different module paths, found {shown(paths)}.")
    return paths


def _precision(value: object) -> str:
    if value not in BASE_PRECISIONS:
        raise ValueError(f": 'base_precision' must be one of {', '.join(BASE_PRECISIONS)}, found {shown(value)}.")
    return str(value)


def _manifest(value: object) -> Manifest:
    try:
        return Manifest.from_json(value)
    except ValueError as error:
        raise ValueError(f": {error}") from None


def _unknown_fields(config: Mapping[str, Any]) -> list[str]:
    known: list[tuple[str, Mapping[str, Any], Collection[str]]] = [
        ("", config, FIELDS),
        ("guide.", config["guide"], GUIDE),
        ("prior.", config["prior"], PRIOR),
        ("task.", config["task"], TASK),
        ("base_model.", config["base_model"], BASE_MODEL),
        *((f"layers[{i}].", layer, LAYER) for i, layer in enumerate(config["layers"])),
        *((f"files[{name!r}].", entry, Entry._fields) for name, entry in config["files"].items()),
    ]
    return [where + key for where, part, fields in known for key in part if key not in fields]
