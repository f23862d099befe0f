"""A lower bound on the size of a saved guide, checked before memory is allocated for the guide.

The options of a guide in ``scalabl_config.json`` may ask for any rank or width. The tensors in the file show how many
numbers the guide really had.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

#: Numbers per latent that the bound may exceed the file by, because options such as ``init_scale=1`` are not sizes.
SLACK = 16


def check_guide_size(options: Mapping[str, Any], tensors: Mapping[str, Tensor], dim: int) -> None:
    """Raise ValueError if the options of a guide ask for many more numbers than were saved.

    Args:
        options: Options of the guide in the configuration.
        tensors: Saved tensors of the guide.
        dim: D, the number of latents.
    """
    saved, needed = sum(t.numel() for t in tensors.values()), _numbers_needed(options, dim)
    if needed > saved + SLACK * dim:
        raise ValueError(
            f"the options of the guide, {_shortened(options)}, ask for a guide of at least {needed} numbers, but only "
            f"{saved} numbers of it were saved."
        )


def _numbers_needed(options: Any, dim: int) -> int:
    """Bound the number of parameters from below: a rank, width or depth of k needs at least k D parameters."""
    if isinstance(options, Mapping):
        shapes = options.get("shapes")
        rest = [v for k, v in options.items() if k != "shapes"]
        shapes = list(shapes.values()) if isinstance(shapes, dict) else []
        sizes = [math.prod(n for n in shape if isinstance(n, int)) for shape in shapes if isinstance(shape, list)]
        return sum(sizes) + sum(_numbers_needed(value, dim) for value in rest)
    if isinstance(options, list):
        return len(options) * dim + sum(_numbers_needed(value, dim) for value in options)
    return max(options, 0) * dim if isinstance(options, int) and not isinstance(options, bool) else 0


def _shortened(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
