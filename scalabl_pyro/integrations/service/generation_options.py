"""Options of a request to write texts."""

import math
from typing import Any

from ..._errors import check_choice, check_count, check_flag, check_positive, is_number
from ...prediction.generate import DECODE
from .limits import Limits, Refused

#: Options that change how a token is chosen at random.
SAMPLING = ("temperature", "top_k", "top_p")
#: Largest number of new tokens where a request gives none.
DEFAULT_NEW_TOKENS = 64


def check_generation(options: dict[str, Any], num_prompts: int, limits: Limits) -> dict[str, Any]:
    """Check the options of a request to write texts.

    Args:
        options: Fields of the request besides the prompts.
        num_prompts: Number of prompts.
        limits: Limits of the service.

    Returns:
        Options of :meth:`scalabl_pyro.Posterior.generate`.

    Raises:
        ValueError, TypeError: An option has a wrong value.
        Refused: The request asks for more texts or tokens than the limits allow (413).
    """
    default = min(DEFAULT_NEW_TOKENS, limits.max_new_tokens)
    options = {"max_new_tokens": default, "num_samples": 1, **options}
    room, copies = options["max_new_tokens"], options["num_samples"]
    check_count(max_new_tokens=room, num_samples=copies)
    if room > limits.max_new_tokens:
        raise Refused(413, f"max_new_tokens={room}: at most {limits.max_new_tokens} are allowed.")
    if num_prompts * copies > limits.max_rows:
        raise Refused(
            413,
            f"{num_prompts} prompts with num_samples={copies} are {num_prompts * copies} texts per draw. At most "
            f"{limits.max_rows} are allowed: send several requests.",
        )
    check_choice("decode", options.setdefault("decode", "draws"), DECODE)
    check_flag(do_sample=options.setdefault("do_sample", False))
    given = [name for name in SAMPLING if name in options]
    if given and not options["do_sample"]:
        raise ValueError(f"{given[0]} changes random choices only: send do_sample=true with it, or leave it out.")
    if copies > 1 and not options["do_sample"]:
        raise ValueError(f"num_samples={copies} would give equal texts: send do_sample=true with it.")
    if "temperature" in options:
        check_positive(temperature=options["temperature"])
    if "top_k" in options:
        check_count(top_k=options["top_k"], least=0)
    if "top_p" in options:
        top_p = options["top_p"]
        if not is_number(top_p) or not 0 < top_p <= 1 or math.isnan(top_p):
            raise ValueError(f"top_p={top_p!r} must be more than 0, and at most 1.")
    return options
