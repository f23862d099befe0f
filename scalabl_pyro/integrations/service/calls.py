"""The calls of the service: each checks a request, and answers several of them at once."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from ..._errors import check_flag
from ..._process.lock import LOCK
from ...baselines.predictor import Predictor
from ...data.encoding import encode_data
from ...posterior.posterior import Posterior
from ...prediction.generate import check_prompts
from ...prediction.result import NumericPrediction, Prediction
from ...storage.json_values import records
from ...tasks import Completion
from .answers import predicted, rows_of, scored, spans
from .batching import Answers, Job
from .generation_options import check_generation
from .limits import Limits, Refused
from .reading import check_items, parse

#: Probability inside the interval of a number.
LEVEL = 0.9


class Call(ABC):
    """One address of the service.

    Args:
        posterior: Fitted posterior.
        num_draws: Number S of draws.
        seed: Seed of the draws.
        batch_size: Number of rows per forward pass.
        limits: Limits of the service.
    """

    #: Field with the rows, and the other fields of a request.
    fields: ClassVar[tuple[str, ...]]
    #: Field with the answers.
    answer: ClassVar[str]

    def __init__(self, posterior: Any, *, num_draws: int, seed: int, batch_size: int, limits: Limits) -> None:
        self.posterior = posterior
        self.limits = limits
        self.options = {"num_draws": num_draws, "seed": seed, "batch_size": batch_size}

    def read(self, body: bytes) -> Job:
        """Check a request.

        Args:
            body: Bytes of the request.

        Returns:
            A job, which no longer fails for a reason that lies in its rows.

        Raises:
            Refused: The request is not valid (422) or exceeds a limit (413).
        """
        asked = parse(body, self.fields)
        items = check_items(asked.pop(self.fields[0]), self.fields[0], self.limits)
        try:
            return self.check(items, asked)
        except (ValueError, TypeError) as error:
            raise Refused(422, str(error)) from error

    @abstractmethod
    def check(self, items: list[Any], options: dict[str, Any]) -> Job:
        """Check rows and options.

        Args:
            items: Rows or prompts.
            options: Other fields of the request.

        Raises:
            ValueError, TypeError: They are not valid.
        """

    @abstractmethod
    def run(self, jobs: Sequence[Job]) -> Answers:
        """Answer jobs with equal keys in one batch."""

    def _examples(self, rows: list[Any], *, need_target: bool) -> list[Any]:
        """Tokenize rows, and check that the LLM can read them."""
        task = self.posterior.task
        examples = encode_data(rows, task.encode, need_target=need_target, split="test")
        task.check_llm(self.posterior.adapter, examples)
        return examples


class PredictCall(Call):
    """``POST /predict``: classes or numbers of rows."""

    fields = ("rows",)
    answer = "predictions"

    def check(self, items: list[Any], options: dict[str, Any]) -> Job:
        """Tokenize the rows."""
        return Job(run=self.run, items=items, key="predict", examples=self._examples(items, need_target=False))

    def run(self, jobs: Sequence[Job]) -> Answers:
        """Predict the rows of all jobs together."""
        whole = self.posterior.predict([row for job in jobs for row in job.items], **self.options)
        if len(jobs) > 1 and isinstance(whole, NumericPrediction) and not whole.is_normal:
            # Intervals come from simulated answers, whose random numbers depend on the other rows.
            return [answer for job in jobs for answer in self.run([job])]
        parts = zip(jobs, spans([len(job.items) for job in jobs]), strict=True)
        return [{self.answer: self._lines(rows_of(whole, rows), job)} for job, rows in parts]

    def _lines(self, part: Prediction | NumericPrediction, job: Job) -> list[dict[str, Any]]:
        return predicted(part, self.posterior.task, job.examples, LEVEL)


class ScoreCall(Call):
    """``POST /score``: log probabilities and uncertainties of given completions."""

    fields = ("rows", "tokens")
    answer = "scores"

    def check(self, items: list[Any], options: dict[str, Any]) -> Job:
        """Tokenize the rows, which must have completions."""
        check_flag(tokens=options.setdefault("tokens", False))
        self._examples(items, need_target=True)
        return Job(run=self.run, items=items, key="score", options=options)

    def run(self, jobs: Sequence[Job]) -> Answers:
        """Score the rows of all jobs together."""
        whole = self.posterior.score([row for job in jobs for row in job.items], **self.options)
        parts = zip(jobs, spans([len(job.items) for job in jobs]), strict=True)
        return [{self.answer: scored(whole, rows, tokens=job.options["tokens"])} for job, rows in parts]


class GenerateCall(Call):
    """``POST /generate``: texts that the draws write for prompts, each scored under all draws."""

    fields = (
        *("prompts", "max_new_tokens", "decode", "num_samples"),
        *("do_sample", "temperature", "top_k", "top_p"),
    )
    answer = "generations"

    def check(self, items: list[Any], options: dict[str, Any]) -> Job:
        """Tokenize the prompts. Texts that are sampled depend on the batch, so such a job runs alone."""
        options = check_generation(options, len(items), self.limits)
        task: Any = self.posterior.task
        rows = [item if isinstance(item, dict) else {task.prompt: item} for item in items]
        tokens = []
        for i, row in enumerate(rows):
            try:
                with LOCK:  # two threads cannot use a fast tokenizer at once
                    tokens.append(task.prompt_tokens(row))
            except ValueError as error:
                raise ValueError(f"Prompt {i}: {error}") from error
        check_prompts(task, self.posterior.adapter, tokens, max_new_tokens=int(options["max_new_tokens"]))
        key = None if options.get("do_sample") else ("generate", *sorted(options.items()))
        return Job(run=self.run, items=rows, key=key, options=options)

    def run(self, jobs: Sequence[Job]) -> Answers:
        """Write the texts of all jobs together."""
        prompts = [row for job in jobs for row in job.items]
        try:
            found = self.posterior.generate(prompts, **self.options, **jobs[0].options)
        except (ValueError, TypeError) as error:  # options that this model cannot use, such as a way to decode
            raise Refused(422, str(error)) from error
        frame, agreement, n = found.to_frame(), found.agreement(), found.per_prompt
        lines = [
            {**line, "texts": records(frame[i * n : (i + 1) * n].drop(columns="prompt"))}
            for i, line in enumerate(records(agreement))
        ]
        return [{self.answer: lines[rows]} for rows in spans([len(job.items) for job in jobs])]


def calls_of(posterior: Predictor, make: Callable[[type[Call]], Call]) -> dict[str, Call]:
    """Return the calls that a posterior can answer, by their address.

    Args:
        posterior: Fitted posterior.
        make: Function that builds a call of a class.
    """
    if not posterior.task.scores_only:
        return {"/predict": make(PredictCall)}
    if isinstance(posterior, Posterior) and isinstance(posterior.task, Completion):
        return {"/score": make(ScoreCall), "/generate": make(GenerateCall)}
    raise TypeError(
        "A service predicts classes or numbers, or scores and writes texts with a Posterior. "
        f"{type(posterior).__name__} with the task {type(posterior.task).__name__} can do neither."
    )
