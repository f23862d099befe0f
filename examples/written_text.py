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
"""# What it writes, and how sure it is.

A language model writes an answer to every question, also to those that it cannot answer. The text alone does not show
the difference. This notebook trains a model that answers short questions, lets it write, and shows how sure it is of
each answer and of each word.

**What you will know at the end**

- How to train on texts, with rows that have a `prompt` and a `completion`.
- Three ways to let the model write, and what each is for.
- How to see which words of a text the model is not sure of.
- Which numbers find wrong answers, and how well.
- What these numbers do not say.

The notebook needs no network and no GPU. It takes about 6 minutes on one CPU core: the last line says how long this run
took, and the first output says on which machine. It is built from `written_text.py` by `make notebook`.
"""

# %%
import sys

sys.path.insert(0, "examples")  # makes _support importable from the top of the repository
from _support import notebooks

notebooks.set_up()  # before the other imports, because some of them print messages

import numpy as np
import pandas as pd
from _support import datasets, models
from _support.general_knowledge import general_knowledge, question
from _support.quiz import is_right, plain
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
NUM_TRAIN, NUM_TEST = (8, 8) if TOY else (80, 80)
NUM_STEPS, NUM_BLOCKS, NUM_DRAWS = (3, 1, 3) if TOY else (60, 10, 5)
LENGTH = {"max_new_tokens": 3 if TOY else 8}  # no answer needs more tokens
print(notebooks.machine())

# %% [markdown]
"""## Rows

A row has a *prompt*, the text that we give to the model, and a *completion*, the text that it should write. Our prompts
are questions of general knowledge, and the completions are short answers. For your own data, make a list of such
dictionaries.
"""

# %%
CLOSE = [
    question("capitals", "France"),
    question("authors", "Hamlet"),
    question("opposites", "big"),
    question("capitals", "Mongolia"),
    question("capitals", "Zubrowka"),
]
NAMES = ["France", "Hamlet", "big", "Mongolia", "Zubrowka"]
rows = [row for row in general_knowledge() if row["prompt"] not in CLOSE]
rows = datasets.pick(rows, NUM_TRAIN + NUM_TEST, seed=0)
train, test = rows[:NUM_TRAIN], rows[NUM_TRAIN:]
display(pd.DataFrame(train)[["prompt", "completion"]].head())
print(f"{len(train)} questions for training, {len(test)} for the test at the end, {len(CLOSE)} to look at closely.")

# %% [markdown]
"""The five questions in `CLOSE` are not in the training. Zubrowka is a country from a film, so it has no capital that
the model could know.

## Fit

The task `Completion` says that the model learns to write the completion behind the prompt. A model reads and writes
*tokens*, which are words or parts of words. Only the tokens of the completion count, and an end token behind them,
which teaches the model to stop.
"""

# %%
llm, tokenizer = models.demo_llm(tiny=TOY)
task = scalabl_pyro.Completion(tokenizer)
display(task)
print([tokenizer.decode(token) for token in task.encode(train[0]).target])

# %% [markdown]
"""`bayesian_lora` adds *LoRA layers* to the upper third of the blocks of SmolLM2, a small language model. LoRA layers
are small matrices beside the weights of the model, and only they are trained. In the middle of each LoRA layer stands a
vector of random numbers. `fit` learns the matrices and the *posterior*, the distribution of these numbers given the
training rows. The blocks below do not change, so they run only once per row (`cache_prefix`).
"""

# %%
blora = scalabl_pyro.bayesian_lora(
    llm, target_modules=["q_proj", "v_proj"], layers_to_transform=models.upper_blocks(llm, NUM_BLOCKS)
)
result = scalabl_pyro.fit(
    blora,
    task,
    train,
    num_steps=NUM_STEPS,
    batch_size=8,
    seed=0,
    hardware={"cache_prefix": True},
    progress=False,
)
posterior = result.posterior
plots.history(result.history)
plt.show()

# %% [markdown]
"""The *loss* is what training makes small. It is the sum of two parts in *nats*, the unit of natural logarithms. The
*NLL* (negative log likelihood) is small if the right answers get a high probability. The *KL* is the distance of the
posterior from the *prior*, the distribution of the random numbers before training. The picture shows nats per row. A
long answer has a larger NLL than a short one, so the history holds the NLL per token, too:
"""

# %%
tenth = max(NUM_STEPS // 10, 1)
per_token = result.history["nll_per_token"]
display(
    pd.Series(
        {"first steps": per_token[:tenth].mean(), "last steps": per_token[-tenth:].mean()}, name="NLL per token, nats"
    )
    .to_frame()
    .T.round(2)
)

# %% [markdown]
"""The NLL per token falls from 4.33 to 0.57 nats. So the right token has a probability of exp(-4.33) = 0.01 at the
start and exp(-0.57) = 0.57 at the end (geometric means). These are training rows; the test comes at the end.

## Three ways to write

A *draw* from the posterior is one choice of the random numbers, and so one model. `generate` has three ways to use the
draws:

- `decode="draws"`: each draw writes an answer of its own. Use it to see whether the draws agree.
- `decode="mixture"`: all draws write one answer together. Each token comes from their averaged probabilities. Use it
  for the answer that you give to a reader.
- `decode="mean"`: the mean of the random numbers writes one answer, as ordinary LoRA does. Use it if you need one
  model without draws, for instance for speed.

Without other options, the most probable token is written each time.
"""

# %%
options = {"num_draws": NUM_DRAWS, "seed": 0, "batch_size": 20, **LENGTH}
draws = posterior.generate(CLOSE, **options)
mixture = posterior.generate(CLOSE, decode="mixture", **options)
mean = posterior.generate(CLOSE, decode="mean", **options)
answers = pd.DataFrame({"mixture": mixture.answers, "mean": mean.answers}, index=NAMES)
answers["draws"] = [", ".join(text.strip() for text in draws.texts(i)) for i in range(len(CLOSE))]
display(answers)

# %% [markdown]
"""France: all five draws write the right answer. Hamlet: all five draws write that Hamlet wrote Hamlet. So they can
agree on a wrong answer. Mongolia: four draws write "Moscow" (Ulaanbaatar is right). Zubrowka: four draws invent
a name that begins with "Lubina", and one writes "Warsaw". The mean writes what the mixture writes, for all five
questions.

## Look at the tokens

A notebook shows the result as a table, and then each text with shaded tokens. The shade is the *epistemic*
uncertainty of a token, which is large if the draws give different probabilities to the tokens that could stand there.
"""

# %%
display(mixture)

# %% [markdown]
"""The texts 0 to 4 are the answers to our five questions, and `<|im_end|>` is the end token. The darkest token is the
beginning of the invented city, with 0.19 nats. To see the numbers of a token, point at it with the mouse, or open the
table below the text. The tokens with the largest values are bold, at most five per text. The output needs no script, so
the shades stay in a saved page.

The `total` uncertainty is the entropy of the averaged probabilities. For the opposite of big, the first token has a
total of 6.4 nats, and only 0.07 of them are epistemic. The rest is called *aleatoric*: each draw by itself finds many
words possible.

## What else could stand there?

`score` reads texts and tells how probable each token is. With `top=3` it keeps the three most probable tokens at each
place. `alternatives` lists them; here are those at the first place of each answer:
"""

# %%
written = [{"prompt": p, "completion": t or " "} for p, t in zip(CLOSE, mixture.answers, strict=True)]
scored = posterior.score(written, num_draws=NUM_DRAWS, seed=0, batch_size=8, top=3)
others = pd.concat([scored.alternatives(i).assign(question=name) for i, name in enumerate(NAMES)])
display(others[others["place"] == 0].set_index("question").rename_axis(None)[["token", "prob", "low", "high"]].round(3))

# %% [markdown]
"""`prob` is the probability in the mixture. `low` and `high` are the smallest and the largest probability under a draw.
Two kinds of doubt can be seen here:

- `Zubrowka`: one draw gives the token "Lub" a probability of 0.16, and another one 0.83. The draws disagree: this
  is epistemic.
- `big`: the token "small" is the first choice, and no draw gives it more than 0.17. The draws agree that many words are
  possible: this is aleatoric.

Here are the probabilities under each draw, for Mongolia:
"""

# %%
row = NAMES.index("Mongolia")
by_draw = scored.rows[row].top_probs_by_draw[:, 0]  # (draws, alternatives) at the first place
display(pd.DataFrame(by_draw, columns=scored.top_pieces[row][0]).rename_axis("draw").round(3))

# %% [markdown]
"""Draws 0 to 3 prefer "Moscow", and draw 4 prefers "capital". This is why draw 4 wrote another answer above. No draw
gives any token more than 0.17, so none is sure of it.

## Random answers

So far, the most probable token was written. Now each draw writes tokens at random, with the probabilities that it gives
them (`do_sample=True`). Such answers show what else the model finds possible. Each draw writes two answers to each
question. The first column is the number of the draw.
"""

# %%
sampled = posterior.generate(CLOSE, num_samples=2, do_sample=True, **options)
display(
    pd.DataFrame({name: sampled.texts(i) for i, name in enumerate(NAMES)}, index=sampled.draw[: sampled.per_prompt])
)

# %% [markdown]
"""Some answers are nonsense: the model is small, and random tokens include improbable ones. Three numbers describe how
much the answers differ:

- `disagreement` is the share of answers that are not the most frequent one. It compares letters: "Shakespeare" and
  "William Shakespeare" are two answers.
- `semantic_entropy` first puts answers with one meaning together. You say when two answers mean the same. Here the last
  word decides. This is right for names, and too simple for sentences. The entropy is 0 nats if all answers mean the
  same, and log 10 = 2.3 nats if all 10 differ.
- `mutual_information` tells how much an answer depends on the draw that wrote it. It is the epistemic uncertainty of
  the whole answer. It is at most log 5 = 1.6 nats, because there are 5 draws. It is an average over a few random
  answers, so it has a standard error.

`frequent` is the most frequent answer, or the first one if all differ. `mbr` is the answer that shares the most words
with the other answers (*minimum Bayes risk*). Long texts are seldom equal, so that counting finds nothing; `mbr` then
still finds the text in the middle.
"""


# %%
def same_meaning(text: str, other: str) -> bool:
    """Compare the last words, without case and punctuation."""
    return plain(text).split()[-1:] == plain(other).split()[-1:]


def shared_words(text: str, other: str) -> float:
    """Return the F score of the words: 1 for the same words, 0 if no word is in both."""
    words, others = set(plain(text).split()), set(plain(other).split())
    return 2 * len(words & others) / max(len(words) + len(others), 1)


table = sampled.mutual_information.assign(
    disagreement=sampled.summary()["disagreement"], semantic_entropy=sampled.semantic_entropy(same_meaning)
)
table["frequent"] = sampled.agreement()["answer"]
table["mbr"] = [text.strip() for text in sampled.mbr(shared_words)]
display(table.set_axis(NAMES)[["frequent", "mbr", "disagreement", "semantic_entropy", *table.columns[:2]]].round(3))

# %% [markdown]
"""- Hamlet has a disagreement of 0.5, but a semantic entropy of log 2 = 0.69 nats: two meanings, which are equally
  frequent. Its mutual information is the smallest of all, 0.05 nats: each draw hesitates between Hamlet and
  Shakespeare, and all draws do so in a similar way.
- France: `same_meaning` counts "capital parfogeneity paris" as Paris. The semantic entropy is as good as this function.
- The opposite of big has a large semantic entropy (2.16 nats), but a small mutual information (0.20 nats). Most of the
  doubt is aleatoric.
- Mongolia and Zubrowka have the largest mutual information. They differ by less than their standard errors. A country
  that exists and a country that does not exist are equally unknown to this model.

## Texts from elsewhere

`score` also reads texts that somebody else wrote: a person, a book, or another model. Here are right and wrong answers.
"""

# %%
claims = [
    (CLOSE[0], " Paris", "right"),
    (CLOSE[0], " Berlin", "wrong"),
    (CLOSE[1], " William Shakespeare", "right"),
    (CLOSE[1], " Charles Dickens", "wrong"),
    (CLOSE[3], " Ulaanbaatar", "right"),
    (CLOSE[3], " Beijing", "wrong"),
]
elsewhere = posterior.score([{"prompt": p, "completion": c} for p, c, _ in claims], num_draws=NUM_DRAWS, top=3)
frame = elsewhere.to_frame().assign(claim=[claim for _, _, claim in claims])
display(frame[["claim", "text", "num_tokens", "log_prob", "log_prob_per_token", "epistemic"]].round(2))
display(elsewhere)

# %% [markdown]
"""- Paris and Shakespeare get a much larger log probability than Berlin and Dickens.
- Mongolia: "Beijing" gets a larger log probability than "Ulaanbaatar", -2.94 and -8.15 nats. The model does not know
  this capital. Besides, a sum over six tokens is smaller than one over two. Per token, "Ulaanbaatar" is slightly
  ahead, because most of its tokens are easy after the first one. Do not compare texts of different lengths by one of
  the two columns only.
- Look at the shades of Paris and Berlin: they are equal. The shade belongs to the place and not to the token. It asks
  what could stand there, before the token is read. How well a token fits is told by its probability.

Longer texts can be drawn for print with `plots.tokens`:
"""

# %%
sentence = " The capital of France is Paris, and the capital of Germany is Paris, too."
longer = posterior.score([{"prompt": CLOSE[0], "completion": sentence}], num_draws=NUM_DRAWS)
plots.tokens(longer, by="total")
plt.show()
places = longer.tokens(0)
places["probability"] = np.exp(places["log_mixture"])
display(places[places["token"].isin([" France", " Germany", " Paris"])][["token", "probability", "total"]].round(3))

# %% [markdown]
"""The model has learned to give short answers, so this sentence is strange to it. The first "Paris" has a probability
of 0.97. The second one is wrong: its probability is 0.000, but its shade is light (0.11 nats). The model is sure of
that place, and it expected another word. So look at both: the shade finds places of doubt, and the probability finds
words that do not fit.

## Which number finds the wrong answers?

The test questions answer this, because we know their answers. The mixture writes one answer per question, and we ask
whether it is right. Case, articles and punctuation do not count. Besides, each draw writes one random answer per
question, so that we can see how much they differ.
"""

# %%
given = posterior.generate(test, decode="mixture", **options)
at_random = posterior.generate(test, do_sample=True, **options)
of_answer, of_random = given.to_frame(), at_random.summary()
wrong = np.array([not is_right(answer, row) for answer, row in zip(given.answers, test, strict=True)])
topics = pd.DataFrame({"topic": [row["topic"] for row in test], "wrong": wrong})
display(topics.groupby("topic")["wrong"].agg(["size", "sum"]).set_axis(["questions", "wrong"], axis=1).T)
print(f"{wrong.sum()} of {len(wrong)} answers are wrong.")

# %% [markdown]
"""The number that finds wrong answers best gives every wrong answer a larger value than every right one. *AUROC* is the
probability of this for a random pair of a wrong and a right answer. It is 1 if the number is perfect, and 0.5 if it
knows nothing.

The first row is our choice, before we look at the others: the negative log probability of the answer. `low` and `high`
are a 95 % interval. The last two columns are a 95 % interval for the difference from the first row: if 0 is between
them, this test cannot tell which of the two is better.
"""

# %%
SCORES = {
    "-log_prob of the answer": -of_answer["log_prob"],
    "-log_prob_per_token of the answer": -of_answer["log_prob_per_token"],
    "epistemic of the answer": of_answer["epistemic"],
    "number of tokens": of_answer["num_tokens"],
    "nll_per_token, mean of random answers": of_random["nll_per_token"],
    "total_per_token, mean of random answers": of_random["total_per_token"],
    "mutual information": at_random.mutual_information["mutual_information"],
    "disagreement": of_random["disagreement"],
    "semantic entropy": at_random.semantic_entropy(same_meaning),
}
SCORES = {name: np.asarray(values, dtype=float) for name, values in SCORES.items()}
resampled = np.random.default_rng(0).integers(len(wrong), size=(50 if TOY else 400, len(wrong)))
again = {name: np.array([metrics.auroc(v[i], wrong[i]) for i in resampled]) for name, v in SCORES.items()}
first = next(iter(again.values()))


def interval(values: np.ndarray) -> np.ndarray:
    """Return the 2.5 % and 97.5 % quantiles."""
    return np.quantile(values, [0.025, 0.975])


lines = {
    name: [metrics.auroc(values, wrong), *interval(again[name]), *interval(again[name] - first)]
    for name, values in SCORES.items()
}
columns = ["AUROC", "low", "high", "difference, low", "difference, high"]
display(pd.DataFrame.from_dict(lines, orient="index", columns=columns).round(3))

# %% [markdown]
"""- The log probability of the answer has an AUROC of 0.86, and so has its epistemic uncertainty. With 80 questions,
  each AUROC is uncertain by about 0.1 in both directions.
- The number of tokens alone has 0.69: long answers are more often wrong. A useful number must beat this one. The log
  probability does (the interval of the difference is below 0).
- `disagreement` is behind the log probability by little more than chance allows. For the six other numbers, 0 is
  between the ends, so this test does not tell which of them is best.

So do not expect that epistemic uncertainty finds mistakes better than the plain probability. In a
[larger test](../docs/quality.md#written-answers) with 220 questions, three seeds and learning rates chosen per method,
the log probability had an AUROC of 0.87, for plain LoRA and for this library's method (ScalaBL) alike. The epistemic
uncertainty alone had 0.80. What the posterior adds is the reason for a doubt: do the draws disagree, or does each draw
find many answers possible?

## Answer less, and be wrong less often

`keep` chooses the share of the questions whose answers are the most certain ones. The picture shows how many of the
kept answers are wrong. In random order, the error would be the same at every share.
"""

# %%
shares = np.linspace(0.1, 1, 10)
shown = {
    "-log_prob of the answer": "o-",
    "mutual information": "s--",
    "semantic entropy": "^-.",
    "number of tokens": "x:",
}
_, ax = plt.subplots(figsize=(4.8, 3.6), layout="constrained")
errors = {name: [wrong[given.keep(share, by=SCORES[name])].mean() for share in shares] for name in shown}
for name, style in shown.items():
    ax.plot(shares, errors[name], style, markersize=4, label=name)
ax.axhline(wrong.mean(), color="gray", linewidth=0.9, label="random order")
ax.set(xlabel="share of questions that are answered", ylabel="error among the answers", ylim=(0, None))
ax.legend(frameon=False, fontsize="small")
plt.show()
display(pd.DataFrame(errors, index=pd.Index(shares.round(1), name="share")).T[[0.2, 0.4, 0.6, 0.8, 1.0]].round(2))

# %% [markdown]
"""With the log probability, the best 20 % of the answers (16 of 80) have no mistake, and the best half has an error of
0.20 instead of 0.44. No mistake in 16 answers does not mean that there will be none: an error of up to 17 % would give
this result with a probability of 5 % or more. In the middle, the first three lines differ by one or two answers. Many
answers have the same number of tokens; `keep` then takes them in the order of the list.

`keep` compares questions with each other. If you need a threshold for new questions, and a promise about their error,
choose it as in the notebook `review_table.ipynb`.

## What these numbers do not say

Look at the mistakes of which the model is surest, and at the right answers of which it is least sure:
"""

# %%
table = pd.DataFrame(
    {
        "question": [row["prompt"].split("\n")[0].removeprefix("Question: ") for row in test],
        "answer": given.answers,
        "accepted": [" or ".join(row["accepted"]) for row in test],
        "probability": np.exp(of_answer["log_prob"]),
        "mutual information": SCORES["mutual information"],
    }
)
display(table[wrong].sort_values("probability", ascending=False).head(6).round(3))
display(table[~wrong].sort_values("probability").head(4).round(3))
print(f"Mean probability of an answer: {table['probability'].mean():.2f}. Share that is right: {1 - wrong.mean():.2f}.")

# %% [markdown]
"""- **A sure answer can be wrong.** "Istanbul" has a probability of 0.64 and a mutual information of 0.03 nats: the
  draws agree. They differ only in the random numbers of the LoRA layers. They share all weights that the model had
  before, and with them its errors. No number here compares an answer with the world.
- **An unsure answer can be right.** "Addis Ababa" has a probability of 0.05.
- **The probability is that of this very text.** It is not the probability that the answer is right. "leave" shares its
  probability with "depart", which is also right. The mean probability is 0.37, and 0.56 of the answers are right. Use
  these numbers to put answers in order. If you need probabilities that are true, compare them with known answers.
- **The numbers depend on the question.** Their size changes with the length and the form of the answers. A threshold
  that is good for capitals may be bad for sentences. Test it on questions like yours.
- **One run is one run.** Another seed, or other questions, would give other figures. The intervals above cover the
  choice of the questions, but not the training.

## Where to go next

- The same steps as a page to read, with fewer figures: `docs/tutorials/text.md`.
- All methods compared on 580 quiz questions: `docs/quality.md`, and the benchmark `examples/benchmarks/quiz.py`.
- What total, aleatoric and epistemic mean: `docs/guide/read-the-uncertainty.md`.
- From labeled texts to a list for review: the notebook `review_table.ipynb`.
"""

# %%
print(notebooks.duration())
