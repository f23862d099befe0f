"""Base class of tasks: a task turns a row into tokens, and the LLM's output into a distribution over the answer."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import pyro.distributions as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .._arguments import check_role
from .._display import Summarized
from .._process.lock import LOCK
from .._process.pyro_modes import Program
from .._values import integer
from ..data.batch import Batch, Example
from ..data.encoding import check_tokens
from ..data.labels import ClassName
from ..data.rows import Row
from ..data.training_batches import seen_targets
from ..lora.adapter import Adapter
from ..lora.forward import LatentLLM
from ..lora.outputs import at_least_float32
from ..storage.budget import Budget


class Task(Summarized, Program):
    """Likelihood p(y | outputs of the LLM), and the prompt that asks for y.

    A subclass defines :meth:`encode` and :meth:`likelihood`. Parameters and PyroParams of a task are learned together
    with the posterior and saved with it.

    Args:
        tokenizer: A Hugging Face tokenizer with a pad token. None for a module whose input is not text.
        max_length: Longest prompt in tokens. A longer prompt loses the end of its text, and a warning is logged.

    Raises:
        TypeError: ``tokenizer`` is not a Hugging Face tokenizer.
        ValueError: The tokenizer has no pad token, or ``max_length`` is not a positive whole number.

    Example:
        >>> import pyro.distributions as dist
        >>> from scalabl_pyro import Task
        >>> from scalabl_pyro.data import Example
        >>> class Counts(Task):  # for a classification model with one output
        ...     def encode(self, row):
        ...         return Example({"input_ids": self.tokenizer(row["text"]).input_ids}, row.get("count"))
        ...
        ...     def likelihood(self, outputs, batch):
        ...         return dist.Poisson(outputs[..., 0].exp())
        >>> task = Counts(tokenizer, max_length=8)  # any Hugging Face tokenizer
        >>> task
        Counts(max_length=8)
        >>> task.encode({"text": "the sky is blue", "count": 4}).target
        4
    """

    #: Names of the constructor arguments besides the tokenizer. They are saved with a posterior, passed to the
    #: constructor on loading, and shown by ``repr``.
    options: tuple[str, ...] = ("max_length",)
    #: Options that files of earlier versions lack, with the values that mean what these versions did.
    added_options: ClassVar[Mapping[str, Any]] = {}
    #: Names of the fields of a row, for error messages: first the text, last the answer. May be empty.
    row_fields: Sequence[str] = ()
    #: Whether the task works without a tokenizer.
    without_tokenizer = True
    #: Whether the likelihood knows the probability of given answers only, as that of texts does.
    scores_only = False
    #: Names of the classes. None for a likelihood over numbers.
    classes: Sequence[ClassName] | None = None
    #: Rule that combines the windows of a long text. None: the LLM reads whole rows.
    windows: Literal["logits", "probs"] | None = None
    #: What :func:`scalabl_pyro.tasks.from_data` guessed from a table, in words.
    guessed: str | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None, *, max_length: int | None = None) -> None:
        super().__init__()
        if tokenizer is not None or not self.without_tokenizer:
            call = f"{type(self).__name__}(tokenizer, ...)"
            check_role("tokenizer", tokenizer, "tokenizer", call=call, kind=PreTrainedTokenizerBase)
        if tokenizer is not None and tokenizer.pad_token_id is None:
            raise ValueError(
                "The tokenizer has no pad token, so prompts of different length cannot share a batch: set "
                "tokenizer.pad_token = tokenizer.eos_token."
            )
        length = integer(max_length)
        if max_length is not None and (length is None or length < 1):
            raise ValueError(f"max_length={max_length!r} must be a positive whole number of tokens, or None.")
        self.tokenizer: Any = tokenizer
        self.max_length = length

    @classmethod
    def from_saved(
        cls, tokenizer: PreTrainedTokenizerBase | None, options: Mapping[str, Any], *, budget: Budget
    ) -> "Task":
        """Build a task from the options in an untrusted file. It does not run the tokenizer.

        Args:
            tokenizer: Its tokenizer.
            options: All its options.
            budget: Budget that the characters to tokenize later are drawn from.
        """
        return cls(tokenizer, **options)

    @property
    def window_length(self) -> int | None:
        """Largest number of tokens that the LLM reads at a time. None: it reads whole rows."""
        return None if self.windows is None else self.max_length

    @property
    def pad_token_id(self) -> int:
        """Token that fills shorter rows at their right end."""
        return 0 if self.tokenizer is None else self.tokenizer.pad_token_id

    def encode(self, row: Row) -> Example:
        """Tokenize one row.

        Args:
            row: Fields of the row, by name.

        Returns:
            Tokens and answer; the answer is None if the row has none.

        Raises:
            ValueError: A field is missing or has a wrong value.
        """
        raise NotImplementedError(f"{type(self).__name__} must define encode(row) -> Example.")

    def check_llm(self, adapter: Adapter, examples: Sequence[Example]) -> None:
        """Check that an LLM can read examples of this task. Training and prediction call it before their first pass.

        Args:
            adapter: Adapter inside the LLM.
            examples: Tokenized rows, at least one.

        Raises:
            ValueError: A token has no embedding, or an example is longer than the LLM's table of positions.
        """
        check_tokens(examples, adapter.module, self.pad_token_id, window_length=self.window_length)

    def check_use(self, call: str) -> None:
        """Refuse a call that needs what the likelihood does not have. By default, nothing is refused.

        Args:
            call: Call that needs the probability of every answer, or moments, such as ``"predict()"``.

        Raises:
            TypeError: The likelihood knows the probability of given answers only.
        """

    def num_tokens(self, batch: Batch) -> int | None:
        """Return how many tokens the likelihood of a batch counts. None if an answer is not a sequence of tokens."""
        return None

    def prepare(self, targets: Sequence[float | int], *, are_all: bool) -> None:
        """Learn from training targets what the task must know before training starts. By default, that is nothing.

        :func:`scalabl_pyro.fit` calls it once, before it builds the optimizer.

        Args:
            targets: Training targets.
            are_all: Whether these are all of them. False if ``train_data`` yields batches: then they are the first.
        """

    def prepare_for(self, batches: Callable[[int], Batch]) -> None:
        """Call :meth:`prepare` with the targets that ``training_source`` knows before the first step."""
        targets, are_all = seen_targets(batches)
        if targets:
            self.prepare(targets, are_all=are_all)

    def restart(self) -> None:
        """Forget what :meth:`prepare` learned, for ``fit(reset=True)``. By default, that is nothing."""

    def outputs(self, llm: LatentLLM, batch: Batch, s: Tensor) -> Tensor:
        """Run the LLM, and return what the likelihood needs of its output. By default, these are the logits.

        Args:
            llm: The LLM, which takes the latents as its argument ``s``.
            batch: B rows.
            s: Latents, shape (..., 1, D), or (..., B, D) where each row has a draw of its own.

        Returns:
            K numbers per row, shape (..., B, K), float32 or float64.
        """
        inputs: dict[str, Any] = dict(batch.inputs)
        return at_least_float32(llm(**inputs, s=s).logits)

    def likelihood(self, outputs: Tensor, batch: Batch) -> dist.TorchDistribution:
        """Build the distribution of y.

        Args:
            outputs: What :meth:`outputs` returned, shape (..., B, K).
            batch: The B rows.

        Returns:
            Distribution with batch shape (..., B).
        """
        raise NotImplementedError(f"{type(self).__name__} must define likelihood(outputs, batch) -> distribution.")

    def distribution(self, outputs: Tensor, batch: Batch) -> dist.TorchDistribution:
        """Build the :meth:`likelihood` while no other thread runs a Pyro program.

        A task is a Pyro program, and Pyro's settings belong to the process. Only the construction takes the lock: use
        the distribution (``log_prob``, ``sample``) without it.

        Args:
            outputs: What :meth:`outputs` returned, shape (..., B, K).
            batch: The B rows.

        Returns:
            Distribution with batch shape (..., B).
        """
        with LOCK:
            return self.likelihood(outputs, batch)

    def forward(self, outputs: Tensor, batch: Batch) -> dist.TorchDistribution:
        """Run :meth:`likelihood` as a Pyro program, in which the task's PyroParams are param sites."""
        return self.likelihood(outputs, batch)

    def _summary(self) -> dict[str, object]:
        """Options that have a value, each one short. Fields with usual names and a useless overlap are left out."""
        values = {name: getattr(self, name, None) for name in self.options}
        if self.windows is None:
            values.pop("overlap", None)
        usual = {name: value for name, value in self.added_options.items() if isinstance(value, str)}
        values = {name: value for name, value in values.items() if name not in usual or usual[name] != value}
        shown: dict[str, object] = {name: _short(value) for name, value in values.items() if value is not None}
        return shown if self.guessed is None else {**shown, "guessed": f"({self.guessed})"}


def copy_task(task: Task) -> Task:
    """Copy a task and its parameters; the copy shares the tokenizer."""
    return copy.deepcopy(task, {id(task.tokenizer): task.tokenizer})


def _short(value: Any, limit: int = 40) -> str:
    """Return the repr of an option, shortened to the first and last item of a long sequence."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return f"{value.item():.4g}"
    text = repr(value)
    if isinstance(value, list | tuple) and len(text) > limit:
        text = f"({value[0]!r}, ..., {value[-1]!r})"
    return text if len(text) <= limit else f"{text[: limit - 4]}...{text[-1]}"
