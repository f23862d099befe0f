"""Let AutoGuides look at a model without keeping its graph of gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import nn


@contextmanager
def prototypes_without_gradients(guide: Any) -> Iterator[None]:
    """Run models without gradients where an AutoGuide looks at them for the first time inside the context.

    For as long as it lives, an AutoGuide keeps what the model returned and the distributions of the latents. If these
    have gradients, the activations of a whole pass through an LLM stay in memory. The gradients of the parameters are
    then also tied to the stream of that pass, which the capture of a CUDA graph must not touch.

    Args:
        guide: Any guide.
    """
    new: list[Any] = [m for m in guide.modules() if _is_new(m)] if isinstance(guide, nn.Module) else []
    models = [auto._model for auto in new]
    for auto, (model,) in zip(new, models, strict=True):
        auto._model = (_Quiet(model),)
    try:
        yield
    finally:
        for auto, own in zip(new, models, strict=True):
            auto._model = own


class _Quiet:
    """A model that runs without gradients, and has the attributes of the model."""

    def __init__(self, model: Any) -> None:
        self._own = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self._own(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def _is_new(module: nn.Module) -> bool:
    own = getattr(module, "_model", None)
    return isinstance(module, AutoGuide) and module.prototype_trace is None and isinstance(own, tuple)
