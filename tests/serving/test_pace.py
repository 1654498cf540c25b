"""Batch, delay and places from tables of times; expected values by the formulas of Little's law, written here."""

from __future__ import annotations

import pytest

from effnet.errors import ArgumentError
from effnet.serving.pace import SHARE, Pace, measure_pace

TIMES = {1: 0.004, 2: 0.007, 4: 0.012, 8: 0.018, 16: 0.034}


@pytest.mark.parametrize(("budget", "largest"), [(0.05, 8), (0.1, 16), (0.02, 2), (0.01, 1), (0.001, 1)])
def test_two_batches_fit_into_the_budget(budget: float, largest: int) -> None:
    pace = Pace(budget, TIMES, 16)
    assert pace.rate == pytest.approx(largest / TIMES[largest])
    assert pace.keeps == (2 * TIMES[1] <= SHARE * budget)
    if pace.keeps:
        assert pace.batch >= largest
        assert 2 * pace.batch / pace.rate <= SHARE * budget
        assert pace.places / pace.rate <= SHARE * budget
    else:
        assert (pace.batch, pace.places) == (1, 2)


def test_places_are_what_is_answered_within_the_budget() -> None:
    pace = Pace(0.1, TIMES, 16)
    assert pace.rate == pytest.approx(16 / 0.034)
    assert pace.places == int(0.8 * 0.1 * 16 / 0.034)
    assert pace.batch == 16


def test_nobody_waits_longer_than_a_full_batch_saves() -> None:
    assert Pace(1.0, TIMES, 16).delay == pytest.approx(0.004 - 0.034 / 16)
    assert Pace(0.086, TIMES, 16).delay == pytest.approx(0.8 * 0.086 - 2 * 0.034)  # what the budget leaves
    assert Pace(1.0, {1: 0.004, 2: 0.009}, 2).delay == 0  # no batch is cheaper than its images


def test_a_slower_server_lets_fewer_in_and_a_faster_one_more() -> None:
    pace = Pace(0.1, TIMES, 8)
    for _ in range(100):
        pace.observe(16, 0.34)  # a tenth of the speed that was measured
    assert pace.rate == pytest.approx(16 / 0.34, rel=0.01)
    assert pace.places == int(0.8 * 0.1 * pace.rate) == 3
    assert pace.batch == 1
    for _ in range(100):
        pace.observe(1, 0.004)
    assert pace.rate == pytest.approx(250, rel=0.01)
    assert pace.places // 2 == 9
    assert pace.batch == 8  # what the engine is made for


def test_only_what_fits_is_measured() -> None:
    asked = []

    def seconds_of(images: int) -> float:
        asked.append(images)
        return 0.01 * images

    pace = measure_pace(0.1, 16, seconds_of)
    assert asked == [1, 2, 4, 8]  # 8 take 0.08 s, twice that is more than 0.8 of 0.1 s
    assert pace.rate == pytest.approx(100)
    asked.clear()
    measure_pace(10.0, 12, seconds_of)
    assert asked == [1, 2, 4, 8, 12]


def test_times_begin_with_one_image() -> None:
    with pytest.raises(ArgumentError, match="times"):
        Pace(0.1, {2: 0.1}, 2)
