"""How far a run is, and how a time budget moves its end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effnet.training.schedule import Budget, Horizon


def test_progress_is_even_without_changes() -> None:
    horizon = Horizon.of(8)
    assert [horizon.progress(step) for step in (0, 2, 8)] == [0, 0.25, 1]


def test_a_moved_end_never_jumps() -> None:
    horizon = Horizon.of(100).moved(50, 75)
    assert horizon.progress(50) == Horizon.of(100).progress(50) == 0.5
    assert horizon.progress(62.5) == pytest.approx(0.75)  # type: ignore[arg-type]  # halfway between steps
    assert horizon.progress(75) == 1
    assert horizon.total == 75


@given(st.integers(1, 200), st.lists(st.tuples(st.integers(1, 300), st.integers(0, 400)), max_size=4))
def test_progress_grows_to_one(total: int, moves: list[tuple[int, int]]) -> None:
    horizon = Horizon.of(total)
    for step, end in sorted(moves):
        if step < horizon.total:
            horizon = horizon.moved(step, end)
    shares = [horizon.progress(step) for step in range(horizon.total + 1)]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == pytest.approx(1)


def test_a_budget_pays_for_validation_and_the_end() -> None:
    budget = Budget(seconds=100, validation=5, ending=15, steps_per_epoch=10)
    assert budget.steps(used=20, per_step=1.5) == 30  # 60 s left for steps of 1.5 s and a tenth of a validation


def test_small_drifts_are_left_alone() -> None:
    budget = Budget(100, 0, 0, 1000)
    horizon = Horizon.of(100)
    assert budget.replan(horizon, 50, used=50.5, per_step=1.0) is horizon
    assert budget.replan(horizon, 50, used=50, per_step=2.0).total == 75
    assert budget.replan(horizon, 50, used=200, per_step=2.0).total == 50


def test_steps_that_are_long_against_the_budget_do_not_carry_it_on_for_ever() -> None:
    budget, used, step = Budget(300, 0, 0, 1000), 20.0, 0
    horizon = Horizon.of(max(1, budget.steps(used, 16)))
    while step < horizon.total:
        step, used = step + 1, used + 40  # they take longer than was measured
        horizon = budget.replan(horizon, step, used, 40)
    assert (step, used) == (7, 300)
