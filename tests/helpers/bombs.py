"""Small files that ask for much: edits of valid posteriors, and the process that loads them under limits.

``python bombs.py FOLDER`` reads one case per line, as JSON, loads it, and answers with one line. The process may take 1
GB more than it has after its start.
"""

import contextlib
import hashlib
import io
import json
import os
import resource
import select
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

MEGABYTES = 1000  # that a case may take above the base
SECONDS = 10  # that a case may take
MAX_CHARACTERS = 2_000_000  # of JSON that a case repeats: the process must hold the case itself under its limit
CONFIG = "scalabl_config.json"


# edits ------------------------------------------------------------------------------------------------------


def spots(value: Any) -> list[tuple[Any, Any]]:
    """Every entry of a nest of lists and dicts: (container, key or index)."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [spot for key in keys for spot in [(value, key), *spots(value[key])]]


def edit_value(root: Any, how: str, where: int, size: int, value: Any) -> Any:
    """Change one entry of a JSON value; ``where`` chooses it."""
    box = [root]
    found = [spot for spot in spots(box) if how != "number" or isinstance(spot[0][spot[1]], int | float)] or spots(box)
    container, key = found[where % len(found)]
    old = container[key]
    if how in ("put", "number"):
        container[key] = value
    elif how == "enlarge":  # more of the same, up to a few megabytes
        many = max(2, min(size, MAX_CHARACTERS // (len(json.dumps(old)) + 1)))
        if isinstance(old, dict):
            inner = next(iter(old.values()), value)
            container[key] = {**old, **{f"k{i}": inner for i in range(many)}}
        elif isinstance(old, list | str):
            container[key] = (old or [value]) * many if isinstance(old, list) else (old or "x") * many
        else:
            container[key] = [old] * many
    elif how == "nest":
        for i in range(size % 60):
            container[key] = {"x": container[key]} if i % 3 == 2 else [container[key]]
    elif how == "copy":
        other, name = spots(box)[size % len(spots(box))]
        container[key] = json.loads(json.dumps(other[name]))
    elif how == "rename" and isinstance(container, dict):
        container[str(value) if not isinstance(value, str) else value] = container.pop(key)
    elif how == "add":
        container[key] = {**old, "x": value} if isinstance(old, dict) else [old, value]
    return box[0]


def edit_entries(content: bytes, how: str, where: int, size: int, value: Any) -> tuple[bytes, int]:
    """Change the list of tensors; return the new beginning of the file, and the size that agrees with it."""
    from scalabl_pyro.storage.tensor_files import DTYPES

    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = sorted(name for name in header if name != "__metadata__")
    if names and how == "shape":
        name = names[where % len(names)]
        shape = header[name]["shape"]
        if isinstance(value, list):
            shape = value
        elif isinstance(value, int):
            shape = [*shape, value] if size % 3 == 0 or not shape else [*shape[:-1], value]
        header[name]["shape"] = shape
    elif names:
        header = edit_value(header, how, where, size, value)
    if how != "shape" or not names:
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data, 0
    end, kept = 0, b""
    for key in [*(n for n in names if n != name), name]:  # the changed tensor comes last: the others keep their numbers
        entry = header[key]
        old = data[slice(*entry["data_offsets"])]
        count = DTYPES.get(entry["dtype"], 4)
        for n in entry["shape"]:
            count *= n
        entry["data_offsets"] = [end, end + count]
        end, kept = end + count, kept + old
    text = json.dumps(header).encode()
    begin = len(text).to_bytes(8, "little") + text
    return begin + kept[: max(end, 0)], len(begin) + end


def build(place: Any, case: dict[str, Any]) -> None:
    """Write the files of a case. Hashes in manifests belong to the files, so that later checks are reached."""
    valid = place.valid[case["kind"]]
    changed: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    for file, how, where, size, value in case.get("edits", ()):
        names = [name for name in valid if file in name] or sorted(valid)
        name = names[where % len(names)]
        content = changed.get(name, valid[name])
        if name.endswith(".safetensors"):
            with contextlib.suppress(TypeError, KeyError, AttributeError, OverflowError):
                changed[name], sizes[name] = edit_entries(content, how, where // 7, size, value)
        elif name.endswith(".json"):
            if isinstance(value, dict) and how == "part":  # {"guide": {...}}: whole parts of a configuration
                changed[name] = json.dumps({**json.loads(content), **value}).encode()
            elif how == "raw":
                changed[name] = value.encode() * max(1, size)
            else:
                changed[name] = json.dumps(edit_value(json.loads(content), how, where // 7, size, value)).encode()
    if "tensors" in case:
        from safetensors import torch as safe

        name = next(n for n in valid if n.endswith("posterior.safetensors"))
        changed[name] = safe.save(tensors_of(dict(safe.load(valid[name])), case["tensors"]))
    try:
        place.put(case["kind"], changed)
    except (ValueError, TypeError, KeyError, AttributeError):  # no manifest is left to hold a hash
        place.put(case["kind"], changed, rehash=False)
    for name, size in sizes.items():
        if 0 < size < 2**42 and (place.folder / name).is_file():
            os.truncate(place.folder / name, size)  # sparse: it takes no room
    for link in case.get("links", ()):
        add_link(place.folder, *link)


def tensors_of(tensors: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Replace all tensors of the parts that are named: {"prior.scale": [shape, number]}."""
    import torch

    parts = {name.split(".")[0] for name in new}
    kept = {name: value for name, value in tensors.items() if name.split(".")[0] not in parts}
    return kept | {name: torch.full(shape, float(number)) for name, (shape, number) in new.items()}


def add_link(folder: Path, how: str, count: int, target: str) -> None:
    """Add files, links or spellings, and list them."""
    owner = folder / (CONFIG if (folder / CONFIG).exists() else "baseline.json")
    config = json.loads(owner.read_bytes())
    if how == "sparse":
        (folder / "x").touch()
        os.truncate(folder / "x", count)
        config["files"]["x"] = {"bytes": count, "sha256": "0" * 64}
    elif how == "spellings":
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
        file = "posterior.safetensors" if "posterior.safetensors" in names else names[-1]
        content = (folder / file).read_bytes()
        entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for i in range(count):
            config["files"]["./" * (i + 1) + file] = entry
    elif how == "children":  # each of them a link to a folder
        inner = sorted(p for p in folder.iterdir() if p.is_dir())
        names = [f"m{i}" for i in range(count)]
        for name in names:
            (folder / name).symlink_to(folder if target == "itself" else inner[0])
        config["children"] = config.get("children", []) + names
    elif how == "link":
        victims = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".json")
        victim = victims[count % len(victims)]
        victim.unlink()
        victim.symlink_to(target)
    owner.write_text(json.dumps(config))


# the process ------------------------------------------------------------------------------------------------


def kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def serve(root: Path) -> None:
    """Answer one case per line: {"outcome", "seconds", "megabytes", "kept"}.

    "megabytes" is the peak above what the process had before the case, "kept" the address space after it, above the
    base. The limit counts address space.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from bomb_places import places

    warnings.simplefilter("ignore")
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), io.StringIO()
    printed = root / "printed"  # what libraries in other languages than Python write to the standard output
    os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), 1)
    ready = places(root)
    base = kilobytes("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, ((base + MEGABYTES * 1024) * 1024,) * 2)
    print(json.dumps({name: sorted(place.valid) for name, (place, _) in ready.items()}), file=answers, flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        place, check = ready[case["place"]]
        build(place, case)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before, start = kilobytes("VmRSS"), time.perf_counter()
        try:
            outcome = check(case)
        except BaseException as error:
            outcome = f"BROKEN {type(error).__name__}: {error}"[:2000]
        if text := printed.read_bytes():
            os.truncate(printed, 0)
            outcome = f"BROKEN the case wrote to the standard output: {text[:500]!r}"
        answer = {"outcome": outcome, "seconds": time.perf_counter() - start}
        answer["megabytes"] = (kilobytes("VmHWM") - before) / 1024
        answer["kept"] = (kilobytes("VmSize") - base) / 1024
        print(json.dumps(answer), file=answers, flush=True)


class Bomber:
    """The process that loads the cases. A case that takes longer than SECONDS ends it, and the next starts another."""

    def __init__(self, root: Path) -> None:
        self.root, self.process = root, None
        self.worst = {"seconds": 0.0, "megabytes": 0.0, "kept": 0.0}

    def start(self) -> dict[str, list[str]]:
        """Start the process; return the kinds of each place."""
        here = Path(__file__)
        paths = [str(here.parents[2]), str(here.parent), str(here.parents[1] / "posterior")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONDONTWRITEBYTECODE": "1", "MALLOC_ARENA_MAX": "1"}
        pipe: Any = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, str(here), str(self.root)], stdin=pipe, stdout=pipe, text=True, env=environment
        )
        return self.answer(200)

    def answer(self, seconds: float) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            self.stop()
            return {"outcome": f"BROKEN more than {seconds} seconds", "seconds": seconds, "megabytes": 0.0, "kept": 0.0}
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.process = None
            return {"outcome": f"BROKEN the process ended with {code}", "seconds": 0.0, "megabytes": 0.0, "kept": 0.0}
        return json.loads(line)

    def load(self, case: dict[str, Any]) -> dict[str, Any]:
        """Load a case, and check its limits. One process serves all cases: what loading kept would count each time."""
        if self.process is None:
            self.start()
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        found = self.answer(SECONDS)
        for part in self.worst:
            self.worst[part] = max(self.worst[part], found[part])
        assert not found["outcome"].startswith("BROKEN"), (case, found)
        assert found["megabytes"] < MEGABYTES, (case, found)
        return found

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
