"""The largest network near a rule's curve that is fast enough. Latency is measured, never modelled.

What times a network is passed in, so that this room needs no engine; analysis.profile.time_image is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from effnet.arch.blocks import Shape
from effnet.arch.cost import cost
from effnet.arch.spec import NetworkSpec
from effnet.errors import ArgumentError
from effnet.scaling import compound
from effnet.scaling.candidates import Candidates, Search

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


def within_latency(search: Search, latency: float, timer: Timer) -> tuple[NetworkSpec, Candidates | None]:
    """The largest timed network near the curve that is fast enough and meets the other limits.

    From the baseline up or down the curve until the latency lies between two networks; then between those. The way up
    ends at the network that makes most of the other limits: if that is fast enough, it is the answer.

    Returns:
        The network, and the candidates for the other limits where there are any.

    Raises:
        ArgumentError: the smallest network takes longer, or none meets the other limits.
    """
    limit = 1e3 * latency
    smallest, top = search.ends
    optimum, candidates = search.best() if search.budget.limits else (None, None)
    if optimum is not None:
        top = max(smallest, min(top, compound.implied(search.baseline, optimum, search.rule).macs))

    def median(phi: float) -> float:
        network = search.curve_spec(phi) if optimum is None or phi < top else None
        return timer(network or cast(NetworkSpec, optimum)).median_ms

    low = high = min(0.0, top)
    fast = slow = median(low)
    while slow <= limit and high < top:
        low, fast = high, slow
        high = min(high + search.doubling, top)
        slow = median(high)
    while fast > limit and low > smallest:
        high, slow = low, fast
        low = max(low - search.doubling, smallest)
        fast = median(low)
    if fast > limit:
        rule = f"cannot be met by the rule {search.rule.name or 'given'} from {search.baseline.name}: "
        raise ArgumentError("latency", latency, f"{rule}the smallest takes {fast:.2f} ms here.")
    if slow > limit:
        _close_in(search, (low + high) / 2, limit, timer)
    passed = [trial for trial in timer.trials.values() if trial.median_ms <= limit]
    return max(passed, key=lambda trial: trial.macs).spec, candidates


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
