"""The tokenizer of a task as a folder of files that never refer to files outside the folder."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..storage import json_reader
from ..storage.untrusted_files import check_tree, read_file

TOKENIZER = "tokenizer"
TOKENIZER_CONFIG = "tokenizer_config.json"
#: Largest allowed size of the folder. Tokenizers with large vocabularies have about 50 MB.
MAX_TOKENIZER = 2**29
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


def read_tokenizer(folder: Path) -> Any:
    """Load a tokenizer; only files inside ``folder`` are read.

    Raises:
        FileNotFoundError: The folder is missing.
        ValueError: A file is damaged, leads out of the folder, or names another file.
    """
    check_tree(folder, limit=MAX_TOKENIZER)
    try:
        if (folder / TOKENIZER_CONFIG).is_file():
            content = read_file(folder.parent, f"{folder.name}/{TOKENIZER_CONFIG}", limit=MAX_TOKENIZER)
            config = json_reader.loads(content)
            if named := [key for key, value in config.items() if _names_a_file(key, value)]:
                raise ValueError(f"{TOKENIZER_CONFIG} names files of its own choice: {named}")
        return AutoTokenizer.from_pretrained(folder.resolve(), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"The tokenizer {folder} is damaged ({error}).") from error


def _names_a_file(key: str, value: Any) -> bool:
    """Whether the tokenizer's class would open the value of an entry of its configuration as a path."""
    is_file = key in ("vocab", "merges", "init_inputs") or key.endswith(("_file", "_files", "_spm"))
    return is_file and bool(value) and not isinstance(value, int | float)
