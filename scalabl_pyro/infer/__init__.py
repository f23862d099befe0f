"""Names of ``pyro.infer`` for Pyro models of your own, with the same interface but faster on an LLM.

Example:
    >>> from scalabl_pyro.infer import SVI
    >>> SVI.__mro__[1].__module__
    'pyro.infer.svi'
"""

from ..inference.svi import SVI

__all__ = ["SVI"]
