"""Write texts under the draws of a posterior, and score each text under all draws."""

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
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
from ..tasks.decoder_inputs import start_token
from .generate_check import takes_padding, warn_of_other_logits
from .generate_options import HARMLESS, PURE, flat_tokens, is_neutral, without_own_options
from .generated import Generation
from .mixture_decoding import decode_mixture
from .score import score
from .text_ends import TextEnds, Written

#: What writes a text: the posterior mean, each draw by itself, or the mixture of all draws.
Decode = Literal["mean", "draws", "mixture"]
DECODE: tuple[str, ...] = get_args(Decode)


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
        shaping = [n for n, value in self.options.items() if n not in HARMLESS and not is_neutral(n, value)]
        return bool(self.options.get("do_sample")) and not shaping and self.decode != "mean"

    def write(self, prompts: Sequence[list[int]]) -> list[Written]:
        """Write the texts of some prompts in one batch.

        Args:
            prompts: Tokens of P prompts.

        Returns:
            Each text, ordered by prompt, then by draw, then by sample.
        """
        repeats = len(self.s) if self.decode == "draws" else 1
        copies, again = (1, self.num_samples) if self.repeats_rows else (self.num_samples, 1)
        rows = [prompt for prompt in prompts for _ in range(repeats * again)]
        ids, mask = self._padded(rows)
        module: Any = self.llm.llm
        stops = self._ends.begin()
        options = {**self._options, "num_return_sequences": copies, "stopping_criteria": [stops]}
        with eval_mode(module), torch.no_grad(), self._bound(len(ids), copies):
            try:
                found = module.generate(input_ids=ids, attention_mask=mask, **options)
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise FloatingPointError(
                    "The probabilities of the next token are NaN: the outputs of the LLM overflow, or the options "
                    "forbid all tokens."
                ) from error
        start = 1 if self.task.encoder_decoder else ids.shape[1]  # a decoder begins with its start token
        texts = []
        for i, row in enumerate(found[:, start:].tolist()):
            before = [] if self.task.encoder_decoder else rows[i // copies]
            stopped = None if self._ends.has_beams or i not in stops.lengths else stops.lengths[i] - start
            texts.append(self._ends.cut(row, before=before, stopped=stopped, pad=self.task.pad_token_id))
        return texts

    def _padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Return the rows and their mask, padded on the left. An encoder counts positions from the left, as trained."""
        width, pad, device = max(map(len, rows)), self.task.pad_token_id, self.llm.adapter.device
        if self.task.encoder_decoder:
            ids = [row + [pad] * (width - len(row)) for row in rows]
            mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        else:
            ids = [[pad] * (width - len(row)) + row for row in rows]
            mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    @functools.cached_property
    def _options(self) -> dict[str, Any]:
        """Options of ``generate`` for a batch, besides its rows and what stops them."""
        own = {**without_own_options(self.llm.llm), "do_sample": False, "pad_token_id": self.task.pad_token_id}
        given = {name: value for name, value in self.options.items() if name != "stop_strings"}
        if self.task.encoder_decoder:
            own["decoder_start_token_id"] = start_token(self.llm.llm)
        pure = PURE if self.options.get("do_sample") else {}
        return {**own, **pure, **given, "eos_token_id": sorted(self.end_tokens) or None}

    @functools.cached_property
    def _ends(self) -> TextEnds:
        return TextEnds(
            self.task.tokenizer,
            self.end_tokens,
            stop_strings=self.options.get("stop_strings", ()),
            criteria=self.options.get("stopping_criteria"),
            has_beams=self.options.get("num_beams", 1) > 1,
        )

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
        return set(flat_tokens(given))

    def _bound(self, rows: int, copies: int) -> AbstractContextManager[None]:
        """Bind what writes the texts. ``generate`` repeats each row for its beams and samples, one after the other."""
        adapter = self.llm.adapter
        own: dict[str, Any] = {"factors": self.llm.factors, "heads": self.llm.heads}
        if self.decode == "mean":
            return adapter.bind(self.mean.to(adapter.device), **own)
        s = self.s.to(adapter.device)
        if self.decode == "mixture":
            return decode_mixture(adapter, s, rows, **own)
        each = max(copies, self.options.get("num_beams", 1))
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
    per_prompt = writer.num_samples * (len(writer.s) if writer.decode == "draws" else 1)
    written: dict[int, list[Written]] = {}
    with scoped_seed(writer.seed), tqdm(total=len(prompts), disable=not progress, desc="generate") as bar:
        for chosen in _batches(writer, prompts, batch_size):
            texts = writer.write([prompts[i] for i in chosen])
            for place, i in enumerate(chosen):
                written[i] = texts[place * per_prompt : (place + 1) * per_prompt]
            bar.update(len(chosen))
    flat = [(prompts[i], text) for i in range(len(prompts)) for text in written[i]]
    examples = [_as_example(prompt, text.tokens, writer.task.encoder_decoder) for prompt, text in flat]
    scored = score(writer.llm, writer.task, writer.s, examples, batch_size=batch_size, progress=progress)
    draws = [k for k in range(len(writer.s)) for _ in range(writer.num_samples)]
    return Generation(
        prompts=tuple(writer.task.tokenizer.decode(prompt) for prompt in prompts),
        scored=scored,
        answers=tuple(_plain_text(writer, text.tokens) for _, text in flat),
        draw=tuple(draws * len(prompts)) if writer.decode == "draws" else (None,) * len(flat),
        finished=tuple(text.finished for _, text in flat),
        decode=writer.decode,
        is_pure=writer.is_pure,
        seconds=time.perf_counter() - start,
    )


def _batches(writer: Writer, prompts: Sequence[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Divide the numbers of the prompts into batches of similar length, or of one length if padding is seen."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    task, module = writer.task, writer.llm.llm
    start = start_token(module) if task.encoder_decoder else None
    warn_of_other_logits(module, prompts[0], task.pad_token_id, start)
    lengths = sorted(set(map(len, prompts)))
    pads = task.encoder_decoder or batch_size == 1 or len(lengths) == 1
    if pads or takes_padding(module, prompts[0], task.pad_token_id):
        groups = [order]
    else:
        groups = [[i for i in order if len(prompts[i]) == length] for length in lengths]
    for group in groups:
        for first in range(0, len(group), batch_size):
            yield group[first : first + batch_size]


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
    if writer.task.encoder_decoder and (writer.decode == "mixture" or writer.options.get("num_beams", 1) > 1):
        raise ValueError(
            "An encoder-decoder can write with decode='draws' or 'mean', and without beams: its encoder runs once per "
            "row."
        )
    if writer.decode != "mixture":
        return
    if writer.options.get("num_beams", 1) > 1:
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


def _plain_text(writer: Writer, tokens: list[int]) -> str:
    kept = [token for token in tokens if token not in writer.end_tokens]
    return str(writer.task.tokenizer.decode(kept, skip_special_tokens=True))
