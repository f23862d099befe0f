"""The model ``scalabl`` of lm-evaluation-harness: a posterior behind the interface of its Hugging Face model."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..._errors import check_choice, check_count
from ...lora.head_check import ends_with_head
from ...lora.train_mode import eval_mode
from ...posterior.posterior import Posterior
from ...prediction.mixture import log_mean_exp
from ...prediction.mixture_decoding import decode_mixture
from .continuations import Scored, score_rows
from .registration import MODEL_NAME

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

#: What writes the texts of ``generate_until``.
Decode = Literal["mixture", "mean", "draw"]


@register_model(MODEL_NAME)
class ScalaBLLM(HFLM):
    """Model of lm-evaluation-harness that answers with the mixture of S posterior draws.

    Tokens, special tokens, chat templates, truncation, batches and stop sequences are those of ``HFLM``, the model
    ``hf`` of the harness. With one draw, all results are those of ``HFLM`` with this draw as an adapter.

    - The log likelihood of a continuation is log mean_k p_k(continuation | context): the logarithm of the mean of the
      probabilities of the whole continuation, not the mean of logarithms.
    - ``is_greedy`` tells whether each token of a continuation is the most probable one of the mixture, in which each
      draw counts as much as it explains the tokens of the continuation so far. So it tells whether
      ``decode="mixture"`` would write the continuation.
    - The log likelihood of a long document (``loglikelihood_rolling``) is the logarithm of the mean over draws of the
      product over its windows.

    Log probabilities are computed in float32 or higher, unless ``softmax_dtype`` names another type.

    Args:
        pretrained: Base model: a name, a path, or a model. None for that of a given posterior.
        posterior: Directory that ``save_pretrained`` wrote, or a posterior.
        num_draws: Number S of draws. 0 means the posterior mean alone.
        seed: Seed of the draws.
        decode: What writes the texts of ``generate_until``: the ``"mixture"`` of all draws, the posterior ``"mean"``,
            or one ``"draw"``.
        draw: Number of the draw that writes, from 0 on, for ``decode="draw"``.
        options: Options of ``HFLM``: ``dtype``, ``device``, ``batch_size``, ``max_length``, ``tokenizer``,
            ``add_bos_token`` and so on. A pass holds ``num_draws`` times ``batch_size`` rows.

    Raises:
        ValueError: An option contradicts the posterior, a number is outside its range, or the base model is another one
            than that of the posterior.

    Example:
        >>> lm = ScalaBLLM(pretrained="HuggingFaceTB/SmolLM2-135M", posterior="my-posterior", num_draws=10)
        >>> lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])["results"]
    """

    def __init__(
        self,
        pretrained: Any = None,
        *,
        posterior: Any,
        num_draws: int = 10,
        seed: int = 0,
        decode: Decode = "mixture",
        draw: int = 0,
        **options: Any,
    ) -> None:
        check_count(num_draws=num_draws, seed=seed, draw=draw, least=0)
        check_choice("decode", decode, get_args(Decode))
        base = _base_of(posterior, pretrained, options)
        super().__init__(pretrained=base, **options)
        if isinstance(base, _Described):
            self._model = self.pretrained = base.module
        if self.backend != "causal":
            raise ValueError("The model 'scalabl' is for decoder-only LLMs, and this one is an encoder-decoder.")
        own = posterior if isinstance(posterior, Posterior) else Posterior.from_pretrained(self.model, str(posterior))
        self.posterior = own
        self.decode = decode
        self.seed = seed
        self.num_draws = num_draws
        self._llm = own.llm()
        self._s = own.sample(num_draws, seed=seed).s
        self._writer = own.mean() if decode == "mean" else own.sample(draw + 1, seed=seed).s[draw]
        self._draw = draw if decode == "draw" else None

    def get_model_info(self) -> dict[str, Any]:
        """Return what identifies the model in the results of the harness."""
        keys = {"posterior": self.posterior.describe(), "num_draws": self.num_draws, "draws_seed": self.seed}
        return {**super().get_model_info(), **keys, "decode": self.decode, "draw": self._draw}

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Compute the log likelihood of whole texts, nats; a text that is too long is divided as in ``HFLM``."""
        texts = [request.args[0] for request in requests]
        windows: list[tuple[None, list[int], list[int]]] = []
        owner: list[int] = []
        for number, text in enumerate(texts):
            found = get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            windows += [(None, *make_disjoint_window(window)) for window in found]
            owner += [number] * (len(windows) - len(owner))
        sums = np.zeros((len(texts), len(self._s)))
        for number, scored in zip(owner, self._scored(windows, disable_tqdm=disable_tqdm), strict=True):
            sums[number] += scored.log_probs
        answers = [float(log_mean_exp(by_draw)) for by_draw in sums]
        for text, answer in zip(texts, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Compute log likelihood and ``is_greedy`` of each request (texts, context tokens, continuation tokens)."""
        return [_answer(one) for one in self._scored(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)]

    def _scored(
        self, requests: Sequence[Any], *, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Scored]:
        """Score the continuations of requests, in the batches of ``HFLM``: those that share their input run once."""
        order = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1] + request[2]), tuple(request[1] + request[2])),
            group_fn=lambda request: request[1] + request[2][:-1],
            group_by="contexts" if self.logits_cache else None,
        )
        is_auto = self.batch_size == "auto" and not override_bs
        if is_auto:
            self.batch_sizes: dict[int, int] = {}
        size = override_bs or (0 if is_auto else int(self.batch_size))
        scored: list[Scored] = []
        hidden = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=hidden, desc="Running loglikelihood requests") as bar:
            for chunk in order.get_batched(n=size, batch_fn=self._batch_scheduler if is_auto else None):
                empty = torch.empty(1, 1, 1)
                members = [list(order.get_cache(text, context, rest, empty)) for text, context, rest in chunk]
                for row, found in zip(members, self._pass_over(chunk, members), strict=True):
                    for (text, *_), one in zip(row, found, strict=True):
                        scored.append(one)
                        if text is not None:  # windows of longer texts have none
                            self.cache_hook.add_partial("loglikelihood", text, _answer(one))
                    bar.update(len(row))
        return order.get_original(scored)

    def _pass_over(self, chunk: Sequence[Any], members: Sequence[Any]) -> list[list[Scored]]:
        """Run one batch. Inputs that are too long lose their start, as in ``HFLM``."""
        for _, context, rest in chunk:
            if not context or not rest or len(rest) > self.max_length:
                raise ValueError(
                    f"A request has {len(context)} context tokens and {len(rest)} continuation tokens: it needs one of "
                    f"each, and at most max_length={self.max_length} of the continuation."
                )
        rows = [(context + rest)[-(self.max_length + 1) :][:-1] for _, context, rest in chunk]
        with eval_mode(self.model), torch.no_grad(), self._autocast():
            given = [[rest for _, rest, _ in row] for row in members]
            return score_rows(self._llm, self._s, rows, given, dtype=self.softmax_dtype)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Run all draws on rows of tokens. ``HFLM`` calls it to find the largest batch that fits."""
        rows = inps.tolist()
        with eval_mode(self.model), torch.no_grad(), self._autocast():
            scored = score_rows(self._llm, self._s, rows, [[row] for row in rows], dtype=self.softmax_dtype)
        return torch.tensor(np.stack([one.log_probs for (one,) in scored]))

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Write one text per row of context tokens."""
        if self.decode == "mixture":
            self._check_mixture(context, generation_kwargs)
        with eval_mode(self.model), self._bound(len(context)):
            return super()._model_generate(context, max_length, stop, **generation_kwargs)

    def _bound(self, num_rows: int) -> AbstractContextManager[None]:
        """Bind what writes the texts."""
        own: dict[str, Any] = {"factors": self._llm.factors, "heads": self._llm.heads}
        adapter = self.posterior.adapter
        if self.decode == "mixture":
            return decode_mixture(adapter, self._s.to(adapter.device), num_rows, **own)
        return adapter.bind(self._writer.to(adapter.device), **own)

    def _check_mixture(self, context: Tensor, options: dict[str, Any]) -> None:
        if int(options.get("num_beams", 1)) > 1 or int(options.get("num_return_sequences", 1)) > 1:
            raise ValueError(
                "decode='mixture' has no beam search and one text per prompt: pass decode='mean' or decode='draw'."
            )
        if not ends_with_head(self.posterior.adapter, {"input_ids": context[:1]}):
            raise ValueError(
                f"decode='mixture' does not work for {type(self.model).__name__}, which changes its logits after the "
                "head: pass decode='mean' or decode='draw'."
            )

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)


@dataclass(frozen=True)
class _Described:
    """What ``HFLM`` reads of a model that is loaded already.

    It would tie the weights of the model itself, which fails with LoRA on a tied head.
    """

    module: nn.Module
    device: torch.device
    config: Any
    name_or_path: str


def _answer(scored: Scored) -> tuple[float, bool]:
    return float(log_mean_exp(scored.log_probs)), scored.is_greedy


def _base_of(posterior: Any, pretrained: Any, options: dict[str, Any]) -> Any:
    """Return what ``HFLM`` loads, and give it the tokenizer of a given posterior."""
    if options.get("peft"):
        raise ValueError("peft=: the posterior holds its adapter already. Leave peft= out.")
    if not isinstance(posterior, Posterior):
        if pretrained is None:
            raise ValueError("pretrained= is missing: give the base model of the saved posterior, a name or a path.")
        if not isinstance(posterior, str | Path):
            raise TypeError(f"posterior={posterior!r}: give the directory of a saved posterior, or a Posterior.")
        return pretrained
    module: Any = posterior.adapter.module
    if pretrained is not None and pretrained is not module:
        raise ValueError("pretrained= is not the LLM of the given posterior: leave it out.")
    if posterior.task.tokenizer is not None:
        options.setdefault("tokenizer", posterior.task.tokenizer)
    return _Described(module, module.device, module.config, module.name_or_path)
