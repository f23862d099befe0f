"""Texts that the draws of a posterior wrote: how much they agree, and which to keep."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._arguments import known_arguments_of_methods
from .._display import Summarized
from .._errors import check_choice
from .._version import __version__
from ..metrics import Array
from .inference_data import dataset, to_arviz, with_draws
from .scored_texts import ScoredTexts

if TYPE_CHECKING:
    import xarray as xr


@known_arguments_of_methods
@dataclass(frozen=True, repr=False)
class Generation(Summarized):
    """The texts that a posterior wrote for P prompts, n per prompt, each scored under all S draws.

    Attributes:
        prompts: The P prompts.
        scored: Log probabilities and uncertainties of all P * n texts, ordered by prompt.
        answers: The P * n texts without special tokens.
        draw: Number of the draw that wrote each text; None for ``decode="mean"`` and ``"mixture"``.
        finished: Whether each text ended before ``max_new_tokens``.
        decode: ``"mean"``, ``"draws"`` or ``"mixture"``.
        is_pure: Whether the texts are independent draws of the model, without beams, temperature or a cut of
            improbable tokens.
        seconds: Time that the generation took.

    Example:
        >>> found = posterior.generate(["the sky is"], num_draws=8, do_sample=True)
        >>> found.to_frame()
    """

    prompts: tuple[str, ...]
    scored: ScoredTexts
    answers: tuple[str, ...]
    draw: tuple[int | None, ...]
    finished: tuple[bool, ...]
    decode: str
    is_pure: bool
    seconds: float = float("nan")

    @property
    def per_prompt(self) -> int:
        """Number n of texts per prompt."""
        return len(self.answers) // len(self.prompts)

    def texts(self, prompt: int) -> list[str]:
        """Return the texts of a prompt.

        Args:
            prompt: Number of the prompt.

        Raises:
            ValueError: No prompt has this number.
        """
        if prompt not in range(len(self.prompts)):
            raise ValueError(f"prompt={prompt!r}: the prompts have the numbers 0 to {len(self.prompts) - 1}.")
        return list(self.answers[prompt * self.per_prompt : (prompt + 1) * self.per_prompt])

    @property
    def mutual_information(self) -> pd.DataFrame:
        """Mutual information of text and draw per prompt, nats: the estimate and its standard error.

        It is the epistemic uncertainty about the whole text, at most log S. The estimate is the mean over texts of the
        prefix-weighted sum of token terms, which has a tenth of the standard deviation of log p_k(y) - log p(y).

        Raises:
            ValueError: The texts are no independent draws, or there is one text per prompt.
        """
        if not self.is_pure:
            raise ValueError(
                "The mutual information is an average over texts that the draws wrote at random. Generate with "
                "do_sample=True and decode='draws' or 'mixture', without temperature, top_k, top_p or beams."
            )
        values = self._by_prompt(self.scored.epistemic)
        if values.shape[1] < 2:
            raise ValueError("One text per prompt gives no standard error: use more draws, or num_samples=2 or more.")
        error = values.std(1, ddof=1) / math.sqrt(values.shape[1])
        return pd.DataFrame({"mutual_information": values.mean(1), "standard_error": error})

    def agreement(self, normalize: Callable[[str], str] = str.strip) -> pd.DataFrame:
        """Return the most frequent answer of each prompt, and its share of the texts.

        Args:
            normalize: Function that makes equal answers equal texts.
        """
        rows = [Counter(map(normalize, self.texts(i))).most_common(1)[0] for i in range(len(self.prompts))]
        return pd.DataFrame({"answer": [text for text, _ in rows], "share": [n / self.per_prompt for _, n in rows]})

    def semantic_entropy(self, same_meaning: Callable[[str, str], bool]) -> Array:
        """Return the entropy of the meanings of the texts of each prompt, nats.

        Texts are put into groups of one meaning, and each text counts the same.

        Args:
            same_meaning: Whether two texts mean the same. A text joins the first group whose first text it equals.

        References:
            Farquhar et al., Detecting hallucinations in large language models using semantic entropy, Nature 2024,
            the discrete form.
        """
        return np.asarray([_entropy_of_groups(self.texts(i), same_meaning) for i in range(len(self.prompts))])

    def mbr(self, utility: Callable[[str, str], float]) -> list[str]:
        """Return the text with the largest mean utility for each prompt (minimum Bayes risk decoding).

        Args:
            utility: utility(text, other) of a text if the other one is right, such as an F score.

        References:
            Kumar and Byrne, Minimum Bayes-Risk Decoding for Statistical Machine Translation, NAACL 2004.
        """
        best = []
        for i in range(len(self.prompts)):
            texts = self.texts(i)
            means = [float(np.mean([utility(text, other) for other in texts])) for text in texts]
            best.append(texts[int(np.argmax(means))])
        return best

    def keep(self, share: float, *, by: str | Sequence[float] | Array = "epistemic_per_token") -> list[int]:
        """Return the numbers of the prompts whose answers are the most certain ones, in their order.

        Args:
            share: Share of the prompts to keep, more than 0 and at most 1.
            by: Column of :meth:`summary`, or one number per prompt; a small number means certain.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share={share!r}: give the share of prompts to keep, more than 0 and at most 1.")
        if isinstance(by, str):
            summary = self.summary()
            check_choice("by", by, [name for name in summary.columns if name not in ("prompt", "answer")])
            by = summary[by].to_numpy()
        values = np.asarray(by, dtype=np.float64)
        if values.shape != (len(self.prompts),):
            raise ValueError(f"by has the shape {values.shape}, and there are {len(self.prompts)} prompts.")
        count = max(round(share * len(values)), 1)
        return sorted(np.argsort(values, kind="stable")[:count].tolist())

    def summary(self) -> pd.DataFrame:
        """Return one row per prompt: the most frequent answer, and means over its texts of what can say it is wrong."""
        frame = self.scored.to_frame()
        agreement = self.agreement()
        columns: dict[str, Any] = {"prompt": self.prompts, "answer": agreement["answer"]}
        columns["disagreement"] = 1 - agreement["share"]
        columns["nll_per_token"] = -self._by_prompt(frame["log_prob_per_token"].to_numpy()).mean(1)
        for name in ("total_per_token", "epistemic_per_token", "epistemic"):
            columns[name] = self._by_prompt(frame[name].to_numpy()).mean(1)
        return pd.DataFrame(columns)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per text, with its prompt, the draw that wrote it, and its score."""
        frame = self.scored.to_frame().drop(columns="text")
        numbers = np.repeat(np.arange(len(self.prompts)), self.per_prompt)
        own = pd.DataFrame({"prompt": numbers, "draw": self.draw, "text": self.answers, "finished": self.finished})
        return pd.concat([own, frame], axis=1)

    def to_xarray(self) -> "xr.Dataset":
        """Return log probabilities by prompt, text and draw, and the uncertainties of each text."""
        shape = (len(self.prompts), self.per_prompt)
        log_probs = self.scored.log_probs.T.reshape(*shape, -1)
        names = ("total", "aleatoric", "epistemic", "num_tokens")
        by_text = {name: (("prompt", "sample"), getattr(self.scored, name).reshape(shape)) for name in names}
        return dataset(
            {"log_prob": (("prompt", "sample", "draw"), log_probs), **by_text},
            coords={"prompt": list(self.prompts), "text": (("prompt", "sample"), np.reshape(self.answers, shape))},
        )

    def to_arviz(self) -> Any:
        """Return the texts and their scores as ``InferenceData`` (ArviZ 0.x) or ``xarray.DataTree`` (ArviZ 1.x).

        - ``posterior_predictive`` has ``log_prob``, the log probability of each whole text under each draw, nats, with
          the dimensions ``chain``, ``draw``, ``prompt`` and ``sample``. The draws wrote the texts themselves, so these
          are not log likelihoods of data, and LOO does not apply.
        - ``constant_data`` has, with the dimensions ``prompt`` and ``sample``: ``text``, ``num_tokens``, ``finished``,
          ``total``, ``aleatoric`` and ``epistemic`` (nats), and ``written_by``, the number of the draw, or -1 if no
          single draw wrote the text.

        Example:
            >>> found = posterior.generate(["the sky is"], num_draws=8, do_sample=True)
            >>> az.summary(found.to_arviz(), group="posterior_predictive")
        """
        data = self.to_xarray().drop_vars(["prompt", "text"])
        places = ("prompt", "sample")
        shape = (len(self.prompts), self.per_prompt)
        own = {"text": np.reshape(self.answers, shape), "finished": np.reshape(self.finished, shape)}
        own["written_by"] = np.reshape([-1 if draw is None else draw for draw in self.draw], shape)
        coords: dict[str, Any] = {"prompt": np.arange(shape[0]), "sample": np.arange(shape[1])}
        coords["prompt_text"] = ("prompt", list(self.prompts))
        log_prob = data["log_prob"].expand_dims("chain").transpose("chain", "draw", *places)
        constant = data.drop_vars("log_prob").assign({name: (places, value) for name, value in own.items()})
        groups = {"posterior_predictive": with_draws(log_prob.to_dataset()), "constant_data": constant}
        attrs = {"inference_library": "scalabl_pyro", "inference_library_version": __version__, "decode": self.decode}
        return to_arviz({name: group.assign_coords(coords) for name, group in groups.items()}, attrs)

    def _repr_html_(self) -> str:
        table = self.summary().to_html(escape=True, float_format=lambda value: f"{value:.3g}")
        return f"<div>{table}{self.scored.to_html()}</div>"

    def _by_prompt(self, values: Array) -> Array:
        return np.asarray(values, dtype=np.float64).reshape(len(self.prompts), self.per_prompt)

    def _summary(self) -> dict[str, object]:
        return {
            "prompts": len(self.prompts),
            "texts": len(self.answers),
            "decode": self.decode,
            "num_draws": self.scored.num_draws,
        }


def groups_of(count: int, is_same: Callable[[int, int], bool]) -> list[list[int]]:
    """Put things into groups: each joins the first group whose first member is the same.

    Args:
        count: Number of things.
        is_same: Whether the first member of a group, and a thing, are the same; both by their number.

    Example:
        >>> groups_of(4, lambda first, i: first % 2 == i % 2)
        [[0, 2], [1, 3]]
    """
    groups: list[list[int]] = []
    for i in range(count):
        group = next((group for group in groups if is_same(group[0], i)), None)
        if group is None:
            groups.append([i])
        else:
            group.append(i)
    return groups


def _entropy_of_groups(texts: Sequence[str], same_meaning: Callable[[str, str], bool]) -> float:
    groups = groups_of(len(texts), lambda first, i: same_meaning(texts[first], texts[i]))
    shares = np.asarray([len(group) for group in groups]) / len(texts)
    return float(-(shares * np.log(shares)).sum())
