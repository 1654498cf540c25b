"""The largest network near a rule's curve that is fast enough. Latency is measured, never modelled.

What times a network is passed in, so that this room needs no engine; analysis.profile.time_image is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from effnet.arch.cost import cost
from effnet.arch.shape import Shape
from effnet.arch.spec import NetworkSpec
from effnet.errors import ArgumentError
from effnet.scaling.candidates import Search

TRIALS = 6  # networks that are timed between the two that enclose a latency
AIM = 0.985  # of a latency: what a network that is to be timed next should take
ENOUGH = 0.97  # of a latency: nothing closer is looked for

Measure = Callable[[NetworkSpec], Any]  # returns an analysis.timing.Timing, or what has its median_ms and spread_ms


@dataclass(frozen=True)
class Trial:
    """A network that was timed."""

    spec: NetworkSpec
    macs: int
    median_ms: float
    spread_ms: tuple[float, float]


class Timer:
    """Times networks, each once."""

    def __init__(self, measure: Measure | None) -> None:
        self.measure = measure
        self.trials: dict[Shape, Trial] = {}  # names and unrounded factors make no other network

    def __call__(self, spec: NetworkSpec) -> Trial:
        """The measurement of this network."""
        if spec.shape not in self.trials:
            assert self.measure is not None
            timed = self.measure(spec)
            self.trials[spec.shape] = Trial(spec, cost(spec).macs, timed.median_ms, timed.spread_ms)
        return self.trials[spec.shape]


def within_latency(search: Search, latency: float, timer: Timer) -> NetworkSpec:
    """The largest timed network of the curve that is fast enough and meets the other limits.

    From the baseline up or down the curve until the latency lies between two networks; then between those.
    """
    limit = 1e3 * latency

    def median(phi: float) -> float:
        network = search.curve_spec(phi)
        return math.inf if network is None else timer(network).median_ms

    low = high = 0.0
    fast = slow = median(0.0)
    while slow <= limit and high < search.largest_phi:
        low, fast = high, slow
        high = min(high + 1, search.largest_phi)
        slow = median(high)
    while fast > limit and low > search.smallest_phi:
        high, slow = low, fast
        low = max(low - 1, search.smallest_phi)
        fast = median(low)
    if fast > limit:
        needs = "no network meets the other limits" if fast == math.inf else f"the smallest takes {fast:.2f} ms here"
        rule = f"cannot be met by the rule {search.rule.name or 'given'} from {search.baseline.name}: {needs}."
        raise ArgumentError("latency", latency, rule)
    if slow > limit:
        _close_in(search, (low + high) / 2, limit, timer)
    passed = [trial for trial in timer.trials.values() if trial.median_ms <= limit]
    return max(passed, key=lambda trial: trial.macs).spec


def _close_in(search: Search, phi: float, limit: float, timer: Timer) -> None:
    """Time networks near the curve between the largest fast and the smallest slow one: false position on the logs.

    `limit` in milliseconds. What was timed is in the timer.
    """
    import numpy as np

    networks = search.near(phi)
    for _ in range(TRIALS):
        trials = [trial for trial in timer.trials.values() if trial.median_ms > 0]
        fast = max((trial for trial in trials if trial.median_ms <= limit), key=lambda trial: trial.macs)
        slow = min(
            (trial for trial in trials if trial.median_ms > limit and trial.macs > fast.macs),
            key=lambda trial: trial.macs,
            default=None,
        )
        if slow is None or fast.median_ms >= ENOUGH * limit:
            return
        share = math.log(AIM * limit / fast.median_ms) / math.log(slow.median_ms / fast.median_ms)
        target = math.log(fast.macs) + min(max(share, 0.1), 0.9) * math.log(slow.macs / fast.macs)
        macs = networks.prices["macs"]
        between = (macs > fast.macs) & (macs < slow.macs)
        if not between.any():
            return
        timer(search.spec_at(networks, int(np.where(between, np.abs(np.log(macs) - target), np.inf).argmin())))
