"""Decides whether the steps of a training are captured as CUDA graphs."""

import logging
from typing import Literal

import torch
from torch import nn

from ..lora.gradient_checkpointing import dropouts_of
from ..lora.sharding import is_sharded
from .objective import TrainingObjective

logger = logging.getLogger(__name__)

#: Why steps are not captured if the caller does not want it.
NOT_WANTED = "cuda_graph=False"


def reason_against(
    wanted: bool | Literal["auto"],
    objective: TrainingObjective,
    *,
    keeps_prefix: bool,
    are_several: bool,
) -> str | None:
    """Say why steps are not captured; None if they are.

    Args:
        wanted: ``cuda_graph`` of :class:`scalabl_pyro.HardwareOptions`.
        objective: What is minimized.
        keeps_prefix: Whether hidden states are cached.
        are_several: Whether several processes share each batch.

    Raises:
        ValueError: ``wanted`` is True, but the step cannot be captured.
    """
    blora, devices = objective.model.blora, devices_of(objective.model)
    reason = why_not(
        devices,
        stays_on_device=objective.stays_on_device,
        keeps_prefix=keeps_prefix,
        gathers_weights=are_several and is_sharded(blora.llm),
        draws_own_masks=are_several and bool(dropouts_of(blora.adapter)),
    )
    if wanted is True and reason:
        raise ValueError(f"cuda_graph=True, but {reason}. Use cuda_graph='auto', the default, or False.")
    if wanted and reason and any(device.type == "cuda" for device in devices):
        logger.info("steps run without CUDA graphs: %s", reason)
    return reason if wanted else NOT_WANTED


def devices_of(module: nn.Module) -> set[torch.device]:
    """Devices of all parameters of a module, the frozen ones included."""
    return {parameter.device for parameter in module.parameters()}


def why_not(
    devices: set[torch.device],
    *,
    stays_on_device: bool,
    keeps_prefix: bool,
    gathers_weights: bool = False,
    draws_own_masks: bool = False,
) -> str | None:
    """Say what speaks against graphs; None if nothing does.

    Args:
        devices: Devices of all parameters of the model.
        stays_on_device: Whether a step computes all its numbers on the device.
        keeps_prefix: Whether hidden states are cached.
        gathers_weights: Whether a pass gathers weights from other processes.
        draws_own_masks: Whether dropout has a random stream of its own in each process.
    """
    if all(device.type != "cuda" for device in devices):
        return "the model is not on a CUDA device"
    if len(devices) > 1:
        return f"the model lies on {len(devices)} devices, and a graph belongs to one"
    if not stays_on_device:
        return "this ELBO or guide reads its loss on the host"
    if keeps_prefix:
        return "cache_prefix decides on the host what to compute"
    if gathers_weights:
        return "the base is split over the processes, which gather its weights in each pass"
    if draws_own_masks:
        return "each of several processes draws its masks of dropout from a seed on the host"
    return None
