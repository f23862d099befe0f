"""The examples of active learning and selective prediction: which rows are acquired, and which are answered."""

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

import scalabl_pyro as sp

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from _support import datasets, run_settings
from _support.acquisition import STRATEGIES, Pool, scores
from _support.selection import SCORES, doubt, threshold, upper_bound
from _support.upper_block_fits import fit_upper_blocks, predict_rows


def by_hand() -> sp.Prediction:
    """Two draws of four rows with two classes, of known uncertainties.

    Row 0 is certain; row 1 a fair coin in both draws; in row 2 the draws are certain of different classes; row 3 lies
    between.
    """
    probs = np.array([[[1, 0], [0.5, 0.5], [1, 0], [0.9, 0.1]], [[1, 0], [0.5, 0.5], [0, 1], [0.4, 0.6]]], float)
    with np.errstate(divide="ignore"):
        return sp.Prediction(np.log(probs), np.array([0, 1, 1, 0]), ("a", "b"))


def rng(seed=0):
    return np.random.default_rng(seed)


# scores -----------------------------------------------------------------------------------------------------------


def test_bald_is_the_mutual_information_of_answer_and_draw():
    entropy = lambda p: -sum(x * np.log(x) for x in (p, 1 - p))  # noqa: E731
    between = entropy(0.65) - (entropy(0.9) + entropy(0.4)) / 2
    np.testing.assert_allclose(scores("bald", by_hand()), [0, 0, np.log(2), between], atol=1e-12)


def test_bald_acquires_the_rows_of_largest_mutual_information_and_entropy_the_coin_too():
    assert Pool(4, []).acquire(scores("bald", by_hand()), 2, rng()) == [2, 3]
    assert set(Pool(4, []).acquire(scores("entropy", by_hand()), 2, rng())) == {1, 2}  # both ln 2


def test_random_acquires_every_row_as_often():
    counts = np.zeros(4)
    for seed in range(400):
        counts[Pool(4, []).acquire(scores("random", by_hand()), 1, rng(seed))] += 1
    assert (abs(counts - 100) < 5 * np.sqrt(400 * 0.25 * 0.75)).all()


def test_an_unknown_strategy_and_bald_of_a_single_function_are_refused():
    with pytest.raises(ValueError, match=r"strategy='batchbald' is unknown: use bald, entropy, random"):
        scores("batchbald", by_hand())
    mean = sp.Prediction(by_hand().log_probs[:1], None, ("a", "b"), is_mean=True)
    with pytest.raises(ValueError, match="predict with num_draws=2 or more"):
        scores("bald", mean)


# the pool ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_row_is_acquired_twice_and_the_pool_shrinks_to_nothing(strategy):
    probs = rng(1).dirichlet(np.ones(3), (4, 23))
    prediction = sp.Prediction(np.log(probs), None, ("a", "b", "c"))
    pool, left = Pool(23, [3, 7]), []
    while len(pool.unlabeled):
        before = set(pool.labeled)
        acquired = pool.acquire(scores(strategy, prediction), 5, rng(2))
        assert before.isdisjoint(acquired) and not set(pool.unlabeled) & set(pool.labeled)
        left.append(len(pool.unlabeled))
    assert left == [16, 11, 6, 1, 0]
    assert sorted(pool.labeled) == list(range(23)) and pool.labeled[:2] == [3, 7]
    assert pool.acquire(scores(strategy, prediction), 5, rng()) == []


def test_scores_of_labeled_rows_are_not_looked_at():
    assert Pool(4, [2]).acquire(np.array([0.1, 0.3, np.nan, 0.2]), 2, rng()) == [1, 3]


def test_a_pool_smaller_than_the_batch_gives_all_it_has():
    assert Pool(3, [0]).acquire(np.array([9.0, 1.0, 2.0]), 10, rng()) == [2, 1]


def test_ties_are_broken_at_random_by_the_seed_behind_larger_scores():
    wanted = np.array([1.0, 1.0, 1.0, 5.0, 1.0])
    picks = [Pool(5, []).acquire(wanted, 2, rng(seed)) for seed in range(40)]
    assert {first for first, _ in picks} == {3} and {second for _, second in picks} == {0, 1, 2, 4}
    assert picks == [Pool(5, []).acquire(wanted, 2, rng(seed)) for seed in range(40)]


@pytest.mark.parametrize("labeled", [[0, 0], [4], [-1]])
def test_positions_must_be_those_of_a_pool(labeled):
    with pytest.raises(ValueError, match="must be different positions from 0 to 3"):
        Pool(4, labeled)


def test_scores_that_cannot_be_ranked_are_refused():
    pool = Pool(3, [0])
    with pytest.raises(ValueError, match=r"shape \(2,\): expected \(3,\)"):
        pool.acquire(np.zeros(2), 1, rng())
    with pytest.raises(ValueError, match=r"rows \[2\] are NaN"):
        pool.acquire(np.array([0, 0, np.nan]), 1, rng())
    with pytest.raises(ValueError, match="acquire one row or more"):
        pool.acquire(np.zeros(3), 0, rng())
    assert pool.labeled == [0]


# fits of the upper blocks -----------------------------------------------------------------------------------------


def test_the_lower_block_runs_once_for_all_fits_of_the_upper_one():
    llm, task = tiny.causal_lm(), sp.MultipleChoice(tiny.tokenizer())
    args = Namespace(blocks=1, steps=2, batch_size=4, lr=1e-2)
    rows, calls = tiny.question_rows(33, seed=1), []
    llm.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    for seed, passes in {0: 2, 1: 0}.items():
        posterior = fit_upper_blocks(llm, task, tiny.question_rows(8), args, seed)
        calls.clear()
        got = predict_rows(posterior, rows, num_draws=3, seed=seed)
        assert len(calls) == passes
        expected = posterior.predict(rows, num_draws=3, seed=seed, batch_size=32)
        np.testing.assert_allclose(got.log_probs, expected.log_probs, atol=1e-5)
        np.testing.assert_array_equal(got.target, expected.target)
        posterior.blora().unload()


def test_no_prediction_is_kept_where_all_blocks_are_adapted():
    llm, task = tiny.causal_lm(), sp.MultipleChoice(tiny.tokenizer())
    result = sp.fit(sp.bayesian_lora(llm), task, tiny.question_rows(8), num_steps=1, progress=False)
    with pytest.raises(ValueError, match="cache_prefix=True: no fixed blocks lie below the first adapted one"):
        predict_rows(result.posterior, tiny.question_rows(4), num_draws=2, seed=0)


# selective prediction ---------------------------------------------------------------------------------------------


def test_doubt_is_the_score_it_is_named_after():
    given = by_hand()
    np.testing.assert_allclose(doubt(given, "max_prob"), [0, 0.5, 0.5, 0.35])
    np.testing.assert_allclose(doubt(given, "entropy"), given.total)
    np.testing.assert_allclose(doubt(given, "mutual_information"), given.epistemic)
    with pytest.raises(ValueError, match=f"use {', '.join(SCORES)}"):
        doubt(given, "variance")


def test_the_threshold_answers_as_much_as_the_risk_allows():
    score, wrong = np.array([0.4, 0.1, 0.3, 0.2, 0.5]), np.array([False, False, True, False, True])
    # in order: right, right, wrong, right, wrong; error 0, 0, 1/3, 1/4, 2/5
    assert threshold(score, wrong, 0.2) == 0.2
    assert threshold(score, wrong, 0.25) == 0.4  # past 1/3, which is too much
    assert threshold(score, wrong, 0.4) == 0.5
    assert threshold(np.array([0.1, 0.2]), np.array([True, False]), 0.3) == -np.inf


def test_rows_that_tie_are_answered_together_or_not_at_all():
    score, wrong = np.array([0.1, 0.1, 0.1, 0.2]), np.array([False, True, False, False])
    assert threshold(score, wrong, 0.3) == 0.2
    assert threshold(score, wrong, 0.2) == -np.inf


def test_the_bound_is_that_of_clopper_and_pearson():
    assert upper_bound(0, 100, 0.05) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert upper_bound(5, 5, 0.05) == 1.0
    errors = torch.distributions.Binomial(40, torch.tensor(upper_bound(3, 40, 0.05), dtype=torch.float64))
    assert errors.log_prob(torch.arange(4.0)).exp().sum().item() == pytest.approx(0.05, rel=1e-4)


def test_a_guaranteed_threshold_keeps_its_promise_where_the_one_that_was_seen_does_not():
    risk, delta, failed = 0.1, 0.1, {None: 0, 0.1: 0}
    for seed in range(200):
        score = rng(seed).uniform(size=300)
        wrong = rng(seed + 1000).uniform(size=300) < score / 2  # the error of rows up to t is t / 4
        for given in failed:
            limit = threshold(score, wrong, risk, delta=given)
            failed[given] += max(limit, 0) / 4 > risk
    assert failed[0.1] <= 200 * delta and failed[None] > 60


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([0.1], [True, False], 0.1, None), "expected"),
        (([], [], 0.1, None), "N >= 1"),
        (([0.1], [True], 1.0, None), "risk=1.0 must lie between"),
        (([0.1], [True], 0.1, 0.0), "delta=0.0 must lie between"),
    ],
)
def test_thresholds_of_nothing_or_of_impossible_risks_are_refused(given, message):
    score, wrong, risk, delta = given
    with pytest.raises(ValueError, match=message):
        threshold(np.array(score), np.array(wrong, bool), risk, delta=delta)


# the tables -------------------------------------------------------------------------------------------------------


def test_strategies_are_held_against_random_with_the_same_seed():
    import active_learning

    rows = [
        {"seed": seed, "strategy": name, "labels": labels, "accuracy": value, "nll": 1 - value}
        for seed in (0, 1)
        for labels in (10, 20, 30)
        for name, value in {"random": 0.1 * seed, "bald": 0.1 * seed + 0.01 * labels * (seed + 1)}.items()
    ]
    table = active_learning.against_random(pd.DataFrame(rows))
    gains = np.array([0.25, 0.5])  # of labels 20 and 30, by seed; the start is the same for all
    assert table.loc["bald", ("accuracy", "mean")] == pytest.approx(gains.mean())
    assert table.loc["bald", ("nll", "mean")] == pytest.approx(-gains.mean())
    assert table.loc["bald", ("accuracy", "sem")] == pytest.approx(gains.std(ddof=1) / np.sqrt(2))


def test_rows_that_repeat_or_stand_in_test_are_left_out():
    rows = [{"question": q, "choices": ["a", "b"]} for q in ("One?", "two?", "one? ", "three?")]
    assert [row["question"] for row in datasets.distinct(rows, but=[rows[3]])] == ["One?", "two?"]


def test_trec_is_read_from_a_folder_or_the_one_below(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "trec_test.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "answer": 0}\n')
    assert datasets.trec(tmp_path, "test")[0]["answer"] == 0
    with pytest.raises(SystemExit, match=r"does not contain trec_train\.jsonl"):
        datasets.trec(tmp_path, "train")


def test_lines_of_other_settings_are_not_mixed(tmp_path):
    table, settings = tmp_path / "runs.csv", tmp_path / "settings.json"
    args = Namespace(steps=2, seeds=[0], out=tmp_path)
    assert run_settings.earlier_lines(args, table, settings) == []
    pd.DataFrame([{"seed": 0, "nll": 1.5}]).to_csv(table, index=False)
    run_settings.save_settings(args, settings)
    assert run_settings.earlier_lines(Namespace(steps=2, seeds=[0, 1], out="."), table, settings) == [
        {"seed": 0, "nll": 1.5}
    ]
    with pytest.raises(SystemExit, match="made with other settings"):
        run_settings.earlier_lines(Namespace(steps=3, seeds=[0], out="."), table, settings)
