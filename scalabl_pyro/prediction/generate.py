"""Write texts under the draws of a posterior, and score each text under all draws."""

import functools
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._process.random_state import scoped_seed
from ..data.batch import Example
from ..lora.adapter import Adapter
from ..lora.forward import AdaptedLLM
from ..lora.head_check import ends_with_head
from ..lora.position_table import position_limit
from ..lora.train_mode import eval_mode
from ..tasks import Completion
from .generated import Generation
from .mixture_decoding import decode_mixture
from .score import score

#: What writes a text: the posterior mean, each draw by itself, or the mixture of all draws.
Decode = Literal["mean", "draws", "mixture"]
DECODE: tuple[str, ...] = get_args(Decode)
#: Options that change neither the probabilities of the tokens nor their choice at random.
HARMLESS = {"max_new_tokens", "do_sample", "stop_strings", "eos_token_id", "use_cache", "cache_implementation"}
#: Pure sampling, where the generation configuration of a model may set other values.
PURE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


@dataclass(frozen=True, kw_only=True)
class Writer:
    """How texts are written.

    Attributes:
        llm: LLM with the factors of the posterior.
        task: Task that writes the prompts.
        s: Draws, (S, D), under which all texts are scored.
        mean: Posterior mean, (D,).
        decode: What writes a text.
        num_samples: Number of texts per prompt, and per draw with ``decode="draws"``.
        seed: Seed of the sampling.
        options: Options of ``generate`` of transformers.
    """

    llm: AdaptedLLM
    task: Completion
    s: Tensor
    mean: Tensor
    decode: Decode
    num_samples: int
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_pure(self) -> bool:
        """Whether a text is a draw from the model, so that averages over texts are estimates of expectations."""
        return bool(self.options.get("do_sample")) and set(self.options) <= HARMLESS and self.decode != "mean"

    def write(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Write the texts of some prompts in one batch.

        Args:
            prompts: Tokens of P prompts.

        Returns:
            Tokens of each text with its end token, ordered by prompt, then by draw, then by sample.
        """
        repeats = len(self.s) if self.decode == "draws" else 1
        rows = [prompt for prompt in prompts for _ in range(repeats)]
        width = max(map(len, rows))
        pad, device = self.task.pad_token_id, self.llm.adapter.device
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        copies = self.num_samples
        if self.repeats_rows:
            ids, mask = (x.repeat_interleave(copies, 0) for x in (ids, mask))
            copies = 1
        module: Any = self.llm.llm
        pure = PURE if self.options.get("do_sample") else {}
        own = {"do_sample": False, "repetition_penalty": 1.0, "pad_token_id": pad, "num_return_sequences": copies}
        options = {**own, **pure, **self.options, "eos_token_id": sorted(self.end_tokens) or None}
        if "stop_strings" in options:
            options["tokenizer"] = self.task.tokenizer
        with eval_mode(module), torch.no_grad(), self._bound(len(ids), copies):
            found = module.generate(input_ids=ids, attention_mask=mask, **options)
        start = 1 if self.task.encoder_decoder else width  # a decoder begins with its start token
        return [self._until_end(row) for row in found[:, start:].tolist()]

    @property
    def repeats_rows(self) -> bool:
        """Whether rows are repeated for the samples here, and not by ``generate``.

        A mixture repeats its rows for the draws. An encoder runs before ``generate`` repeats rows, and each row must
        have its draw there already.
        """
        return self.decode == "mixture" or self.task.encoder_decoder

    @functools.cached_property
    def end_tokens(self) -> set[int]:
        """Tokens that end a text: those of the model, and the one that the task teaches."""
        module: Any = self.llm.llm
        own = module.generation_config.eos_token_id
        given = self.options.get("eos_token_id", [own, self.task.tokenizer.eos_token_id])
        return set(_flat(given))

    def is_finished(self, tokens: Sequence[int]) -> bool:
        """Tell whether a text ended by itself, and not because it reached ``max_new_tokens``."""
        return len(tokens) < self.options["max_new_tokens"] or tokens[-1] in self.end_tokens

    def _until_end(self, tokens: list[int]) -> list[int]:
        """Cut the padding behind a text; the token that ends it stays."""
        ends, stops = self.end_tokens, self.options.get("stop_strings") or ()
        stops = (stops,) if isinstance(stops, str) else stops
        for place, token in enumerate(tokens):
            whole = self.task.tokenizer.decode(tokens[: place + 1]) if stops else ""
            if token in ends or any(stop in whole for stop in stops):
                return tokens[: place + 1]
        return tokens

    def _bound(self, rows: int, copies: int) -> AbstractContextManager[None]:
        """Bind what writes the texts. ``generate`` repeats each row for its beams and samples, one after the other."""
        adapter = self.llm.adapter
        own: dict[str, Any] = {"factors": self.llm.factors, "heads": self.llm.heads}
        if self.decode == "mean":
            return adapter.bind(self.mean.to(adapter.device), **own)
        s = self.s.to(adapter.device)
        if self.decode == "mixture":
            return decode_mixture(adapter, s, rows, **own)
        each = max(copies, int(self.options.get("num_beams", 1)))
        if self.repeats_rows:
            s, each = s.repeat_interleave(self.num_samples, 0), 1
        return adapter.bind(s.repeat(rows // len(s), 1).repeat_interleave(each, 0), **own)


def generate(writer: Writer, prompts: Sequence[list[int]], *, batch_size: int, progress: bool = False) -> Generation:
    """Write texts, and score them; see :meth:`scalabl_pyro.Posterior.generate`.

    Args:
        writer: How texts are written.
        prompts: Tokens of P prompts.
        batch_size: Prompts per batch.
        progress: Whether to show a progress bar.
    """
    start = time.perf_counter()
    room = writer.options["max_new_tokens"]
    check_prompts(writer.task, writer.llm.adapter, prompts, max_new_tokens=room)
    _check_decode(writer, prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    per_prompt = writer.num_samples * (len(writer.s) if writer.decode == "draws" else 1)
    written: dict[int, list[list[int]]] = {}
    with scoped_seed(writer.seed), tqdm(total=len(prompts), disable=not progress, desc="generate") as bar:
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            texts = writer.write([prompts[i] for i in chosen])
            for place, i in enumerate(chosen):
                written[i] = texts[place * per_prompt : (place + 1) * per_prompt]
            bar.update(len(chosen))
    flat = [(prompts[i], text) for i in range(len(prompts)) for text in written[i]]
    examples = [_as_example(prompt, text, writer.task.encoder_decoder) for prompt, text in flat]
    scored = score(writer.llm, writer.task, writer.s, examples, batch_size=batch_size, progress=progress)
    draws = [k for k in range(len(writer.s)) for _ in range(writer.num_samples)]
    return Generation(
        prompts=tuple(writer.task.tokenizer.decode(prompt) for prompt in prompts),
        scored=scored,
        answers=tuple(_plain_text(writer, text) for _, text in flat),
        draw=tuple(draws * len(prompts)) if writer.decode == "draws" else (None,) * len(flat),
        finished=tuple(writer.is_finished(text) for _, text in flat),
        decode=writer.decode,
        is_pure=writer.is_pure,
        seconds=time.perf_counter() - start,
    )


def check_prompts(task: Completion, adapter: Adapter, prompts: Sequence[list[int]], *, max_new_tokens: int) -> None:
    """Check that the LLM can read prompts, and has positions for the texts behind them.

    Args:
        task: Task that writes the prompts.
        adapter: Adapter inside the LLM.
        prompts: Tokens of P prompts.
        max_new_tokens: Largest number of tokens per text.

    Raises:
        ValueError: It has not, or it cannot write texts.
    """
    module = adapter.module
    if not callable(getattr(module, "generate", None)):
        raise ValueError(f"{type(module).__name__} has no method generate: load a causal LM of transformers.")
    task.check_llm(adapter, [Example({"input_ids": prompt}) for prompt in prompts])
    longest, limit = max(map(len, prompts)), position_limit(module)
    needed = max(longest, max_new_tokens + 1) if task.encoder_decoder else longest + max_new_tokens
    if limit is not None and needed > limit:  # a decoder has its own row of positions
        raise ValueError(
            f"A prompt has {longest} tokens, and max_new_tokens={max_new_tokens}, but the model has positions for "
            f"{limit} tokens only. Lower max_new_tokens, or pass max_length to the task, which cuts longer prompts."
        )


def _check_decode(writer: Writer, prompts: Sequence[list[int]]) -> None:
    if writer.task.encoder_decoder and (writer.decode == "mixture" or int(writer.options.get("num_beams", 1)) > 1):
        raise ValueError(
            "An encoder-decoder can write with decode='draws' or 'mean', and without beams: its encoder runs once per "
            "row."
        )
    if writer.decode != "mixture":
        return
    if int(writer.options.get("num_beams", 1)) > 1:
        raise ValueError("decode='mixture' has no beam search: use num_beams=1, or decode='draws'.")
    ids = torch.tensor([prompts[0]], device=writer.llm.adapter.device)
    if not ends_with_head(writer.llm.adapter, {"input_ids": ids}):
        raise ValueError(
            f"decode='mixture' does not work for {type(writer.llm.llm).__name__}, which changes its logits after the "
            "head: use decode='draws'."
        )


def _as_example(prompt: list[int], text: list[int], is_pair: bool) -> Example:
    if is_pair:
        return Example({"input_ids": prompt}, text, {"positions": list(range(len(text)))})
    places = range(len(prompt), len(prompt) + len(text))
    return Example({"input_ids": prompt + text}, text, {"positions": [i - 1 for i in places]})


def _flat(tokens: Any) -> list[int]:
    """Return the tokens of nested lists, without None."""
    if isinstance(tokens, int):
        return [tokens]
    return [] if tokens is None else [token for part in tokens for token in _flat(part)]


def _plain_text(writer: Writer, tokens: list[int]) -> str:
    kept = [token for token in tokens if token not in writer.end_tokens]
    return str(writer.task.tokenizer.decode(kept, skip_special_tokens=True))
