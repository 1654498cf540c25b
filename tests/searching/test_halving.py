"""Successive halving and its verdict, on scores that are made up."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from effnet.searching.halving import (
    Job,
    Rung,
    differences_from,
    judge,
    make_rungs,
    missing_trainings,
    open_jobs,
    survivors,
)


def play(rungs: tuple[Rung, ...], score: dict[int, float], noise: float = 0.0, order: int = 0) -> dict[Job, float]:
    """All trainings of a search, done in any order that open_jobs allows."""
    done: dict[Job, float] = {}
    draw = random.Random(order)
    while jobs := open_jobs(rungs, done):
        job = draw.choice(jobs)
        luck = random.Random(f"{job}").gauss(0, noise)
        done[job] = score[job.candidate] + luck
    return done


def test_the_rungs() -> None:
    assert make_rungs(27, seeds=3, finalists=4) == (Rung(1 / 9, 27, 1), Rung(1 / 3, 9, 1), Rung(1, 4, 3))
    assert make_rungs(3, rungs=2, seeds=5) == (Rung(1 / 3, 3, 1), Rung(1, 3, 5))
    assert sum(rung.trainings for rung in make_rungs(27)) == 27 + 9 + 20


def test_the_best_third_goes_on() -> None:
    rungs = make_rungs(27, seeds=3)
    score = {candidate: -abs(candidate - 13.2) for candidate in range(27)}
    done = play(rungs, score)
    assert len(done) == sum(rung.trainings for rung in rungs)
    assert survivors(rungs, 1, done) == (13, 14, 12, 15, 11, 16, 10, 17, 9)
    assert set(survivors(rungs, 2, done) or ()) == {12, 13, 14, 15}
    found = judge(rungs, done)
    assert (found.best, found.level) == (13, (13,))
    assert found.between_rungs == (1, 1)
    assert found.between_seeds == (1, 1)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.tuples(*[st.integers(1, 4)] * 3), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_order_of_the_work_changes_nothing(ranks: list[int], sizes: tuple[int, int, int], order: int) -> None:
    rungs = make_rungs(len(ranks), rungs=sizes[0], seeds=sizes[1], finalists=sizes[2])
    score = {candidate: rank / 5 for candidate, rank in enumerate(ranks)}  # some of them tied
    done = play(rungs, score, noise=0.2 * (order % 2), order=order)
    assert done == play(rungs, score, noise=0.2 * (order % 2))
    assert missing_trainings(rungs, done) == (0,) * len(rungs)


def test_an_interrupted_search_goes_on_with_what_is_missing() -> None:
    rungs = make_rungs(9, rungs=2, seeds=2, finalists=3)
    done = play(rungs, {candidate: -candidate for candidate in range(9)})
    lost = Job(1, 1, 2)
    del done[lost]
    assert open_jobs(rungs, done) == (lost,)
    assert missing_trainings(rungs, done) == (0, 1)
    judged = judge(rungs, done)
    assert (judged.rung, judged.seeds, judged.complete) == (1, 1, False)
    early = {job: score for job, score in done.items() if job.rung == 0 and job.candidate != 4}
    assert open_jobs(rungs, early) == (Job(0, 0, 4),)
    assert survivors(rungs, 1, early) is None
    assert missing_trainings(rungs, early) == (1, 6)
    judged = judge(rungs, early)
    assert (judged.rung, judged.best, len(judged.means), judged.between_rungs) == (0, 0, 8, ())
    assert all(math.isinf(each.low) and each.level for each in judged.differences)
    assert judge(rungs, {}) is None


def test_differences_are_paired_and_corrected_for_their_number() -> None:
    rungs = (Rung(1, 3, 4),)
    table = {0: (0.90, 0.91, 0.89, 0.92), 1: (0.89, 0.905, 0.88, 0.91), 2: (0.91, 0.88, 0.90, 0.90)}
    found = judge(rungs, {Job(0, seed, c): scores[seed] for c, scores in table.items() for seed in range(4)})
    assert found.best == 0
    assert list(found.means) == [0, 2, 1]
    grid = np.array([table[0], table[1], table[2]])
    rest = grid - grid.mean(1, keepdims=True) - grid.mean(0) + grid.mean()
    reach = stats.studentized_range.ppf(0.95, 3, 2 * 3) * ((rest**2).sum() / 6 / 4) ** 0.5
    assert found.noise == pytest.approx(((rest**2).sum() / 6) ** 0.5)
    for each in found.differences:
        gap = grid[each.candidate].mean() - grid[0].mean()
        assert (each.low, each.value, each.high) == pytest.approx((gap - reach, gap, gap + reach))
    assert found.level == (0, 2, 1)


def test_who_left_within_the_noise_is_counted() -> None:
    rungs = (Rung(1 / 3, 6, 1), Rung(1, 2, 2))
    first = (0.80, 0.79, 0.785, 0.76, 0.755, 0.70)  # the second is the last that goes on
    last = {0: (0.90, 0.92), 1: (0.91, 0.91)}
    scores = {Job(0, 0, c): score for c, score in enumerate(first)}
    scores |= {Job(1, seed, c): values[seed] for c, values in last.items() for seed in range(2)}
    found = judge(rungs, scores)
    assert found.noise == pytest.approx(0.01)  # residuals of half a point, one degree of freedom
    assert found.close_calls == (1,)  # .79 - 1.96 x 1.414 x .01 = .762
    assert math.isnan(judge((Rung(1, 2, 1),), {Job(0, 0, c): 0.5 for c in range(2)}).noise)


def test_of_two_candidates_tukeys_interval_is_students() -> None:
    one, two = (0.90, 0.91, 0.89, 0.92), (0.89, 0.905, 0.88, 0.91)
    gaps = [b - a for a, b in zip(one, two, strict=True)]
    low, high = stats.t.interval(0.95, 3, statistics.fmean(gaps), stats.sem(gaps))
    (chosen,) = differences_from(0, {0: one, 1: two})  # of two there is one pair
    assert (chosen.low, chosen.high) == pytest.approx((low, high))


def test_a_training_that_came_to_nothing_hides_no_difference() -> None:
    table = {0: (0.90, 0.91, 0.89), 1: (0.80, 0.81, 0.80), 2: (0.89, 0.0, 0.89)}
    scores = {Job(0, seed, c): values[seed] for c, values in table.items() for seed in range(3)}
    found = judge((Rung(1, 3, 3),), scores)
    assert found.level == (0,)
    without = judge((Rung(1, 2, 3),), {job: score for job, score in scores.items() if job.candidate < 2})
    assert found.noise == without.noise
    broken = next(each for each in found.differences if each.candidate == 2)
    assert broken.low == broken.value == broken.high < -0.3
    table = {0: (0.9, 0.9, 0.0), 1: (0.59, 0.60, 0.58), 2: (0.58, 0.59, 0.60)}
    assert all(each.low == -math.inf and each.level for each in differences_from(0, table))


def test_equal_candidates_are_seldom_found_worse() -> None:
    """Of eight that are equally good, one is called worse than the best in at most 5 % of 400 searches, and luck."""
    wrong = 0
    for trial in range(400):
        draw = random.Random(trial)
        scores = {Job(0, seed, c): 0.8 + draw.gauss(0, 0.01) for c in range(8) for seed in range(5)}
        wrong += len(judge((Rung(1, 8, 5),), scores).level) < 8
    assert 0 < wrong <= 0.07 * 400


def test_the_level_set_holds_the_best_as_often_as_it_says() -> None:
    """Five candidates, two of them equally good: both are found level in at least 95 % of 150 searches."""
    rungs, hits = (Rung(1, 5, 5),), 0
    for trial in range(150):
        draw = random.Random(trial)
        true = (0.80, 0.80, 0.79, 0.78, 0.70)
        scores = {Job(0, seed, c): true[c] + draw.gauss(0, 0.01) for c in range(5) for seed in range(5)}
        found = judge(rungs, scores)
        hits += {0, 1} <= set(found.level)
        assert 4 not in found.level
    assert hits >= 0.95 * 150


def test_one_seed_tells_nothing_apart_and_one_candidate_has_no_order() -> None:
    found = judge((Rung(1, 3, 1),), {Job(0, 0, c): 0.1 + c for c in range(3)})
    assert found.level == (2, 1, 0)
    assert all(math.isinf(each.low) for each in found.differences)
    alone = judge((Rung(1, 1, 2),), {Job(0, seed, 0): 0.5 for seed in range(2)})
    assert (alone.level, alone.differences) == ((0,), ())
    assert math.isnan(alone.between_seeds[0])
