"""``scalabl_config.json``: a bounded, typed reader that believes nothing it has not checked."""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .._errors import ScalaBLWarning
from ..storage import directories, json_reader, untrusted_files

#: Raised when an older version would misread the files: it refuses them.
FORMAT_VERSION = 1
#: Raised when fields are added that an older version may do without: it ignores them, with a warning.
FORMAT_MINOR = 0
CONFIG_FILE = "scalabl_config.json"
MAX_BYTES = 8 * 2**20

LAYER = {"name": str, "rank": int, "in_features": int, "out_features": int, "scaling": float}
GUIDE = {"family": str, "class": str, "options": dict}
PRIOR = {"family": str, "class": str, "parameters": list, "options": dict}
TASK = {"class": str, "options": dict}
FILE = {"bytes": int, "sha256": str}
BASE_MODEL = ("class", "model_type", "embedding_shape", "probes", "layer_probes")


@dataclass(frozen=True)
class SavedConfig:
    """What a saved posterior says of itself.

    Attributes:
        library_version: version that wrote it.
        layers: name, rank, in_features, out_features, scaling of each adapted layer.
        gauge: gauge of the factors.
        heads: paths of the modules trained in full.
        guide: ``family`` (None for a class of the user's own), ``class``, ``options``.
        prior: ``family`` (None for a class of the user's own), ``class``, ``parameters``, ``options``.
        task: ``class``, ``options``.
        base_model: fingerprint.
        provenance: how the posterior came about.
        files: ``bytes`` and ``sha256`` of every other file, by path in the directory.
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
    files: dict[str, dict[str, Any]]

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
        versions = {"format_version": FORMAT_VERSION, "format_minor": FORMAT_MINOR}
        text = json.dumps({**versions, **asdict(self)}, indent=2)
        directories.write_file(folder / CONFIG_FILE, (text + "\n").encode())


FIELDS = ("format_version", "format_minor", *SavedConfig.__dataclass_fields__)


def read_config(folder: Path) -> SavedConfig:
    """Read and check the configuration of ``folder``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, of a newer format, or an entry has the wrong type; file and entry are named.
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
    """The configuration in the bytes of its file.

    Raises:
        ValueError: as :func:`read_config`; the message goes on from the name of the file.
    """
    config = _json_object(content)
    version, minor = config.get("format_version"), config.get("format_minor", 0)
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ValueError(f" has format_version {version!r}; this version of scalabl_pyro reads {FORMAT_VERSION}.")
    if not isinstance(minor, int) or isinstance(minor, bool) or minor < 0:
        raise ValueError(f": 'format_minor' must be a number from 0, found {minor!r}.")
    parsed = SavedConfig(
        library_version=get_entry(config, "library_version", str),
        layers=_layers(get_entry(config, "layers", list)),
        gauge=get_entry(config, "gauge", str),
        heads=_heads(get_entry(config, "heads", list)),
        guide=_part(config, "guide", GUIDE),
        prior=_part(config, "prior", PRIOR),
        task={key: get_entry(get_entry(config, "task", dict), key, kind) for key, kind in TASK.items()},
        base_model=get_entry(config, "base_model", dict),
        provenance=get_entry(config, "provenance", dict),
        files=_files(get_entry(config, "files", dict)),
    )
    if unknown := _unknown_fields(config):
        what = f" has fields that this version does not know: {unknown[:5]}"
        if minor <= FORMAT_MINOR:
            raise ValueError(f"{what}. Format {version}.{minor} has none, so the file is damaged.")
        note = f"{CONFIG_FILE}{what}. scalabl_pyro {parsed.library_version} wrote it; they are ignored."
        warnings.warn(note, ScalaBLWarning, stacklevel=5)
    return parsed


def get_entry(config: Mapping[str, Any], key: str, kind: type) -> Any:
    """The entry ``key``, which must be of type ``kind``."""
    value = config.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f": {key!r} must be a {kind.__name__}, found {type(value).__name__}.")
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
    """Guide or prior: all entries where the family is one of this library, else what tells the user which it was."""
    part = get_entry(config, name, dict)
    if part.get("family") is None:
        return part
    return {key: get_entry({"class": "", "options": {}, **part}, key, kind) for key, kind in fields.items()}


def _layers(layers: list[Any]) -> list[dict[str, Any]]:
    if not layers or not all(isinstance(layer, dict) for layer in layers):
        raise ValueError(": 'layers' must be a list of objects.")
    parsed = [{key: get_entry(layer, key, kind) for key, kind in LAYER.items()} for layer in layers]
    if len({layer["name"] for layer in parsed}) < len(parsed):
        raise ValueError(": a layer is listed twice.")
    if any(min(layer["rank"], layer["in_features"], layer["out_features"]) < 1 for layer in parsed):
        raise ValueError(": ranks and shapes of layers must be positive.")
    if not all(math.isfinite(layer["scaling"]) for layer in parsed):
        raise ValueError(": 'scaling' of each layer must be finite.")
    return parsed


def _heads(heads: list[Any]) -> list[str]:
    if not all(isinstance(name, str) and name for name in heads) or len(set(heads)) < len(heads):
        raise ValueError(f": 'heads' must be a list of module paths, each once, found {heads}.")
    return heads


def _files(entries: dict[str, Any]) -> dict[str, dict[str, Any]]:
    parsed = {}
    for name, entry in entries.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name:
            raise ValueError(f": 'files' names {name!r}, which is no path inside the directory.")
        if not isinstance(entry, dict):
            raise ValueError(f": 'files' must give an object for {name!r}.")
        parsed[name] = {key: get_entry(entry, key, kind) for key, kind in FILE.items()}
    return parsed


def _unknown_fields(config: Mapping[str, Any]) -> list[str]:
    known: list[tuple[str, Mapping[str, Any], Any]] = [
        ("", config, FIELDS),
        ("guide.", config["guide"], GUIDE),
        ("prior.", config["prior"], PRIOR),
        ("task.", config["task"], TASK),
        ("base_model.", config["base_model"], BASE_MODEL),
        *((f"layers[{i}].", layer, LAYER) for i, layer in enumerate(config["layers"])),
        *((f"files[{name!r}].", entry, FILE) for name, entry in config["files"].items()),
    ]
    return [where + key for where, part, fields in known for key in part if key not in fields]
