"""Finds the largest network near a rule's curve that is fast enough. Latency is measured, never modelled.

The timing function is passed in, so that nothing here needs an engine; `effnet scale --latency` passes
metrics.timing.time_network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np

from effnet.arch.blocks import Shape
from effnet.arch.cost import cost
from effnet.arch.spec import NetworkSpec
from effnet.errors import ArgumentError
from effnet.scaling.compound import implied_phis
from effnet.scaling.curve import CountedNetworks, CurveSearch

MOST_BETWEEN = 6  # networks to time between the two that enclose the latency, at most
AIM = 0.985  # share of the latency that the next network to time should take
ENOUGH = 0.97  # share of the latency that ends the search

Measure: TypeAlias = Callable[[NetworkSpec], Any]  # returns a Timing, or anything with median_ms and spread_ms


@dataclass(frozen=True)
class TimedNetwork:
    """A network that was timed."""

    spec: NetworkSpec
    macs: int
    median_ms: float
    spread_ms: tuple[float, float]


class NetworkTimer:
    """Times each network once."""

    def __init__(self, measure: Measure | None) -> None:
        self.measure = measure
        self.timed: dict[Shape, TimedNetwork] = {}  # names and unrounded factors do not make another network

    def __call__(self, spec: NetworkSpec) -> TimedNetwork:
        """The measurement of this network."""
        if spec.shape not in self.timed:
            assert self.measure is not None
            timing = self.measure(spec)
            self.timed[spec.shape] = TimedNetwork(spec, cost(spec).macs, timing.median_ms, timing.spread_ms)
        return self.timed[spec.shape]


def within_latency(
    search: CurveSearch, latency: float, timer: NetworkTimer
) -> tuple[NetworkSpec, CountedNetworks | None]:
    """The largest timed network near the curve that is fast enough and meets the other limits.

    It walks the curve from the baseline, up or down, until two networks enclose the latency, and then searches between
    them. The walk up ends at the network that makes most of the other limits; if fast enough, that is the result.

    Args:
        search: the curve, with the other limits.
        latency: seconds for one image.
        timer: times networks.

    Returns:
        The network, and all networks that were considered for the other limits, if any.

    Raises:
        ArgumentError: the smallest network takes longer, or none meets the other limits.
    """
    limit = 1e3 * latency
    smallest, top = search.ends
    optimum, considered = search.best() if search.budget.limits else (None, None)
    if optimum is not None:
        top = max(smallest, min(top, implied_phis(search.baseline, optimum, search.rule).macs))

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
        _close_in(search.near((low + high) / 2), search, limit, timer)
    passed = [timed for timed in timer.timed.values() if timed.median_ms <= limit]
    return max(passed, key=lambda timed: timed.macs).spec, considered


def _close_in(networks: CountedNetworks, search: CurveSearch, limit: float, timer: NetworkTimer) -> None:
    """Time networks between the largest fast and the smallest slow one, by false position on logarithms."""
    macs = networks["macs"]
    for _ in range(MOST_BETWEEN):
        every = [timed for timed in timer.timed.values() if timed.median_ms > 0]
        fast = max((timed for timed in every if timed.median_ms <= limit), key=lambda timed: timed.macs)
        slower = (timed for timed in every if timed.median_ms > limit and timed.macs > fast.macs)
        slow = min(slower, key=lambda timed: timed.macs, default=None)
        if slow is None or fast.median_ms >= ENOUGH * limit:
            return
        between = (macs > fast.macs) & (macs < slow.macs)
        if not between.any():
            return
        share = math.log(AIM * limit / fast.median_ms) / math.log(slow.median_ms / fast.median_ms)
        target = math.log(fast.macs) + min(max(share, 0.1), 0.9) * math.log(slow.macs / fast.macs)
        timer(search.spec_at(networks, int(np.where(between, np.abs(np.log(macs) - target), np.inf).argmin())))
