"""The rule of the choice: the best, or a cheaper one where the images show no difference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from effnet import spec as make_spec
from effnet.fitting.candidates import FitCandidate
from effnet.fitting.choice import Right, ScoreRecord, decide


def candidate(name: str, macs: float) -> FitCandidate:
    return FitCandidate(name, make_spec("lite0", resolution=32), "lite0", costs={"macs": macs})


def right(wrong: int, n: int = 1000) -> Right:
    """n images, of which the first ones are wrong."""
    return np.arange(n) >= wrong


LARGE, SMALL = candidate("large", 2e8), candidate("small", 1e8)


def test_a_clearly_better_network_is_taken() -> None:
    order, reason = decide([LARGE, SMALL], {"large": right(50), "small": right(100)}, "on 1,000 images")
    assert [each.name for each in order] == ["large", "small"]
    assert "+5.00 points" in reason


def test_a_cheaper_one_is_taken_where_no_difference_is_found() -> None:
    mixed = right(50).copy()
    mixed[40:60] = ~mixed[40:60]  # each gets ten right that the other gets wrong
    order, reason = decide([LARGE, SMALL], {"large": right(50), "small": mixed}, "on 1,000 images")
    assert order[0].name == "small"
    assert "no difference from large was found (+0.00 points" in reason


def test_a_cheaper_one_that_is_probably_worse_is_not_taken() -> None:
    """The interval holds 0, but the cheaper one gets eight more of a thousand wrong."""
    worse = right(50).copy()
    worse[50:70] = False
    worse[:12] = True
    order, reason = decide([LARGE, SMALL], {"large": right(50), "small": worse}, "on 1,000 images")
    assert order[0].name == "large"
    assert "cannot prove" in reason


def test_a_dearer_one_is_not_taken_for_nothing() -> None:
    order, _ = decide([SMALL, LARGE], {"large": right(51), "small": right(50)}, "on 1,000 images")
    assert order[0].name == "small"


@pytest.mark.parametrize("n", [1, 7, 8, 9, 1000])
def test_scores_are_read_as_they_were_written(tmp_path: Path, n: int) -> None:
    drawn = np.random.default_rng(n).random(n) < 0.5
    ScoreRecord(tmp_path / "choice.json").get("probe a", lambda: drawn)

    def again() -> Right:
        raise AssertionError("scored twice")

    assert (ScoreRecord(tmp_path / "choice.json").get("probe a", again) == drawn).all()
