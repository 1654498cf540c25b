"""The networks that a search for alpha, beta and gamma compares.

Step 1 of the paper fixes phi = 1 and tries triples with alpha beta^2 gamma^2 near 2 (section 3.3). But with layers
rounded up, every alpha from 1.05 to 1.25 builds the same blocks on B0, and the networks that differ cost from 1.9 to
3.3 times the baseline, so the most expensive one would win. Departures from the paper:

- layers are rounded to the nearest number;
- width and resolution are adjusted until the multiply-adds are 2^phi times the baseline's, within 2 %; neither falls
  below the baseline's, since beta and gamma are at least 1;
- triples that build the same network are one candidate.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from effnet.arch.cost import cost, total_cost
from effnet.arch.spec import NetworkSpec
from effnet.errors import ArgumentError
from effnet.fields import positive_float, positive_int
from effnet.progress import SILENT, Progress
from effnet.scaling.budget import Budget, count_resources
from effnet.scaling.compound import Rule

PRODUCT = 2.0  # target for alpha beta^2 gamma^2
WITHIN = 0.02  # relative error of a candidate's multiply-adds
REACH = 0.15  # largest relative adjustment of width and resolution
WIDTHS = 121  # widths to try
LAST_MAP = 4  # pixels; 7 in the paper's networks at 224 px
LARGEST_GRID = 1_000_000  # triples


@dataclass(frozen=True)
class Candidate:
    """A network that a search compares to others of the same cost."""

    network: NetworkSpec
    triples: tuple[Rule, ...]  # all that build it; the first one needed the smallest adjustment
    ratio: float  # its multiply-adds, relative to the baseline's
    effective: tuple[float, float, float]  # see `effective_growth`

    @classmethod
    def of(cls, baseline: NetworkSpec, network: NetworkSpec, triples: Sequence[Rule]) -> Candidate:
        """The network that these triples build on a baseline."""
        ratio = cost(network).macs / cost(baseline).macs
        return cls(network, tuple(triples), ratio, effective_growth(baseline, network))


def adapt_baseline(baseline: NetworkSpec, native: int, resolution: int | None = None) -> NetworkSpec:
    """The baseline at a resolution that leaves room to scale: at most half the images' own.

    Upscaled images add no information, and four times the multiply-adds by resolution alone need images of twice the
    height and width. Strides become 1, from the stem on, until the last map has LAST_MAP pixels per side.

    Raises:
        ArgumentError: `resolution` is more than `native`, the images' shorter side in pixels.
    """
    if resolution is not None and positive_int("resolution", resolution) > native:
        raise ArgumentError("resolution", resolution, f"is beyond the images' own {native} px, which adds nothing.")
    size = min(baseline.resolution, max(1, native // 2)) if resolution is None else resolution
    network = dataclasses.replace(baseline, resolution=size)
    if size == baseline.resolution:
        return network
    rows = baseline.stages
    changes: list[dict[str, Any]] = [{"stem_stride": 1}, {"stem_pool": False}]
    for count in range(1, len(rows) + 1):
        unstrided = tuple(dataclasses.replace(row, stride=1) for row in rows[:count])
        changes.append({"stages": unstrided + rows[count:]})
    for change in changes:
        if network.final_size >= LAST_MAP:
            break
        network = dataclasses.replace(network, **change)
    return network


def grid(step: float = 0.05, tolerance: float = 0.1) -> tuple[Rule, ...]:
    """Every triple of 1 plus multiples of `step` whose alpha beta^2 gamma^2 is within `tolerance` of 2.

    Raises:
        ArgumentError: a value is outside its range, or there is no such triple.
    """
    step, tolerance = positive_float("step", step), positive_float("tolerance", tolerance)
    most = PRODUCT + tolerance
    alphas, squares = (int((top - 1) / step + 1e-9) for top in (most, math.sqrt(most)))
    if alphas * squares**2 > LARGEST_GRID:
        raise ArgumentError("step", step, f"gives more than {LARGEST_GRID:,} triples.")
    found = []
    for a, b, c in itertools.product(range(alphas + 1), range(squares + 1), range(squares + 1)):
        alpha, beta, gamma = (round(1 + number * step, 9) for number in (a, b, c))
        if abs(alpha * beta**2 * gamma**2 - PRODUCT) <= tolerance + 1e-9 and max(a, b, c):
            found.append(Rule(alpha, beta, gamma))
    if not found:
        raise ArgumentError("tolerance", tolerance, f"leaves no triple on a grid of {step:g}.")
    return tuple(found)


def build_candidates(
    baseline: NetworkSpec,
    rules: Sequence[Rule],
    *,
    phi: float = 1.0,
    largest: int | None = None,
    budget: Budget | None = None,
    progress: Progress = SILENT,
) -> tuple[Candidate, ...]:
    """The networks that triples build at 2^phi times the baseline's multiply-adds, those with most triples first.

    No candidate has more than `largest` pixels per side or exceeds a limit of `budget`; latency is not checked here.

    Raises:
        ArgumentError: a value is outside its range, or no candidate is left.
    """
    ratio = PRODUCT**phi
    found: dict[object, tuple[NetworkSpec, list[tuple[float, Rule]]]] = {}
    for place, rule in enumerate(rules, start=1):
        progress.update("building networks", place, len(rules))
        if built := build_network(baseline, rule, phi, ratio, largest):
            network, adjustment = built
            found.setdefault(network.shape, (network, []))[1].append((adjustment, rule))
    if not found:
        limit = "" if largest is None else f" and at most {largest} px"
        why = f"builds no network with {ratio:g} times the multiply-adds of {baseline.name}{limit}."
        raise ArgumentError("rules", "every triple", why)
    rows, prices = [], []
    limits = {} if budget is None else budget.limits
    for network, triples in found.values():
        if budget is not None:
            prices.append(count_resources(network, budget, tuple(limits)))
            if any(prices[-1][name] > limit for name, limit in limits.items()):
                continue
        triples.sort(key=lambda row: row[0])
        name = "-".join([baseline.name, *(f"{growth:g}" for growth in triples[0][1].growths)])
        network = dataclasses.replace(network, name=name)
        rows.append(Candidate.of(baseline, network, [rule for _, rule in triples]))
    if not rows:
        least = ", ".join(f"{min(price[name] for price in prices):,} {name}" for name in limits)
        raise ArgumentError("budget", limits, f"excludes all {len(found)} networks: they need at least {least}.")
    return tuple(sorted(rows, key=lambda row: (-len(row.triples), row.triples[0].growths)))


def build_network(
    baseline: NetworkSpec, rule: Rule, phi: float, ratio: float, largest: int | None = None
) -> tuple[NetworkSpec, float] | None:
    """The network of a triple, with width and resolution adjusted as little as possible to cost `ratio` baselines.

    Returns:
        The network and its adjustment: |log| of the factor on width plus |log| of the factor on resolution. None if no
        network of at most `largest` pixels is within WITHIN of that cost.
    """
    import numpy as np

    depth_factor, width_factor, resolution_factor = rule.factors(phi)
    depth, width = baseline.depth * depth_factor, baseline.width * width_factor
    pixels = baseline.resolution * resolution_factor
    base = dataclasses.replace(baseline, depth_rounding="nearest")
    most = min(largest or math.inf, (1 + REACH) * pixels)
    least = max(baseline.resolution if resolution_factor >= 1 else 1, (1 - REACH) * pixels)
    sides = range(math.ceil(least), math.floor(most) + 1)
    if not sides:
        return None
    widths = width * np.linspace(1 - REACH, 1 + REACH, WIDTHS)
    widths = widths[(widths >= baseline.width * (1 - 1e-9)) | (width_factor < 1)]
    w, r = (part.ravel() for part in np.meshgrid(widths, np.array(sides), indexing="ij"))
    macs = np.asarray(total_cost(base.shape_at(w, np.full_like(w, depth), r)).macs)
    adjustments = np.abs(np.log(w / width)) + np.abs(np.log(r / pixels))
    fits = np.abs(macs / (ratio * cost(baseline).macs) - 1) <= WITHIN
    if not fits.any():
        return None
    best = int(np.where(fits, adjustments, np.inf).argmin())
    network = dataclasses.replace(base, depth=depth, width=round(float(w[best]), 6), resolution=int(r[best]))
    return network, float(adjustments[best])


def effective_growth(baseline: NetworkSpec, network: NetworkSpec) -> tuple[float, float, float]:
    """Alpha, beta and gamma as built: the effect of a network's depth, width and resolution on the multiply-adds.

    Each is changed alone on the baseline: depth multiplies the multiply-adds by alpha, width by beta^2, resolution by
    gamma^2. So the numbers include rounding.
    """
    before = cost(baseline).macs
    deeper = dataclasses.replace(baseline, depth=network.depth, depth_rounding=network.depth_rounding)
    wider = dataclasses.replace(baseline, width=network.width)
    larger = dataclasses.replace(baseline, resolution=network.resolution)
    alpha, beta, gamma = (cost(each).macs / before for each in (deeper, wider, larger))
    return alpha, math.sqrt(beta), math.sqrt(gamma)
