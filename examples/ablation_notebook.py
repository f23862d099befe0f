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
"""# Two priors, two guides, one data set.

A Bayesian fit has two choices that a usual fit does not have. The *prior* is the distribution of the random numbers in
the model, the *latents*, before it sees data. The *guide* is the family of distributions in which `fit` looks for the
posterior, the distribution of the latents given the data. An *ablation* changes one choice at a time and measures the
effect. Here SmolLM2-135M learns the topic of Reuters news eight times: with two priors, two guides, and two seeds.

**What you will know at the end**

- How to fit with another prior or another guide: one argument each.
- How large the effect of both choices is on this data, next to the effect of chance.
- How to tell a difference from noise: rows in pairs, standard errors, and a second seed.
- Which numbers of a comparison you can rely on, and how Pareto k tells you.
- How the latents differ between priors, and what a guide with correlations can show that the other one cannot.

The notebook needs no network and no GPU. It takes about 10 minutes on one CPU core: the last line says how long this
run took, and the first output says on which machine. It is built from `ablation_notebook.py` by `make notebook`. The
script `ablation.py` compares any priors and guides on any data.
"""

# %%
import sys

sys.path.insert(0, "examples")  # makes _support importable from the top of the repository
from _support import notebooks

notebooks.set_up()  # before the other imports, because some of them print messages

import itertools

import ablation
import numpy as np
import pandas as pd
from _support import datasets, models
from IPython.display import display
from matplotlib import pyplot as plt

import scalabl_pyro
from scalabl_pyro import plots
from scalabl_pyro.analysis.checks import check_history

# %% [markdown]
"""With `SCALABL_TOY=1` the notebook runs on a random model with two blocks in seconds. Its numbers mean nothing. The
line below says which size this run has, and which versions made its numbers.
"""

# %%
TOY = notebooks.TOY
NUM_TRAIN, NUM_TEST, NUM_LOO = (12, 8, 4) if TOY else (120, 150, 16)
NUM_STEPS, NUM_BLOCKS, NUM_WEIGHTS = (3, 1, 25) if TOY else (120, 2, 100)
PRIORS = ("normal", "horseshoe")
GUIDES = ("normal", "full_covariance")
SEEDS = (0, 1)
print(notebooks.machine())

# %% [markdown]
"""## The choices

- Prior `normal`: each latent has the distribution Normal(0, 1).
- Prior `horseshoe`: most latents are expected to be near zero, and a few may be large. How near is learned, with
  additional latents, the *scales*.
- Guide `normal`: a normal distribution in which the latents are independent of each other.
- Guide `full_covariance`: a normal distribution with a correlation for each pair of latents.

All fits read the same rows and have the same number of steps. Fits with the same seed also have the same start and the
same order of the rows. So their difference comes from the prior, from the guide, or from the random draws during
training. The fits with another seed show how large differences by chance are. Only the upper blocks of the model and
its last layer are adapted, to save time.
"""

# %%
llm, tokenizer = models.demo_llm(tiny=TOY)
train = datasets.reuters_r8("train", count=NUM_TRAIN, seed=0)
test = datasets.reuters_r8("test", count=NUM_TEST, seed=0)
task = datasets.word_task(tokenizer, train, datasets.NEWS, 32)
upper = models.upper_blocks(llm, NUM_BLOCKS)


def fit_and_measure(prior: str, guide: str, seed: int) -> dict:
    """Fit one pair, predict the test rows, and compute the numbers of its line in the table."""
    blora = scalabl_pyro.bayesian_lora(llm, prior=prior, layers_to_transform=upper, seed=seed)
    result = scalabl_pyro.fit(
        blora,
        task,
        train,
        guide=guide,
        num_steps=NUM_STEPS,
        batch_size=8,
        seed=seed,
        hardware={"cache_prefix": True},
        progress=False,
    )
    posterior = result.posterior
    prediction = posterior.predict(test, num_draws=10, seed=0, batch_size=50, cache_prefix=True)
    weights = scalabl_pyro.compare(
        {"": posterior}, train[:NUM_LOO], num_draws=NUM_WEIGHTS, num_data=NUM_TRAIN, batch_size=50
    )
    line = prediction.metrics()[["accuracy", "nll", "ece"]].loc["value"].to_dict()
    line |= weights[["elbo", "elpd_loo", "pareto_k", "good_k"]].loc[""].to_dict()
    line["parameters"] = sum(p.numel() for p in posterior.guide.parameters())
    blora.unload()
    return {"result": result, "prediction": prediction, "line": line}


fits = {key: fit_and_measure(*key) for key in itertools.product(PRIORS, GUIDES, SEEDS)}
display(fits["horseshoe", "full_covariance", 0]["result"])

# %% [markdown]
"""## Have they converged?

The *loss* is what training makes small. It is the sum of the *NLL* (negative log likelihood, small if the right topics
get a high probability) and of the *KL* (the distance of the guide from the prior), in nats per row. A *nat* is the unit
of natural logarithms. A fit whose loss still falls should not be judged yet. The `value` in the table is the slope of
the loss over the last third of the training, in standard errors. It is negative if the loss falls.
"""

# %%
figure, axes = plt.subplots(1, len(PRIORS), figsize=(9, 3.4), layout="constrained", sharey=True)
for ax, prior in zip(axes, PRIORS, strict=True):
    for guide, color, width in zip(GUIDES, (plots.QUIET, plots.WARM), (5, 1.2), strict=True):
        for seed, style in zip(SEEDS, ("-", ":"), strict=True):
            history = fits[prior, guide, seed]["result"].history
            smooth = history["loss"].rolling(10, min_periods=1).mean()
            label = f"{guide}, seed {seed}"
            ax.plot(history["step"], smooth, color=color, linestyle=style, linewidth=width, label=label)
    ax.set(title=f"prior {prior}", xlabel="step")
axes[0].set(ylabel="loss, nats per row (mean of 10 steps)", yscale="log")
for axis in (axes[0].yaxis.set_major_formatter, axes[0].yaxis.set_minor_formatter):
    axis("{x:g}")
axes[0].legend(frameon=False)
plt.show()
NAMES = ["prior", "guide", "seed"]
found = [(*key, f.check, f.value, f.cause) for key, fit in fits.items() for f in check_history(fit["result"].history)]
slopes = pd.DataFrame(found, columns=[*NAMES, "check", "value", "finding"]).query("check == 'loss_slope'")
display(slopes.drop(columns="check").set_index(NAMES).round(1))

# %% [markdown]
"""## The table

- `accuracy`, `nll`, `ece` are computed from the test rows, averaged over 10 draws from the posterior. ECE (expected
  calibration error) is the mean distance between the probability of the answers and the share of right answers. Lower
  is better for NLL and ECE.
- `elbo` (evidence lower bound, nats per data set) is what `fit` maximizes: the expected log likelihood of all training
  rows, less the KL. Compare it only between guides with the same prior.
- `elpd_loo` is the log probability of training rows, each as if it had been left out (*leave-one-out*), in nats. It is
  computed from weights of the draws. The factors of the LoRA layers have seen every row, so it is optimistic.
- `pareto_k` says whether these weights can be relied on. It grows with the distance between guide and posterior. Do not
  use `elpd_loo` if `pareto_k` is above `good_k`.
- `parameters` is the number of parameters of the guide.
"""

# %%
table = pd.DataFrame.from_dict({key: fit["line"] for key, fit in fits.items()}, orient="index").rename_axis(NAMES)
display(table.round(3))
reliable = table["pareto_k"] <= table["good_k"]
print(f"Pareto k is good for {reliable.sum()} of {len(table)} fits. Do not use elpd_loo of the others.")

# %% [markdown]
"""## What is a difference?

All fits answer the same test rows. So we subtract the log probability of the right topic row by row, and average. This
is more exact than the difference of two averages, because easy and hard rows cancel. The *standard error* says how much
the average would change with other test rows. Each point below changes one choice and keeps the other two: the guide
from `normal` to `full_covariance`, the prior from `normal` to `horseshoe`, or the seed from 0 to 1. Points right of
zero have a higher NLL, which is worse. The bars are two standard errors long on each side.
"""

# %%


def log_scores(key: tuple) -> np.ndarray:
    """Compute the log probability of the right topic of each test row."""
    prediction = fits[key]["prediction"]
    return np.log(prediction.probs[np.arange(len(test)), prediction.target])


def change(of: str, before: tuple, after: tuple) -> dict:
    """Measure the change of the NLL between two fits."""
    gap = log_scores(before) - log_scores(after)
    kept = ", ".join(f"{name} {a}" for name, a, b in zip(NAMES, before, after, strict=True) if a == b)
    return {"of": of, "kept": kept, "difference": gap.mean(), "se": gap.std(ddof=1) / len(gap) ** 0.5}


changes = pd.DataFrame(
    [change("guide", (p, GUIDES[0], s), (p, GUIDES[1], s)) for p, s in itertools.product(PRIORS, SEEDS)]
    + [change("prior", (PRIORS[0], g, s), (PRIORS[1], g, s)) for g, s in itertools.product(GUIDES, SEEDS)]
    + [change("seed", (p, g, SEEDS[0]), (p, g, SEEDS[1])) for p, g in itertools.product(PRIORS, GUIDES)]
)
figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
colors = {"guide": plots.MARK, "prior": plots.WARM, "seed": plots.QUIET}
for i, row in changes.iterrows():
    ax.errorbar(row["difference"], -i, xerr=2 * row["se"], fmt="o", color=colors[row["of"]], capsize=3)
ax.axvline(0, color=plots.QUIET, linewidth=0.8)
ax.set_yticks(-np.arange(len(changes)), changes["of"] + " changes; " + changes["kept"], fontsize=8)
ax.locator_params(axis="x", nbins=5)
ax.set(xlabel="change of the NLL, nats per test row", title="What changes the NLL?")
plt.show()

# %% [markdown]
"""A change counts only if it passes three tests. It has the same sign for both seeds. It is larger than two standard
errors each time. And it is larger than every change that another seed makes alone.
"""

# %%
chance = changes.loc[changes["of"] == "seed", "difference"].abs().max()
verdicts = []
for of, others in (("guide", PRIORS), ("prior", GUIDES)):
    for other in others:
        found = changes[(changes["of"] == of) & changes["kept"].str.contains(f" {other}, seed")]
        same_sign = found["difference"].gt(0).nunique() == 1
        is_large = (found["difference"].abs() > np.maximum(2 * found["se"], chance)).all()
        by_seed = {f"seed {seed}": value for seed, value in zip(SEEDS, found["difference"], strict=True)}
        verdicts.append({"change of": of, "kept": other} | by_seed | {"does it count?": bool(same_sign and is_large)})
print(f"Another seed changes the NLL by up to {chance:.3f} nats per row.")
display(pd.DataFrame(verdicts).set_index(["change of", "kept"]).round(3))

# %% [markdown]
"""## The latents of one layer

The plot shows the latents of the layer in which `full_covariance` finds the largest correlation. The dots are medians,
the thick lines hold half of the draws, and the thin lines hold nearly all. The other parameters of each fit were
trained anew, so the medians differ for many reasons. Compare the widths: the horseshoe should pull most latents to
zero.
"""

# %%
widest = fits["normal", "full_covariance", 0]["result"].posterior
covariance = widest.guide.covariance().detach().cpu().numpy()
correlation = covariance / np.sqrt(np.outer(covariance.diagonal(), covariance.diagonal())) - np.eye(len(covariance))
edges = np.cumsum([0, *widest.subspace.ranks])
blocks = [correlation[start:stop, start:stop] for start, stop in itertools.pairwise(edges)]
most = int(np.argmax([np.abs(block).max() for block in blocks]))
layer = widest.subspace.names[most]
posteriors = {f"{p} / {g}": fits[p, g, 0]["result"].posterior for p, g in itertools.product(PRIORS, GUIDES)}
draws = {name: ablation.draws_of(posterior, layer) for name, posterior in posteriors.items()}
print(f"The layer is {layer}.")
ablation.forest(draws)
plt.show()
display(pd.DataFrame({name: p.summary()["rms_sd"] for name, p in posteriors.items()}).round(3))

# %% [markdown]
"""The table shows the standard deviation of the latents, averaged over each layer. The prior `normal` has a standard
deviation of 1. After enough steps, a latent that the data say nothing about has this standard deviation, too.

## Correlations

Each square of the picture is one pair of latents, under the guide `full_covariance` and the prior `normal`. The lines
separate the layers. A strong color means that the data fix a combination of two latents, but not each of them. White
squares mean that the two latents have nothing to do with each other.
"""

# %%
figure, ax = plt.subplots(figsize=(5, 4), layout="constrained")
image = ax.imshow(correlation, cmap="RdBu", vmin=-1, vmax=1)
for edge in edges[1:-1]:
    ax.axhline(edge - 0.5, color="black", linewidth=0.6)
    ax.axvline(edge - 0.5, color="black", linewidth=0.6)
ax.set(xlabel="latent", ylabel="latent", title="Correlations (diagonal left out)")
figure.colorbar(image)
plt.show()
within = np.equal.outer(*[np.repeat(range(len(blocks)), widest.subspace.ranks)] * 2)
print(f"Largest correlation within a layer: {np.abs(blocks[most]).max():.2f}, in {layer}.")
print(f"Largest correlation between layers: {np.abs(np.where(within, 0, correlation)).max():.2f}.")

# %% [markdown]
"""The next two pictures show draws of the two latents with the largest correlation, and of a third one. The guide
`full_covariance` can represent correlations, and `normal` cannot. If the clouds look alike, the first guide has little
to say that the second one cannot say, too.
"""

# %%
first, second = np.unravel_index(np.abs(blocks[most]).argmax(), blocks[most].shape)
third = next(rank for rank in range(3) if rank not in (first, second))
ranks = sorted({int(first), int(second), third})
for guide in reversed(GUIDES):
    ablation.pair(draws[f"normal / {guide}"], f"guide {guide}", ranks)
    plt.show()

# %% [markdown]
"""## What you can take from this

The verdicts above are computed from the numbers of this run. They are valid for this model, these rows and this number
of steps, and not for other ones. Two seeds are few: they can show that a difference is not larger than chance, but not
how large it is on average. To compare priors and guides on your own rows, run `examples/ablation.py` with `--data`, and
take more seeds for a difference that matters to you.

## Where to go next

- Write your own prior or guide: `docs/extend/own-prior.md`, `docs/extend/own-guide.md`.
- What the ELBO and its scale mean: `docs/concepts.md`. All terms: `docs/glossary.md`.
- Guides next to samples from the exact posterior: `examples/benchmarks/guides_vs_nuts.py`.
- A closer look at one posterior: the notebook `posterior_analysis.ipynb`.
"""

# %%
print(notebooks.duration())
