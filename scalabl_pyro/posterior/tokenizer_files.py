"""The tokenizer of a task as a folder of files that never refer to files outside the folder."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..storage import json_reader
from ..storage.budget import Budget
from ..storage.untrusted_files import check_tree, read_file
from .tokenizer_contents import check_small_file, check_vocabulary

TOKENIZER = "tokenizer"
TOKENIZER_CONFIG = "tokenizer_config.json"
#: Largest allowed size of the folder. Tokenizers with large vocabularies have about 35 MB.
MAX_TOKENIZER = 2**27
#: Largest allowed size of the configuration and of other small files. The largest known ones have about 1 MB.
MAX_SMALL = 2**23
#: Largest number of values in the JSON files with a vocabulary, which bounds the memory of transformers by 1 GB. A
#: vocabulary of 262,000 tokens with merges has 2 million.
MAX_VOCABULARY = 2_800_000
#: Largest number of objects in these files. Each added token is one; 130,000 take 4 seconds.
MAX_OBJECTS = 2**17
#: Names of the files with a vocabulary.
VOCABULARIES = ("tokenizer.json", "vocab.json")
#: Largest number of lines in a text file, such as a list of merges.
MAX_LINES = 2**21
#: Entries that transformers adds to the configuration when it loads a tokenizer.
ADDED_ON_LOADING = ("files_loaded", "is_local", "local_files_only", "name_or_path")


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Save a tokenizer, without the paths of the files that it was loaded from."""
    tokenizer.save_pretrained(folder)
    file = folder / TOKENIZER_CONFIG
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        kept = {k: v for k, v in config.items() if k not in ADDED_ON_LOADING and not _names_a_file(k, v)}
        if kept != config:
            file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_tokenizer(folder: Path, *, budget: Budget) -> Any:
    """Load a tokenizer; only files inside ``folder`` are read. Their sizes are checked before transformers reads them.

    Args:
        folder: Folder of the tokenizer.
        budget: Budget that the files and their bytes are drawn from.

    Raises:
        FileNotFoundError: The folder is missing.
        ValueError: A file is damaged, too large, leads out of the folder, or names another file.
    """
    files = check_tree(folder, limit=MAX_TOKENIZER, budget=budget)
    try:
        for file in files:
            _check_file(folder, file.relative_to(folder).as_posix(), budget)
        return AutoTokenizer.from_pretrained(folder.resolve(), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"The tokenizer {folder} is damaged ({error}).") from error


def _check_file(folder: Path, name: str, budget: Budget) -> None:
    """Check that a file is not larger than those of real tokenizers, and that the configuration names no other file."""
    is_vocabulary, is_json = name in VOCABULARIES, name.endswith(".json")
    limit = MAX_TOKENIZER if is_vocabulary or not is_json else MAX_SMALL
    content = read_file(folder.parent, f"{folder.name}/{name}", limit=limit, budget=budget)
    if is_vocabulary:
        json_reader.check_values(content, MAX_VOCABULARY)
        if (objects := content.count(b"{")) > MAX_OBJECTS:
            raise ValueError(f"{name} has up to {objects:,} added tokens, more than the {MAX_OBJECTS:,} allowed here")
        check_vocabulary(name, json_reader.loads(content, max_values=MAX_VOCABULARY))
    elif is_json:
        config = json_reader.loads(content)
        check_small_file(name, config)
        named = [key for key, value in config.items() if _names_a_file(key, value)] if isinstance(config, dict) else []
        if name == TOKENIZER_CONFIG and named:
            raise ValueError(f"{TOKENIZER_CONFIG} names files of its own choice: {named}")
    elif name.endswith(".txt") and (lines := content.count(b"\n")) > MAX_LINES:
        raise ValueError(f"{name} has {lines:,} lines, more than the {MAX_LINES:,} that are allowed here")


def _names_a_file(key: str, value: Any) -> bool:
    """Whether the tokenizer's class would open the value of an entry of its configuration as a path."""
    is_file = key in ("vocab", "merges", "init_inputs") or key.endswith(("_file", "_files", "_spm"))
    return is_file and bool(value) and not isinstance(value, int | float)
