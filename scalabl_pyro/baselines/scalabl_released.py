"""ScalaBL as its authors' released code trains it, which is not the ELBO that the paper writes down.

In each step AdamW follows the mean NLL of a batch; then a second optimizer, plain SGD, follows the KL times a weight
from a schedule. The KL is KL(prior || posterior), where the ELBO has KL(posterior || prior): it grows as 1 / scale^2
where the scale is small, so that the schedule and the SGD learning rate, rather than the data, set the scale. Use it to
compare with published figures, and :func:`scalabl_pyro.fit` for the method itself.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._deprecated import renamed_arguments
from .._errors import check_positive
from .._process.pyro_modes import local_params
from .._process.random_state import scoped_seed
from ..data.batch import Batch
from ..data.training_batches import training_source
from ..guides import NormalGuide
from ..lora.train_mode import sole_use
from ..model.bayesian_lora import BayesianLoRA, bayesian_lora
from ..posterior.posterior import Posterior
from ..tasks import Task
from ..training.cuda_graphs import GRAPH_TOKENS, why_not
from ..training.optimizer import rate_schedule
from ..training.result import FitResult, TrainingError
from .kl_reweighting import KLReweighting
from .mle import unloaded_on_error
from .released_step import AlternatingStep, EagerGradient, GraphedGradient

#: Its mean is stored as a logarithm there, so it cannot be 0.
PRIOR_LOC, PRIOR_SCALE = 1e-8, 1.0


@renamed_arguments(kl_lr="lr_kl")
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
    """Fine-tune A, B, loc and scale of s the way the released code does.

    loc = exp(log_loc) and scale = exp(log_scale); all rows of a batch share one draw; A is free of any gauge. Unlike
    there, predictions use fixed draws. Defaults are those of the authors' scripts.

    Args:
        module: the base model; it is adapted in place.
        task: the likelihood.
        train_data: as for :func:`scalabl_pyro.fit`.
        num_steps: steps, each of both optimizers.
        batch_size: rows a step.
        lr: of AdamW (eps 1e-6, no weight decay), on everything, for the NLL.
        lr_kl: of SGD, on log_loc and log_scale, for the KL; 0.1 or 0.2 in the scripts, 0.02 by default in their code.
        init_scale: largest initial standard deviation; they start uniform on (init_scale / sqrt(2), init_scale).
        warmup: share of the steps over which both learning rates rise; then they fall to 0.
        gamma: of :class:`~scalabl_pyro.baselines.KLReweighting`.
        num_data: N; needed when ``train_data`` yields batches.
        lora: options of :func:`scalabl_pyro.bayesian_lora` (rank, targets, ...).
        cuda_graph: on a GPU, replay the gradient of the NLL as a CUDA graph, captured once for each batch shape.
        seed: of the factors, the initial scales, the data order and the noise.
        progress: show a progress bar.

    Returns:
        A posterior with a :class:`~scalabl_pyro.guides.NormalGuide`, and a history whose ``kl`` is KL(prior ||
        posterior) in nats, and ``kl_weight`` is pi_i.

    Raises:
        TrainingError: an NLL or KL that is not finite; its ``result`` holds what was learned before.

    References:
        Samplawski et al., UAI 2025, and the code released with it.
    """
    check_positive(num_steps=num_steps, batch_size=batch_size, lr=lr, lr_kl=lr_kl, init_scale=init_scale, gamma=gamma)
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup={warmup} must lie between 0 and 1: it is a share of the steps.")
    prior = dist.Normal(PRIOR_LOC, PRIOR_SCALE)
    blora = bayesian_lora(module, **{"seed": seed, **(lora or {}), "gauge": "free", "prior": prior})
    with unloaded_on_error(blora):
        task.to(blora.device)
        graphed = cuda_graph and why_not(blora.device, stays_on_device=True, keeps_prefix=False) is None
        batches, num_data = training_source(
            train_data,
            task.encode,
            batch_size=batch_size,
            pad_token_id=task.pad_token_id,
            num_data=num_data,
            seed=seed,
            multiple=GRAPH_TOKENS if graphed else 1,
        )
        latents = LogNormals(blora.adapter.loc, init_scale=init_scale, seed=seed).to(blora.device)
        learned = [p for p in [*blora.point_estimates.parameters(), *task.parameters()] if p.requires_grad]
        history, error = _train(
            blora,
            task,
            batches,
            AlternatingStep(latents, learned, lr=lr, lr_kl=lr_kl),
            weight=KLReweighting(num_data, batch_size, gamma).share,
            rate=rate_schedule("linear", warmup, num_steps),
            num_steps=num_steps,
            graphed=graphed,
            seed=seed,
            progress=progress,
        )
        provenance = {
            "method": "ScalaBL as released",
            "num_data": num_data,
            "num_steps": len(history),
            "batch_size": batch_size,
            "seed": seed,
            "lr_kl": lr_kl,
        }
        posterior = Posterior.capture(blora, task, latents.guide(), provenance=provenance)
        blora.adapter.rest_at(posterior.mean())
        result = FitResult(posterior, pd.DataFrame(history))
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
    graphed: bool,
    seed: int,
    progress: bool,
) -> tuple[list[dict[str, float]], TrainingError | None]:
    """All steps; what was done of them, and why the rest was not."""
    history: list[dict[str, float]] = []
    start, lr = time.perf_counter(), step.adamw.param_groups[0]["lr"]
    gradient = (GraphedGradient if graphed else EagerGradient)(
        step, lambda batch: _nll(blora, task, batch), device=blora.device
    )
    with _training_scope(blora, seed), tqdm(range(num_steps), disable=not progress, desc="scalabl_released") as bar:
        for i in bar:
            loss = gradient(batches(i), 1.0)
            try:
                nll, kl = step.update(loss, weight=weight(i), rate=rate(i))
            except FloatingPointError as failure:
                return history, TrainingError(f"At step {i}: {failure} Lower lr or lr_kl.")
            seconds = time.perf_counter() - start
            row = {"step": i, "loss": nll, "nll": nll, "kl": kl, "kl_weight": weight(i), "lr": rate(i) * lr}
            history.append({**row, "seconds": seconds})
            bar.set_postfix(nll=f"{nll:.4g}", kl=f"{kl:.4g}", refresh=False)
    return history, None


class LogNormals(nn.Module):
    """q(s) = Normal(exp(log_loc), exp(log_scale)): means, too, are positive there.

    Args:
        loc: (D,) initial means.
        init_scale: largest initial standard deviation.
        seed: of the initial standard deviations.
    """

    def __init__(self, loc: Tensor, *, init_scale: float, seed: int) -> None:
        super().__init__()
        uniform = torch.rand(loc.shape, generator=torch.Generator().manual_seed(seed), dtype=loc.dtype)
        self.log_loc = nn.Parameter(loc.log())
        self.log_scale = nn.Parameter((init_scale * (0.5**0.5 + (1 - 0.5**0.5) * uniform)).log())

    def draw(self) -> Tensor:
        """(D,) one draw, reparametrized."""
        return self.log_loc.exp() + self.log_scale.exp() * torch.randn_like(self.log_scale)

    def kl(self) -> Tensor:
        """KL(prior || q), nats."""
        return reversed_kl(self.log_loc.exp(), self.log_scale.exp())

    @torch.no_grad()
    def guide(self) -> NormalGuide:
        """The same family in the library's words."""
        return NormalGuide(self.log_loc.exp(), self.log_scale.exp())


def reversed_kl(loc: Tensor, scale: Tensor) -> Tensor:
    """KL(p || q) = sum of log(scale / sp) + (sp^2 + (mp - loc)^2) / (2 scale^2) - 1/2, the wrong way round."""
    moments = (PRIOR_SCALE**2 + (PRIOR_LOC - loc).square()) / (2 * scale.square())
    return ((scale / PRIOR_SCALE).log() + moments - 0.5).sum()


def _nll(blora: BayesianLoRA, task: Task, batch: Batch) -> Callable[[Tensor], Tensor]:
    def nll(s: Tensor) -> Tensor:
        return -task.likelihood(task.outputs(blora, batch, s), batch).log_prob(cast(Tensor, batch.target)).mean()

    return nll


@contextmanager
def _training_scope(blora: BayesianLoRA, seed: int) -> Iterator[None]:
    """As in :func:`scalabl_pyro.fit`: seeded noise, no dropout of the base model, no mark on Pyro's settings."""
    with (
        sole_use(blora.llm),
        scoped_seed(seed),
        local_params(),
        pyro.validation_enabled(False),
        torch.enable_grad(),
    ):
        yield
