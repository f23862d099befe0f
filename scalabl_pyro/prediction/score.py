"""Score given completions under all draws of a posterior."""

import time
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ..data.batch import Batch, Example
from ..lora.forward import AdaptedLLM
from ..model.passes import Passes
from ..tasks import Completion
from .scored_texts import ScoredTexts, TokenNumbers
from .token_readout import FIXED, TokenReadout
from .token_texts import TokenTexts


@torch.no_grad()
def score(
    llm: AdaptedLLM,
    task: Completion,
    s: Tensor,
    examples: Sequence[Example],
    *,
    batch_size: int,
    top: int = 0,
    progress: bool = False,
    is_mean: bool = False,
) -> ScoredTexts:
    """Compute what each draw says of each token of the completions; see :meth:`scalabl_pyro.Posterior.score`.

    Args:
        llm: LLM with the factors of the posterior.
        task: Task that encoded the examples.
        s: Draws, (S, D).
        examples: N tokenized rows with completions.
        batch_size: Rows per forward pass. All draws of a row run in one pass.
        top: Number of most probable tokens to keep per place.
        progress: Whether to show a progress bar.
        is_mean: Whether the only draw is the posterior mean.
    """
    start = time.perf_counter()
    passes = Passes.over(examples, task, llm.adapter, batch_size=batch_size)
    draws = s.to(passes.device).unsqueeze(1)
    found: dict[int, TokenNumbers] = {}

    def add(batch: Batch) -> None:
        readout = TokenReadout(cast(Tensor, batch.target), len(s), top=top)
        numbers = task.read(llm, batch, draws, readout)
        by_row = numbers.reshape(len(s), len(batch), *numbers.shape[-2:]).cpu().double().numpy()
        for place, row in enumerate(batch.index.tolist()):
            found[row] = _of_row(by_row[:, place], examples[row].target, top)

    passes.map(add, progress=progress, description="score")
    rows = [found[i] for i in range(len(examples))]
    if not all(np.isfinite(row.log_probs).all() for row in rows):
        raise FloatingPointError("The log probability of a token is NaN or infinite: the outputs of the LLM overflow.")
    texts = [task.tokenizer.decode(row.tokens) for row in rows]
    token_texts = TokenTexts(task.tokenizer)
    pieces = [token_texts.pieces(row.tokens) for row in rows]
    others = [[[token_texts.of(int(i)) for i in here] for here in row.top_tokens] for row in rows] if top else []
    seconds = time.perf_counter() - start
    return ScoredTexts(tuple(rows), tuple(texts), tuple(pieces), is_mean, seconds, top_pieces=tuple(others))


def _of_row(numbers: np.ndarray, tokens: list[int], top: int) -> TokenNumbers:
    """Sort the numbers of one row, (S, T, 4 + 3 * top)."""
    numbers = numbers[:, : len(tokens)]
    log_probs, mixture, total, aleatoric = (numbers[..., i] for i in range(FIXED))
    ids, best, by_draw = (numbers[..., FIXED + i * top : FIXED + (i + 1) * top] for i in range(3))
    return TokenNumbers(
        tokens=np.asarray(tokens),
        log_probs=log_probs,
        log_mixture=mixture[0],
        total=total[0],
        aleatoric=aleatoric[0],
        top_tokens=ids[0].astype(np.int64),
        top_probs=best[0],
        top_probs_by_draw=by_draw,
    )
