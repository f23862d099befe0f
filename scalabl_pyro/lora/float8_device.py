"""Which devices multiply 8-bit floats."""

import functools

import torch

#: Lowest compute capability of a GPU that multiplies 8-bit floats: L4, L40, RTX 40 and H100 have it.
LOWEST = (8, 9)


@functools.cache
def check_device(device: torch.device) -> None:
    """Raise ValueError if a device does not multiply 8-bit floats, as the CPU does by emulation."""
    if device.type in ("cpu", "meta"):
        return
    if device.type != "cuda" or torch.version.hip is not None:
        what = "an AMD GPU" if device.type == "cuda" else f"a device of type {device.type!r}"
        raise ValueError(
            f"base_precision='float8' runs on NVIDIA GPUs, and on a CPU for tests; the model is on {what}. Leave "
            "base_precision out."
        )
    found = torch.cuda.get_device_capability(device)
    if found < LOWEST:
        raise ValueError(
            f"base_precision='float8' needs a GPU of compute capability {LOWEST[0]}.{LOWEST[1]} or higher (L4, RTX 40, "
            f"H100 or newer), and {torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}. Leave base_precision "
            "out; to save memory, load the model in 4 bits with bitsandbytes."
        )
