"""Training by Pyro's own SVI, with the rates and the random numbers of ``fit``."""

from collections.abc import Callable

import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO

from scalabl_pyro._process.random_state import derive_seed
from scalabl_pyro.data import Batch
from scalabl_pyro.model.joint import TaskModel
from scalabl_pyro.training.objective import ScopedGuide


def train_with_stock_svi(blora, task, guide, batches: Callable[[int], Batch], *, num_data: int, steps: int, seed: int):
    """Take steps of AdamW at rate 1e-2 with one draw per row; ``fit`` does the same with these rates."""
    model = TaskModel(blora, task, num_data=num_data, draws="per_example")
    per_example = 1 / num_data  # fit's loss is in nats per example
    svi = SVI(
        pyro.poutine.scale(model, per_example),
        pyro.poutine.scale(ScopedGuide(guide, draws="per_example"), per_example),
        pyro.optim.AdamW({"lr": 1e-2, "weight_decay": 0.0}),
        TraceMeanField_ELBO(),
    )
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "noise"))
        for step in range(steps):
            svi.step(batches(step))
