"""Several processes that train and predict as one."""

from .gloo_group import LostProcess
from .processes import alone

__all__ = ["LostProcess", "alone"]
