"""How long a function takes: in turn with others, round after round.

Contestants take turns in one process, so that a disturbance meets all of them; the figure is the median. Needs no
torch.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from effnet.fields import positive_int

Progress = Callable[[int, int], None]  # rounds done, rounds in all

TURN, CALLS = 0.08, 200  # seconds that a turn of short calls lasts, and how many it has at most
FEWEST, MOST, ENOUGH = 7, 30, 20.0  # rounds, and seconds to fill where nobody says how many


@dataclass(frozen=True)
class Timing:
    """How long one thing took, run after run."""

    seconds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The run in the middle: a disturbed run does not move it."""
        return 1e3 * statistics.median(self.seconds)

    @property
    def mean_ms(self) -> float:
        """The average, disturbed runs included."""
        return 1e3 * statistics.fmean(self.seconds)

    @property
    def stdev_ms(self) -> float:
        """The sample's standard deviation; 0 for a single run."""
        return 1e3 * statistics.stdev(self.seconds) if len(self.seconds) > 1 else 0.0

    @property
    def spread_ms(self) -> tuple[float, float]:
        """The 10th and the 90th percentile."""
        if len(self.seconds) == 1:
            return self.median_ms, self.median_ms
        tenths = statistics.quantiles(self.seconds, n=10, method="inclusive")
        return 1e3 * tenths[0], 1e3 * tenths[-1]

    def to_dict(self) -> dict[str, Any]:
        """The statistics, and how many runs they are of."""
        low, high = self.spread_ms
        values = {"median_ms": self.median_ms, "p10_ms": low, "p90_ms": high}
        return values | {"mean_ms": self.mean_ms, "stdev_ms": self.stdev_ms, "runs": len(self.seconds)}


def measure(function: Callable[[], object], *, runs: int | None = None, warmup: int = 2) -> Timing:
    """Time `function`; see `time_rounds` for the other arguments."""
    return time_rounds(lambda: [seconds(function)], runs=runs, warmup=warmup)[0]


def measure_in_turn(
    functions: Mapping[str, Callable[[], object]],
    *,
    runs: int | None = None,
    warmup: int = 2,
    progress: Progress | None = None,
) -> dict[str, Timing]:
    """Time every function once in each round; see `time_rounds` for the other arguments."""
    timings = time_rounds(
        lambda: [seconds(function) for function in functions.values()], runs=runs, warmup=warmup, progress=progress
    )
    return dict(zip(functions, timings, strict=True))


def time_rounds(
    turn: Callable[[], Sequence[float]],
    *,
    runs: int | None = None,
    warmup: int = 2,
    progress: Progress | None = None,
) -> list[Timing]:
    """Run rounds, without torch's gradients where torch is in use, and gather the times of every contestant.

    Args:
        turn: one round; returns the seconds of each contestant.
        runs: rounds that count; by default as many as fit into 20 seconds, at least 7 and at most 30.
        warmup: rounds before them, which allocate memory and choose kernels.
        progress: called with the number of rounds done and of all, after each round.

    Raises:
        ArgumentError: `runs` or `warmup` is no positive whole number.
    """
    rounds = None if runs is None else positive_int("runs", runs)
    warmup = positive_int("warmup", warmup)
    torch: Any = sys.modules.get("torch")
    with torch.inference_mode() if torch else nullcontext():
        once = [seconds(turn) for _ in range(warmup)][-1]  # the first one also allocates
        rounds = rounds or min(MOST, max(FEWEST, int(ENOUGH / once)))
        laps = []
        for number in range(1, rounds + 1):
            laps.append(turn())
            if progress:
                progress(number, rounds)
    return [Timing(contestant) for contestant in zip(*laps, strict=True)]


def turn(function: Callable[[], object]) -> float:
    """The median seconds of a call, of as many as fit into TURN, after one that wakes threads and fills caches."""
    function()
    laps = [seconds(function)]
    while sum(laps) < TURN and len(laps) < CALLS:
        laps.append(seconds(function))
    return statistics.median(laps)


def seconds(function: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
