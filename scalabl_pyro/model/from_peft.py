"""Makes an adapter that PEFT trained Bayesian, without a change of the function that it computes."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .._arguments import check_role, known_arguments
from .._errors import check_flag
from .._process.random_state import scoped_seed
from ..lora.adapter import Gauge
from ..lora.attach import attach, check_no_adapter
from ..lora.base_module import check_has_values, check_placement
from ..lora.convert_peft import convert_peft, needs_conversion
from ..lora.load_peft import load_peft
from ..lora.module_snapshot import ModuleSnapshot
from ..priors import PriorLike
from .lora_program import BayesianLoRA


@known_arguments
def from_peft(
    model: nn.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    spectrum: bool = False,
    prior: PriorLike = 1.0,
    gauge: Gauge = "unit_rows",
    modules_to_save: Sequence[str] | None = None,
    rank: int | float | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> BayesianLoRA:
    """Make a trained PEFT adapter Bayesian: the module computes what it computed with the adapter.

    LoRA comes in exactly: any rank, ``rank_pattern``, ``alpha_pattern``, rsLoRA. What PEFT trained besides LoRA factors
    stays too and is saved with the posterior: ``modules_to_save``, heads of classifiers, biases, LoRA on embeddings.
    Methods that PEFT can convert to LoRA (LoHa, LoKr, VeRA and others) come in through ``peft.convert_to_lora``. A
    warning then tells the error. Everything else is refused before the model is changed.

    Args:
        model: A plain base model, with ``path``; or a ``PeftModel``, whose active adapter is taken.
        path: Folder that ``save_pretrained`` of PEFT wrote, or a name on the Hugging Face Hub. The base model is
            changed in place, as PEFT does.
        spectrum: Where s starts. False: all entries at 3^-1/2, as in a new adapter, and the singular values of the
            update gamma B A stay in B. A prior scale then means a *relative* change, the same in each direction. Take
            it unless you know better. True: s starts at the singular values. A prior scale then is an *absolute* size
            of the update: it hardly holds the large directions and holds the small ones firmly. Take it to shrink or
            prune directions (horseshoe or rank-mask priors), or to compare s between layers.
        prior: Prior of s, as in :func:`scalabl_pyro.bayesian_lora`.
        gauge: Gauge of the factors, as in :func:`scalabl_pyro.bayesian_lora`.
        modules_to_save: Paths of modules to train further in full. None means the new head of a classifier.
        rank: For methods other than LoRA: rank of all layers, or the share of squared singular values that each layer
            keeps (0 to 1). None means 0.9999, which is a relative error of 1 %.
        subfolder: Folder inside ``path``.
        revision: Branch, tag or commit on the Hub.
        token: Token for the Hub.

    Returns:
        A PyroModule as from :func:`scalabl_pyro.bayesian_lora`. Its ``unload()`` gives the PeftModel back. A converted
        adapter comes back as the LoRA that it became.

    Raises:
        FileNotFoundError: ``path`` holds no adapter.
        ValueError: The adapter belongs to another base, tensors are missing, several adapters are active, or a DoRA
            adapter is on embeddings.
        TypeError: The method cannot become LoRA, such as prompt tuning or IA3.

    Example:
        >>> import peft
        >>> trained = peft.get_peft_model(llm, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        >>> trained.save_pretrained("my-adapter")
        >>> blora = scalabl_pyro.from_peft(trained.unload(), "my-adapter")
        >>> blora.adapter.subspace.ranks[0]
        4

    References:
        Hu et al., LoRA, ICLR 2022; Samplawski et al., UAI 2025, section 3.
    """
    check_role("model", model, "llm", call="from_peft(base_model, path)")
    check_flag(spectrum=spectrum)
    _check_ways(model, path)
    snapshot = ModuleSnapshot(model)
    given = {"subfolder": subfolder, "revision": revision, "token": token}
    hub = {name: value for name, value in given.items() if value is not None}
    try:
        modes, mode = {m: m.training for m in model.modules()}, model.training
        with scoped_seed(0):  # PEFT fills new layers with random values before it loads them
            model = _plain_lora(model, path, rank=rank, snapshot=snapshot, hub=hub)
        for part in model.modules():  # PEFT puts what it loads into eval mode
            part.training = modes.get(part, mode)
        adapter = attach(model, gauge=gauge, modules_to_save=modules_to_save, spectrum=spectrum)
        return BayesianLoRA(adapter, prior=prior)
    except BaseException:
        snapshot.restore()
        raise


def _plain_lora(
    model: nn.Module, path: object, *, rank: float | None, snapshot: ModuleSnapshot, hub: Mapping[str, Any]
) -> nn.Module:
    """Return the model with a LoRA adapter: loaded from ``path``, and converted if it is of another method."""
    if path is not None:
        check_placement(model)
        check_has_values(model)
        model = load_peft(model, os.fspath(cast(str, path)), snapshot=snapshot, **hub)
    if isinstance(model, PeftModel) and needs_conversion(model):
        return convert_peft(model, rank=rank)
    if rank is not None:
        raise ValueError(f"rank={rank!r}: the adapter is LoRA already and keeps its ranks. Leave rank out.")
    return model


def _check_ways(model: nn.Module, path: object) -> None:
    """Raise unless exactly one of the two ways to give an adapter is taken."""
    check_no_adapter(model)
    carries = any(isinstance(m, BaseTunerLayer) for m in model.modules()) or isinstance(model, PeftModel)
    if path is None and not carries:
        raise ValueError(
            "The model carries no adapter. Give the folder or Hub name of one, from_peft(model, path), or start a new "
            "one with bayesian_lora(model)."
        )
    if path is not None and not isinstance(path, str | os.PathLike):
        raise TypeError(f"path={path!r}: expected the folder of an adapter, or its name on the Hub.")
