"""Other ways to fine-tune, one file each, with the verbs of :func:`scalabl_pyro.fit`.

Each takes the *base* model, adapts it, and returns a :class:`~scalabl_pyro.fit.FitResult`;
``result.posterior.blora().unload()`` gives the base model back for the next method.
"""

from .mle import mle

__all__ = ["mle"]
