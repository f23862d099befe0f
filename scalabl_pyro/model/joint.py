"""The joint Pyro model of a data set: s from the prior, each answer from the likelihood of the LLM under s."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from .._errors import check_positive
from .._process.random_state import scoped_seed
from ..data.batch import Batch
from ..tasks import Task
from .bayesian_lora import BayesianLoRA


class TaskModel(nn.Module):
    """The joint model of a data set: s ~ prior, y_n ~ likelihood(LLM(x_n; s)).

    Args:
        blora: The LLM.
        task: The likelihood.
        num_data: Size N of the whole training set; the likelihood of a minibatch of B rows is scaled by N / B.
        factor_scale: Standard deviation of a normal MAP prior on B (and on A, if the gauge leaves it free).
        draws: ``"per_example"`` gives each row of a batch its own s, so that the gradient noise of the ELBO falls with
            the batch size. ``"shared"`` gives all rows the same s.

    Raises:
        ValueError: ``factor_scale`` is not positive.
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
            check_positive(factor_scale=factor_scale)
        self.blora = blora
        self.task = task
        self.num_data = num_data
        self.draws = draws
        self.factor_scale = factor_scale

    def forward(self, batch: Batch, kl_weight: float | Tensor = 1.0) -> Tensor:
        """Sample s and y for a batch; y is observed when the batch has targets.

        Args:
            batch: B rows of the data set.
            kl_weight: Weight of the log prior; the guide must use the same weight, see :func:`latent_scope`.

        Returns:
            The answers y, (B,) or with the dimensions of the draws in front.
        """
        with latent_scope(batch, kl_weight, draws=self.draws):
            s = self.blora.sample_latents()
        if self.factor_scale is not None:
            pyro.factor("factor_prior", self.log_factor_prior())
        if batch.joint is not None and self.draws == "per_example":
            s = s[..., batch.start : batch.start + len(batch), :]
        with self._own_masks(batch):
            outputs = self.task.outputs(self.blora, batch, s)
        with pyro.plate("data", self.num_data, subsample=batch.index):
            return pyro.sample("label", self.task(outputs, batch), obs=batch.target)

    def log_factor_prior(self) -> Tensor:
        """Log density of the factors under their MAP prior, up to a constant: (), nats per data set; 0 without one."""
        adapter, device = self.blora.adapter, self.blora.device
        if self.factor_scale is None:
            return torch.zeros((), device=device)
        # With unit rows only the directions of A matter, and the prior is uniform on directions.
        free = [factor for A, B in adapter.factors() for factor in ((A, B) if adapter.gauge == "free" else (B,))]
        squares = torch.stack([factor.square().sum().to(device) for factor in free]).sum()
        return -0.5 * squares / self.factor_scale**2

    @contextmanager
    def _own_masks(self, batch: Batch) -> Iterator[None]:
        """Give dropout a random stream per process.

        It draws as many numbers as the process has rows. Without a stream of its own, the random states of the
        processes would drift apart.
        """
        dropouts = (dropout for layer in self.blora.adapter.layers for dropout in layer.lora_dropout.values())
        if batch.joint is None or not any(isinstance(dropout, nn.Dropout) for dropout in dropouts):
            yield
            return
        with scoped_seed(int(torch.randint(2**31, ())) + batch.start):
            yield


@contextmanager
def latent_scope(batch: Batch, kl_weight: float | Tensor = 1.0, *, draws: str) -> Iterator[None]:
    """Set the plate and the scale of the site s, for model and guide alike.

    With per-example draws, s is sampled in a plate over the B rows, and its log density is scaled by 1 / B: the average
    over rows of log p(s_b) - log q(s_b) is an unbiased estimate of -KL(q || p). If several processes share a batch,
    each of them draws s for all rows.

    Args:
        batch: Rows of this process.
        kl_weight: Weight of KL(q || p).
        draws: ``"per_example"`` or ``"shared"``, see :class:`TaskModel`.
    """
    rows = len(batch) if batch.joint is None else batch.joint
    with ExitStack() as stack:
        if draws == "per_example":
            stack.enter_context(pyro.plate("rows", rows, dim=-1))
            kl_weight = kl_weight / rows
        if not torch.is_tensor(kl_weight) and kl_weight == 0:
            stack.enter_context(poutine.mask(mask=False))  # Pyro refuses a scale of 0
        elif torch.is_tensor(kl_weight) or kl_weight != 1:
            stack.enter_context(poutine.scale(scale=kl_weight))
        yield
