"""Errors for arguments of the wrong kind, such as a tokenizer for a task, and for arguments of an unknown name."""

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ._errors import describe, nearest

Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class", bound=type)

#: Longest name of a file that common file systems allow, in bytes.
MAX_NAME = 255

#: Kinds of objects that users mix up, by package and name of their class. Names are compared, so that nothing is
#: imported.
KINDS = {
    ("scalabl_pyro", "BayesianLoRA"): "blora",
    ("scalabl_pyro", "Task"): "task",
    ("scalabl_pyro", "PosteriorState"): "posterior",
    ("scalabl_pyro", "FitResult"): "result",
    ("scalabl_pyro", "BaselineResult"): "result",
    ("scalabl_pyro", "Prediction"): "prediction",
    ("scalabl_pyro", "NumericPrediction"): "prediction",
    ("scalabl_pyro", "AveragedPrediction"): "averages",
    ("scalabl_pyro", "AveragedNumericPrediction"): "averages",
    ("scalabl_pyro", "ScoredTexts"): "scores",
    ("scalabl_pyro", "Batch"): "batch",
    ("transformers", "PreTrainedTokenizerBase"): "tokenizer",
    ("torch", "Module"): "llm",
}

#: What each kind is, in the words of a message.
ROLES = {
    "blora": "what bayesian_lora(llm) returns",
    "task": "a task such as MultipleChoice(tokenizer)",
    "posterior": "a Posterior, such as fit(...).posterior",
    "llm": "a model, such as AutoModelForCausalLM.from_pretrained(...)",
    "tokenizer": "a tokenizer, AutoTokenizer.from_pretrained(...)",
    "prediction": "a prediction, such as posterior.predict(rows)",
    "scores": "scored texts, such as posterior.score(rows)",
}

#: What to do, by what is wanted and what was given.
WAYS = {
    ("blora", "llm"): "Wrap the model first: blora = bayesian_lora(llm).",
    ("blora", "name"): "Load the model and wrap it: bayesian_lora(AutoModelForCausalLM.from_pretrained(...)).",
    (
        "blora",
        "posterior",
    ): "To train further, pass posterior.blora(). To infer s again, use refit(posterior, data).",
    ("blora", "result"): "To train further, pass result.posterior.blora().",
    ("task", "tokenizer"): "Make a task with it: MultipleChoice(tokenizer).",
    ("task", "class"): "Make an instance: task = MultipleChoice(tokenizer).",
    ("task", "posterior"): "The task of a posterior is posterior.task.",
    ("posterior", "result"): "Pass result.posterior.",
    ("posterior", "blora"): "Train it first: fit(blora, task, train_data).posterior.",
    ("posterior", "llm"): "Train it first: fit(bayesian_lora(llm), task, train_data).posterior.",
    ("posterior", "name"): "Load it first: Posterior.from_pretrained(llm, path).",
    ("llm", "name"): "Load the model first: AutoModelForCausalLM.from_pretrained(...).",
    ("llm", "class"): "Make or load the model first: AutoModelForCausalLM.from_pretrained(...).",
    ("llm", "posterior"): "The base model is posterior.blora().unload().",
    ("llm", "result"): "The base model is result.posterior.blora().unload().",
    ("llm", "blora"): "The model inside it is blora.llm.",
    ("prediction", "posterior"): "Predict first: posterior.predict(rows).",
    ("prediction", "result"): "Predict first: result.posterior.predict(rows).",
    ("prediction", "scores"): "These are scored texts: plots.tokens(scored) shows them.",
    ("scores", "posterior"): "Score texts first: posterior.score(rows).",
    ("scores", "result"): "Score texts first: result.posterior.score(rows).",
    ("prediction", "averages"): "It holds averages only, and this needs single draws: predict with keep_draws=True.",
}


def kind_of(value: object) -> str:
    """Tell which of the objects that users mix up this is: a value of :data:`KINDS`, or what it is besides.

    Args:
        value: Any object.

    Example:
        >>> kind_of("gpt2"), kind_of({"question": "one"}), kind_of(3)
        ('name', 'row', 'other')
    """
    if isinstance(value, str | bytes | os.PathLike):
        return "name"
    if isinstance(value, type):
        return "class"
    names = {(ancestor.__module__.partition(".")[0], ancestor.__name__) for ancestor in type(value).__mro__}
    found = next((kind for name, kind in KINDS.items() if name in names), None)
    return found or ("row" if isinstance(value, Mapping) else "other")


def check_role(name: str, value: object, role: str, *, call: str = "", kind: type | tuple[type, ...] = ()) -> None:
    """Check that an argument is the kind of object that a function wants.

    Args:
        name: Name of the argument.
        value: Its value.
        role: Kind that is wanted, a key of :data:`ROLES`.
        call: How the function is called, such as ``fit(blora, task, train_data)``.
        kind: Classes that are accepted. Empty: whatever :func:`kind_of` takes for the role.

    Raises:
        TypeError: It is another kind of object. The message says what was given and what to do.

    Example:
        >>> check_role("blora", "gpt2", "blora")
        Traceback (most recent call last):
        TypeError: blora is a str ('gpt2'), expected what bayesian_lora(llm) returns. Load the model and wrap it: ...
    """
    given = kind_of(value)
    if isinstance(value, kind) if kind else given == role:
        return
    ways = [WAYS.get((role, given), ""), f"The call is {call}." if call else ""]
    raise TypeError(" ".join([f"{name} is {describe(value)}, expected {ROLES[role]}.", *filter(None, ways)]))


def check_path(name: str, value: object) -> None:
    """Check that an argument is the path of a folder.

    Raises:
        TypeError: It is neither a str nor a path.
        ValueError: It is empty, or a name in it is longer than the common file systems of this system allow.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} is {describe(value)}, expected the path of a folder: a str or a pathlib.Path.")
    if value == "":
        raise ValueError(f"{name}='': expected the path of a folder. Use '.' for the current one.")
    for part in Path(os.fspath(value)).parts:
        size = len(os.fsencode(part)) if os.name == "posix" else len(part)
        if size > MAX_NAME:
            raise ValueError(
                f"{name} has a name of {size} bytes, {part[:20] + '...'!r}. At most {MAX_NAME} are allowed: give a "
                "shorter one."
            )


#: Names that other libraries use for an argument. The first one that a function has is suggested.
SYNONYMS = {
    **dict.fromkeys(("learning_rate", "learningrate", "eta", "step_size"), ("lr",)),
    **dict.fromkeys(
        ("epochs", "num_epochs", "num_train_epochs", "max_steps", "n_steps", "steps", "iterations"), ("num_steps",)
    ),
    **dict.fromkeys(("train_batch_size", "per_device_train_batch_size", "bs"), ("batch_size",)),
    **dict.fromkeys(("rank", "lora_r", "lora_rank"), ("r",)),
    **dict.fromkeys(("alpha", "scaling"), ("lora_alpha",)),
    **dict.fromkeys(("dropout", "p"), ("lora_dropout",)),
    **dict.fromkeys(("n_draws", "n_samples", "samples", "draws", "num_samples"), ("num_draws", "num_samples")),
    **dict.fromkeys(("random_state", "random_seed", "rng"), ("seed",)),
    **dict.fromkeys(("verbose", "show_progress", "disable_tqdm"), ("progress",)),
    **dict.fromkeys(("beta", "kl_beta", "kl"), ("kl_weight",)),
    **dict.fromkeys(("dataset", "train_dataset", "rows", "train_rows", "data"), ("train_data", "data")),
    **dict.fromkeys(("model", "base_model", "network"), ("blora", "module", "llm")),
    **dict.fromkeys(("output_dir", "ckpt_dir"), ("checkpoint_dir",)),
    **dict.fromkeys(("eval_steps", "val_check_interval", "eval_freq", "validation_freq"), ("eval_every",)),
    **dict.fromkeys(("early_stopping", "early_stopping_patience", "early_stopping_rounds"), ("patience",)),
}


#: Names that trainers use for rows that are not trained on.
EVALUATION = ("eval_data", "eval_dataset", "val_data", "valid_data", "validation_data", "dev_data", "test_data")


def suggest(name: str, allowed: Iterable[str]) -> str:
    """Suggest the argument that was meant: what other libraries call so, or names near it.

    Args:
        name: The wrong name.
        allowed: The valid names.

    Example:
        >>> suggest("learning_rate", ["lr", "seed"])
        "Did you mean 'lr'?"
    """
    allowed = list(allowed)
    if not allowed:
        return "It takes none."
    if name in EVALUATION and "eval_data" in allowed:
        return "Did you mean 'eval_data'?"
    if name in EVALUATION and "train_data" in allowed:
        return "It takes training rows only. Predict other rows afterwards: result.posterior.predict(rows)."
    for synonym in SYNONYMS.get(name, ()):
        if synonym in allowed:
            return f"Did you mean {synonym!r}?"
    return nearest(name, allowed)


def known_arguments(function: Function, *, name: str | None = None) -> Function:
    """Make a function refuse unknown keyword arguments with the nearest valid name.

    Args:
        function: Function, method or constructor. One that takes ``**options`` stays as it is.
        name: Name in the message. Default: that of the function.

    Example:
        >>> @known_arguments
        ... def train(*, lr=1.0): ...
        >>> train(learning_rate=2.0)
        Traceback (most recent call last):
        TypeError: train() has no argument 'learning_rate'. Did you mean 'lr'?
    """
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
        return function
    allowed = _keywords(function)
    is_constructor = function.__name__ == "__init__"

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        unknown = next((given for given in kwargs if given not in allowed), None)
        if unknown is None:
            return function(*args, **kwargs)
        known, shown = allowed, name or function.__qualname__
        if is_constructor:  # the caller has called the class, which may pass arguments on to its ancestors
            known = {key for ancestor in _own(type(args[0])) for key in _keywords(vars(ancestor).get("__init__"))}
            shown = type(args[0]).__name__
        raise TypeError(f"{shown}() has no argument {unknown!r}. {suggest(unknown, known)}")

    return call  # type: ignore[return-value]


def _own(cls: type) -> list[type]:
    """A class and its ancestors, without those of Pyro and torch, whose arguments are not passed on."""
    return [ancestor for ancestor in cls.__mro__ if ancestor.__module__.partition(".")[0] not in ("pyro", "torch")]


def _keywords(function: object) -> set[str]:
    """Names of the arguments that can be given by name, without those of Python's own constructors."""
    if not inspect.isfunction(function):
        return set()
    named = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    return {p.name for p in named} - {"self", "cls"}


def known_arguments_of_methods(cls: Class) -> Class:
    """Make the constructor and the public methods of a class refuse unknown keyword arguments.

    Args:
        cls: The class. Methods that it inherits stay as they are.
    """
    for name, member in list(vars(cls).items()):
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(member, classmethod):
            setattr(cls, name, classmethod(known_arguments(member.__func__)))
        elif inspect.isfunction(member):
            setattr(cls, name, known_arguments(member))
    return cls
