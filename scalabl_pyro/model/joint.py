"""The joint Pyro model of a data set: s comes from the prior, and each answer from the likelihood given s."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from .._errors import check_scale
from .._process.full_precision import autocast_again
from .._process.random_state import scoped_seed
from ..data.batch import Batch
from ..lora.gradient_checkpointing import dropouts_of
from ..tasks import Task
from .bayesian_lora import BayesianLoRA


class TaskModel(nn.Module):
    """The joint model of a data set: s ~ prior, y_n ~ likelihood(LLM(x_n; s)).

    Args:
        blora: LLM with its prior on s.
        task: Task that defines the likelihood.
        num_data: Size N of the whole training set. The likelihood of a minibatch of B rows is multiplied by N / B.
        draws: ``"per_example"`` gives each row of a batch its own s, so that the gradient noise of the ELBO decreases
            with the batch size. ``"shared"`` gives all rows the same s.
        factor_scale: Standard deviation of a normal prior on B, and also on A if the gauge is ``"free"``. The factors
            then get maximum a posteriori (MAP) estimates. None means no prior on the factors.

    Raises:
        ValueError: If ``factor_scale`` is not positive.
    """

    def __init__(
        self,
        blora: BayesianLoRA,
        task: Task,
        *,
        num_data: int,
        draws: str = "shared",
        factor_scale: float | None = None,
    ) -> None:
        super().__init__()
        if factor_scale is not None:
            check_scale(factor_scale=factor_scale)
        self.blora = blora
        self.task = task
        self.num_data = num_data
        self.draws = draws
        self.factor_scale = factor_scale

    def forward(self, batch: Batch, kl_weight: float | Tensor = 1.0) -> Tensor:
        """Sample s and y for a batch; y is observed if the batch has targets.

        Args:
            batch: Batch of B rows of the data set.
            kl_weight: Weight of the log prior. The guide must use the same weight, see :func:`latent_scope`.

        Returns:
            Answers y, (B,). If s has several draws, their dimensions come first.
        """
        with latent_scope(batch, kl_weight, draws=self.draws):
            s = self.blora.sample_latents()
        if self.factor_scale is not None:
            pyro.factor("factor_prior", self.log_factor_prior())
        if batch.joint is not None and self.draws == "per_example":
            s = s[..., batch.start : batch.start + len(batch), :]
        with self._own_masks(batch), autocast_again():
            outputs = self.task.outputs(self.blora, batch, s)
        with pyro.plate("data", self.num_data, subsample=batch.index):
            return pyro.sample("label", self.task(outputs, batch), obs=batch.target)

    def log_factor_prior(self) -> Tensor:
        """Compute the log density of the factors under their prior, up to a constant.

        Returns:
            Log density for the whole data set in nats, (); 0 if the factors have no prior.
        """
        adapter, device = self.blora.adapter, self.blora.device
        if self.factor_scale is None:
            return torch.zeros((), device=device)
        # With unit rows, only the directions of the rows of A matter, and their prior is uniform.
        free = [factor for A, B in adapter.factors() for factor in ((A, B) if adapter.gauge == "free" else (B,))]
        squares = torch.stack([factor.square().sum().to(device) for factor in free]).sum()
        return -0.5 * squares / self.factor_scale**2

    @contextmanager
    def _own_masks(self, batch: Batch) -> Iterator[None]:
        """Give dropout its own random stream in each process.

        Dropout draws more random numbers in a process that has more rows. Without a separate stream, the random states
        of the processes would become different.
        """
        if batch.joint is None or not dropouts_of(self.blora.adapter):
            yield
            return
        with scoped_seed(int(torch.randint(2**31, ())) + batch.start):
            yield


@contextmanager
def latent_scope(batch: Batch, kl_weight: float | Tensor = 1.0, *, draws: str) -> Iterator[None]:
    """Set the plate and the scale of the site s. The model and the guide both use it.

    With per-example draws, s is sampled in a plate over the B rows, and its log density is multiplied by 1 / B. The
    average over rows of log p(s_b) - log q(s_b) is then an unbiased estimate of -KL(q || p). If several processes share
    a batch, each process draws s for all rows.

    Args:
        batch: Batch of the rows of this process.
        kl_weight: Weight of KL(q || p).
        draws: Kind of draws, ``"per_example"`` or ``"shared"``; see :class:`TaskModel`.
    """
    rows = len(batch) if batch.joint is None else batch.joint
    with ExitStack() as stack:
        if draws == "per_example":
            stack.enter_context(pyro.plate("rows", rows, dim=-1))
            kl_weight = kl_weight / rows
        if not torch.is_tensor(kl_weight) and kl_weight == 0:
            stack.enter_context(poutine.mask(mask=False))  # Pyro raises an error for a scale of 0
        elif torch.is_tensor(kl_weight) or kl_weight != 1:
            stack.enter_context(poutine.scale(scale=kl_weight))
        yield
