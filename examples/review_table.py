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
"""# From a table of labeled text to a list for review.

You have a table of texts. Some rows have a label, and the others need one. A language model can label them, but some of
its labels will be wrong. This notebook finds the rows that a human should look at.

**What you will know at the end**

- How to go from a CSV file with the columns `text` and `label` to a fitted model.
- How to get one line per row: the label, its probability, and how uncertain the model is.
- How to choose a threshold, so that the labels that you accept have the error that you want.
- What this threshold promises, and what it does not promise.
- How to save the list and the model, and how to load the model again.

The notebook needs no network and no GPU. It takes about 5 minutes on one CPU core: the last line says how long this
run took, and the first output says on which machine. It is built from `review_table.py` by `make notebook`.
"""

# %%
import sys

sys.path.insert(0, "examples")  # makes _support importable from the top of the repository
from _support import notebooks

notebooks.set_up()  # before the other imports, because some of them print messages

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from _support import datasets, models
from _support.selection import threshold, upper_bound
from IPython.display import display
from matplotlib import pyplot as plt

import scalabl_pyro
from scalabl_pyro import metrics, plots

# %% [markdown]
"""With `SCALABL_TOY=1` the notebook runs on a random model with two blocks in seconds. Its numbers mean nothing. The
line below says which size this run has, and which versions made its numbers.
"""

# %%
TOY = notebooks.TOY
NUM_TRAIN, NUM_VALIDATION, NUM_NEW = (16, 12, 12) if TOY else (300, 200, 200)
NUM_STEPS, NUM_BLOCKS = (4, 1) if TOY else (250, 2)
OUT = Path(tempfile.mkdtemp()) if TOY else notebooks.RUNS / "review_table"
OUT.mkdir(parents=True, exist_ok=True)
print(notebooks.machine())

# %% [markdown]
"""## The table

We make a CSV file from Reuters news. Each article has one of eight topics. To use your own data, write the path of your
own file in place of `articles.csv`.
"""

# %%
articles = datasets.distinct(datasets.reuters_r8("train", count=10**6, seed=0, balanced=False))
articles = datasets.pick(articles, NUM_TRAIN + NUM_VALIDATION + NUM_NEW, seed=1)
labels = [row["choices"][row["answer"]] for row in articles]
pd.DataFrame({"text": [row["question"] for row in articles], "label": labels}).to_csv(OUT / "articles.csv", index=False)

# %%
table = pd.read_csv(OUT / "articles.csv")
CLASSES = sorted(table["label"].unique())
display(table.head())
display(table["label"].value_counts().to_frame("rows").T)

# %% [markdown]
"""We split the rows at random into three parts:

- *Training rows* have a label. The model learns from them.
- *Validation rows* have a label, too. The model does not learn from them. They show how often it is wrong.
- *New rows* need a label. Here we know their labels, but we hide them until the end.
"""

# %%
shuffled = table.sample(frac=1, random_state=0)
train, validation = shuffled[:NUM_TRAIN], shuffled[NUM_TRAIN : NUM_TRAIN + NUM_VALIDATION]
new = shuffled[NUM_TRAIN + NUM_VALIDATION :]
hidden = new["label"]
new = new.drop(columns="label")
display(pd.Series({"training": len(train), "validation": len(validation), "new": len(new)}, name="rows").to_frame().T)

# %% [markdown]
"""## The question to the model

The model is SmolLM2, a small language model with 135 million weights. It reads a *prompt*, the text that we give it,
and continues the text. So we write a prompt that ends before the topic. The probability of each topic is how likely the
model continues with this word, compared with the words of the other topics. Each class must be one *token*, one entry
of the vocabulary of the model. Texts are cut after 32 tokens to save time.

A *task* describes this. It reads the fields `question`, `choices` and `answer`, so we rename the columns.
"""


# %%
def for_task(part: pd.DataFrame) -> pd.DataFrame:
    """Name the columns as the task reads them."""
    return part.rename(columns={"text": "question", "label": "answer"}).assign(choices=[CLASSES] * len(part))


llm, tokenizer = models.demo_llm(tiny=TOY)
task = scalabl_pyro.MultipleChoice(
    tokenizer, labels=CLASSES, template="News: {question}\nTopic:", chat=False, max_length=32
)
display(task)
print(task.prompt({"question": "opec ministers agreed to cut output", "choices": CLASSES}))

# %% [markdown]
"""## Fit

`bayesian_lora` adds *LoRA layers* to the model. They are small matrices beside the weights of the model, and only they
are trained. In the middle of each LoRA layer stands a vector of random numbers, the *latents*. `fit` learns the
matrices and the *posterior*, the distribution of the latents given the training rows. To save time, we adapt only the
upper blocks of the model and its last layer. The lower blocks do not change, so they run only once per row
(`cache_prefix`).
"""

# %%
upper = models.upper_blocks(llm, NUM_BLOCKS)
blora = scalabl_pyro.bayesian_lora(llm, layers_to_transform=upper)
result = scalabl_pyro.fit(
    blora,
    task,
    for_task(train),
    num_steps=NUM_STEPS,
    batch_size=16,
    seed=0,
    hardware={"cache_prefix": True},
    progress=False,
)
display(result)

# %% [markdown]
"""The *loss* is what training makes small. It is the sum of two parts in *nats*, the unit of natural logarithms. The
*NLL* (negative log likelihood) is small if the right topics get a high probability. The *KL* is the distance of the
posterior from the *prior*, which is the distribution of the latents before training. The table shows the KL of all rows
together, and the picture divides it by the number of rows. If the loss still falls steeply at the end, train for more
steps.
"""

# %%
plots.history(result.history)
plt.show()

# %% [markdown]
"""## One line per row

Each *draw* from the posterior gives one network. `predict` asks ten of them and averages their probabilities.
`to_frame` makes a table with one line per row:

- `prediction` is the likeliest class, and `probability` is its probability.
- `total` is the uncertainty in nats: the entropy of the probabilities. It is 0 if one class has probability 1. It is
  largest if all classes are equally likely.
- `total` is the sum of two parts. `aleatoric` is the mean entropy of the single networks. `epistemic` is the part that
  comes from networks that disagree.

We join this table with our own by the row number of the CSV file. The rows with the largest uncertainty come first.
"""

# %%
posterior = result.posterior


def predict(model: scalabl_pyro.Posterior, part: pd.DataFrame) -> scalabl_pyro.Prediction:
    """Predict with the same ten draws for all rows."""
    return model.predict(for_task(part), num_draws=10, seed=0, batch_size=32, cache_prefix=True)


def join(part: pd.DataFrame, prediction: scalabl_pyro.Prediction) -> pd.DataFrame:
    """Put the prediction beside the rows, and the most uncertain row first."""
    order = np.argsort(-prediction.probs, axis=1)
    frame = prediction.to_frame().set_index(part.index)
    frame.insert(1, "second choice", np.asarray(CLASSES, dtype=object)[order[:, 1]])
    return part.join(frame).sort_values("total", ascending=False)


on_validation = predict(posterior, validation)
checked = join(validation, on_validation)
display(on_validation)
display(checked.drop(columns="target").head().round(3))

# %% [markdown]
"""## Can you believe the probabilities?

The validation rows answer this. We sort them into groups by the probability of the prediction, and count how often the
prediction is right. A *calibrated* model is on the dashed line: of the predictions with a probability of 0.8, 80 % are
right. The bars are 95 % intervals, and the strip below shows how many rows each group has. *ECE* (expected calibration
error) is the mean distance from the line; lower is better.
"""

# %%
plots.reliability(on_validation, label="validation rows")
plt.show()
display(on_validation.metrics(bootstrap=200)[["accuracy", "nll", "brier"]].round(3))

# %% [markdown]
"""The lines `low` and `high` are the ends of a 95 % interval: with another sample of validation rows, the numbers would
differ by about this much. `nll` and `brier` measure the probabilities as a whole; lower is better for both.

## Does the uncertainty find the mistakes?

Accept the most certain row first, then the next one, and so on. *Coverage* is the share of rows that are accepted.
*Risk* is the share of wrong labels among them. If the uncertainty finds the mistakes, the risk stays low until the
coverage is high. *AURC*, the area under the curve, is the mean risk over all coverages; lower is better. In random
order, the risk would be the error of all rows at every coverage. In the ideal order, all right labels come first.
"""

# %%
wrong = on_validation.labels != on_validation.target
ax = plots.risk_coverage(on_validation, uncertainty="total")
plots.risk_coverage(on_validation, uncertainty="epistemic", ax=ax)
plt.show()
scores = {"total": on_validation.total, "epistemic": on_validation.epistemic}
areas = {name: metrics.aurc(on_validation.probs, on_validation.target, uncertainty=u) for name, u in scores.items()}
display(pd.Series(areas | {"random order": wrong.mean()}, name="AURC").to_frame().round(3))

# %% [markdown]
"""We use `total`. It is large for both reasons of a mistake: the text is open, or the networks disagree. We chose it
before we saw the curves. That matters for the promise below: it does not hold if you try many scores on the same rows
and keep the best.

## A threshold for the error that you want

The rule is: accept a label if `total` is at most the threshold. Say that one wrong label in ten is acceptable. There
are two ways to choose the threshold on the validation rows:

- `seen`: the largest threshold at which at most 10 % of the accepted *validation* rows are wrong. On new rows the error
  can well be larger, because this threshold looked good on these rows by chance, too.
- `promised`: a stricter threshold, at which at most 10 % of the accepted *new* rows are wrong in the long run. This
  promise fails with a probability of at most 5 % (`DELTA`). The promise holds only for new rows that are like the
  validation rows. The method is that of [Geifman and El-Yaniv (2017)](https://arxiv.org/abs/1705.08500).
"""

# %%
WANTED_ERROR, DELTA = 0.10, 0.05
limits = {
    "seen": threshold(on_validation.total, wrong, WANTED_ERROR),
    "promised": threshold(on_validation.total, wrong, WANTED_ERROR, delta=DELTA),
}


def outcome(limit: float, uncertainty: np.ndarray, mistakes: np.ndarray) -> dict[str, float]:
    """Count accepted rows and mistakes, with a 95 % interval for the error of accepted rows."""
    accepted = uncertainty <= limit
    rows, errors = int(accepted.sum()), int(mistakes[accepted].sum())
    low = 1 - upper_bound(rows - errors, rows, 0.025) if rows else float("nan")
    return {
        "threshold": limit,
        "accepted": rows,
        "for review": len(accepted) - rows,
        "wrong, accepted": errors,
        "wrong, for review": int(mistakes.sum()) - errors,
        "error of accepted": errors / rows if rows else float("nan"),
        "low": low,
        "high": upper_bound(errors, rows, 0.025) if rows else float("nan"),
    }


seen = {rule: outcome(limit, on_validation.total, wrong) for rule, limit in limits.items()}
display(pd.DataFrame.from_dict(seen, orient="index").round(3))

# %% [markdown]
"""If no row can be accepted, the threshold is `-inf`, and all rows are for review. Then label more validation rows,
allow a larger error, or train a better model.

## The list for review

Now the new rows, without their labels. Rows above the `promised` threshold go to the list. The most uncertain row
stands first. `second choice` is the class with the second largest probability. It helps the human who decides.
"""

# %%
on_new = predict(posterior, new)
answered = join(new, on_new)
review = answered[answered["total"] > limits["promised"]]
columns = ["prediction", "second choice", "probability", "total", "epistemic", "text"]
review[columns].to_csv(OUT / "review.csv", index_label="row")
answered.drop(review.index)[columns].to_csv(OUT / "accepted.csv", index_label="row")
print(f"{len(review)} of {len(new)} new rows are for review.")
display(review[columns].head(8).round(3))

# %% [markdown]
"""## Was it right?

We know the labels of the new rows, so we can look. The table has the same columns as the one above, but for rows that
had no part in the choice of the threshold. `low` and `high` are a 95 % interval for the error of accepted rows: with so
few rows, the interval is wide.
"""

# %%
mistakes = np.asarray(CLASSES, dtype=object)[on_new.labels] != hidden.to_numpy()
found = {rule: outcome(limit, on_new.total, mistakes) for rule, limit in limits.items()}
display(pd.DataFrame.from_dict(found, orient="index").round(3))

# %%
known = predict(posterior, new.assign(label=hidden))  # the same draws, so the same probabilities
ax = plots.risk_coverage(known, uncertainty="total", label="new rows")
top = ax.get_ylim()[1]
ax.set_ylim(top=1.5 * top)  # room for the legend
ax.axhline(WANTED_ERROR, color="black", linewidth=0.8)
ax.text(0.02, WANTED_ERROR, "wanted error", va="bottom", fontsize=8)
for rule, limit in limits.items():
    coverage = (known.total <= limit).mean()
    ax.vlines(coverage, 0, top, color="black", linewidth=0.8)
    ax.text(coverage + 0.01, 0.02 * top, rule, rotation=90, va="bottom", fontsize=8)
plt.show()

# %% [markdown]
"""## Labels to check

A human should look at another kind of row, too: the model is sure, but the label in the table says something else.
Either the model is wrong, and its uncertainty does not show it, or the label in the table is wrong. The table lists the
validation rows with a probability above 0.9 and another label. It is empty if there are none.
"""

# %%
sure = checked[(checked["probability"] > 0.9) & (checked["prediction"] != checked["label"])]
print(f"{len(sure)} of {(checked['probability'] > 0.9).sum()} confident predictions differ from the label.")
display(sure.sort_values("probability", ascending=False)[["label", "prediction", "probability", "text"]].round(3))

# %% [markdown]
"""## Save and load

`save_pretrained` writes only what was learned, without the language model. To use it again, load the language model
first. The loaded posterior predicts the new rows, and we compare the result with the file `review.csv`.
"""

# %%
posterior.save_pretrained(OUT / "posterior")
fresh_llm, _ = models.demo_llm(tiny=TOY)
loaded = scalabl_pyro.Posterior.from_pretrained(fresh_llm, OUT / "posterior")
again = predict(loaded, new)
in_file = pd.read_csv(OUT / "review.csv", index_col="row")
repeated = join(new, again).loc[in_file.index]
display(loaded)
print(f"Largest difference of a probability: {np.abs(again.probs - on_new.probs).max():.1e}")
print(f"Largest difference from the file:    {np.abs(repeated['total'] - in_file['total']).max():.1e} nats")
print(f"The same labels: {(repeated['prediction'] == in_file['prediction']).all()}")

# %% [markdown]
"""## Where to go next

- Your own rows, files and label columns: `docs/guide/own-data.md`.
- Which rows to label next, and more about thresholds: `docs/guide/active-learning.md`. The functions `threshold` and
  `upper_bound` are in `examples/_support/selection.py`, which is made to be copied.
- What the posterior has learned: the notebook `posterior_analysis.ipynb`.
- Another prior, another family of posteriors: the notebook `ablation.ipynb`.
"""

# %%
print(notebooks.duration())
