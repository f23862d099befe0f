"""Valid posteriors, baselines and checkpoints to make bombs of, each with the check of a case."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import test_fuzz as fuzz
import tiny
import torch

import scalabl_pyro as sp
from scalabl_pyro.cli import main
from scalabl_pyro.guides import as_guide

#: Words in the message of an error that show that memory ran out before a check refused the file.
EXHAUSTED = ("allocate memory", "MemoryError", "enough memory", "bad_alloc", "annot allocate")


def places(root: Path) -> dict[str, tuple[Any, Callable[[dict[str, Any]], str]]]:
    """Return each place with its check, which returns what happened, or raises an error if the promise is broken."""
    torch.set_num_threads(1)
    sources = _posteriors(root / "valid")
    full = _Posterior(_folder(root, "posterior"), tiny.causal_lm(), None, sources, [])
    base, task = tiny.causal_lm(), sp.MultipleChoice(tiny.tokenizer())
    sp.bayesian_lora(base, **fuzz.LORA)
    carrier = _Posterior(_folder(root, "carrier"), base, task, sources, [])
    doctor = _Posterior(_folder(root, "doctor"), tiny.causal_lm(), None, sources, [])
    baselines = _Baseline(_folder(root, "baseline"), *_baselines(root / "baselines"))
    (root / "runs").mkdir(exist_ok=True)
    runs = fuzz.RunPlace(root / "runs" / fresh(root / "runs"))
    return {
        "posterior": (full, lambda case: _checked(full)),
        "carrier": (carrier, lambda case: _checked(carrier)),
        "doctor": (doctor, lambda case: _diagnosed(doctor)),
        "baseline": (baselines, lambda case: _checked(baselines)),
        "run": (runs, lambda case: runs.check_run(case["kind"])),
    }


class _Posterior(fuzz.Place):
    message = ""

    def load(self, llm: Any, folder: Path, **override: Any) -> Any:  # type: ignore[override]
        try:
            return self.loader(llm, folder, **override)
        except (ValueError, FileNotFoundError) as error:
            self.message = f"{type(error).__name__}: {error}"
            assert not any(word in self.message for word in EXHAUSTED), self.message[:500]
            assert len(self.message) < 2000, "the message is too long"
            raise

    loader = staticmethod(sp.Posterior.from_pretrained)

    def check_works(self, posterior: sp.Posterior) -> None:
        """Its draws are those of any posterior. Saved and loaded again, it is the same."""
        self.check_draws(posterior)


class _Baseline(_Posterior):
    loader = staticmethod(sp.baselines.load)

    def check_draws(self, posterior: Any) -> None:
        """A baseline has draws of its own kind."""


def _checked(place: _Posterior) -> str:
    before = place.loaded
    place.message = ""
    place.check()
    return "loaded" if place.loaded > before else place.message[:1000]


def _diagnosed(place: fuzz.Place) -> str:
    """The doctor ends in findings: each line is one of its own."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main.main(["doctor", str(place.folder)])
    said = out.getvalue()
    own = ("ok       ", "PROBLEM  ", "         -> ", "No problems found.")
    for line in said.splitlines():
        assert not line or line.startswith(own) or line.endswith(("problem found.", "problems found.")), line[:300]
    assert "the check ended with" not in said and not any(word in said for word in EXHAUSTED), said[:1000]
    assert code in (0, 1)
    return said


def _folder(root: Path, name: str) -> Path:
    folder = root / name / fresh(root / name)
    folder.mkdir(parents=True)
    return folder / "p"


def fresh(folder: Path) -> str:
    return str(len(list(folder.iterdir())) if folder.exists() else 0)


def _posteriors(root: Path) -> dict[str, Path]:
    llm, task = tiny.causal_lm(), sp.MultipleChoice(tiny.tokenizer(chat=True))
    found = {}
    for kind, (guide, prior) in fuzz.KINDS.items():
        if not (root / kind).exists():
            blora = sp.bayesian_lora(llm, prior=prior, **fuzz.LORA)
            posterior = sp.Posterior.capture(blora, task, as_guide(guide, blora), provenance={"seed": 0})
            posterior.save_pretrained(root / kind)
            blora.unload()
        found[kind] = root / kind
    return found


def _baselines(root: Path) -> tuple[Any, Any, dict[str, Path], list[Any]]:
    llm, task, rows = tiny.causal_lm(), sp.MultipleChoice(tiny.tokenizer()), tiny.question_rows(8)
    if not root.exists():
        options: dict[str, Any] = {"num_steps": 2, "progress": False, "lora": fuzz.LORA}
        point = sp.baselines.mle(llm, task, rows, **options).posterior
        sp.baselines.temperature_scaling(point, rows).save_pretrained(root / "temperature")
        sp.baselines.laplace_lora(point, rows).save_pretrained(root / "laplace")
        point.blora().unload()
        for method in (sp.baselines.blob, sp.baselines.deep_ensemble):
            posterior = method(llm, task, rows, **options).posterior
            posterior.save_pretrained(root / method.__name__)
            posterior.blora().unload()
    base = tiny.causal_lm()
    sp.bayesian_lora(base, gauge="free", **fuzz.LORA)
    return base, task, {path.name: path for path in root.iterdir()}, []
