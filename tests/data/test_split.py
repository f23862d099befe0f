"""A split keeps the share of each class, and every row is in one part."""

import collections

import numpy as np
import pandas as pd
import pytest

from scalabl_pyro.data import stratified_split

LABELS = ["a"] * 50 + ["b"] * 20 + ["c"] * 2 + ["d"] + [None] * 10


def table(seed=0):
    order = np.random.default_rng(seed).permutation(len(LABELS))
    return pd.DataFrame({"number": range(len(LABELS)), "label": [LABELS[i] for i in order]})


def counts(rows):
    return collections.Counter(row["label"] if isinstance(row["label"], str) else None for row in rows)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.99])
def test_each_class_has_its_share(share):
    rest, part = stratified_split(table(), by="label", share=share)
    assert sorted(row["number"] for row in [*rest, *part]) == list(range(len(LABELS)))
    assert [row["number"] for row in part] == sorted(row["number"] for row in part)
    for name, n in collections.Counter(LABELS).items():
        expected = min(max(round(share * n), 1), n - 1) if n > 1 else 0
        assert counts(part)[name] == expected and counts(rest)[name] == n - expected


def test_the_seed_decides():
    one, again, other = (stratified_split(table(), by="label", seed=seed)[1] for seed in (0, 0, 1))
    numbers = [[row["number"] for row in part] for part in (one, again, other)]
    assert numbers[0] == numbers[1] != numbers[2]


@pytest.mark.parametrize("share", [0, 1, -0.1, 2, "half", None, float("nan")])
def test_a_wrong_share_is_refused(share):
    with pytest.raises(ValueError, match="expected a number between 0 and 1"):
        stratified_split(table(), by="label", share=share)


@pytest.mark.parametrize("seed", [-1, 1.5, "x"])
def test_a_wrong_seed_is_refused(seed):
    with pytest.raises(ValueError, match=r"seed=.* must be a whole number, 0 or more"):
        stratified_split([{"label": 1}], by="label", seed=seed)


def test_an_absent_field_is_named():
    with pytest.raises(ValueError, match=r"by='lable': the rows have no such field.*'label'"):
        stratified_split(table(), by="lable")
