"""A string is read as a file or as a hub data set only where it says so: a text never leaves the machine."""

import json

import pytest
import tiny

import scalabl_pyro as sp
from scalabl_pyro.data import read_rows

SECRET = "The patient in room 7 is Mr X, and the test was positive."
#: Strings that must not be looked up anywhere.
TEXTS = (
    SECRET,
    "",
    "word",
    "owner/name",
    "a/b/c",
    "x" * 5000,
    "null\0byte",
    "line\nline",
    "https://host/data",
    "../..x",
)


@pytest.fixture
def folder(tmp_path):
    """A folder with two data sets and a file of another kind."""
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": name}))
    (tmp_path / "table.xlsx").write_text("question\none\n")
    return tmp_path


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:12]))
def test_a_text_is_refused_without_a_look_at_the_hub(text):
    with pytest.raises(ValueError, match=r"Expected rows .*got a str") as error:
        read_rows(text)
    assert len(str(error.value)) < 400, "a long text goes into logs"


@pytest.mark.usefixtures("no_network")
def test_a_name_of_the_hub_without_the_prefix_is_shown_with_it():
    with pytest.raises(ValueError, match="write 'hf://allenai/openbookqa'"):
        read_rows("allenai/openbookqa")


@pytest.mark.usefixtures("no_network")
def test_no_function_that_takes_rows_sends_a_text_away(fitted):
    posterior, task = fitted.posterior, fitted.posterior.task
    calls = {
        "fit": lambda data: sp.fit(posterior.blora(), task, data, progress=False),
        "refit": lambda data: sp.refit(posterior, data, progress=False),
        "ensemble": lambda data: sp.ensemble(posterior, data, progress=False),
        "laplace": lambda data: sp.laplace(posterior, data),
        "mcmc": lambda data: sp.mcmc(posterior, data, progress=False),
        "compare": lambda data: sp.compare([posterior], data),
        "predict": posterior.predict,
        "predict_linearized": posterior.predict_linearized,
        "prior_predictive": posterior.prior_predictive,
        "loo": posterior.loo,
        "diagnose": posterior.diagnose,
        "log_likelihood": posterior.log_likelihood,
        "log_weights": posterior.log_weights,
        "mle": lambda data: sp.baselines.mle(tiny.causal_lm(), task, data, progress=False),
        "temperature_scaling": lambda data: sp.baselines.temperature_scaling(posterior, data),
        "laplace_lora": lambda data: sp.baselines.laplace_lora(posterior, data),
        "tfb": lambda data: sp.baselines.tfb(posterior, data),
    }
    for name, call in calls.items():
        for text in (SECRET, "owner/name"):
            with pytest.raises((ValueError, TypeError), match=r"Expected rows .*got a str|prediction") as error:
                call(text)
            assert "network" not in str(error.value), name


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_a_folder_is_not_concatenated(folder, kind):
    with pytest.raises(ValueError, match=r"is a folder.*path of one .jsonl file"):
        read_rows(kind(folder))
    named = folder / "rows.jsonl"
    named.mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        read_rows(kind(named))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_a_file_of_another_kind_is_named(folder, kind):
    with pytest.raises(ValueError, match=r"table\.xlsx' is a file, but its name does not end in \.jsonl"):
        read_rows(kind(folder / "table.xlsx"))


@pytest.mark.parametrize("name", ["hf://owner/name", "hf://datasets/owner/name"])
def test_the_prefix_asks_the_hub(monkeypatch, name):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return [{"sentence": "_ is blue.", "option1": "Grass", "option2": "The sky", "answer": "2"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (row,) = read_rows(name, split="validation", name="main")
    assert asked == [(("owner/name",), {"split": "validation", "name": "main"})]
    assert row == {"question": "_ is blue.", "choices": ["Grass", "The sky"], "answer": 1}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["hf://", "hf://a/b/c", f"hf://{SECRET}", "hf://owner/", "hf://owner/name/"])
def test_the_prefix_before_something_else_is_refused(name):
    with pytest.raises(ValueError, match="Expected a data set of the hub, 'hf://owner/name', got a str"):
        read_rows(name)


@pytest.mark.usefixtures("no_network")
def test_a_local_folder_does_not_stand_in_for_the_hub(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="folder 'owner/name' exists too"):
        read_rows("hf://owner/name")


@pytest.mark.parametrize("given", ["rows", "file"])
def test_options_of_the_hub_are_not_dropped_for_other_sources(folder, given):
    source = [{"question": "one"}] if given == "rows" else folder / "train.jsonl"
    with pytest.raises(TypeError, match=r"\['name'\] are options of a data set of the hub"):
        read_rows(source, name="main")


def test_a_list_of_texts_is_named(fitted):
    with pytest.raises(TypeError, match=r"Row 0 is a str.*expected a dict"):
        fitted.posterior.predict(["one", "two"])
