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
"""# What a posterior says.

`make demo` fine-tunes SmolLM2-135M on Reuters news and saves a posterior in `runs/quickstart/`. Here we look at it as
an analyst would. We look at the latents, at the effect of their draws on predictions, and at the texts that the model
is unsure of.

This notebook is built from `posterior_analysis.py` by `make notebook`.
"""

# %%
import os

os.environ["TQDM_DISABLE"] = "1"  # no progress bars in the file; read at the import of tqdm

import logging
import sys
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import display

with warnings.catch_warnings(action="ignore"):  # Imports warn about progress bars and the next ArviZ,
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # and about kernels that some CPUs lack.
    import arviz as az
    import transformers

import scalabl_pyro as sp
from scalabl_pyro import metrics, plots

sys.path.insert(0, "examples")  # makes _support importable from the top of the repository
from _support import datasets, models

logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)  # no warning about articles that are cut
transformers.utils.logging.disable_progress_bar()
pd.options.display.max_columns, pd.options.display.max_colwidth = 20, 90
TOPICS = list(datasets.R8_TOPICS.values())

# %% [markdown]
"""With `SCALABL_TOY=1` the notebook runs on a random model with two blocks in seconds. Its numbers mean nothing."""

# %%
TOY = os.environ.get("SCALABL_TOY") == "1"
NUM_TEST, NUM_OTHER, NUM_TRAIN = (10, 4, 6) if TOY else (80, 20, 24)

if TOY:
    torch.set_num_threads(1)
    RUN = Path(tempfile.mkdtemp())
    llm, tokenizer = models.tiny_llm()
    rows = datasets.reuters_r8("train", count=16, seed=0)
    task = datasets.word_task(tokenizer, rows, datasets.NEWS, 16)
    blora = sp.bayesian_lora(llm)
    toy = sp.fit(blora, task, rows, num_steps=5, lr=1e-2, init_scale=0.3, progress=False)
    prediction = toy.posterior.predict(rows[:8], num_draws=10)
    toy.history.to_csv(RUN / "history.csv", index=False)
    prediction.metrics().to_csv(RUN / "table.csv")
    toy.posterior.to_arviz(num_draws=500, prediction=prediction).to_netcdf(str(RUN / "posterior.nc"))
    toy.posterior.save_pretrained(RUN / "posterior")
    blora.unload()
else:
    RUN = Path(models.__file__).resolve().parents[2] / "runs" / "quickstart"
    llm, tokenizer = models.smollm2()

# %% [markdown]
"""## The run

The directory holds only what was learned, so we load the base model first. Loading checks that the two belong together.
"""

# %%
posterior = sp.Posterior.from_pretrained(llm, RUN / "posterior")
display(pd.Series(posterior.provenance, name="provenance").to_frame())
display(pd.read_csv(RUN / "table.csv", index_col=0).round(3))

# %% [markdown]
"""Did training converge? The loss is the negative ELBO in nats per row, the sum of NLL and KL. If the KL still falls at
the end, the scales of the posterior have not converged, and more steps would change what follows.
"""

# %%
history = pd.read_csv(RUN / "history.csv")
plots.history(history)
plt.show()
display(history[["step", "loss", "nll", "kl"]].iloc[[0, len(history) // 2, -1]].round(2))

# %% [markdown]
"""## The latents, layer by layer

`s` scales the bottleneck of each LoRA layer. `rms_mean` is the root mean square of the posterior means over the latents
of a layer, and `rms_sd` that of the posterior standard deviations. The prior is Normal(0, 1).
"""

# %%
display(posterior.summary(num_draws=500).round(3))
plots.posterior_by_layer(posterior)
plt.show()

# %% [markdown]
"""ArviZ reads the same draws, with module paths as names. Draws of a guide are independent, so effective sample sizes
and R-hat say nothing about the fit. We ask only for the statistics.
"""

# %%
idata = posterior.to_arviz(num_draws=500)
layers = [posterior.subspace.names[i] for i in (0, 1, -1)]
display(az.summary(idata, var_names=["s"], coords={"layer": layers[-1:]}, kind="stats"))
az.plot_forest(idata, var_names=["s"], coords={"layer": layers}, combined=True)
plt.show()

# %% [markdown]
"""## What did the layers learn from the data?

If the data say nothing about a latent, its posterior is the prior: mean 0, sd 1. Three numbers tell how far each layer
is from the prior:

- `sd / prior sd`: the size of the posterior noise. It starts at 0.3 or below; in a very short run it stays there.
- `signal / noise`: |mean| / sd. It does not depend on how a layer splits its size between `s` and `B`, so use it to
  compare layers.
- `KL`: the cost in nats of leaving the prior, computed from the moments of the draws.
"""

# %%
s = posterior.sample(500, seed=0).s
mean, sd = s.mean(0), s.std(0)
kl = 0.5 * (sd**2 + mean**2 - 1) - sd.log()
split = posterior.subspace.split
by_layer = pd.DataFrame(
    {
        "sd / prior sd": [part.mean().item() for part in split(sd)],
        "signal / noise": [part.median().item() for part in split(mean.abs() / sd)],
        "KL": [part.sum().item() for part in split(kl)],
    },
    index=pd.Index(posterior.subspace.names, name="layer"),
)
print(f"{kl.sum():.1f} nats in all, {kl.sum() / posterior.provenance['num_data']:.3f} for each training row.")
display(by_layer.sort_values("signal / noise", ascending=False).round(3))
display(by_layer.groupby(lambda name: name.rsplit(".", 1)[-1]).mean().round(3))

# %% [markdown]
"""## Draws and mean, on a few sentences

Each draw is one network. `num_draws=0` predicts with the network at the mean; 50 draws average 50 predictions. The
table shows the probability of the likeliest topic under both, and its spread between draws (5 % to 95 %). It also shows
the uncertainty in nats: the part that each draw has (aleatoric) and the part that draws disagree on (epistemic). The
sentences look like the training data: lower case, no digits. The last two belong to no topic.
"""

# %%
SENTENCES = [
    "third quarter net profit rose to mln dlrs from mln a year earlier the company said",
    "opec ministers agreed to cut output as crude prices fell below dlrs a barrel",
    "the dollar fell after the central bank bought yen and may raise its discount rate traders said",
    "a vessel carrying tonnes of wheat ran aground and grain exports may be delayed",
    "my goalkeeper saved two penalties on sunday and the whole village sang until midnight",
    "is there a driver for this graphics card that works with the new version of windows",
]
asked = [{"question": text, "choices": TOPICS} for text in SENTENCES]
at_mean, over_draws = posterior.predict(asked, num_draws=0), posterior.predict(asked, num_draws=50, seed=0)
each = np.arange(len(asked))
by_draw = np.exp(over_draws.log_probs[:, each, over_draws.labels])
frame = over_draws.to_frame().rename(columns={"probability": "draws"})
frame.insert(0, "sentence", SENTENCES)
frame.insert(2, "mean", at_mean.probs[each, over_draws.labels])
frame.insert(4, "5 %", np.quantile(by_draw, 0.05, axis=0))
frame.insert(5, "95 %", np.quantile(by_draw, 0.95, axis=0))
display(frame.round(3))

# %% [markdown]
"""## What is the model unsure of?

Held-out Reuters articles, and posts of 20 Newsgroups, which have none of the topics. We rank all of them by epistemic
uncertainty. The draws disagree most on the texts at the top. Read them, and ask whether a person would hesitate too.
"""

# %%
test = datasets.reuters_r8("test", count=NUM_TEST, seed=0)
other = datasets.newsgroups(count=NUM_OTHER, seed=0)
inside = posterior.predict(test, num_draws=20, seed=0)
outside = posterior.predict(other, num_draws=20, seed=0)
frames = {"Reuters": inside.to_frame(), "Newsgroups": outside.to_frame()}
ranked = pd.concat([frame.assign(source=name) for name, frame in frames.items()], ignore_index=True)
ranked["text"] = [row["question"][:200] for row in (*test, *other)]
columns = ["source", "target", "prediction", "probability", "total", "epistemic", "text"]
display(ranked.sort_values("epistemic", ascending=False)[columns].head(8).round(3))

# %% [markdown]
"""Does uncertainty tell the two sources apart? The AUROC is the probability that a post scores above an article; 0.5 is
chance. The three kinds ask different questions, and none is best on every data set.
"""

# %%
kinds = ("total", "aleatoric", "epistemic")
auroc = {kind: metrics.ood_auroc(getattr(inside, kind), getattr(outside, kind)) for kind in kinds}
display(pd.Series(auroc, name="AUROC").to_frame().round(3))
plots.uncertainty_histogram(inside, outside)
plt.show()

# %% [markdown]
"""## Selective prediction

If the model answers only the articles that it is most sure of, how fast does the error fall? A good ranking keeps the
curve low until the coverage is high. With so few rows the steps are coarse; the bootstrap intervals show how coarse.
"""

# %%
inside_at_mean = posterior.predict(test, num_draws=0)
ax = plots.risk_coverage(inside_at_mean, label="mean", color=plots.WARM)
plots.risk_coverage(inside, ax=ax, label="20 draws")
plt.show()
reports = {"mean": inside_at_mean.metrics(bootstrap=200), "20 draws": inside.metrics(bootstrap=200)}
display(pd.concat(reports).round(3))

# %% [markdown]
"""## Leave-one-out

How well would the model predict a training article if it had not been trained on it? PSIS-LOO estimates this by
reweighting draws. It needs many draws (100 here; `predict` takes 10 by default), and rows of the *training* set,
because held-out articles were left out anyway. Two cautions: the draws come from the guide, not from the exact
posterior; and `A` and `B` have seen every row, so LOO is optimistic. A Pareto k above 0.5 marks an article for which
100 draws are too few.
"""

# %%
num_data = posterior.provenance["num_data"]
train = datasets.reuters_r8("train", count=num_data, seed=0)[:NUM_TRAIN]
trained_on = posterior.predict(train, num_draws=100, seed=0)
with warnings.catch_warnings(action="ignore"):  # about large Pareto k, which we look at below
    loo = az.loo(posterior.to_arviz(num_draws=100, prediction=trained_on), pointwise=True)
elpd = loo.elpd if hasattr(loo, "elpd") else loo.elpd_loo  # ArviZ 1.x, ArviZ 0.x
log_score = {
    "training rows, in sample": -metrics.nll(trained_on.probs, trained_on.target),
    "training rows, left out": float(elpd) / len(train),
    "held-out rows": -metrics.nll(inside.probs, inside.target),
}
display(pd.Series(log_score, name="log score, nats per row").to_frame().round(3))
k = np.asarray(loo.pareto_k)
print(f"Pareto k: {k.max():.2f} at most, above 0.5 for {(k > 0.5).sum()} of {len(k)} articles.")

# %% [markdown]
"""## The file

`posterior.nc` holds draws, predictions and observed topics, and records where they come from. The loaded posterior
gives the same draws as the file for the same seed.
"""

# %%
stored = az.from_netcdf(str(RUN / "posterior.nc"))
in_file = stored["posterior"]["s"].values.reshape(500, -1)
print("The same draws:", np.array_equal(in_file, posterior.sample(500, seed=0).s.numpy()))
display(pd.Series(dict(stored["posterior"].attrs), name="attribute").to_frame())

# %% [markdown]
"""A posterior predictive check from the file alone: how often each topic is simulated, and how often it is observed."""

# %%
answers = {
    "simulated": stored["posterior_predictive"]["label"].values.ravel(),
    "observed": stored["observed_data"]["label"].values,
}
share = {name: np.bincount(value, minlength=len(TOPICS)) / len(value) for name, value in answers.items()}
display(pd.DataFrame(share, index=TOPICS).round(3))
