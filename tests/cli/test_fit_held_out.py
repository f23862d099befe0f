"""``scalabl-pyro fit --eval``: held-out rows from a second table or from a share, their scores, and what is wrong."""

import json
import sys

import pandas as pd
import pytest
import tiny

import scalabl_pyro as sp
from scalabl_pyro.cli import main as cli
from scalabl_pyro.data import read_rows, stratified_split

ROWS = pd.DataFrame(
    [
        {"note": f"{row['question']} {tiny.LETTERS[i // 10]} {i % 10}", "class": tiny.COLORS[row["answer"]]}
        for i, row in enumerate(tiny.question_rows(40))  # no two texts are equal
    ]
)
OTHERS = pd.DataFrame({"note": ["the rose is the rose", "grass , grass"], "class": ["blue", "green"]})
OPTIONS = ["--model", "base", "--num-steps", 6, "--batch-size", 4, "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, and tables."""
    here = tmp_path_factory.mktemp("files")
    tiny.causal_lm().save_pretrained(here / "base")
    tiny.tokenizer().save_pretrained(here / "base")
    ROWS.to_csv(here / "train.csv", index=False)
    OTHERS.to_csv(here / "valid.csv", index=False)
    ROWS[["note"]].assign(price=[0.5 * i for i in range(40)]).to_csv(here / "prices.csv", index=False)
    return here


@pytest.fixture
def fit(folder, capsys, monkeypatch, request):
    monkeypatch.chdir(folder)

    def run(*words, data="train.csv"):
        out = folder / f"{request.node.name}-{len(list(folder.iterdir()))}".replace("/", "-")
        code = cli.main(["fit", data, *map(str, [*OPTIONS, *words]), "--out", str(out)])
        found = capsys.readouterr()
        return code, found.out, found.err, out

    return run


def test_a_share_is_held_out_as_stratified_split_does_and_scored_as_fit_does(fit, folder):
    code, said, error, out = fit("--eval", 0.25, "--eval-every", 2, "--seed", 3, "--json", "--history", "h.csv")
    assert code == 0, error
    found = json.loads(said)
    train, held_out = stratified_split(read_rows(folder / "train.csv"), by="class", share=0.25, seed=3)
    task = sp.tasks.from_data(
        tiny.tokenizer(), read_rows(folder / "train.csv"), llm=tiny.causal_lm(), text="note", target="class"
    )
    blora = sp.bayesian_lora(tiny.causal_lm(), seed=3)
    options = {"num_steps": 6, "batch_size": 4, "seed": 3, "progress": False}
    own = sp.fit(blora, task, train, eval_data=held_out, eval_every=2, **options)
    assert found["rows"] == len(train) and found["held_out"]["rows"] == len(held_out)
    nll = [line["eval_nll"] for line in found["held_out"]["evaluations"]]
    assert nll == pytest.approx(own.evaluations["eval_nll"].tolist(), rel=1e-5)
    assert [line["step"] for line in found["held_out"]["evaluations"]] == [1, 3, 5]
    assert found["settled"] == own.settled and found["held_out"]["kept_step"] == 5
    assert "a share of 0.25 of train.csv, the same share of each class in 'class', seed 3" in found["held_out"]["from"]
    history = pd.read_csv("h.csv")
    assert history["nll"].to_numpy() == pytest.approx(own.history["nll"].to_numpy(), rel=1e-5)
    assert history["eval_nll"].notna().sum() == 3
    assert sp.Posterior.from_pretrained(tiny.causal_lm(), out).provenance["evaluation"]["kept_step"] == 5


def test_a_second_table_is_scored_and_patience_keeps_the_best_step(fit):
    code, said, error, _ = fit("--eval", "valid.csv", "--eval-every", 1, "--patience", 2)
    assert code == 0, error
    assert "Held out: 2 rows, valid.csv.\n" in said and "eval_nll" in said
    assert "The posterior is that after " in said and "the lowest held-out NLL of all evaluations" in said
    assert "steps" in said.splitlines()[-2] and said.splitlines()[-1].startswith("Posterior saved")


def test_steps_are_counted_from_one_in_table_and_sentence(fit):
    code, said, error, _ = fit("--eval", "valid.csv", "--eval-every", 2)
    assert code == 0, error
    lines = said.splitlines()
    (head,) = [i for i, line in enumerate(lines) if "eval_nll" in line]
    assert [int(line.split()[0]) for line in lines[head + 1 : head + 4]] == [2, 4, 6]
    assert "The posterior is that after 6 steps: " in said


def test_rates_are_those_of_fit(fit):
    code, _, error, out = fit("--lr", 1e-3, "--lr-A", 2e-3)
    assert code == 0, error
    found = sp.Posterior.from_pretrained(tiny.causal_lm(), out)
    task = sp.tasks.from_data(tiny.tokenizer(), ROWS, llm=tiny.causal_lm(), text="note", target="class")
    rates = {"lr": 1e-3, "lr_A": 2e-3}
    own = sp.fit(sp.bayesian_lora(tiny.causal_lm()), task, ROWS, num_steps=6, batch_size=4, progress=False, **rates)
    for (A, B), (own_A, own_B) in zip(found.factors, own.posterior.factors, strict=True):
        assert A.allclose(own_A, atol=1e-6) and B.allclose(own_B, atol=1e-6)
    code, _, error, _ = fit("--lr", 0)
    assert code == 1 and "lr" in error


def test_without_held_out_rows_the_settled_line_is_there(fit):
    code, said, _, _ = fit()
    assert code == 0 and "After 6 steps: too few steps to tell" in said and "Held out" not in said
    code, said, _, _ = fit("--json")
    assert json.loads(said)["held_out"] is None and "too few steps" in json.loads(said)["settled"]


def test_whole_numbers_as_classes_of_a_causal_lm(fit, folder):
    ROWS[["note"]].assign(stars=[1, 2, 3, 4] * 10).to_csv(folder / "stars.csv", index=False)
    code, said, error, out = fit("--eval", 0.2, "--json", data="stars.csv")
    assert code == 0, error
    assert json.loads(said)["task"] == "LabelCompletion"
    posterior = sp.Posterior.from_pretrained(tiny.causal_lm(), out)
    assert posterior.predict(read_rows(folder / "stars.csv"), num_draws=2).classes == (1, 2, 3, 4)


def test_numbers_are_held_out_at_random(fit):
    code, said, error, _ = fit("--eval", 0.2, "--json", data="prices.csv")
    assert code == 0, error
    held_out = json.loads(said)["held_out"]
    assert held_out["rows"] == 8 and "chosen at random" in held_out["from"]
    assert held_out["evaluations"][-1]["eval_rmse"] > 0


@pytest.mark.filterwarnings("always::scalabl_pyro.ScalaBLWarning")
def test_the_warning_of_an_overlap_reaches_the_terminal_in_its_words(fit, folder):
    pd.concat([OTHERS, ROWS[:3]]).to_csv(folder / "overlap.csv", index=False)
    code, _, error, _ = fit("--eval", "overlap.csv")
    assert code == 0
    (line,) = [line for line in error.splitlines() if line.startswith("warning: ")]
    assert "rows of overlap.csv have the text of a row of train.csv" in line
    assert "eval_data" not in line and "train_data" not in line and ".py" not in line


TABLES = {
    "new-class.csv": {"note": ["the sky", "the rose"], "class": ["blu", "blue"]},
    "no-class.csv": {"note": ["the sky"], "colour": ["blue"]},
    "gap.csv": {"note": ["the sky", "the rose"], "class": ["blue", None]},
}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--patience", 3], "--patience 3 needs held-out rows: add --eval valid.csv"),
        (["--eval-every", 3], "--eval-every 3 needs held-out rows"),
        (["--eval", 1.5], "--eval 1.5: give a share between 0 and 1"),
        (["--eval", "20%"], "--eval 20%: give a share between 0 and 1"),
        (["--eval", "none.csv"], "none.csv does not exist"),
        (["--eval", 0.01, "--history", "h.pdf"], "--history h.pdf: the name must end in"),
        (
            ["--eval", "new-class.csv"],
            "new-class.csv has classes in 'class' that no row of train.csv has: 'blu' (1 row)",
        ),
        (["--eval", "new-class.csv"], "Did you mean 'blue'"),
        (["--eval", "no-class.csv"], "no-class.csv has no column 'class', which train.csv has"),
        (["--eval", "gap.csv"], "gap.csv: Row 1 has no answer"),
    ],
)
def test_what_is_wrong_with_the_held_out_rows_stands_in_one_line(fit, folder, words, message):
    for name, columns in TABLES.items():
        pd.DataFrame(columns).to_csv(folder / name, index=False)
    code, said, error, out = fit(*words)
    last = error.splitlines()[-1]
    assert code == 1 and not said and not out.exists()
    assert last.startswith("error: ") and message in last and "Traceback" not in error


def test_rows_with_the_text_of_another_row_are_not_held_out(fit, folder):
    pd.concat([ROWS, ROWS[:20]]).to_csv(folder / "twice.csv", index=False)
    code, said, error, _ = fit("--eval", 0.5, "--json", data="twice.csv")
    found = json.loads(said)
    assert code == 0 and "warning" not in error  # of an overlap
    held_out = found["held_out"]
    assert 0 < held_out["rows"] < 30 and found["rows"] + held_out["rows"] == 60
    assert f"; {30 - held_out['rows']} more with the text of another row are trained on" in held_out["from"]


def test_an_error_of_a_row_names_its_place_in_the_table_also_after_a_split(fit, folder):
    ROWS.assign(**{"class": [None if i == 37 else c for i, c in enumerate(ROWS["class"])]}).to_csv(
        folder / "gaps.csv", index=False
    )
    code, _, error, _ = fit("--eval", 0.5, data="gaps.csv")
    assert code == 1 and "error: Row 37 has no answer" in error


def test_a_table_that_is_too_small_for_a_share_says_so(fit, folder):
    pd.DataFrame({"note": ["the sky", "the rose"], "price": [0.5, 1.5]}).to_csv(folder / "two.csv", index=False)
    code, _, error, _ = fit("--eval", 0.1, data="two.csv")
    assert code == 1 and "--eval 0.1: two.csv has 2 rows, so one part would be empty" in error


def test_the_help_teaches_what_held_out_rows_are_for(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "was the training long enough?" in said and "rows that no step trains on" in said.lower()
    assert sys.modules["scalabl_pyro.cli.held_out"]
