"""The path of a module inside its model, such as ``model.layers.11.self_attn.q_proj``: suffixes and blocks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockPath:
    """Where a numbered block lies: the path of the stack of blocks, and the index of the block in it."""

    stack: str
    index: int

    @property
    def path(self) -> str:
        """Path of the block itself."""
        return f"{self.stack}.{self.index}" if self.stack else str(self.index)


def has_suffix(path: str, suffix: str) -> bool:
    """Tell whether a path is ``suffix`` or ends with it after a dot, as PEFT matches ``target_modules``."""
    return path == suffix or path.endswith("." + suffix)


def lies_in(path: str, parent: str) -> bool:
    """Tell whether a path is that of ``parent`` or of a module inside it."""
    return path == parent or path.startswith(parent + ".")


def last_name(path: str) -> str:
    """The name of a module in its parent: ``q_proj`` in ``model.layers.11.self_attn.q_proj``."""
    return path.rsplit(".", 1)[-1]


def block_of(path: str) -> BlockPath | None:
    """The block that a module lies in, given by the first number in its path; None outside of numbered blocks."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return BlockPath(".".join(parts[:i]), int(part))
    return None
