"""The files that `make demo` leaves, made in seconds from a random model and few rows."""

from pathlib import Path

import pandas as pd

import scalabl_pyro as sp

from . import models, opinions
from .datasets import word_task


def toy_run(folder: Path, llm, tokenizer) -> None:
    """Fit, and write a table, the history, the draws and the posterior to ``folder``, under the names of the demo."""
    rows = opinions.movie_reviews("train", count=16, seed=0)
    task = word_task(tokenizer, rows, opinions.OPINION, 16)
    blora = sp.bayesian_lora(llm, layers_to_transform=models.upper_blocks(llm, 1))
    result = sp.fit(blora, task, rows, num_steps=5, lr=1e-2, init_scale=0.3, progress=False)
    prediction = result.posterior.predict(rows[:8], num_draws=10)
    result.history.to_csv(folder / "history.csv", index=False)
    pd.concat({"movie reviews": prediction.metrics()}).to_csv(folder / "tables.csv")
    result.posterior.to_arviz(num_draws=500, prediction=prediction).to_netcdf(str(folder / "posterior.nc"))
    result.posterior.save_pretrained(folder / "posterior")
    blora.unload()
