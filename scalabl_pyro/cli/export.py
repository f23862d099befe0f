"""The command ``export``: draws of a posterior become plain LoRA adapters."""

from pathlib import Path
from typing import Any, cast

from ..posterior.engines import Engine
from .loading import load_posterior
from .terminal import say, say_json


def export(
    path: Path, out: Path, model: str, draws: str, seed: int, engine: str | None, device: str, as_json: bool
) -> int:
    """Write draws as PEFT adapters, and say where.

    Args:
        path: Directory of the saved posterior.
        out: New directory for the adapters.
        model: Base model.
        draws: ``"mean"``, or the number of draws.
        seed: Seed of the draws.
        engine: Engine whose limits are checked.
        device: Device of the model.
        as_json: Whether to print JSON.

    Returns:
        0.

    Raises:
        ValueError: ``draws`` is neither, or the engine cannot serve the posterior.
    """
    wanted: Any = draws if draws == "mean" else int(draws) if draws.isdecimal() else None
    if wanted is None:
        raise ValueError(f"--draws {draws}: give a whole number, or 'mean'.")
    posterior = load_posterior(path, model, device)
    folders = posterior.export_peft(out, draws=wanted, seed=seed, for_engine=cast(Engine | None, engine))
    if as_json:
        say_json({"adapters": [str(folder) for folder in folders]})
    else:
        say(f"{len(folders)} adapter{'' if len(folders) == 1 else 's'} written:")
        for folder in folders:
            say(f"  {out / folder.name}")
    return 0
