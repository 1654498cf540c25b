"""What stops a run early, and what does not."""

from __future__ import annotations

import math

import pytest

from effnet.errors import TrainingError
from effnet.training.sanity_checks import CHECKED, SanityChecks


def feed(steps: int, *, loss: float = 1.0, spread: float = 0.1, gradient: float = 1.0, start: int = 0) -> None:
    checks = SanityChecks(10)
    for step in range(start, start + steps):
        checks.check(step, loss, spread, gradient)


def test_learning_and_guessing_go_on() -> None:
    feed(CHECKED, loss=1.0)
    feed(CHECKED, loss=math.log(10) + 0.5)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"loss": math.nan}, "the loss is nan at step 0.*learning rate"),
        ({"loss": math.inf}, "the loss is inf"),
        ({"gradient": math.nan}, "gradients are not finite"),
        ({"gradient": 0.0}, "gradients are zero.*damaged"),
        ({"spread": 0.0}, "same answer to every image"),
        ({"loss": math.log(10) + 2}, r"after 100 steps the loss is 4.30, and guessing has ln\(K\) = 2.30"),
    ],
)
def test_what_cannot_come_to_anything_stops(values: dict[str, float], words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        feed(CHECKED, **values)


def test_later_only_numbers_that_are_none_stop() -> None:
    feed(200, spread=0.0, gradient=0.0, loss=99, start=CHECKED)
    with pytest.raises(TrainingError, match="nan at step 500"):
        feed(1, loss=math.nan, start=500)
