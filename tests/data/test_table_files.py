"""Files that hold a table: each form gives the rows that pandas would give, and what is damaged is named."""

import csv
import gzip
import json

import numpy as np
import pandas as pd
import pytest
import tiny
from datasets import ClassLabel, Dataset, Features, Value

import scalabl_pyro as sp
from scalabl_pyro._values import is_missing
from scalabl_pyro.data import read_rows

ROWS = [
    {"note": 'Gold up, oil "calm", dealers say', "class": "oil", "price": 2.5},
    {"note": "Zwei\nZeilen: heiß", "class": None, "price": 3.0},
    {"note": "None", "class": "NA", "price": 4.0},
]
TABLE = pd.DataFrame(ROWS)


def write_lines(path, rows=ROWS):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


WRITERS = {
    "rows.csv": lambda path: TABLE.to_csv(path, index=False),
    "ROWS.CSV": lambda path: TABLE.to_csv(path, index=False, encoding="utf-8-sig"),
    "rows.csv.gz": lambda path: TABLE.to_csv(path, index=False),
    "rows.tsv": lambda path: TABLE.to_csv(path, index=False, sep="\t"),
    "rows.parquet": lambda path: TABLE.to_parquet(path),
    "rows.pq": lambda path: Dataset.from_list(ROWS).to_parquet(path),
    "rows.jsonl": write_lines,
    "rows.jsonl.gz": write_lines,
    "rows.ndjson.gz": write_lines,
    "array.json": lambda path: path.write_text("\n " + json.dumps(ROWS, indent=1), encoding="utf-8-sig"),
    "lines.json": write_lines,
    "array.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
}


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_gives_its_rows(tmp_path, name, kind):
    WRITERS[name](tmp_path / name)
    found = [dict(row) for row in read_rows(kind(tmp_path / name))]
    assert [{k: None if is_missing(v) else v for k, v in row.items()} for row in found] == ROWS


def test_a_csv_column_has_the_type_that_its_cells_have_in_common(tmp_path):
    text = "code,whole,real,truth,mixed,gap\n007,1,1,True,1,\n012,2,2.5,false,NA,3\n"
    (tmp_path / "rows.csv").write_text(text)
    first, second = read_rows(tmp_path / "rows.csv")
    assert second == {"code": "012", "whole": 2, "real": 2.5, "truth": False, "mixed": "NA", "gap": 3}
    assert first["code"] == "007" and first["truth"] is True and is_missing(first["gap"])
    by_name = pd.read_csv(tmp_path / "rows.csv", keep_default_na=False, na_values=[""])
    assert [row["real"] for row in (first, second)] == by_name["real"].tolist()


def test_numbers_that_floats_would_round_stay_texts(tmp_path):
    text = "id,gap,label\n123456789012345678901,9007199254740993,1\n123456789012345678902,,2\n"
    (tmp_path / "rows.csv").write_text(text)
    first, second = read_rows(tmp_path / "rows.csv")
    assert first == {"id": "123456789012345678901", "gap": "9007199254740993", "label": 1}
    assert second["id"] == "123456789012345678902" and is_missing(second["gap"])


def test_a_quoted_text_of_any_length_and_form_is_read(tmp_path):
    notes = ["x" * 200_000 + '"', 'a "b"\r\n, c', ",", "\u2028\x85 \N{THUMBS UP SIGN}", '"']
    for name, separator in (("rows.csv", ","), ("rows.tsv", "\t"), ("rows.csv.gz", ",")):
        table = pd.DataFrame({"note": notes, "class": range(5)})
        table.to_csv(tmp_path / name, index=False, sep=separator)
        assert [dict(row) for row in read_rows(tmp_path / name)] == table.to_dict("records")


def test_the_class_names_of_a_parquet_file_are_kept(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["yes", "no"])})
    data = Dataset.from_dict({"text": ["the sky", "grass"], "label": [0, 1]}, features=features)
    data.to_parquet(tmp_path / "rows.parquet")
    task = sp.SequenceClassification(tiny.tokenizer(), classes=["no", "yes"])
    assert [task.encode(row).target for row in read_rows(tmp_path / "rows.parquet")] == [1, 0]


DAMAGED = {
    "other.csv": (b"note;class\na;b\n", r"one column, 'note;class': .*separated by ';'.*sep=';'"),
    "semicolon.csv": (
        b"note;class\nred, blue;1\ngold;0\n",
        r"separated by ';'.*table.to_csv\(other_path",
    ),
    "quoted.csv": (b'\xef\xbb\xbfnote;class\n"red; blue";1\n', r"'note;class'.*separated by ';'"),
    "ragged.csv": (b"a,b\n1,2\n1,2,3\n", r"not a table.*line 3"),
    "comma.csv": (b"note,class\nred, blue,1\ngold, oil,0\n", r"not a table.*line 2.*stands in quotation marks"),
    "ends.csv": (b"note,class\nred,1,\noil,0,\n", r"not a table.*Expected 2 fields in line 2"),
    "twice.csv": (b"note,class,class\nred,1,2\n", "several columns are named 'class'"),
    "quotes.tsv": (b'note\tclass\n"Red he said\t1\noil\t2\nend" x\t3\n', r"line 4: .*after its closing.*quoting=3"),
    "escaped.csv": (b'note,class\n"he said \\"red\\" twice",1\n', r"line 2: .*Write a mark inside .* twice"),
    "open.csv": (b'note,class\n"red,1\n', "not a table"),
    "empty.csv": (b"", "not a table"),
    "latin.csv": ("a\nheiß\n".encode("latin-1"), "not UTF-8"),
    "header.csv": (b"a,b\n", "has no rows"),
    "not.csv.gz": (b"a,b\n1,2\n", "not a table"),
    "not.parquet": (b"a,b\n", "not a Parquet file"),
    "not.jsonl.gz": (b"{}", "not a complete gzip file"),
    "cut.jsonl.gz": (gzip.compress(b'{"a": 1}\n')[:-4], "not a complete gzip file"),
    "cut.json": (b'[{"a": 1}', "not JSON"),
    "numbers.json": (b"[1, 2]", "item 0: expected a JSON object, got int"),
    "none.json": (b"[]", "has no rows"),
    "deep.json": (b"[" * 10**5, "not JSON"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(tmp_path, name):
    content, message = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["absent.csv", "absent.parquet", "absent.jsonl.gz", "absent.tsv"])
def test_a_file_that_does_not_exist(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("name", ["rows.xlsx", "rows.parquet.gz", "rows.gz", "rows.csv.bak"])
def test_other_kinds_of_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"is a file, but its name does not end in .*pandas.read_excel"):
        read_rows(tmp_path / name)


def test_fit_predict_and_analyses_read_a_csv_file(tmp_path):
    rows = tiny.text_rows(8)
    pd.DataFrame(rows).rename(columns={"text": "note", "label": "class"}).to_csv(tmp_path / "t.csv", index=False)
    path = tmp_path / "t.csv"
    task = sp.SequenceClassification(tiny.tokenizer(), classes=["a", "b", "c"], text="note", target="class")
    blora = sp.bayesian_lora(tiny.classifier(num_labels=3), r=2)
    posterior = sp.fit(blora, task, path, num_steps=2, progress=False).posterior
    expected = posterior.predict([{"note": r["text"], "class": r["label"]} for r in rows], num_draws=2)
    for given in (path, str(path)):
        np.testing.assert_array_equal(posterior.predict(given, num_draws=2).log_probs, expected.log_probs)
        np.testing.assert_array_equal(posterior.log_likelihood(given).by_row(posterior.sample(2).s).shape, (2, 8))
    assert posterior.diagnose(path, num_draws=200) is not None
    assert posterior.loo(path, num_draws=200) is not None


def test_a_real_table_goes_through_csv_parquet_and_lines_alike(shared_data, tmp_path):
    rows = [
        {"note": row["question"], "class": row["choices"][row["answer"]]}
        for row in read_rows(shared_data / "text" / "trec_test.jsonl")
    ]
    with open(tmp_path / "trec.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["note", "class"])
        writer.writeheader()
        writer.writerows(rows)
    pd.DataFrame(rows).to_parquet(tmp_path / "trec.parquet")
    write_lines(tmp_path / "trec.jsonl.gz", rows)
    for name in ("trec.csv", "trec.parquet", "trec.jsonl.gz"):
        assert [dict(row) for row in read_rows(tmp_path / name)] == rows
