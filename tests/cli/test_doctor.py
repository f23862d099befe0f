"""``python -m scalabl_pyro doctor`` finds what is broken, says what to do, and exits with 1; else with 0."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tiny
import torch
from golden_posterior import GOLDEN, base_model
from safetensors.torch import load_file, save_file

import scalabl_pyro as sp
from scalabl_pyro.cli import check_installation
from scalabl_pyro.cli import main as cli
from scalabl_pyro.training.checkpoint_files import CheckpointFolder

CONFIG, ADAPTER, POSTERIOR = "scalabl_config.json", "adapter_model.safetensors", "posterior.safetensors"


@pytest.fixture
def path(tmp_path):
    return Path(shutil.copytree(GOLDEN / "posterior-1.0", tmp_path / "posterior"))


def in_a_process(*arguments: object) -> tuple[int, str]:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "scalabl_pyro", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.fixture
def run(capsys):
    """The command in this process."""

    def here(*arguments: object) -> tuple[int, str]:
        code = cli.main(list(map(str, arguments)))
        return code, capsys.readouterr().out

    return here


def edit_config(path: Path, **fields: object) -> None:
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, **fields}))


def nan(path: Path) -> None:
    tensors = load_file(path / POSTERIOR)
    save_file({**tensors, "guide.loc": tensors["guide.loc"] * float("nan")}, path / POSTERIOR)


def flip(path: Path) -> None:
    content = bytearray((path / ADAPTER).read_bytes())
    content[-5] ^= 1
    (path / ADAPTER).write_bytes(content)


def link(path: Path) -> None:
    shutil.move(path / ADAPTER, path.parent / "elsewhere")
    (path / ADAPTER).symlink_to(path.parent / "elsewhere")


#: What breaks a directory, and what is then said.
BROKEN = {
    "no such directory": (shutil.rmtree, ["holds no scalabl_config.json", "-> check the path"]),
    "no configuration": (
        lambda p: (p / CONFIG).unlink(),
        ["holds no scalabl_config.json", "-> copy the whole"],
    ),
    "configuration cut": (
        lambda p: (p / CONFIG).write_text("{"),
        ["is damaged: not JSON", "-> copy the directory again"],
    ),
    "newer format": (lambda p: edit_config(p, format_version=2), ["has format_version 2", "update scalabl_pyro"]),
    "wrong entry": (lambda p: edit_config(p, gauge=1), ["'gauge' must be of type str"]),
    "missing file": (lambda p: (p / POSTERIOR).unlink(), [f"{POSTERIOR} is missing", "-> copy the file again"]),
    "cut file": (
        lambda p: (p / POSTERIOR).write_bytes(b"x" * 99),
        ["99 bytes, not 408", "not a whole safetensors file"],
    ),
    "flipped bit": (flip, [f"{ADAPTER} has changed since it was saved: its SHA-256"]),
    "NaN": (nan, ["'guide.loc' holds values that are not finite"]),
    "link": (link, [f"{ADAPTER} leads out of its directory"]),
    "tokenizer": (
        lambda p: (p / "tokenizer" / "tokenizer.json").write_text("{"),
        ["is damaged", "from_pretrained(..., task"],
    ),
    "task": (lambda p: edit_config(p, task={"class": "MultipleChoice", "options": {"labls": 1}}), ["'labls'"]),
}


@pytest.mark.parametrize(("damage", "words"), BROKEN.values(), ids=BROKEN)
def test_broken_posterior_is_diagnosed(path, run, damage, words):
    damage(path)
    code, said = run("doctor", path)
    assert code == 1
    for word in words:
        assert word in said
    lines = said.splitlines()
    assert "PROBLEM" in said and "problem" in lines[-1]
    advised = [after.startswith("         -> ") for line, after in itertools.pairwise(lines) if line.startswith("PROB")]
    assert all(advised), said  # each of them with what to do about it


def test_broken_posterior_ends_a_process_with_1(path):
    flip(path)
    code, said = in_a_process("doctor", path)
    assert code == 1 and said.endswith("1 problem found.\n") and "SHA-256" in said


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "words"), BROKEN.values(), ids=BROKEN)
def test_broken_posterior_is_diagnosed_in_a_process(path, damage, words):
    damage(path)
    code, said = in_a_process("doctor", path)
    assert code == 1 and all(word in said for word in words)


@pytest.mark.slow
def test_good_posterior_and_installation_end_a_process_with_0(path, tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    for arguments in ((), (path,), (path, "--model", tmp_path / "base")):
        code, said = in_a_process("doctor", *arguments)
        assert code == 0 and said.endswith("No problems found.\n"), said


def test_good_posterior_is_well(path, run):
    code, said = run("doctor", path)
    assert code == 0 and said.endswith("No problems found.\n") and "PROBLEM" not in said
    assert "8 latents in 4 layers of a LlamaForCausalLM; guide NormalGuide, prior Normal, task MultipleChoice" in said


def test_posterior_is_compared_with_its_base_model(path, run, tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    tiny.causal_lm().save_pretrained(tmp_path / "other")
    code, said = run("doctor", path, "--model", tmp_path / "base")
    assert code == 0 and f"it belongs to {tmp_path / 'base'}; 10 draws" in said
    code, said = run("doctor", path, "--model", tmp_path / "other")
    assert code == 1 and "Another base model" in said and "-> load the model that the posterior was learned on" in said
    code, said = run("doctor", path, "--model", tmp_path / "nowhere")
    assert code == 1 and "cannot be read" in said
    flip(path)
    code, said = run("doctor", path, "--model", tmp_path / "base")
    assert code == 1 and "not compared with" in said and "-> solve those first" in said


def test_classifier_is_compared_with_its_base_model(run, tmp_path):
    llm = tiny.classifier(num_labels=3)
    llm.save_pretrained(tmp_path / "base")
    task = sp.SequenceClassification(tiny.tokenizer(), classes=["a", "b", "c"])
    result = sp.fit(sp.bayesian_lora(llm, r=2), task, tiny.text_rows(4), num_steps=1, progress=False)
    result.posterior.save_pretrained(tmp_path / "p")
    code, said = run("doctor", tmp_path / "p", "--model", tmp_path / "base")
    assert code == 0, said


def test_files_that_were_not_saved_with_it_are_mentioned(path, run):
    (path / "notes.txt").write_text("mine")
    code, said = run("doctor", path)
    assert code == 0 and "1 more file that was not saved with the posterior, such as 'notes.txt'" in said
    (path / "more.txt").write_text("mine")
    assert "2 more files that were not saved with the posterior, such as 'more.txt'" in run("doctor", path)[1]


def test_checkpoints_are_told_from_posteriors(run, tmp_path):
    CheckpointFolder(tmp_path / "run", keep=1).write(3, {"a": torch.zeros(1)}, {})
    code, said = run("doctor", tmp_path / "run")
    assert code == 1 and "-> these are checkpoints of a training run: fit(..., checkpoint_dir=" in said


def test_names_in_a_file_cannot_control_the_terminal(path, run):
    edit_config(path, library_version="\x1b[2J\x07 9")
    code, said = run("doctor", path)
    assert code == 0 and "\x1b" not in said and "\x07" not in said and "\\x1b[2J" in said


def test_half_of_a_character_in_a_file_is_a_finding(path, run):
    edit_config(path, library_version="\ud800 9")
    code, said = run("doctor", path)
    assert code == 1 and "half of a character" in said and "\ud800" not in said


def test_installation_is_examined(run, unchanged_rng):
    code, said = run("doctor")
    assert code == 0 and said.endswith("No problems found.\n")
    for word in ("torch 2.", "device cpu", "arviz ", "was trained", "saved and loaded again"):
        assert word in said


def test_old_and_missing_packages_are_named_with_what_to_install(monkeypatch, run):
    found = metadata.version

    def version(name: str) -> str:
        if name == "scipy":
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "peft" else found(name)

    monkeypatch.setattr(check_installation.metadata, "version", version)
    code, said = run("doctor")
    assert code == 1 and said.endswith("2 problems found.\n")
    assert "scipy is not installed\n         -> pip install 'scipy>=1.13'" in said
    assert "peft 0.1 is installed, needed <0.22,>=0.19\n         -> pip install --upgrade 'peft<0.22,>=0.19'" in said


def test_bounds_are_those_of_pyproject_and_of_the_installed_package(monkeypatch):
    assert check_installation.PYPROJECT == Path(__file__).resolve().parents[2] / "pyproject.toml"
    project = {r.name: str(r.specifier) for r in check_installation.requirements()}
    assert project["torch"] == "<3,>=2.6" and "pytest" not in project
    monkeypatch.setattr(check_installation, "PYPROJECT", Path("/nowhere"))
    assert {"torch", "peft"} <= {r.name for r in check_installation.requirements()}


def test_failure_of_the_trial_is_a_finding(monkeypatch, run):
    monkeypatch.setattr(check_installation, "fit", lambda *args, **options: 1 / 0)
    code, said = run("doctor")
    assert code == 1 and "a small random model on cpu: ZeroDivisionError" in said


@pytest.mark.parametrize("arguments", [["operate"], [], ["doctor", "--model", "x"]], ids=str)
def test_arguments_that_make_no_sense_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.gpu
def test_installation_is_examined_on_the_gpu(run):
    code, said = run("doctor")
    assert code == 0 and f"a small random model on {torch.device('cuda', 0)} was trained" in said
