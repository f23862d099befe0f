"""Training and prediction in several processes that work as one."""

from .._deprecated import renamed_function
from .gloo_group import LostProcess
from .processes import single_process

__all__ = ["LostProcess", "single_process"]

alone = renamed_function(single_process, "alone")
