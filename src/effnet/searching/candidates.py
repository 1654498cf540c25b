"""What the search for alpha, beta and gamma compares: networks, not triples.

The paper's step 1 fixes phi = 1 and looks at triples with alpha beta^2 gamma^2 near 2 (section 3.3). Rounding makes
many of them one and the same network: with layers rounded up, every alpha from 1.05 to 1.25 builds the same blocks on
B0. And those that differ cost from 1.9 to 3.3 times the baseline, so that the dearest would win. So here

- layers are rounded to the nearest number,
- width and resolution are moved until the multiply-adds are 2^phi times the baseline's, within 2 %, neither of them
  below the baseline's, since beta and gamma are at least 1,
- triples that build one network are one candidate, which lists them all, and what it grows in effect.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from effnet.arch.cost import cost, total_cost
from effnet.arch.spec import NetworkSpec, StageSpec
from effnet.errors import ArgumentError
from effnet.fields import positive_float, positive_int
from effnet.progress import SILENT, Progress
from effnet.scaling.budget import Budget, count_resources
from effnet.scaling.compound import Rule

PRODUCT = 2.0  # what alpha beta^2 gamma^2 should be
WITHIN = 0.02  # how far the multiply-adds of a candidate may be from the ratio
REACH = 0.15  # how far width and resolution may each be moved for that
WIDTHS = 121  # that are tried
LAST_MAP = 4  # pixels; the paper's networks end with 7 at 224 px
LARGEST_GRID = 1_000_000  # triples


@dataclass(frozen=True)
class Candidate:
    """A network that a search compares with others of the same cost."""

    network: NetworkSpec
    triples: tuple[Rule, ...]  # that build it; the one that had to be moved least comes first
    ratio: float  # its multiply-adds over the baseline's
    effective: tuple[float, float, float]  # its depth, width and resolution, by what each does to the multiply-adds

    @classmethod
    def of(cls, baseline: NetworkSpec, network: NetworkSpec, triples: Sequence[Rule]) -> Candidate:
        """A network that these triples build on a baseline."""
        ratio = cost(network).macs / cost(baseline).macs
        return cls(network, tuple(triples), ratio, effective(baseline, network))

    @property
    def rule(self) -> Rule:
        """The triple that stands for it."""
        return self.triples[0]


def suited(baseline: NetworkSpec, native: int, resolution: int | None = None) -> NetworkSpec:
    """The baseline where images of `native` pixels leave room to scale: at half of that, with fewer strides if need be.

    A resolution beyond the images' own carries nothing, and four times the multiply-adds by resolution alone is twice
    the pixels. Strides are given up from the front until the last map has LAST_MAP pixels a side.

    Args:
        baseline: the network.
        native: pixels of the images' shorter side.
        resolution: at which it starts; by default its own or half of the images', whichever is less.

    Raises:
        ArgumentError: `resolution` is beyond the images' own.
    """
    if resolution is not None and positive_int("resolution", resolution) > native:
        raise ArgumentError("resolution", resolution, f"is beyond the images' own {native} px: that carries nothing.")
    size = min(baseline.resolution, max(1, native // 2)) if resolution is None else resolution
    network = dataclasses.replace(baseline, resolution=size)
    if size == baseline.resolution:
        return network
    fewer: list[dict[str, Any]] = [{"stem_stride": 1}, {"stem_pool": False}]
    fewer += [{"stages": _unstrided(baseline, number)} for number in range(1, len(baseline.stages) + 1)]
    for change in fewer:
        if network.final_size >= LAST_MAP:
            break
        network = dataclasses.replace(network, **change)
    return network


def _unstrided(baseline: NetworkSpec, number: int) -> tuple[StageSpec, ...]:
    """The rows, the first `number` of them without strides."""
    rows = baseline.stages
    return tuple(dataclasses.replace(row, stride=1) for row in rows[:number]) + rows[number:]


def grid(step: float = 0.05, tolerance: float = 0.1, product: float = PRODUCT) -> tuple[Rule, ...]:
    """Every triple of multiples of `step` from 1 on with a product of alpha beta^2 gamma^2 within `tolerance`.

    Raises:
        ArgumentError: a value is outside its range, or there is no such triple.
    """
    step, tolerance = positive_float("step", step), positive_float("tolerance", tolerance)
    most = product + tolerance
    alphas, squares = (int((top - 1) / step + 1e-9) for top in (most, math.sqrt(most)))
    if alphas * squares**2 > LARGEST_GRID:
        raise ArgumentError("step", step, f"makes more than {LARGEST_GRID:,} triples.")
    found = []
    for a, b, c in itertools.product(range(alphas + 1), range(squares + 1), range(squares + 1)):
        growths = (round(1 + number * step, 9) for number in (a, b, c))
        alpha, beta, gamma = growths
        if abs(alpha * beta**2 * gamma**2 - product) <= tolerance + 1e-9 and max(a, b, c):
            found.append(Rule(alpha, beta, gamma))
    if not found:
        raise ArgumentError("tolerance", tolerance, f"leaves no triple on a grid of {step:g}.")
    return tuple(found)


def candidates(
    baseline: NetworkSpec,
    rules: Sequence[Rule],
    *,
    phi: float = 1.0,
    largest: int | None = None,
    budget: Budget | None = None,
    progress: Progress = SILENT,
) -> tuple[Candidate, ...]:
    """The networks that triples build on a baseline at equal cost, those with the most triples first.

    Args:
        baseline: what is scaled.
        rules: the triples.
        phi: the exponent; the paper's step 1 has 1. All candidates have 2^phi times the baseline's multiply-adds.
        largest: pixels: the images' own size; more of them carry nothing.
        budget: limits that a candidate has to meet; a latency among them is left to the caller.
        progress: follows the work.

    Raises:
        ArgumentError: a value is outside its range, or no candidate is left.
    """
    wanted = PRODUCT**phi
    found: dict[object, tuple[NetworkSpec, list[tuple[float, Rule]]]] = {}
    for place, rule in enumerate(rules, start=1):
        progress.update("building triples", place, len(rules))
        if made := build(baseline, rule, phi, wanted, largest):
            network, moved = made
            found.setdefault(network.shape, (network, []))[1].append((moved, rule))
    if not found:
        why = "" if largest is None else f" and at most {largest} px"
        raise ArgumentError(
            "rules", "every triple", f"misses {wanted:g} times the multiply-adds of {baseline.name}{why}."
        )
    fit = [each for each in found.values() if budget is None or _meets(each[0], budget)]
    if not fit and budget is not None:
        prices = [count_resources(network, budget, budget.counted) for network, _ in found.values()]
        least = ", ".join(f"{min(price[name] for price in prices):,} {name}" for name in budget.limits)
        words = f"is met by none of the {len(found)} networks: they take at least {least}."
        raise ArgumentError("budget", budget.limits, words)
    rows = []
    for network, triples in fit:
        triples.sort(key=lambda row: row[0])
        name = f"{baseline.name}-" + "-".join(f"{growth:g}" for growth in triples[0][1].growths)
        network = dataclasses.replace(network, name=name)
        rows.append(Candidate.of(baseline, network, [rule for _, rule in triples]))
    return tuple(sorted(rows, key=lambda row: (-len(row.triples), row.rule.growths)))


def build(
    baseline: NetworkSpec, rule: Rule, phi: float, ratio: float, largest: int | None = None
) -> tuple[NetworkSpec, float] | None:
    """The network of a triple at `ratio` times the baseline's multiply-adds, and how far it was moved for that.

    Args:
        baseline: what is scaled.
        rule: the triple.
        phi: the exponent.
        ratio: what the multiply-adds grow by.
        largest: pixels of the images themselves; more of them carry nothing.

    Returns:
        None where no network within WITHIN is found; how far is the sum of the absolute logarithms of the factors by
        which width and resolution were moved.
    """
    import numpy as np

    deep, wide, fine = rule.factors(phi)
    depth, width, pixels = baseline.depth * deep, baseline.width * wide, baseline.resolution * fine
    base = dataclasses.replace(baseline, depth_rounding="nearest")
    most = min(largest or math.inf, (1 + REACH) * pixels)
    least = max(baseline.resolution if fine >= 1 else 1, (1 - REACH) * pixels)
    sizes = list(range(math.ceil(least), math.floor(most) + 1))
    if not sizes:
        return None
    widths = width * np.linspace(1 - REACH, 1 + REACH, WIDTHS)
    widths = widths[(widths >= baseline.width * (1 - 1e-9)) | (wide < 1)]
    w, r = (part.ravel() for part in np.meshgrid(widths, np.array(sizes), indexing="ij"))
    macs = np.asarray(total_cost(base.shape_at(w, np.full_like(w, depth), r)).macs)
    moved = np.abs(np.log(w / width)) + np.abs(np.log(r / pixels))
    fits = np.abs(macs / (ratio * cost(baseline).macs) - 1) <= WITHIN
    if not fits.any():
        return None
    place = int(np.where(fits, moved, np.inf).argmin())
    network = dataclasses.replace(base, depth=depth, width=round(float(w[place]), 6), resolution=int(r[place]))
    return network, float(moved[place])


def effective(baseline: NetworkSpec, network: NetworkSpec) -> tuple[float, float, float]:
    """What a network's depth, width and resolution each do to the multiply-adds, in the terms of alpha, beta, gamma.

    Each is changed alone on the baseline: depth multiplies the multiply-adds by alpha, width by beta^2, resolution by
    gamma^2. So rounding is in these numbers.
    """
    before = cost(baseline).macs
    deep = dataclasses.replace(baseline, depth=network.depth, depth_rounding=network.depth_rounding)
    wide = dataclasses.replace(baseline, width=network.width)
    fine = dataclasses.replace(baseline, resolution=network.resolution)
    alpha, beta, gamma = (cost(each).macs / before for each in (deep, wide, fine))
    return alpha, math.sqrt(beta), math.sqrt(gamma)


def _meets(network: NetworkSpec, budget: Budget) -> bool:
    prices = count_resources(network, budget, budget.counted)
    return all(prices[name] <= limit for name, limit in budget.limits.items())
