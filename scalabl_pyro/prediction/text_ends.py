"""Where generated texts end: at an end token, at a stop string, or where another criterion stops them."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import StoppingCriteria, StopStringCriteria


class Written(NamedTuple):
    """A text as it was written.

    Attributes:
        tokens: Its tokens, with the one that ends it.
        finished: Whether it ended by itself, and not because there was no room or no time.
    """

    tokens: list[int]
    finished: bool


class Stops(StoppingCriteria):
    """Criteria that stop rows, and the length at which each row was stopped. Behind it, ``generate`` writes padding.

    Args:
        criteria: Criteria of transformers.
    """

    def __init__(self, criteria: Iterable[Any]) -> None:
        self.criteria = list(criteria)
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return whether each row is stopped, (rows,)."""
        is_done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for criterion in self.criteria:
            is_done = is_done | criterion(input_ids, scores, **kwargs)
        for row in is_done.nonzero().flatten().tolist():
            self.lengths.setdefault(row, input_ids.shape[1])
        return is_done


class TextEnds:
    """Finds the ends of texts.

    Args:
        tokenizer: Tokenizer of the task.
        end_tokens: Tokens that end a text.
        stop_strings: Texts that end a text.
        criteria: Criteria of the caller.
        has_beams: Whether a beam search writes. It moves texts between its rows, so their ends are found afterwards.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_tokens: Iterable[int],
        *,
        stop_strings: Sequence[str] = (),
        criteria: Any = None,
        has_beams: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.end_tokens = set(end_tokens)
        self.stop_strings = list(stop_strings)
        given = [criteria] if isinstance(criteria, StoppingCriteria) else list(criteria or [])
        own = [StopStringCriteria(tokenizer, self.stop_strings)] if self.stop_strings else []
        self.criteria = [*own, *given]
        self.has_beams = has_beams

    def begin(self) -> Stops:
        """Return the criteria for one batch."""
        return Stops(self.criteria)

    def cut(self, tokens: list[int], *, before: Sequence[int], stopped: int | None, pad: int) -> Written:
        """Cut the padding behind a text; the token that ends it stays.

        Args:
            tokens: What ``generate`` wrote.
            before: Tokens of the row before them.
            stopped: Number of tokens when a criterion stopped the row; None if none did.
            pad: Token that fills the rest of a row.
        """
        count = len(tokens) if stopped is None else stopped
        for place, token in enumerate(tokens[:count]):
            if token in self.end_tokens or (self.has_beams and self._stops(before, tokens[: place + 1])):
                return Written(tokens[: place + 1], finished=True)
        if self.has_beams and self.criteria and pad not in self.end_tokens:
            while count > 1 and tokens[count - 1] == pad:
                count -= 1
        return Written(tokens[:count], finished=stopped is not None or count < len(tokens))

    def _stops(self, before: Sequence[int], tokens: Sequence[int]) -> bool:
        """Whether a text contains a stop string, which may begin in the prompt."""
        if not self.stop_strings:
            return False
        start, whole = (len(self.tokenizer.decode(before)), self.tokenizer.decode([*before, *tokens]))
        return any(stop in whole[max(start - len(stop) + 1, 0) :] for stop in self.stop_strings)
