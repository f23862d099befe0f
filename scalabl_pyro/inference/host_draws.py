"""Find random numbers that a model draws on the host: a CUDA graph would repeat them at each replay."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample


class _UnseenSubsamples(Messenger):
    """Keep the random rows of a plate out of account.

    ``pyro.plate(name, N, subsample_size=B)`` draws B rows on the CPU, also where the model does not use them because
    the rows of the batch were chosen outside. Where it uses them on a GPU, their copy makes the capture fail.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            msg["infer"] = {**(msg["infer"] or {}), "state_before": torch.get_rng_state()}

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            torch.set_rng_state(msg["infer"].pop("state_before"))


@contextmanager
def no_host_draws() -> Iterator[None]:
    """Refuse random numbers of torch's CPU generator, of numpy or of ``random``. Their states are then put back.

    Raises:
        RuntimeError: Numbers were drawn.
    """
    own: Any = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    with _UnseenSubsamples():
        yield
    of_numpy: Any = np.random.get_state()  # noqa: NPY002
    has_drawn = {
        "torch's CPU generator": not torch.equal(torch.get_rng_state(), own[0]),
        "numpy": of_numpy[2] != own[1][2] or not np.array_equal(of_numpy[1], own[1][1]),
        "random": random.getstate() != own[2],
    }
    torch.set_rng_state(own[0])
    np.random.set_state(own[1])  # noqa: NPY002
    random.setstate(own[2])
    names = [name for name, drawn in has_drawn.items() if drawn]
    if names:
        raise RuntimeError(
            f"the model draws random numbers on the host, from {' and '.join(names)}; a replay would repeat them"
        )
