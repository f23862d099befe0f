"""Refusal of ``save_pretrained`` on a wrapped model: Hugging Face and PEFT know A and B, but not the latents."""

from typing import Any, NoReturn

from torch import nn

from .module_changes import ModuleChanges


class RefuseSave:
    """Stands in for ``save_pretrained`` of a module that carries Bayesian LoRA layers."""

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise RuntimeError."""
        raise RuntimeError(
            "save_pretrained() of a wrapped model would write A and B without the latents s: another function. Save "
            "the posterior with posterior.save_pretrained(path), or call blora.unload() and then save the model."
        )


def refuse_saving(module: nn.Module, changes: ModuleChanges) -> None:
    """Make ``save_pretrained`` of a module, and of all its parts, raise until the changes are reverted."""
    for part in module.modules():
        if callable(getattr(type(part), "save_pretrained", None)):
            changes.set_attribute(part, "save_pretrained", RefuseSave())
