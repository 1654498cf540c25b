"""The paper's claim in small: compound scaling beats scaling one dimension, at equal multiply-adds (Figures 3, 4, 8).

The paper's own comparison is not at equal cost: counted, its Table 7 sets 1.80 billion multiply-adds of compound
scaling against 1.45 to 1.58 of the others. Here every network of one cost has that cost within 2 %, by its rule for as
long as that goes, and the rest by width and resolution (triples.py). What a network grew in effect stands beside it.

Compound scaling is compared with each other line seed by seed; the noise is not pooled as in a search, for the lines
differ in it (deep plain networks are started well or badly).

Of Figure 4, which sweeps the width at several depths and resolutions, the factors are the caption's: 1.3 on resolution,
2 on depth (section 3.3 speaks of 2 on both).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from effnet.arch.cost import cost
from effnet.arch.spec import NetworkSpec
from effnet.errors import ArgumentError
from effnet.fields import positive_float
from effnet.scaling.compound import RULES, Rule
from effnet.searching.candidates import Limits, effective
from effnet.searching.halving import Difference, Job, Scores, paired_difference

SINGLE = ("width", "depth", "resolution")
COMPOUND, BASELINE = "compound", "baseline"
SWEPT_WIDTHS = (1.0, 1.4, 2.0)
SWEPT = ((1.0, 1.0), (1.0, 1.3), (2.0, 1.0), (2.0, 1.3))  # factors on depth and resolution
SLACK = 0.1  # by which a swept network may cost more than the lines' dearest
SWEEP_SEEDS = 2  # trainings of a network that only a sweep needs


@dataclass(frozen=True)
class Contestant:
    """A network of the comparison."""

    line: str  # baseline, width, depth, resolution, compound, or of which sweep it is
    factor: float  # what its multiply-adds were to be, the baseline's being 1
    network: NetworkSpec
    ratio: float  # what they are
    effective: tuple[float, float, float]  # depth, width and resolution, by what each does to the multiply-adds


@dataclass(frozen=True)
class Standing:
    """Compound scaling against one other line, at one cost."""

    line: str
    factor: float
    difference: Difference  # compound less the other

    @property
    def words(self) -> str:
        """Who is better, if anybody is."""
        if self.difference.low > 0:
            return f"compound is better than {self.line} alone"
        if self.difference.high < 0:
            return f"{self.line} alone is better than compound"
        return f"no difference between compound and {self.line} alone was found"


def contestants(
    baseline: NetworkSpec,
    rule: Rule,
    factor: float,
    *,
    largest: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Contestant]:
    """The baseline, the four lines at the square root of `factor` and at `factor`, then the sweeps of the width.

    Args:
        baseline: what is scaled.
        rule: of compound scaling.
        factor: what the multiply-adds grow by, more than 1.
        largest: pixels of the images themselves, beyond which there is nothing to see.
        progress: is told of each network of a line, which takes its time with large baselines.

    Raises:
        ArgumentError: a line has no network of the wanted cost.
    """
    if positive_float("factor", factor) <= 1:
        raise ArgumentError("factor", factor, "must be more than 1.")
    found = [_contestant(BASELINE, 1.0, baseline, baseline)]
    rules = {name: RULES[name] for name in SINGLE} | {COMPOUND: rule}
    wanted = list(itertools.product((factor**0.5, factor), rules.items()))
    for done, (ratio, (line, growth)) in enumerate(wanted):
        progress(done, len(wanted))
        network = Limits(ratio, largest).reach(baseline, growth)
        if network is None:
            seen = "" if largest is None else f" and at most {largest} px, which the images have"
            words = (
                f"cannot be reached by {line} from {baseline.name} at {baseline.resolution} px: no network within 2 %"
            )
            raise ArgumentError("factor", round(ratio, 3), f"{words}{seen}. Take another factor, or --resolution.")
        found.append(_contestant(line, ratio, baseline, network))
    progress(len(wanted), len(wanted))
    for (deep, fine), wide in itertools.product(SWEPT, SWEPT_WIDTHS):
        pixels = round(fine * baseline.resolution)
        if (deep, fine, wide) == (1, 1, 1) or pixels > (largest or pixels):
            continue
        network = dataclasses.replace(
            baseline,
            depth=deep * baseline.depth,
            width=wide * baseline.width,
            resolution=pixels,
            depth_rounding="nearest",
        )
        ratio = cost(network).macs / cost(baseline).macs
        if ratio <= factor * (1 + SLACK):
            found.append(_contestant(f"d={deep:g}, r={fine:g}", ratio, baseline, network))
    return found


def _contestant(line: str, factor: float, baseline: NetworkSpec, network: NetworkSpec) -> Contestant:
    network = dataclasses.replace(
        network, name=f"{baseline.name} {line} x{factor:.3g}" if factor != 1 else baseline.name
    )
    return Contestant(line, factor, network, cost(network).macs / cost(baseline).macs, effective(baseline, network))


def jobs(found: Sequence[Contestant], seeds: int, scores: Scores) -> tuple[Job, ...]:
    """The trainings that are missing: each seed of the lines in turn, then the sweeps."""
    lines = (BASELINE, *SINGLE, COMPOUND)
    main = [place for place, each in enumerate(found) if each.line in lines]
    swept = [place for place, each in enumerate(found) if each.line not in lines]
    wanted = [Job(0, seed, place) for seed in range(seeds) for place in main]
    wanted += [Job(0, seed, place) for seed in range(min(seeds, SWEEP_SEEDS)) for place in swept]
    return tuple(job for job in wanted if job not in scores)


def standings(found: Sequence[Contestant], seeds: int, scores: Mapping[Job, float]) -> list[Standing]:
    """Compound scaling against width, depth and resolution alone at each cost, intervals for all of them at once.

    Raises:
        ArgumentError: trainings are missing.
        MissingExtraError: SciPy is not installed.
    """
    if missing := jobs(found, seeds, scores):
        raise ArgumentError("scores", f"{len(scores)} trainings", f"lack {len(missing)} of the comparison.")
    places = {(each.line, each.factor): place for place, each in enumerate(found)}
    factors = sorted({each.factor for each in found if each.line == COMPOUND})
    rows = []
    for factor, line in itertools.product(factors, SINGLE):
        ours, other = places[COMPOUND, factor], places[line, factor]
        gaps = [scores[Job(0, seed, ours)] - scores[Job(0, seed, other)] for seed in range(seeds)]
        rows.append(Standing(line, factor, paired_difference(other, gaps, len(factors) * len(SINGLE))))
    return rows
