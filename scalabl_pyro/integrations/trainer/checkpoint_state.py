"""What a Trainer's checkpoint holds of an ELBO: the posterior, and what an exact resumption needs besides.

    checkpoint-500/
        posterior/                a posterior like any other: Posterior.from_pretrained(llm, path)
        state/step-00000500/      live parameters and the noise, as safetensors and JSON with a manifest
        optimizer.pt, ...         what the Trainer itself writes

Pickle is neither written nor read here.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from ...storage.tensor_files import below
from ...training.checkpoint_files import CheckpointFolder
from ...training.provenance import versions
from ...training.run_identity import check_same_run
from ...training.training_state import LearnedState
from .elbo_module import ElboModule

#: Folders in a checkpoint.
POSTERIOR, STATE = "posterior", "state"
#: How the names of the states of random generators begin.
RANDOM = "random."


def write_state(folder: Path, module: ElboModule, *, step: int, run: dict[str, Any]) -> None:
    """Write live parameters and the state of the noise into a checkpoint.

    Args:
        folder: Folder of the checkpoint.
        module: What is trained.
        step: Number of optimizer steps taken.
        run: Identity of the run.
    """
    tensors: dict[str, Tensor] = LearnedState(module.objective, None).tensors()
    tensors |= {RANDOM + name: state for name, state in module.noise.states().items()}
    CheckpointFolder(folder / STATE, keep=1).write(step, tensors, {"run": run, "versions": versions()})


def read_state(folder: str | Path, module: ElboModule, *, run: dict[str, Any], with_noise: bool) -> None:
    """Continue from a checkpoint.

    Args:
        folder: Folder of the checkpoint.
        module: What is trained.
        run: Identity of the run.
        with_noise: Whether the noise continues too. If not, only the parameters are read.

    Raises:
        ValueError: The folder holds no valid state, or that of another run. Nothing is changed then.
    """
    folder = Path(folder)
    learned = LearnedState(module.objective, None)
    limit = 4 * sum(tensor.nbytes for tensor in learned.tensors().values()) + 2**24
    found = CheckpointFolder(folder / STATE, keep=1).newest(limit=limit)
    if found is None:
        raise ValueError(
            f"{folder} holds no state of a Bayesian training, or a damaged one: give a checkpoint that this trainer "
            "wrote. Load a posterior alone with Posterior.from_pretrained(llm, path)."
        )
    advice = "Use the same options and data, or start anew."
    check_same_run(found.record, run, path=folder, advice=advice)
    random = below(found.tensors, RANDOM)
    try:
        learned.load({name: t for name, t in found.tensors.items() if not name.startswith(RANDOM)})
        if with_noise:
            module.noise.load_states(random)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} cannot be resumed from: {error}") from error
