"""A posterior for an adapter that is trained already: A and B stay, and only s is inferred."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import torch

from .._arguments import check_role, known_arguments, suggest
from .._errors import check_choice
from ..data.rows import rows_for
from ..guides import DeltaGuide, NormalGuide
from ..model.bayesian_lora import BayesianLoRA
from ..posterior.posterior import Posterior
from ..tasks import Task
from ..training.fit import fit
from .laplace import laplace
from .largest_scale import NoiseSearch
from .mcmc import mcmc
from .refit import refit

#: Scale of the prior of ``"laplace"``, relative to the root mean square of the adapter's s: chosen on validation rows.
PRIOR_SHARE = 0.5

#: How s is inferred.
Method = Literal["laplace", "vi", "mcmc", "tfb"]
METHODS: tuple[str, ...] = get_args(Method)


@known_arguments
def posthoc(
    blora: BayesianLoRA, task: Task, data: Any, *, method: Method = "laplace", seed: int = 0, **options: Any
) -> Posterior:
    """Infer the latents s of a trained adapter, without training A and B again.

    The adapter can come from :func:`scalabl_pyro.from_peft`. Its factors, its heads and the parameters of the task stay
    as they are, bit for bit. The methods differ in what they assume and in their cost:

    - ``"laplace"``: normal posterior with the curvature of the likelihood at the adapter, and all correlations. It
      costs one pass over the data with a gradient per class. Options: those of :func:`scalabl_pyro.laplace`; here
      ``prior_scale``, the scale of the prior Normal(0, scale), is half the root mean square of the adapter's s by
      default. ``"evidence"`` chooses a larger one, which helps or harms by the data; see the page on this function. The
      mean stays at the adapter, which is not the mode under this prior; ``newton_steps=1`` moves it toward the mode.
    - ``"vi"``: variational inference, which also moves the mean of s. Options: those of :func:`scalabl_pyro.refit` and
      :func:`scalabl_pyro.fit`. ``num_steps`` sets the cost; by default it is two passes over the data.
    - ``"mcmc"``: draws of the exact posterior of s. It costs hundreds of passes. Options: those of
      :func:`scalabl_pyro.mcmc`.
    - ``"tfb"``: the largest standard deviation of all latents under which the NLL of the rows rises by ``tolerance`` at
      most. It needs no gradients. Options: ``tolerance`` (relative, 0.003), ``max_scale`` (1.0), ``num_draws`` (4),
      ``num_bisections`` (6), ``batch_size`` (16).

    Args:
        blora: Adapter with trained factors, at its resting point.
        task: Task that defines the likelihood. Its prompt should be the one of training.
        data: Training rows of the adapter, or a random part of them. With a part, the posterior is wider.
        method: How s is inferred.
        seed: Seed of all random numbers; ``"laplace"`` uses none.
        options: Options of the method.

    Returns:
        Posterior with the adapter's factors. ``predict(num_draws=0)`` of ``"laplace"`` and ``"tfb"`` is the adapter.

    Raises:
        ValueError: The adapter is not trained (all B are zero), a row has no answer, the method is unknown, or an
            option has a wrong value.
        TypeError: An option belongs to another method.

    Example:
        >>> posterior = scalabl_pyro.posthoc(blora, task, train_data, method="laplace")
        >>> posterior.provenance["method"]
        'Laplace'

    References:
        Daxberger et al., Laplace Redux, NeurIPS 2021; Yang et al., Bayesian Low-rank Adaptation for LLMs, ICLR 2024;
        Shi et al., Training-Free Bayesianization for Low-Rank Adapters, NeurIPS 2025; Samplawski et al., UAI 2025.
    """
    check_role("blora", blora, "blora", call="posthoc(blora, task, data)")
    check_role("task", task, "task", call="posthoc(blora, task, data)")
    check_choice("method", method, METHODS)
    _check_options(method, options)
    if not any(bool(B.any()) for _, B in blora.adapter.factors()):
        raise ValueError(
            "The adapter is not trained: all factors B are zero, so s changes nothing. Train it with fit(blora, task, "
            "data), or bring a trained one with from_peft(model, path)."
        )
    rows = rows_for(task.encode, data)
    point = Posterior.capture(
        blora, task, DeltaGuide(blora.adapter.loc, learn=False), provenance={"method": "adapter", "num_data": len(rows)}
    )
    return _INFER[method](point, rows, seed, options)


def noise_on_latents(posterior: Posterior, rows: Any, search: NoiseSearch) -> Posterior:
    """Give all latents the largest standard deviation that keeps the NLL of some rows within a tolerance.

    It is the search of :func:`scalabl_pyro.baselines.tfb`, with noise on s instead of noise on A.

    Args:
        posterior: Posterior of a trained adapter. Only its mean is used.
        rows: Labeled rows: the training data or a part of it.
        search: Options of the search.

    Returns:
        Posterior with a normal guide around the mean, or without noise if no scale passes. Its provenance holds the
        scale and the NLLs.

    Raises:
        ValueError: Rows have no answers.
    """
    loc = posterior.mean()

    def with_noise(scale: float) -> Posterior:
        guide = NormalGuide(loc, torch.full_like(loc, scale)) if scale else DeltaGuide(loc, learn=False)
        return replace(posterior, guide=guide.requires_grad_(False).eval())

    found = search.provenance(with_noise, rows)
    return replace(with_noise(found["scale"]), provenance={**posterior.provenance, **found})


def _laplace(point: Posterior, rows: Any, seed: int, options: Mapping[str, Any]) -> Posterior:
    scale = PRIOR_SHARE * point.mean().square().mean().sqrt().item()
    return laplace(point, rows, **{"prior_scale": scale, **options})


def _vi(point: Posterior, rows: Any, seed: int, options: Mapping[str, Any]) -> Posterior:
    batch_size = options.get("batch_size", 8)
    steps = max(2 * len(rows) // batch_size, 1) if isinstance(batch_size, int) and batch_size > 0 else 1
    return refit(point, rows, **{"seed": seed, "num_steps": steps, "batch_size": batch_size, **options}).posterior


def _mcmc(point: Posterior, rows: Any, seed: int, options: Mapping[str, Any]) -> Posterior:
    return mcmc(point, rows, seed=seed, **options)


def _tfb(point: Posterior, rows: Any, seed: int, options: Mapping[str, Any]) -> Posterior:
    return noise_on_latents(point, rows, NoiseSearch(seed=seed, **options))


_INFER: dict[str, Callable[[Posterior, Any, int, Mapping[str, Any]], Posterior]] = {
    "laplace": _laplace,
    "vi": _vi,
    "mcmc": _mcmc,
    "tfb": _tfb,
}
#: What takes the options of each method.
_TAKES: dict[str, tuple[Callable[..., Any], ...]] = {
    "laplace": (laplace,),
    "vi": (refit, fit),
    "mcmc": (mcmc,),
    "tfb": (NoiseSearch,),
}
#: Arguments that ``posthoc`` gives to these functions itself.
_GIVEN = ("blora", "task", "posterior", "data", "train_data", "seed", "options", "reset")


def _options_of(method: str) -> list[str]:
    names = [name for function in _TAKES[method] for name in inspect.signature(function).parameters]
    return [name for name in dict.fromkeys(names) if name not in _GIVEN]


def _check_options(method: str, options: Mapping[str, Any]) -> None:
    """Raise TypeError if an option is not one of the method, and say which ones are."""
    own = _options_of(method)
    for name in options:
        if name not in own:
            others = [repr(other) for other in METHODS if other != method and name in _options_of(other)]
            hint = f"It belongs to method={' or '.join(others)}." if others else suggest(name, own)
            raise TypeError(f"method={method!r} has no option {name!r}. {hint} Its options are {', '.join(own)}.")
