"""The whole idea in 30 lines: a model, its Bayesian LoRA, a task, a fit, predictions, and metrics.

python examples/minimal.py           # SmolLM2-135M on Reuters news; about two minutes on two CPU cores
python examples/minimal.py --tiny    # a random model; seconds
"""

import sys

from _support.datasets import NEWS, newsgroups, reuters_r8, word_task
from _support.models import demo_llm, upper_blocks

import scalabl_pyro

# Any causal LM of Hugging Face, and rows like {"question": ..., "choices": [...], "answer": 0}.
llm, tokenizer = demo_llm(tiny="--tiny" in sys.argv)
train, test = reuters_r8("train", count=120, seed=0), reuters_r8("test", count=60, seed=0)

# LoRA layers whose bottleneck has a prior; here in the uppermost block and the head, to save time.
blora = scalabl_pyro.bayesian_lora(llm, r=8, layers_to_transform=upper_blocks(llm, 1))

# The likelihood: the answer is one of the choices, each of which is one token.
task = word_task(tokenizer, train, NEWS, max_length=32)

# Variational inference: learns the LoRA factors and the posterior of the bottlenecks together.
result = scalabl_pyro.fit(
    blora, task, train, num_steps=60, batch_size=8, seed=0, hardware={"cache_prefix": True}, progress=False
)

# Each draw of the posterior is one network. The prediction averages over ten of them.
prediction = result.posterior.predict(test, num_draws=10, seed=0)
print(prediction.metrics().round(3).T.to_string())

# Texts that have none of the topics: is the model less sure of them?
elsewhere = result.posterior.predict(newsgroups(count=60, seed=0), num_draws=10, seed=0)
print(f"Entropy in nats: {prediction.total.mean():.2f} on news, {elsewhere.total.mean():.2f} on forum posts.")
