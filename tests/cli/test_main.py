"""Words of the command line that are not known, and where a base model is looked for."""

import re

import pytest

from scalabl_pyro.cli.loading import reading
from scalabl_pyro.cli.main import main

FIT = ["fit", "train.csv", "--model", "m", "--out", "post"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--lable", "kind"], r"unknown: --lable kind\. Did you mean '--label'"),
        (["--num_steps=4"], r"unknown: --num_steps=4\. Did you mean '--num-steps'"),
        (["--max-len", "4"], r"unknown: --max-len 4\. Did you mean '--max-length'"),  # no option by a part of its name
        (["more.csv"], r"unknown: more\.csv\. See scalabl-pyro fit --help"),
    ],
    ids=range(4),
)
def test_an_unknown_option_is_named_with_the_nearest_one(words, text, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*FIT, *words])
    said = capsys.readouterr()
    assert ended.value.code == 2 and not said.out
    assert re.search(text, said.err)


def test_a_name_of_the_hub_is_told_before_the_hub_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with (
        pytest.raises(ValueError, match="the base model nobody/model cannot be read: no network"),
        reading("nobody/model"),
    ):
        raise OSError("no network")
    told = "There is no folder nobody/model here, so the model is looked for on the Hugging Face hub.\n"
    assert capsys.readouterr().err == told
    for name in ("here", "no/such/folder"):  # a folder, and what cannot be a name of the hub
        with reading(name):
            pass
    assert capsys.readouterr().err == ""
