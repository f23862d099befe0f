"""One draw of a posterior merged into the weights: a plain model, for ``save_pretrained`` and any tool."""

from typing import Any, cast

from torch import Tensor, nn

from .._errors import check_count
from ..lora.adapter import Adapter
from ..lora.base_module import check_has_values
from ..lora.base_tensors import is_ordinary
from ..lora.float8 import original_weight
from ..lora.peft_names import quiet_peft
from ..lora.plain_adapter import as_peft_model, put_draw
from ..lora.plain_copy import plain_copy
from ..lora.tensors import set_tensor
from .export_peft import draws_of, largest_error
from .state import PosteriorState


def merge(posterior: PosteriorState, draw: int | None = None, *, seed: int = 0) -> nn.Module:
    """Merge one draw into a copy of the model; see :meth:`scalabl_pyro.Posterior.merge`."""
    if draw is not None:
        check_count(draw=draw, least=0)
    adapter = posterior.adapter
    adapter.check_attached()
    check_has_values(adapter.module)
    _check_ordinary(adapter)
    (s,) = draws_of(posterior, [draw], seed=seed).values()
    model = plain_copy(adapter, share=False)
    untie(model, [*(f"{name}.weight" for name in adapter.subspace.names), *adapter.base_tensors])
    for name, value in adapter.base_tensors.items():
        set_tensor(model, name, value)
    with_lora = as_peft_model(adapter, model, rank=max(adapter.subspace.ranks))
    put_draw(with_lora, adapter, posterior.factors, s)
    with quiet_peft():
        merged = cast(nn.Module, cast(Any, with_lora.base_model).merge_and_unload(safe_merge=True))
    for name, head in posterior.heads.items():
        for key, value in head.state_dict().items():
            set_tensor(merged, f"{name}.{key}", value)
    _forget_quantization(merged)
    largest_error(posterior, s, merged)
    return merged.requires_grad_(True).eval()


def untie(model: nn.Module, names: list[str]) -> None:
    """Give tensors that are about to change memory of their own, and say so in the configuration of the model.

    Args:
        model: Plain model.
        names: Names of the tensors. Those that no other module uses stay as they are.
    """
    shared = _shared_names(model)
    tied = [name for name in names if name in shared]
    for name in tied:
        set_tensor(model, name, shared[name])
    for part in model.modules() if tied else ():
        _forget_ties(part)


def _shared_names(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that stand in more than one module, by all their names."""
    named = list(model.named_parameters(remove_duplicate=False))
    counts: dict[int, int] = {}
    for _, p in named:
        counts[id(p)] = counts.get(id(p), 0) + 1
    return {name: p for name, p in named if counts[id(p)] > 1}


def _forget_ties(module: nn.Module) -> None:
    """Tell transformers that a model ties no embeddings, so that it saves and loads the head by itself."""
    config: Any = getattr(module, "config", None)
    configs: list[Any] = [config, getattr(config, "text_config", None)]
    for part in configs:
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
    if getattr(module, "all_tied_weights_keys", None):
        cast(Any, module).all_tied_weights_keys = {}


def _forget_quantization(model: nn.Module) -> None:
    """Let a model be saved whose file was quantized, such as GGUF, but whose weights are plain numbers in memory."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and all(is_ordinary(p) for p in model.parameters()):
        quantizer.remove_quantization_config(model)


def _check_ordinary(adapter: Adapter) -> None:
    for name, layer in zip(adapter.subspace.names, adapter.layers, strict=True):
        weight = original_weight(layer.get_base_layer())
        if weight is None or not is_ordinary(weight):
            raise ValueError(
                f"The weight of {name!r} is quantized, and merging into it would round the draw away. Load the base "
                "model in bfloat16 with Posterior.from_pretrained(llm, path), and merge there; or use "
                "posterior.export_peft(path)."
            )
