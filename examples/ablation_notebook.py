# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
"""# Two priors, three guides, one data set.

SmolLM2-135M learns the topic of Reuters news six times, once for every pair of a prior and a guide, from the same start
and on the same batches. Differences come from the prior, from the guide, or from chance. The last section says which.
The notebook took 23 minutes of processor time.

This notebook is built from `ablation_notebook.py` by `make notebook`. It calls the functions of `ablation.py`, the
script that compares any priors and guides on any data.
"""

# %%
import os

os.environ["TQDM_DISABLE"] = "1"  # no progress bars in the file; read at the import of tqdm

import argparse
import itertools
import logging
import sys
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import display

with warnings.catch_warnings(action="ignore"):  # ArviZ 0.x warns about ArviZ 1.x
    import transformers

    sys.path.insert(0, "examples")  # makes ablation importable from the top of the repository
    import ablation

from scalabl_pyro import plots
from scalabl_pyro.analysis.checks import check_history

logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)  # no warning about articles that are cut
transformers.utils.logging.disable_progress_bar()
pd.options.display.max_columns = 20

# %% [markdown]
"""With `SCALABL_TOY=1` the notebook runs on a random model with two blocks in seconds. Its numbers mean nothing.

Priors: `normal` is Normal(0, 1). `horseshoe` expects most latents to be near zero, and infers how near with additional
latent scales. Guides: `normal` has no correlations, `layer_covariance` has correlations within a layer, and
`full_covariance` has all of them. The upper two of thirty blocks and the LM head are adapted. A seventh fit repeats the
first with another seed (other initial factors, another order of the rows), to measure the effect of chance.
"""

# %%
TOY = os.environ.get("SCALABL_TOY") == "1"
PAIRS = ["--priors", "normal", "horseshoe", "--guides", "normal", "layer_covariance", "full_covariance"]
DATA = ["--train-rows", "120", "--test-rows", "100", "--loo-rows", "32", "--max-length", "32"]
REAL = [*DATA, "--blocks", "2", "--steps", "120", "--batch-size", "8", "--draws", "100"]

if TOY:
    torch.set_num_threads(1)
args = ablation.arguments([*PAIRS, *(["--tiny"] if TOY else REAL)])
llm, task, train, test = ablation.load(args)
outcomes = dict(ablation.grid(llm, task, train, test, args))
again = ablation.run(llm, task, train, test, "normal", "normal", argparse.Namespace(**{**vars(args), "seed": 1}))
print(f"{len(train)} rows to train on, {len(test)} to test, {args.steps} steps of {args.batch_size} rows.")

# %% [markdown]
"""## The table

- `accuracy`, `nll` (nats per row), `ece`: on the test rows, averaged over 20 draws. For NLL and ECE, lower is better.
- `elbo`: nats per data set, estimated from 32 training rows and scaled up. It bounds the log evidence *of its own prior
  and factors*. Within a prior it compares fits; between priors it also compares how well the priors fit.
- `elpd_loo`, `se`: leave-one-out log density of these rows in nats, and its standard error.
- `pareto_k`: distance of the guide from the posterior with the factors held fixed. Above `good_k` the guide is too far
  for weights p / q, and `elpd_loo` is then that of the guide and not of the posterior. `bad_rows` is the share of rows
  above the threshold.
- `parameters`: number of parameters of the guide.
- `seconds`: duration of the fit. The two cores were shared with other work, so do not compare these numbers.
"""

# %%
lines = {name: outcome.row for name, outcome in (*outcomes.items(), ("normal / normal, seed 1", again))}
table = pd.DataFrame.from_dict(lines, orient="index")
display(table.round(3))

# %% [markdown]
"""## Have they converged?

The loss is the negative ELBO per row. A guide that still changes should not be judged yet. `loss_slope` is the change
of the loss over the last third of the steps in standard errors. Below -3 the loss clearly still falls.
"""

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
for ax, prior in zip(axes, args.priors, strict=True):
    for guide, color in zip(args.guides, (plots.MARK, plots.WARM, plots.QUIET), strict=True):
        history = outcomes[f"{prior} / {guide}"].result.history
        ax.plot(history["step"], history["loss"].rolling(10, min_periods=1).mean(), color=color, label=guide)
    ax.set(title=f"prior {prior}", xlabel="step")
axes[0].set(ylabel="loss, nats per row (mean of 10 steps)", yscale="log")
axes[0].legend(frameon=False)
plt.show()
slopes = {name: {f.check: f.value for f in check_history(o.result.history)} for name, o in outcomes.items()}
display(pd.DataFrame.from_dict(slopes, orient="index").round(1))

# %% [markdown]
"""## What is a difference?

All pairs answer the same test rows, so their log scores can be compared row by row. `difference` is the NLL minus that
of the first pair in nats per row, and `se` is its standard error over rows. Ignore a difference below two standard
errors, and one that is not larger than the difference between two seeds.
"""

# %%


def log_scores(prediction):
    """Compute the log probability of the right topic of each row."""
    return np.log(prediction.probs[np.arange(len(prediction.target)), prediction.target])


reference = log_scores(outcomes["normal / normal"].prediction)
gaps = {}
for name, outcome in (*outcomes.items(), ("normal / normal, seed 1", again)):
    gap = reference - log_scores(outcome.prediction)
    gaps[name] = {"difference": gap.mean(), "se": gap.std(ddof=1) / len(gap) ** 0.5}
display(pd.DataFrame.from_dict(gaps, orient="index").round(3))

# %% [markdown]
"""## The latents of one layer

The plot shows the layer with the largest correlation under `full_covariance`. Its factors were trained anew with each
pair, so the medians differ for many reasons. Compare the widths.
"""

# %%
widest = outcomes["normal / full_covariance"].posterior
covariance = widest.guide.covariance().detach().numpy()
correlation = covariance / np.sqrt(np.outer(covariance.diagonal(), covariance.diagonal())) - np.eye(len(covariance))
edges = np.cumsum([0, *widest.subspace.ranks])
blocks = [correlation[a:b, a:b] for a, b in itertools.pairwise(edges)]
most = int(np.argmax([np.abs(block).max() for block in blocks]))
layer = widest.subspace.names[most]
print(f"Largest correlation within a layer: {np.abs(blocks[most]).max():.2f}, in {layer}.")
within = np.equal.outer(*[np.repeat(range(len(blocks)), widest.subspace.ranks)] * 2)
print(f"Largest correlation between layers: {np.abs(np.where(within, 0, correlation)).max():.2f}.")
draws = {name: ablation.draws_of(outcome.posterior, layer) for name, outcome in outcomes.items()}
ablation.forest(draws)
plt.show()

# %% [markdown]
"""## Correlations

The plots show the two latents with the largest correlation, and a third one. The first guide can represent correlations
and the second cannot.
"""

# %%
first, second = np.unravel_index(np.abs(blocks[most]).argmax(), blocks[most].shape)
third = next(rank for rank in range(3) if rank not in (first, second))
ranks = sorted({int(first), int(second), third})
for guide in ("full_covariance", "normal"):
    ablation.pair(draws[f"normal / {guide}"], f"guide {guide}", ranks)
    plt.show()

# %% [markdown]
"""## What this run says

With 120 training rows, 120 steps of 8 rows, 100 test rows, and one seed each (two for the first pair):

- **The guide hardly matters here.** Within a prior the NLL of the guides differs by 0.007 nats per row at most; another
  seed makes 0.041. No correlation that `full_covariance` found is above 0.10, so it had little to say that the
  factorized guide cannot. The pair plots look alike.
- **The prior does something.** Under the horseshoe the NLL is lower by 0.07 nats per row, four standard errors over
  rows and more than the seed makes; whether it would be under other seeds this run cannot tell. Its latents are smaller
  and half as wide. Its ELBO is lower by more than 60 nats, as it pays for the scales it infers, one per latent and two
  more.
- **Numbers to mistrust.** `pareto_k` is above its threshold for every pair but two, and for the horseshoe far above:
  its factorized guide of the scales is not close to the posterior. There `elpd_loo` and `elbo` do not rank anything.
- **Not finished.** No loss still fell clearly against its noise, but 120 steps are few, and a slope that small batches
  hide would not be seen.
"""
