"""What files of a stranger may cost: one budget, from which every reader of untrusted files draws."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from .._errors import check_count

#: What each part of a budget counts, for messages.
COUNTED = {
    "bytes": "bytes to read or to hash",
    "numbers": "numbers in tensors",
    "files": "files",
    "members": "posteriors or components",
    "layers": "layers of networks",
    "characters": "characters to tokenize",
}


@dataclass
class Budget:
    """Limits for loading one saved posterior or baseline. All its files together draw from one budget.

    Each part is a number that is left. A reader subtracts what a file asks for before it reads or builds it. So a small
    file that asks for much is refused at once. Loading spends a budget: make a new one for each call.

    Args:
        bytes: Bytes that are read or hashed. A file that is read and hashed counts twice.
        numbers: Numbers in all tensors, and in the matrices that a draw builds.
        files: Files that are listed, or found in folders.
        members: Posteriors in a baseline, and components in mixtures of guides.
        layers: Layers of the networks of flows.
        characters: Characters that a task tokenizes to find its labels: length of the template times labels.

    Raises:
        ValueError: A part is not a whole number from 0 on.

    Example:
        >>> from scalabl_pyro.storage.budget import Budget
        >>> budget = Budget(files=2)
        >>> budget.spend("files", 2, "my-posterior")
        >>> budget.files
        0
    """

    bytes: int = 2**31
    numbers: int = 2**25
    files: int = 1_000
    members: int = 100
    layers: int = 100
    characters: int = 2**24

    def __post_init__(self) -> None:
        check_count(least=0, **vars(self))

    @classmethod
    def beside(cls, parameters: int) -> Self:
        """Return the default budget of a posterior of a model with this number of parameters.

        A posterior may hold trained heads and tensors of its base model, so a large model allows large files.
        """
        default = cls()
        return replace(default, bytes=default.bytes + 8 * parameters, numbers=default.numbers + parameters)

    def spend(self, part: str, amount: int, where: str | Path) -> None:
        """Subtract an amount.

        Args:
            part: Name of the part, such as ``"bytes"``.
            amount: What is needed of it.
            where: File that asks for it, for the message.

        Raises:
            ValueError: Less is left.
        """
        left = getattr(self, part)
        if amount > left:
            raise ValueError(
                f"{where} asks for {amount:,} {COUNTED[part]}; only {left:,} more are allowed. This protects you from "
                f"files that only fill memory or time. If you trust the files, load them with a larger limit: "
                f"budget=Budget({part}=...)."
            )
        setattr(self, part, left - amount)
