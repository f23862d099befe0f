"""Rows with completions, a task for them, and a tiny LLM whose factors are not at their start."""

import tiny
import torch

import scalabl_pyro as sp
from scalabl_pyro.data import collate, encode

NOUNS = {"sky": "blue", "grass": "green", "rose": "red . red", "night": "black"}
EXACT = {"rtol": 0, "atol": 1e-10}
FEW = {"num_steps": 3, "batch_size": 4, "progress": False}


def rows(n=6):
    """Prompts and completions of several lengths."""
    nouns = list(NOUNS.items())
    out = []
    for i in range(n):
        noun, color = nouns[i % 4]
        filler = "the " * (i % 3)
        out.append({"prompt": f"what colour is {filler}{noun} ?", "completion": f" {color} is the {noun}"[: 99 - i]})
    out[1] = {"prompt": "sky", "completion": " blue"}  # a prompt of one token: its position is 0
    return out


def tokenizer(**options):
    tok = tiny.tokenizer(**options)
    tok.eos_token = "."
    return tok


def spread(blora, seed=0):
    """Give B, which starts at 0, random values."""
    with torch.no_grad():
        for _, B in blora.adapter.factors():
            B.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    return blora


def adapted(family="llama", **options):
    llm = tiny.causal_lm(family, dtype=torch.float64) if isinstance(family, str) else family
    return spread(sp.bayesian_lora(llm, **options))


def posterior_of(blora, task, data=None, **options):
    given = {**FEW, "lr": 1e-2, **options}
    return sp.fit(blora, task, data or rows(), **given).posterior


def batch_of(task, data, multiple=1):
    examples = encode(data, task.encode, need_target=True)
    return collate(examples, range(len(examples)), task.pad_token_id, multiple=multiple)


def draws_of(blora, *shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, blora.subspace.dim, dtype=torch.float64, generator=generator)


def likelihood(task, blora, batch, s):
    return task.distribution(task.outputs(blora, batch, s), batch).log_prob(batch.target)


def expected(llm, task, row):
    """Sum of log softmax of the logits of a plain LLM, one row alone."""
    example = task.encode(row)
    ids = torch.tensor([example.inputs["input_ids"]])
    log_p = llm(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(log_p[i, token] for i, token in zip(example.extras["positions"], example.target, strict=True))
