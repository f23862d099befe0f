"""Rows from anywhere, encoded one by one, and put into right-padded batches of similar length."""

import doctest
import importlib
import json
import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from scalabl_pyro.data import Batch, Example, collate, encode, evaluation_batches, read_rows
from scalabl_pyro.data.batch import graded_length
from scalabl_pyro.data.rows import as_question
from scalabl_pyro.data.training_batches import TrainingBatches

ROWS = [{"id": "a", "question": "one"}, {"id": "b", "question": "two"}]
PAD = 99
PROPERTY = settings(max_examples=50, derandomize=True, deadline=None)


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def examples_of(lengths, target=0):
    """Examples of these lengths; the tokens of example i are all i + 1."""
    return [Example({"input_ids": [i + 1] * n}, target) for i, n in enumerate(lengths)]


def encode_ids(row):
    return Example({"input_ids": row["ids"]}, row.get("answer"), is_cut=row.get("is_cut", False))


# read_rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [ROWS, tuple(ROWS), iter(ROWS), (row for row in ROWS), Dataset.from_list(ROWS)],
    ids=["list", "tuple", "iterator", "generator", "Dataset"],
)
def test_anything_that_iterates_over_dicts_gives_its_rows(source):
    assert read_rows(source) == ROWS


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.ndjson", "ROWS.JSONL"])
def test_a_file_gives_one_row_a_line(tmp_path, kind, name):
    assert read_rows(kind(write(tmp_path / name, lines(ROWS)))) == ROWS


def test_blank_lines_and_windows_line_ends_are_no_rows(tmp_path):
    text = "\n" + lines(ROWS).replace("\n", "\r\n") + "   \n\n"
    assert read_rows(write(tmp_path / "rows.jsonl", text)) == ROWS


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    assert read_rows(write(tmp_path / "rows.jsonl", lines(ROWS), encoding="utf-8-sig")) == ROWS


def test_text_is_read_as_unicode(tmp_path):
    rows = [{"question": "Wie heißt das? 你好"}]
    assert read_rows(write(tmp_path / "rows.jsonl", json.dumps(rows[0], ensure_ascii=False))) == rows


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.json"])
def test_a_file_that_does_not_exist_is_not_looked_up_on_the_hub(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"{name} does not exist"):
        read_rows(str(tmp_path / name))


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (lines(ROWS) + '{"id": \n', 3, "not JSON"),
        ("question,answer\n1,2\n", 1, "not JSON"),
        (lines(ROWS[:1]) + "\n[1, 2]\n", 3, "expected a JSON object, got list"),
        ('"text"\n', 1, "expected a JSON object, got str"),
        ("7\n", 1, "expected a JSON object, got int"),
    ],
    ids=["cut", "csv", "list", "text", "number"],
)
def test_a_line_that_is_no_row_is_refused_with_file_and_number(tmp_path, text, line, reason):
    with pytest.raises(ValueError, match=rf"rows.jsonl, line {line}: {reason}"):
        read_rows(write(tmp_path / "rows.jsonl", text))


def test_a_file_in_another_encoding_is_refused_with_its_name(tmp_path):
    text = lines(ROWS) + json.dumps({"question": "Größe"}, ensure_ascii=False)
    with pytest.raises(ValueError, match=r"rows\.jsonl.*(UTF-8|utf-8)"):
        read_rows(write(tmp_path / "rows.jsonl", text, encoding="latin-1"))


def test_no_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="The data set has no rows"):
        read_rows([])
    with pytest.raises(ValueError, match=r"rows\.jsonl has no rows"):
        read_rows(write(tmp_path / "rows.jsonl", "\n\n"))


@pytest.mark.parametrize("source", [3, None], ids=repr)
def test_something_that_holds_no_rows_is_refused_in_words(source):
    with pytest.raises(TypeError, match="rows"):
        read_rows(source)


@pytest.mark.parametrize("source", [ROWS[0], {}], ids=["row", "empty"])
def test_a_single_dict_is_not_taken_for_a_list_of_rows(source):
    with pytest.raises((TypeError, ValueError), match="rows") as error:
        read_rows(source)
    assert "dict" in str(error.value)


# encode -------------------------------------------------------------------------------------------------------


def test_rows_are_encoded_in_order():
    rows = [{"ids": [1, 2], "answer": 1}, {"ids": [3]}]
    assert encode(rows, encode_ids, need_target=False) == [
        Example({"input_ids": [1, 2]}, 1),
        Example({"input_ids": [3]}, None),
    ]


@pytest.mark.parametrize(
    ("row", "where"), [({"ids": [1], "id": "q7"}, r"Row 1 \(id 'q7'\)"), ({"ids": [1]}, "Row 1")], ids=["id", "no id"]
)
def test_an_error_of_the_task_names_the_row(row, where):
    def encode_row(r):
        if r is row:
            raise ValueError("the color is unknown.")
        return encode_ids(r)

    with pytest.raises(ValueError, match=rf"^{where}: the color is unknown.$"):
        encode([{"ids": [1]}, row], encode_row, need_target=False)


def test_a_missing_key_names_the_row_and_the_key():
    with pytest.raises(ValueError, match=r"Row 0 \(id 'q0'\).*ids"):
        encode([{"id": "q0"}], encode_ids, need_target=False)


@pytest.mark.parametrize("row", [[1, 2], "text", 3, None], ids=repr)
def test_a_row_that_is_no_dict_is_refused_by_its_kind(row):
    with pytest.raises(TypeError, match=rf"Row 1 is .*{type(row).__name__.removesuffix('Type')}.*; expected a dict"):
        encode([{"ids": [1]}, row], encode_ids, need_target=False)


def test_a_row_without_tokens_is_refused():
    with pytest.raises(ValueError, match=r"Row 0 \(id 7\) is empty"):
        encode([{"id": 7, "ids": []}], encode_ids, need_target=False)


def test_a_row_without_answer_is_refused_in_training_only():
    rows = [{"ids": [1], "answer": 0}, {"ids": [1], "id": "x"}]
    assert encode(rows, encode_ids, need_target=False)[1].target is None
    with pytest.raises(ValueError, match=r"Row 1 \(id 'x'\) has no answer, but training and the likelihood need one"):
        encode(rows, encode_ids, need_target=True)


@pytest.mark.parametrize("answer", [float("inf"), -float("inf")])
def test_an_answer_that_is_not_finite_is_refused(answer):
    with pytest.raises(ValueError, match=rf"Row 0 \(id 'x'\).*{answer} is not finite"):
        encode([{"id": "x", "ids": [1], "answer": answer}], encode_ids, need_target=True)


def test_an_answer_that_is_no_number_is_refused_with_its_row():
    with pytest.raises((ValueError, TypeError), match=r"Row 0 \(id 'x'\).*'B'"):
        encode([{"id": "x", "ids": [1], "answer": "B"}], encode_ids, need_target=True)


def test_no_rows_cannot_be_encoded():
    with pytest.raises(ValueError, match="The data set has no rows"):
        encode([], encode_ids, need_target=False)


def test_rows_that_lost_text_are_counted_in_one_warning(caplog):
    rows = [{"ids": [1], "is_cut": i < 2} for i in range(5)]
    with caplog.at_level(logging.WARNING, logger="scalabl_pyro"):
        encode(rows, encode_ids, need_target=False)
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 5 rows were longer than max_length and lost a part of their text. "
        "To keep it, increase max_length of the task."
    ]
    caplog.clear()
    encode(rows[2:], encode_ids, need_target=False)
    assert not caplog.records


# collate and Batch --------------------------------------------------------------------------------------------


def test_a_batch_is_padded_on_the_right():
    examples = [
        Example({"input_ids": [5, 6, 7], "token_type_ids": [0, 1, 1]}, 2, {"num_choices": 4}),
        Example({"input_ids": [8], "token_type_ids": [1]}, 0, {"num_choices": 3}),
    ]
    batch = collate(examples, [11, 3], PAD)
    assert {k: v.tolist() for k, v in batch.inputs.items()} == {
        "input_ids": [[5, 6, 7], [8, PAD, PAD]],
        "token_type_ids": [[0, 1, 1], [1, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    assert batch.last.tolist() == [2, 0]
    assert batch.index.tolist() == [11, 3]
    assert batch.target.tolist() == [2, 0]
    assert batch.extras["num_choices"].tolist() == [4, 3]
    assert len(batch) == 2


@pytest.mark.parametrize(
    ("targets", "dtype"), [([0, 2], torch.int64), ([0.5, 2.0], torch.float64), ([0, 2.5], torch.float64)]
)
def test_classes_stay_integers_and_numbers_floats(targets, dtype):
    batch = collate([Example({"input_ids": [1]}, t) for t in targets], [0, 1], PAD)
    assert batch.target.dtype == dtype
    assert batch.target.tolist() == targets


def test_a_batch_has_targets_only_if_all_rows_have_one():
    assert collate(examples_of([1, 1], target=None), [0, 1], PAD).target is None
    assert collate([Example({"input_ids": [1]}, 1), Example({"input_ids": [1]})], [0, 1], PAD).target is None


def batch_of(lengths):
    examples = [Example({"input_ids": [i] * n}, i, {"num_choices": i}) for i, n in enumerate(lengths)]
    return collate(examples, range(len(examples)), PAD)


def tensors_of(batch):
    tensors = {**batch.inputs, **batch.extras, "index": batch.index, "last": batch.last}
    return tensors | ({} if batch.target is None else {"target": batch.target})


@PROPERTY
@given(st.lists(st.integers(1, 6), min_size=1, max_size=9), st.integers(1, 10))
def test_micro_batches_are_the_rows_of_the_batch_in_order(lengths, size):
    batch = batch_of(lengths)
    parts = batch.split(size)
    assert all(1 <= len(part) <= size for part in parts)
    for name, whole in tensors_of(batch).items():
        assert torch.equal(torch.cat([tensors_of(part)[name] for part in parts]), whole)


def test_a_batch_maps_every_tensor_and_leaves_the_old_one():
    batch = batch_of([2, 1])
    seen = tensors_of(batch.map(lambda t: t + 1))
    assert all(torch.equal(seen[name], t + 1) for name, t in tensors_of(batch).items())
    moved = batch.to("meta")
    assert all(t.is_meta for t in tensors_of(moved).values())
    assert not batch.index.is_meta


def test_a_batch_without_target_maps_and_splits_too():
    batch = batch_of([2, 1]).without_target()
    assert batch.target is None
    assert batch.map(lambda t: t).target is None
    assert [part.target for part in batch.split(1)] == [None, None]
    assert set(tensors_of(batch)) == set(tensors_of(batch_of([2, 1]))) - {"target"}


def test_batches_and_examples_cannot_be_changed():
    for frozen, name in ((batch_of([1]), "target"), (Example({"input_ids": [1]}), "target")):
        with pytest.raises(AttributeError):
            setattr(frozen, name, None)


# TrainingBatches ----------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=60)


def order(batches, steps):
    return [batches(step).index.tolist() for step in steps]


@PROPERTY
@given(lengths=LENGTHS, batch_size=st.integers(1, 70), epoch=st.integers(0, 2), seed=st.integers(0, 2**31))
def test_an_epoch_has_every_row_once_in_batches_of_at_most_batch_size(lengths, batch_size, epoch, seed):
    batches = TrainingBatches(examples_of(lengths), batch_size, PAD, seed=seed)
    steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
    rows = order(batches, steps)
    assert sorted(i for batch in rows for i in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= batch_size for batch in rows)


@PROPERTY
@given(lengths=LENGTHS, batch_size=st.integers(1, 70), seed=st.integers(0, 100))
def test_batches_of_one_window_differ_by_at_most_one_row(lengths, batch_size, seed):
    batches = TrainingBatches(examples_of(lengths), batch_size, PAD, seed=seed)
    sizes = [len(batch) for batch in order(batches, range(batches.per_epoch))]
    if len(lengths) <= batches.WINDOW * batch_size:
        assert max(sizes) - min(sizes) <= 1


@PROPERTY
@given(lengths=LENGTHS, steps=st.lists(st.integers(0, 40), min_size=1, max_size=6), seed=st.integers(0, 100))
def test_a_batch_depends_on_seed_and_step_alone(lengths, steps, seed):
    """So a run that resumes at step t goes on as it would have."""
    walked = TrainingBatches(examples_of(lengths), 4, PAD, seed=seed)
    history = order(walked, range(41))
    jumped = TrainingBatches(examples_of(lengths), 4, PAD, seed=seed)
    assert order(jumped, steps) == [history[step] for step in steps]


def test_a_batch_holds_the_examples_that_its_index_names():
    examples = examples_of([3, 1, 2, 5, 4])
    batches = TrainingBatches(examples, 2, PAD, seed=0)
    for step in range(6):
        batch = batches(step)
        for row, i in enumerate(batch.index.tolist()):
            real = batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row].bool()]
            assert real.tolist() == examples[i].inputs["input_ids"]


@PROPERTY
@given(lengths=LENGTHS, step=st.sampled_from([2, 4, 8]), seed=st.integers(0, 100))
def test_rounded_batches_have_few_lengths_that_end_at_the_longest_row(lengths, step, seed):
    plain = TrainingBatches(examples_of(lengths), 4, PAD, seed=seed)
    rounded = TrainingBatches(examples_of(lengths), 4, PAD, seed=seed, multiple=step)
    end = -(-max(lengths) // step) * step
    for i in range(plain.per_epoch):
        before, after = plain(i).inputs["input_ids"].shape[1], rounded(i).inputs["input_ids"].shape[1]
        assert plain(i).index.tolist() == rounded(i).index.tolist()
        assert after % step == 0 and before <= after <= end
        assert after - before < max(step, before / 4)


@given(step=st.sampled_from([1, 4, 16]), longest=st.integers(1, 3000))
def test_each_doubling_has_at_most_eight_rounded_lengths(step, longest):
    rounded = [graded_length(n, step, longest) for n in range(1, longest + 1)]
    assert rounded == sorted(rounded) and rounded[-1] == -(-longest // step) * step
    for low in (8 * step, 16 * step, 32 * step, 64 * step):
        assert len({n for n in rounded if low < n <= 2 * low}) <= 8
    assert graded_length(2 * longest + step, step, longest) % step == 0  # longer than all rows: a completion's answer


def test_rows_of_a_batch_have_similar_lengths():
    lengths = list(range(1, 65))
    batches = TrainingBatches(examples_of(lengths), 8, PAD, seed=0)  # one window
    spans = sorted((min(b), max(b)) for b in order(batches, range(8)))  # row i has length i + 1
    assert all(spans[i][1] < spans[i + 1][0] for i in range(7))


def test_seeds_and_epochs_have_orders_of_their_own(unchanged_rng):
    lengths = [1 + i % 7 for i in range(50)]
    first = TrainingBatches(examples_of(lengths), 5, PAD, seed=0)
    other = TrainingBatches(examples_of(lengths), 5, PAD, seed=1)
    assert order(first, range(10)) != order(other, range(10))
    assert order(first, range(10)) != order(first, range(10, 20))


def test_the_longest_rows_do_not_always_come_last():
    """Sorting by length within a window must not leave a curriculum."""
    batches = TrainingBatches(examples_of(range(1, 65)), 8, PAD, seed=0)
    where = {
        max(range(8), key=lambda p, e=epoch: batches(8 * e + p).inputs["input_ids"].shape[1]) for epoch in range(20)
    }
    assert len(where) > 3


def test_a_batch_larger_than_the_data_is_the_data():
    batches = TrainingBatches(examples_of([2, 1, 3]), 100, PAD, seed=0)
    assert batches.per_epoch == 1
    assert sorted(batches(5).index.tolist()) == [0, 1, 2]


# evaluation_batches -------------------------------------------------------------------------------------------


@PROPERTY
@given(lengths=LENGTHS, batch_size=st.integers(1, 70))
def test_evaluation_sees_every_row_once_longest_first(lengths, batch_size):
    batches = list(evaluation_batches(examples_of(lengths), batch_size, PAD))
    seen = [i for batch in batches for i in batch.index.tolist()]
    assert sorted(seen) == list(range(len(lengths)))
    assert [lengths[i] for i in seen] == sorted(lengths, reverse=True)
    assert all(len(batch) <= batch_size for batch in batches)
    assert all(isinstance(batch, Batch) for batch in batches)


# real files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "num_choices"),
    [
        ("mcqa/openbookqa_train", 4957, {4}),
        ("mcqa/arc_easy_test", 2376, {3, 4, 5}),
        ("mcqa/boolq_test", 3270, {2}),
        ("text/trec_test", 500, {6}),
        ("text/agnews_test", 7600, {4}),
    ],
)
def test_real_files_are_read_whole(shared_data, name, count, num_choices):
    rows = read_rows(shared_data / f"{name}.jsonl")
    assert len(rows) == count
    assert {len(row["choices"]) for row in rows} == num_choices
    assert len({row["id"] for row in rows}) == count


def test_real_questions_have_little_padding_in_training(shared_data):
    rows = read_rows(shared_data / "mcqa" / "openbookqa_train.jsonl")
    examples = encode(rows, lambda row: Example({"input_ids": [1] * len(row["question"].split())}, 0), need_target=True)
    batches = TrainingBatches(examples, 16, PAD, seed=0)
    assert batches.per_epoch == -(-len(rows) // 16)
    masks = [batches(step).inputs["attention_mask"] for step in range(batches.per_epoch)]
    in_order = [collate(examples[i : i + 16], range(16), PAD).inputs["attention_mask"] for i in range(0, 4957, 16)]
    padding = np.mean([1 - m.float().mean().item() for m in masks])
    assert padding < 0.1 < np.mean([1 - m.float().mean().item() for m in in_order])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {
                "id": "8",
                "question_stem": "The sun is",
                "choices": {"text": ["hot", "cold"], "label": ["A", "B"]},
                "answerKey": "B",
            },
            {"id": "8", "question": "The sun is", "choices": ["hot", "cold"], "answer": 1},
        ),
        (
            {"question": "Why?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"},
            {"question": "Why?", "choices": ["x", "y", "z"], "answer": 2},
        ),
        (
            {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": ""},
            {"question": "Why?", "choices": ["x", "y"], "answer": None},
        ),
        (
            {"sentence": "Ann met Eve because _ called.", "option1": "Ann", "option2": "Eve", "answer": "2"},
            {"question": "Ann met Eve because _ called.", "choices": ["Ann", "Eve"], "answer": 1},
        ),
        (
            {"question": "is ice cold", "passage": "Ice is cold.", "answer": True},
            {"question": "Ice is cold.\nIs ice cold?", "choices": ["yes", "no"], "answer": 0},
        ),
        (
            {"question": "2+2?", "choices": ["3", "4"], "answer": 1},
            {"question": "2+2?", "choices": ["3", "4"], "answer": 1},
        ),
        ({"text": "fine", "label": 1}, {"text": "fine", "label": 1}),
    ],
    ids=["openbookqa", "arc numbers", "arc hidden", "winogrande", "boolq", "mmlu", "other"],
)
def test_rows_of_known_hub_data_sets_get_one_form(row, expected):
    assert as_question(row) == expected


TABLE_FILES = ["column_notes", "columns", "model_names", "split", "table_files"]


@pytest.mark.parametrize("name", ["batch", "encoding", "rows", "training_batches", *TABLE_FILES])
def test_examples_of_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(f"scalabl_pyro.data.{name}"))
    assert result.attempted and not result.failed
