"""Checks that several processes can share the batches of one training."""

from ..distributed.processes import Processes
from ..lora.sharding import is_piece, is_sharded
from ..model.bayesian_lora import BayesianLoRA


def check_shareable(processes: Processes, blora: BayesianLoRA, *, batch_size: int, cache_prefix: bool) -> None:
    """Check that processes can share each batch of this model with these options.

    Args:
        processes: Processes that train together.
        blora: The LLM.
        batch_size: Rows per step of all processes together.
        cache_prefix: Whether hidden states are cached.

    Raises:
        ValueError: The model or an option does not allow it.
    """
    if any(is_piece(factor) for pair in blora.adapter.factors() for factor in pair):
        raise ValueError(
            "fully_shard has split the factors of the adapter, but each process trains whole factors: "
            "call fully_shard(..., ignored_params=set(blora.parameters())), or shard before bayesian_lora()."
        )
    if not processes.are_several:
        return
    if batch_size < processes.size:
        raise ValueError(
            f"batch_size={batch_size} counts the rows of all {processes.size} processes together, so some would have "
            f"no row: use at least {processes.size}."
        )
    if (getattr(blora.llm, "_tp_size", None) or getattr(blora.llm, "tp_size", None) or 1) > 1:
        raise ValueError(
            "The layers of this model are split over the processes (tensor parallelism), which then must all see the "
            "same rows, but fit gives each other rows. Load the model without tp_plan."
        )
    if is_sharded(blora.llm) and cache_prefix:
        raise ValueError("cache_prefix=True: the processes of a sharded base must run all blocks. Leave it out.")
