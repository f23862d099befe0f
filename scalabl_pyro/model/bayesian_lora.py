"""Gives a Hugging Face LLM LoRA adapters with latents, as a Pyro program."""

from collections.abc import Iterable, Sequence

from torch import nn

from .._arguments import check_role, kind_of, known_arguments
from .._deprecated import renamed_arguments
from ..lora.adapter import Gauge
from ..lora.attach import attach
from ..lora.float8 import BasePrecision
from ..lora.float8_convert import check_precision, convert
from ..lora.module_snapshot import ModuleSnapshot
from ..lora.targets import ExcludedModules, TargetModules
from ..priors import PriorLike
from .lora_program import BayesianLoRA

__all__ = ["BayesianLoRA", "bayesian_lora"]


@renamed_arguments(train_also="modules_to_save")
@known_arguments
def bayesian_lora(
    module: nn.Module,
    *,
    r: int | None = None,
    lora_alpha: float | None = None,
    target_modules: TargetModules = None,
    exclude_modules: ExcludedModules | None = None,
    layers_to_transform: int | Iterable[int] | None = None,
    cut_rank: bool = False,
    lora_dropout: float = 0.0,
    prior: PriorLike = 1.0,
    gauge: Gauge = "unit_rows",
    modules_to_save: Sequence[str] | None = None,
    base_precision: BasePrecision = "original",
    seed: int = 0,
) -> BayesianLoRA:
    """Add LoRA adapters with a latent vector s inside each layer: y = W0 x + gamma B (s * A x).

    The module is changed in place: PEFT wraps its linear layers, and its weights are frozen. ``blora.unload()``
    restores it bit for bit. After an error, or Ctrl-C, the module is as before. While it is wrapped, its
    ``save_pretrained`` raises an error, because it would write A and B without s.

    A module that already carries a PEFT LoRA adapter keeps the function that it computes: the factors are rewritten as
    B diag(s) A with orthonormal rows of A. What PEFT trained besides these factors stays frozen, and is saved with the
    posterior: modules_to_save, biases, LoRA on embeddings, trained tokens.

    Args:
        module: Hugging Face causal LM or classifier, or any module with linear layers.
        r: Rank of the factors, and number of latents per layer. None means 8.
        lora_alpha: Numerator of gamma = lora_alpha / r, where r is the rank of the layer. None means 16.
        target_modules: Layers to adapt: a list of path suffixes, one regular expression for whole paths,
            ``"all-linear"``, or a predicate ``(path, module) -> bool``. None means the layers that the paper adapts:
            query and value projections and the LM head. Models without such names are adapted in all linear layers.
            A log line (level INFO) says which layers None or ``"all-linear"`` chose. Both leave out gates with one
            output, and layers of Mamba mixers that fused kernels read without calling them.
        exclude_modules: Layers of ``target_modules`` to leave out: a list of path suffixes, one regular expression,
            or a predicate.
        layers_to_transform: Indices of the blocks to adapt; None means all. Adapting the upper half only is much
            cheaper.
        cut_rank: Whether a layer that is too small for ``r`` gets the largest rank that it allows, which is the smaller
            side of its weight. Otherwise such a layer is an error.
        lora_dropout: Dropout probability on the input of A; 0 in the paper.
        prior: Prior of s: the scale of Normal(0, scale), a Pyro distribution, a callable ``layer -> distribution``, or
            a :class:`~scalabl_pyro.priors.Prior`.
        gauge: ``"unit_rows"`` divides each row of A by its norm. Then s can shrink only if B grows. With ``"free"``, s
            can also shrink if A grows. The scale of the prior has a meaning of its own only if B has a prior too
            (``factor_scale`` of :class:`OptimizerOptions`).
        modules_to_save: Paths of modules that are trained in full (as point estimates) and saved. None means the new
            head of a Hugging Face classifier: all modules outside of its backbone (the model without its
            output layers).
        base_precision: Precision of the products with the frozen weights of the blocks. ``"float8"`` converts the
            linear layers of the blocks to 8-bit floats, with a scale per row, which is faster on GPUs of compute
            capability 8.9 or higher. The head stays as it is, and factors and latents too. The codes take as much
            memory as bfloat16, because each weight is stored in two layouts. ``"float8-compact"`` stores one, and takes
            half: a backward pass then transposes the weights one by one. Original weights move to the memory of the
            host, so that ``unload()`` can put them back. On a CPU the products are emulated, which is slow.
        seed: Seed of the initial factors; the global random state stays as it is.

    Returns:
        A PyroModule to call in place of the LLM.

    Raises:
        ValueError: The targets match nothing, the rank is too large for a layer, the module is wrapped already, its
            weights are offloaded, or 8-bit floats are not possible: on this device, or for weights that are quantized
            already or float64.
        TypeError: A layer cannot carry latents, the module carries an adapter of another PEFT method (such as prompt
            tuning), or the prior is not one of the kinds above.

    Example:
        >>> import torch, scalabl_pyro
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> blora = scalabl_pyro.bayesian_lora(net, r=2, prior=1.0)
        >>> blora.num_parameters()
        {'lora': 46, 'latents': 4, 'variational': 8}
        >>> tuple(blora(torch.ones(5, 4)).shape)  # one draw of s from the prior
        (5, 3)

    References:
        Samplawski et al., Scalable Bayesian Low-Rank Adaptation of Large Language Models via Stochastic
        Variational Subspace Inference, UAI 2025, section 3.
    """
    if kind_of(module) != "blora":  # which has an error of its own
        check_role("module", module, "llm", call="bayesian_lora(llm)")
    check_precision(base_precision)
    snapshot = ModuleSnapshot(module)
    try:
        adapter = attach(
            module,
            r=r,
            lora_alpha=lora_alpha,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            layers_to_transform=layers_to_transform,
            cut_rank=cut_rank,
            lora_dropout=lora_dropout,
            gauge=gauge,
            modules_to_save=modules_to_save,
            seed=seed,
        )
        blora = BayesianLoRA(adapter, prior=prior)
        convert(adapter, base_precision)
        return blora
    except BaseException:
        snapshot.restore()
        raise
