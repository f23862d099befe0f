"""The command ``scalabl-pyro``, also ``python -m scalabl_pyro``: its options, and which function runs."""

import argparse
import contextlib
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging as hf_logging

from .._errors import nearest
from .._version import __version__
from ..posterior.engines import LIMITS
from .doctor import doctor
from .evaluate import evaluate
from .export import export
from .fit import fit
from .predict import predict
from .serve import serve
from .terminal import plain_warnings, say

EXAMPLES = """\
examples:
  scalabl-pyro doctor                                     check the installation
  scalabl-pyro fit train.csv --model NAME --text note --label class --out post/
  scalabl-pyro fit train.csv --model NAME --out post/ --eval 0.2 --patience 3
  scalabl-pyro predict post/ new.csv --model NAME --out predictions.csv --review-above 0.3
  scalabl-pyro evaluate post/ test.csv --model NAME --out report.html
  scalabl-pyro serve post/ --model NAME --port 8000
  scalabl-pyro export post/ adapters/ --model NAME --draws 8 --engine vllm
"""
#: Options that several commands have.
SHARED: dict[str, dict[str, Any]] = {
    "path": {"type": Path, "help": "directory of the saved posterior"},
    "--model": {"required": True, "help": "hub name or directory of the base model"},
    "--num-draws": {"type": int, "default": 10, "help": "draws to average; 0 is the mean of s (default: 10)"},
    "--seed": {"type": int, "default": 0, "help": "seed of the draws (default: 0)"},
    "--batch-size": {"type": int, "default": 16, "help": "rows per forward pass (default: 16)"},
    "--device": {"default": "auto", "help": "device, such as cpu or cuda:0 (default: a GPU if there is one)"},
    "--review-above": {
        "type": float,
        "metavar": "LIMIT",
        "help": "mark the rows that a person should see: those whose doubt, 1 - probability, is larger (for numbers: "
        "the standard deviation)",
    },
    "--json": {"action": "store_true", "dest": "as_json", "help": "print the result as JSON"},
}
#: Those of a command that predicts.
OF_DRAWS = ("--num-draws", "--seed", "--batch-size", "--device")
#: What a user can mend. The message of such an error says how, so no traceback is shown.
EXPECTED = (ValueError, TypeError, OSError, ArithmeticError, ImportError)

#: Exit status after Ctrl-C, as shells have it.
STOPPED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Words after ``scalabl-pyro``; by default those of the process.

    Returns:
        Exit status: 0 if all is well, 1 after a problem, 130 after Ctrl-C. Wrong options end the process with status 2.

    Example:
        >>> main(["doctor", "my_posterior"])
        0
    """
    given = _parse(arguments)
    options = {name: value for name, value in vars(given).items() if name not in ("command", "run")}
    try:
        with _quiet_loading(), plain_warnings():
            return int(given.run(**options))
    except EXPECTED as error:
        say(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("stopped by Ctrl-C", file=sys.stderr)
        return STOPPED


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Silence what transformers prints while it loads a model; errors still raise."""
    logger = logging.getLogger("transformers")
    level, had_bars = logger.level, hf_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if had_bars:
            hf_logging.enable_progress_bar()


class _Parser(argparse.ArgumentParser):
    """Parser of a command. It takes whole options only, because a shortened one may be a typo."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the words; an unknown option is named with the nearest known ones of its command."""
    parser, commands = _parser()
    given, unknown = parser.parse_known_args(arguments)
    own = commands[given.command]
    if unknown:
        options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        advice = f" {nearest(options[0], re.findall('--[a-z-]+', own.format_help()))}" if options else ""
        own.error(f"unknown: {' '.join(unknown)}.{advice} See scalabl-pyro {given.command} --help.")
    if given.command == "doctor" and given.model is not None and given.path is None:
        own.error("--model compares a posterior with its base model, so the path of a posterior is needed too")
    return given


def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Build the parser, and those of the commands by name."""
    parser = argparse.ArgumentParser(
        prog="scalabl-pyro",
        description="Bayesian LoRA: fit a posterior to a table, predict with it, judge it, export it, or check it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_Parser)
    _add_doctor(commands)
    _add_fit(commands)
    _add_predict(commands)
    _add_evaluate(commands)
    _add_export(commands)
    _add_serve(commands)
    return parser, commands.choices


def _add_doctor(commands: Any) -> None:
    own = commands.add_parser("doctor", help="check the installation, or a saved posterior")
    own.add_argument(
        "path", nargs="?", type=Path, help="directory of a saved posterior; without it, the installation is checked"
    )
    own.add_argument("--model", help="hub name or directory of the base model that the posterior is compared with")
    own.set_defaults(run=doctor)


def _add_fit(commands: Any) -> None:
    own = commands.add_parser(
        "fit",
        help="learn a posterior from a table with answers",
        description="Learn a posterior from a table with answers, and save it. The task is guessed from the table: "
        "classes, several labels per row, numbers, or completions. The command says what it guessed.",
    )
    own.add_argument("data", help="table of rows with answers: .csv, .tsv, .parquet, .json or .jsonl")
    _add_shared(own, "--model", "--device", "--json")
    own.add_argument("--out", type=Path, required=True, help="new directory of the posterior")
    own.add_argument("--text", help="column of the text (default: guessed)")
    own.add_argument("--label", help="column of the answer (default: guessed)")
    own.add_argument("--max-length", type=int, help="longest text in tokens; longer texts are cut (default: no limit)")
    own.add_argument(
        "--windows",
        choices=("logits", "probs"),
        help="read a longer text in windows of --max-length tokens, and average their logits or their probabilities",
    )
    own.add_argument("--overlap", type=int, help="tokens that a window shares with the one before it (default: 0)")
    own.add_argument("--num-steps", type=int, default=1000, help="optimizer steps (default: 1000)")
    own.add_argument("--batch-size", type=int, default=16, help="rows per step (default: 16)")
    own.add_argument("--rank", type=int, default=8, help="rank of the LoRA layers (default: 8)")
    own.add_argument("--lr", type=float, help="learning rate of B, which to tune first (default: that of fit, 0.008)")
    own.add_argument(
        "--lr-A", dest="lr_A", type=float, help="learning rate of A and of a new head (default: that of fit, 0.00025)"
    )
    own.add_argument("--seed", type=int, default=0, help="seed of the training and of --eval SHARE (default: 0)")
    _add_evaluation(own)
    own.set_defaults(run=fit)


def _add_evaluation(own: argparse.ArgumentParser) -> None:
    """Add the options of ``fit`` about held-out rows and the history."""
    group = own.add_argument_group(
        "was the training long enough?",
        "Rows that no step trains on show how good the model is on new rows, while it trains. Their NLL (negative log "
        "likelihood; lower is better) falls as long as the training helps. With --patience, the training ends once it "
        "has stopped falling, and the posterior is that of the lowest value.",
    )
    group.add_argument(
        "--eval",
        dest="eval_data",
        metavar="FILE|SHARE",
        help="held-out rows: a table with the columns of the first one, or the share of its rows to hold out, such as "
        "0.2 (each class has this share; the choice depends on --seed alone)",
    )
    group.add_argument("--eval-every", type=int, metavar="STEPS", help="steps between two scores (default: a tenth)")
    group.add_argument(
        "--patience", type=int, metavar="SCORES", help="stop after so many scores in a row without a lower NLL"
    )
    group.add_argument(
        "--history", type=Path, metavar="FILE", help="file for the numbers of each step: .csv, .tsv, .parquet or .jsonl"
    )


def _add_predict(commands: Any) -> None:
    own = commands.add_parser(
        "predict",
        help="predict the rows of a table",
        description="Predict the rows of a table. Its columns come first in the output, then the prediction, its "
        "probability, and total, aleatoric and epistemic uncertainty. A column of the table with the name of "
        "one of these is called given_NAME in the output.",
    )
    _add_shared(own, "path")
    own.add_argument("data", help="table of rows: .csv, .tsv, .parquet, .json or .jsonl")
    _add_shared(own, "--model", *OF_DRAWS, "--json")
    own.add_argument(
        "--out", type=Path, help="file for the table: .csv, .tsv, .parquet or .jsonl; without it, the terminal shows it"
    )
    own.add_argument("--class-probs", action="store_true", help="add a column per class")
    _add_shared(own, "--review-above")
    own.set_defaults(run=predict)


def _add_evaluate(commands: Any) -> None:
    own = commands.add_parser(
        "evaluate",
        help="compare predictions with known answers, and write a report",
        description="Compare predictions with known answers. The report says in short how good they are. It has "
        "metrics with intervals, pictures of reliability and of selective prediction, figures per class, and the rows "
        "to look at.",
    )
    _add_shared(own, "path")
    own.add_argument("data", help="table of rows with answers")
    _add_shared(own, "--model", *OF_DRAWS, "--json")
    own.add_argument("--out", type=Path, help="file of the report, .html or .md")
    _add_shared(own, "--review-above")
    own.add_argument("--bootstrap", type=int, default=1000, help="resamples behind the intervals (default: 1000)")
    own.set_defaults(run=evaluate)


def _add_export(commands: Any) -> None:
    own = commands.add_parser(
        "export",
        help="write draws as plain LoRA adapters",
        description="Write draws of the posterior as plain PEFT adapters, which vLLM, SGLang, llama.cpp and PEFT read.",
    )
    _add_shared(own, "path")
    own.add_argument("out", type=Path, help="new directory for the adapters")
    own.add_argument("--draws", default="mean", help="'mean', or the number of draws (default: mean)")
    own.add_argument("--engine", choices=sorted(LIMITS), help="engine whose limits are checked")
    _add_shared(own, "--model", "--seed", "--device", "--json")
    own.set_defaults(run=export)


def _add_serve(commands: Any) -> None:
    own = commands.add_parser(
        "serve",
        help="answer requests over HTTP",
        description='Answer requests over HTTP: POST /predict with {"rows": [...]}, GET /health. There is neither '
        "encryption nor a password. Ctrl-C ends the service.",
    )
    _add_shared(own, "path", "--model", *OF_DRAWS)
    own.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    own.add_argument("--port", type=int, default=8000, help="port to listen at (default: 8000)")
    own.set_defaults(run=serve)


def _add_shared(own: argparse.ArgumentParser, *names: str) -> None:
    for name in names:
        own.add_argument(name, **SHARED[name])
