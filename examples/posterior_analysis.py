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

`make demo` fine-tunes SmolLM2-135M on sentences of movie reviews and saves a *posterior* in `runs/quickstart/`. A
posterior is a distribution over models: it says which values of some parameters fit the training rows. Here we look at
it as an analyst would.

**What you will know at the end**

- Whether the training was long enough, and which layers have learned something.
- How much the predictions differ between one draw from the posterior and the next.
- Whether the probabilities can be believed, and which sentences the model is unsure of.
- What `diagnose` checks, and what a large Pareto k means.
- What the ArviZ file of a posterior holds.

Run `make demo` first. The notebook then takes 10 to 20 minutes on one CPU core: the last line says how long this run
took, and the first output says on which machine. It is built from `posterior_analysis.py` by `make notebook`.
"""

# %%
import sys

sys.path.insert(0, "examples")  # makes _support importable from the top of the repository
from _support import notebooks

notebooks.set_up()  # before the other imports, because some of them print messages

import tempfile
import warnings
from pathlib import Path

import arviz as az
import numpy as np
import pandas as pd
from _support import models, opinions, toy_run
from IPython.display import display
from matplotlib import pyplot as plt

import scalabl_pyro
from scalabl_pyro import metrics, plots
from scalabl_pyro.analysis.checks import check_history

CHOICES = opinions.CHOICES

# %% [markdown]
"""With `SCALABL_TOY=1` the notebook runs on a random model with two blocks in seconds. Its numbers mean nothing. The
line below says which size this run has, and which versions made its numbers.
"""

# %%
TOY = notebooks.TOY
NUM_TEST, NUM_OTHER, NUM_TRAIN = (10, 4, 6) if TOY else (120, 60, 16)
RUN = Path(tempfile.mkdtemp()) if TOY else notebooks.RUNS / "quickstart"

llm, tokenizer = models.demo_llm(tiny=TOY)
if TOY:
    toy_run.toy_run(RUN, llm, tokenizer)
if not (RUN / "posterior").exists():
    raise FileNotFoundError(f"{RUN} does not hold the files of the demo. Run `make demo` first.")
print(notebooks.machine())

# %% [markdown]
"""## The run

The folder holds only what was learned, so we load the language model first. Loading checks that the two belong
together. The table is the one that the demo printed: scores of plain LoRA and of ScalaBL on all kinds of sentences.
"""

# %%
posterior = scalabl_pyro.Posterior.from_pretrained(llm, RUN / "posterior")
display(posterior)
facts = ("num_data", "num_steps", "batch_size", "seed", "method", "seconds")
display(pd.Series({name: posterior.provenance[name] for name in facts}, name="how it was fitted").to_frame())
scores = pd.read_csv(RUN / "tables.csv", index_col=[0, 1]).rename_axis(["source", "method"]).astype(object)
display(scores.where(scores.notna(), ""))

# %% [markdown]
"""## Was the training long enough?

The *loss* is what training makes small, in nats per row. A *nat* is the unit of natural logarithms. The loss is the sum
of two parts. The *NLL* (negative log likelihood) is small if the right answers get a high probability. The *KL* is the
distance of the posterior from the *prior*, the distribution before training. The thin lines are single steps, which are
noisy. If the loss still falls at the end, a longer training would change what follows.
"""

# %%
history = pd.read_csv(RUN / "history.csv")
plots.history(history)
plt.show()
found = [(finding.check, finding.value, finding.cause) for finding in check_history(history)]
display(pd.DataFrame(found, columns=["check", "value", "finding"]).set_index("check").round(2))

# %% [markdown]
"""`loss_slope` is the slope of the loss over the last third of the training, in standard errors. `loss_end` is the loss
at the end minus the loss at the start.

## The latents, layer by layer

A LoRA layer adds the product of two small matrices to a weight of the model. In the middle of each LoRA layer stands a
vector `s` of random numbers, the *latents*. They scale what passes through the layer. The prior of each latent is
Normal(0, 1). The dots are the means of the posterior, and the lines are one standard deviation (`sd`) long on each
side.
"""

# %%
plots.posterior_by_layer(posterior)
plt.show()

# %% [markdown]
"""If the data say nothing about a latent, its posterior is the prior: mean 0, standard deviation 1. Three numbers tell
how far each layer is from the prior:

- `sd / prior sd`: the mean width of the posterior. It starts at 0.3 or below; in a very short run it stays there.
- `signal / noise`: |mean| / sd, the median over the latents of the layer. It does not depend on how a layer splits its
  size between `s` and its matrices, so use it to compare layers.
- `KL`: how far the posterior is from the prior, in nats, if posterior and prior are normal distributions, as they are
  here.
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

# %%
figure, ax = plt.subplots(figsize=(7, 1 + 0.22 * len(by_layer)), layout="constrained")
ax.barh(by_layer.index[::-1], by_layer["KL"][::-1], color=plots.MARK)
ax.set(xlabel="KL, nats per layer", title="How far each layer is from the prior")
plt.show()

# %% [markdown]
"""[ArviZ](https://www.arviz.org) reads the same draws. The draws are independent of each other, so effective sample
sizes and R-hat, which judge chains of dependent draws, say nothing about the fit. We ask only for the statistics. In
the picture the dots are medians, and the lines hold half of the draws and nearly all of them.
"""

# %%
idata = posterior.to_arviz(num_draws=500)
last = {"layer": posterior.subspace.names[-1:]}
display(az.summary(idata, var_names=["s"], coords=last, kind="stats"))
az.plot_forest(idata, var_names=["s"], coords=last, combined=True)
plt.show()

# %% [markdown]
"""## Draws and mean, on a few sentences

Each draw is one network. `num_draws=0` predicts with the network at the mean of the posterior; 50 draws average 50
predictions. Each thin mark of the picture is one network: its probability for `positive`. Marks that lie far apart mean
that the networks disagree. The first two sentences are clear. The next two have a good side and a bad side. The last
two are not about movies, and the very last one has no opinion.
"""

# %%
SENTENCES = [
    "A warm and funny film that I would watch again.",
    "Two hours of my life that I will not get back.",
    "The plot is thin, but the actors are wonderful.",
    "Beautiful to look at, and I could not wait for the end.",
    "The battery died after a week, and nobody answered my messages.",
    "The council will meet again on Tuesday.",
]
asked = [{"question": text, "choices": CHOICES} for text in SENTENCES]
at_mean, over_draws = posterior.predict(asked, num_draws=0), posterior.predict(asked, num_draws=50, seed=0)
POSITIVE = CHOICES.index("positive")
by_draw = np.exp(over_draws.log_probs[:, :, POSITIVE])
each = np.arange(len(asked))
figure, ax = plt.subplots(figsize=(8, 3.2), layout="constrained")
for i in each:
    ax.plot(by_draw[:, i], np.full(len(by_draw), -i), "|", color=plots.MARK, alpha=0.5, markersize=12)
ax.plot(by_draw.mean(0), -each, "o", color=plots.WARM, label="mean of 50 draws")
ax.plot(at_mean.probs[:, POSITIVE], -each, "x", color="black", label="network at the mean")
ax.set_yticks(-each, SENTENCES, fontsize=8)
ax.set(xlabel="probability of positive", xlim=(0, 1))
figure.legend(loc="outside upper right", ncols=2, frameon=False)
plt.show()

# %% [markdown]
"""The table shows the answer and its probability. `total` is the uncertainty in nats: the entropy of the averaged
probabilities. It is 0 if one answer has probability 1, and 0.69 if both are equally likely. It is the sum of two parts.
`aleatoric` is the mean entropy of the single networks. `epistemic` is the part that comes from networks that disagree.
"""

# %%
frame = over_draws.to_frame()
frame.insert(0, "sentence", SENTENCES)
display(frame.round(3))

# %% [markdown]
"""## Can you believe the probabilities?

Now sentences of movie reviews that were not used for training. We sort them into groups by the probability of the
answer, and count how often the answer is right. A *calibrated* model is on the dashed line: of the answers with a
probability of 0.8, 80 % are right. The bars are 95 % intervals, and the strips below show how many sentences each group
has. *ECE* (expected calibration error) is the mean distance from the line; lower is better.
"""

# %%
test = opinions.movie_reviews("test", count=NUM_TEST, seed=0)
predictions = {
    "mean": posterior.predict(test, num_draws=0),
    "10 draws": posterior.predict(test, num_draws=10, seed=0),
}
display(predictions["10 draws"])
plots.reliability(predictions)
plt.show()

# %% [markdown]
"""The worst answers are those that are wrong and look sure. The next picture counts answers with a probability above
0.9. The table has the usual scores with 95 % intervals (`low`, `high`) from resampled sentences. Compare the intervals
before you call one of the two better.
"""

# %%
plots.confident_mistakes(predictions)
plt.show()
reports = {name: prediction.metrics(bootstrap=200) for name, prediction in predictions.items()}
display(pd.concat(reports)[["accuracy", "nll", "brier", "aurc"]].round(3))

# %% [markdown]
"""## Another kind of text

The demo has two other sources. *Product reviews* ask for the same answer, but the model has never seen one. *Neutral
sentences* are from newspapers. They have no opinion, so no answer is right. The table compares the scores on movie and
product reviews.
"""

# %%
other = {
    "product reviews": opinions.product_reviews(count=NUM_OTHER, seed=0),
    "neutral sentences": opinions.neutral_sentences(count=NUM_OTHER, seed=0),
}
inside = predictions["10 draws"]
outside = {name: posterior.predict(rows, num_draws=10, seed=0) for name, rows in other.items()}
shifted = {"movie reviews": inside, "product reviews": outside["product reviews"]}
reports = {name: prediction.metrics(bootstrap=200) for name, prediction in shifted.items()}
display(pd.concat(reports)[["accuracy", "nll", "brier", "aurc"]].round(3))
plots.reliability(shifted)
plt.show()

# %% [markdown]
"""Does uncertainty tell sentences without an opinion from movie reviews? The AUROC is the probability that a neutral
sentence has a higher uncertainty than a movie review; 0.5 is chance, 1 is perfect. The three kinds of uncertainty ask
different questions.
"""

# %%
neutral = outside["neutral sentences"]
kinds = ("total", "aleatoric", "epistemic")
auroc = {kind: metrics.ood_auroc(getattr(inside, kind), getattr(neutral, kind)) for kind in kinds}
display(pd.Series(auroc, name="AUROC").to_frame().round(3))
plots.uncertainty_histogram(inside, neutral)
plt.show()

# %% [markdown]
"""We rank the sentences of all sources by epistemic uncertainty. The networks disagree most on the sentences at the
top. Read them, and ask whether a person would hesitate too.
"""

# %%
frames = {"movie reviews": inside.to_frame()} | {name: found.to_frame() for name, found in outside.items()}
ranked = pd.concat([frame.assign(source=name) for name, frame in frames.items()], ignore_index=True)
ranked["sentence"] = [row["question"] for row in (*test, *other["product reviews"], *other["neutral sentences"])]
columns = ["source", "target", "prediction", "probability", "total", "epistemic", "sentence"]
with pd.option_context("display.max_colwidth", 200):
    display(ranked.sort_values("epistemic", ascending=False)[columns].head(8).round(3))

# %% [markdown]
"""## If the model answers only what it is sure of

The most certain movie reviews are answered first. *Coverage* is the share of rows that are answered. If the uncertainty
finds the mistakes, the error stays low until the coverage is high. In random order it would be the same at every
coverage. *AURC* is the area under the curve, the mean error over all coverages; lower is better.
"""

# %%
plots.risk_coverage(predictions)
plt.show()

# %% [markdown]
"""## Is the posterior a good one?

`fit` looks for the posterior among distributions of one family, the *guide*. `diagnose` compares the guide with the
exact posterior, given the LoRA matrices. It weights the draws: a draw with a higher probability under the exact
posterior gets a larger weight. *Pareto k* grows if few draws have most of the weight, because the guide is not close to
the posterior. `diagnose` does not compare the model with the world; the held-out sentences above do that.
"""

# %%
num_data = posterior.provenance["num_data"]
train = opinions.movie_reviews("train", count=num_data, seed=posterior.provenance["seed"])[:NUM_TRAIN]
diagnosis = posterior.diagnose(train, history=history, num_draws=100, num_data=num_data)
display(diagnosis)
with pd.option_context("display.max_colwidth", None):
    display(diagnosis.to_frame()[["severity", "value", "threshold", "cause"]].round(3))

# %% [markdown]
"""The numbers rest on 100 draws and on a part of the training rows, to save time. With more of both they are more
exact.

## Leave-one-out

How well would the model predict a training sentence if it had not been trained on it? PSIS-LOO estimates this by
weighting draws. It needs rows of the *training* set, because the model has never seen other sentences, so nothing has
to be left out for them. Two cautions. The draws come from the guide, not from the exact posterior. And the LoRA
matrices have seen every row, so LOO is optimistic: the last line of the table shows what new sentences really get. A
Pareto k above 0.5 marks a sentence for which 100 draws are too few.
"""

# %%
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
print(f"Pareto k: {k.max():.2f} at most, above 0.5 for {(k > 0.5).sum()} of {len(k)} sentences.")

# %% [markdown]
"""## The file

`posterior.nc` holds draws, predictions and observed answers, and records where they come from. The loaded posterior
gives the same draws as the file for the same seed.
"""

# %%
stored = az.from_netcdf(str(RUN / "posterior.nc"))
in_file = stored["posterior"]["s"].values.reshape(500, -1)
print("The same draws:", np.array_equal(in_file, posterior.sample(500, seed=0).s.numpy()))
display(pd.Series(dict(stored["posterior"].attrs), name="attribute").to_frame())

# %% [markdown]
"""A *posterior predictive check* from the file alone: each draw gives each training sentence in the file an answer at
random, with its probabilities. How often does each answer come up, and how often is it observed? A large difference
would mean that the model prefers one answer.
"""

# %%
answers = {
    "simulated": stored["posterior_predictive"]["label"].values.ravel(),
    "observed": stored["observed_data"]["label"].values,
}
share = {name: np.bincount(value, minlength=len(CHOICES)) / len(value) for name, value in answers.items()}
share = pd.DataFrame(share, index=CHOICES)
figure, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
share.plot.bar(ax=ax, color=[plots.MARK, plots.QUIET], rot=0)
ax.set(ylabel="share of the answers")
ax.legend(frameon=False)
plt.show()
display(share.round(3))

# %% [markdown]
"""## Where to go next

- From a table of texts to a list that a human should look at: the notebook `review_table.ipynb`.
- Other priors and guides, on news: the notebook `ablation.ipynb`.
- More of ArviZ: `docs/guide/arviz.md`. All terms: `docs/glossary.md`.
- All checks of `diagnose`: `docs/reference/posterior.md`.
"""

# %%
print(notebooks.duration())
