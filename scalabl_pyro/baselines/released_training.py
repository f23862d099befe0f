"""ScalaBL as the code released by its authors trains it. Its loss differs from the ELBO in the paper.

In each step AdamW updates the parameters on the mean NLL of a batch. Then a second optimizer, plain SGD, updates q(s)
on the KL times a weight from a schedule. The KL is KL(prior || posterior); the ELBO has KL(posterior || prior). It
grows as 1 / scale^2 for small scales, so the schedule and the SGD learning rate set the scale, not the data. Use it to
compare with published figures. Use :func:`scalabl_pyro.fit` for the method itself.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import pandas as pd
import pyro.distributions as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._arguments import check_role, known_arguments
from .._deprecated import renamed_arguments
from .._errors import check_count, check_positive, check_scale, check_share
from .._process.random_state import Stream, derive_seed
from ..data.batch import Batch
from ..data.training_batches import training_source
from ..model.bayesian_lora import BayesianLoRA, bayesian_lora
from ..posterior.posterior import Posterior
from ..tasks import Task
from ..training.cuda_graphs import GRAPH_TOKENS
from ..training.graph_choice import devices_of, why_not
from ..training.optimizer import rate_schedule
from ..training.provenance import describe_data, versions
from ..training.result import FitResult, TrainingError
from ..training.scope import step_scope, training_scope
from .point_lora import unloaded_on_error
from .released_kl import PRIOR_LOC, PRIOR_SCALE, KLReweighting, LogNormals
from .released_step import AlternatingStep, gradient_step


@renamed_arguments(kl_lr="lr_kl")
@known_arguments
def scalabl_released(
    module: nn.Module,
    task: Task,
    train_data: Any,
    *,
    num_steps: int = 5000,
    batch_size: int = 4,
    lr: float = 1e-4,
    lr_kl: float = 0.1,
    init_scale: float = 0.05,
    warmup: float = 0.06,
    gamma: float = 8.0,
    num_data: int | None = None,
    lora: Mapping[str, Any] | None = None,
    cuda_graph: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> FitResult:
    """Fine-tune A, B and the posterior of s as the released ScalaBL code does.

    The posterior has loc = exp(log_loc) and scale = exp(log_scale). All rows of a batch share one draw. The rows of A
    are not normalized. Predictions use fixed draws, which the released code does not. The defaults are those of the
    authors' scripts.

    Args:
        module: Base model. It is adapted in place.
        task: Task that encodes the rows and defines the likelihood.
        train_data: Training rows, as for :func:`scalabl_pyro.fit`.
        num_steps: Number of steps. Each step updates with both optimizers.
        batch_size: Rows per step.
        lr: Learning rate of AdamW (eps 1e-6, no weight decay), which updates all parameters on the NLL.
        lr_kl: Learning rate of SGD, which updates log_loc and log_scale on the KL. The scripts use 0.1 or 0.2; the
            default in the released code is 0.02.
        init_scale: Largest initial standard deviation. Initial values are uniform on (init_scale / sqrt(2),
            init_scale).
        warmup: Share of the steps over which both learning rates rise. Then they fall to 0.
        gamma: Constant of :class:`~scalabl_pyro.baselines.KLReweighting`.
        num_data: Number of training rows N. Required when ``train_data`` yields batches.
        lora: Options of :func:`scalabl_pyro.bayesian_lora`, such as ``r`` and ``target_modules``.
        cuda_graph: Whether to replay the gradient of the NLL as a CUDA graph on a GPU, captured once per batch shape.
        seed: Seed of the factors, the initial scales, the data order and the noise.
        progress: Whether to show a progress bar.

    Returns:
        A result whose posterior has a :class:`~scalabl_pyro.guides.NormalGuide`. In its history, ``kl`` is
        KL(prior || posterior) in nats, and ``kl_weight`` is the weight pi_i.

    Raises:
        ValueError: An option is out of range, or rows do not fit the task.
        TrainingError: The NLL or KL is not finite. ``result`` of the error holds what was learned before.

    References:
        Samplawski et al., Scalable Bayesian Low-Rank Adaptation, UAI 2025, and the code released with it.

    Example:
        >>> result = scalabl_pyro.baselines.scalabl_released(llm, task, train_data, num_steps=100)
        >>> result.history[["nll", "kl", "kl_weight"]].tail()
    """
    check_role("task", task, "task", call="scalabl_released(llm, task, train_data)")
    check_count(num_steps=num_steps, batch_size=batch_size)
    check_positive(lr=lr, lr_kl=lr_kl, gamma=gamma)
    check_scale(init_scale=init_scale)
    check_share(warmup=warmup)
    prior = dist.Normal(PRIOR_LOC, PRIOR_SCALE)
    blora = bayesian_lora(module, **{"seed": seed, **(lora or {}), "gauge": "free", "prior": prior})
    with unloaded_on_error(blora):
        task.to(blora.device)
        graphed = cuda_graph and why_not(devices_of(blora), stays_on_device=True, keeps_prefix=False) is None
        batches, num_data = training_source(
            train_data,
            task.encode,
            batch_size=batch_size,
            pad_token_id=task.pad_token_id,
            num_data=num_data,
            seed=seed,
            multiple=GRAPH_TOKENS if graphed else 1,
        )
        task.prepare_for(batches)
        latents = LogNormals(blora.adapter.loc, init_scale=init_scale, seed=derive_seed(seed, "initial scales"))
        latents.to(blora.device)
        learned = [p for p in [*blora.point_estimates.parameters(), *task.parameters()] if p.requires_grad]
        history, error = _train(
            blora,
            task,
            batches,
            AlternatingStep(latents, learned, lr=lr, lr_kl=lr_kl),
            weight=KLReweighting(num_data, batch_size, gamma).share,
            rate=rate_schedule("linear", warmup, num_steps),
            num_steps=num_steps,
            noise=Stream(derive_seed(seed, "noise")),
            graphed=graphed,
            progress=progress,
        )
        own = {"lr": lr, "lr_kl": lr_kl, "init_scale": init_scale, "warmup": warmup, "gamma": gamma, "seed": seed}
        data = {"num_data": num_data, "batch_size": batch_size, "data": describe_data(batches, num_data)}
        result = _as_result(blora, task, latents, history, {**data, **own})
        if error is not None:
            error.result = result if history else None
            raise error
        return result


def _train(
    blora: BayesianLoRA,
    task: Task,
    batches: Callable[[int], Batch],
    step: AlternatingStep,
    *,
    weight: Callable[[int], float],
    rate: Callable[[int], float],
    num_steps: int,
    noise: Stream,
    graphed: bool,
    progress: bool,
) -> tuple[list[dict[str, float]], TrainingError | None]:
    """Make all steps; return the history, and the error that stopped the training early, if any."""
    history: list[dict[str, float]] = []
    start, lr = time.perf_counter(), step.adamw.param_groups[0]["lr"]
    gradient = gradient_step(step, lambda batch: _nll(blora, task, batch), device=blora.device, graphed=graphed)
    with training_scope(blora), tqdm(range(num_steps), disable=not progress, desc="scalabl_released") as bar:
        for i in bar:
            try:
                with step_scope(noise):
                    loss = gradient(batches(i), 1.0).statistics[0]
                    nll, kl = step.update(loss, weight=weight(i), rate=rate(i))
            except FloatingPointError as failure:
                return history, TrainingError(f"At step {i}: {failure} Lower lr or lr_kl.")
            seconds = time.perf_counter() - start
            row = {"step": i, "loss": nll, "nll": nll, "kl": kl, "kl_weight": weight(i), "lr": rate(i) * lr}
            history.append({**row, "seconds": seconds})
            bar.set_postfix(nll=f"{nll:.4g}", kl=f"{kl:.4g}", refresh=False)
    return history, None


def _as_result(
    blora: BayesianLoRA, task: Task, latents: LogNormals, history: list[dict[str, float]], provenance: dict[str, Any]
) -> FitResult:
    """Freeze what was learned into a posterior; the module itself stays at the posterior mean."""
    provenance = {"method": "ScalaBL as released", "num_steps": len(history), "versions": versions(), **provenance}
    posterior = Posterior.capture(blora, task, latents.guide(), provenance=provenance)
    blora.adapter.rest_at(posterior.mean())
    return FitResult(posterior, pd.DataFrame(history))


def _nll(blora: BayesianLoRA, task: Task, batch: Batch) -> Callable[[Tensor], Tensor]:
    def nll(s: Tensor) -> Tensor:
        return -task.likelihood(task.outputs(blora, batch, s), batch).log_prob(cast(Tensor, batch.target)).mean()

    return nll
