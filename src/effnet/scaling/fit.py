"""The network that fits a budget, and why it is this one.

Accuracy is not computed here. What is maximised is what accuracy grows with in the paper: multiply-adds along a rule's
curve. Published accuracies are quoted with their source.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

from effnet.arch.blocks import DepthRounding
from effnet.arch.cost import cost
from effnet.arch.spec import NetworkSpec
from effnet.arch.variants import VARIANTS, Variant, variant
from effnet.arch.variants import spec as make_spec
from effnet.errors import ArgumentError
from effnet.fields import LARGEST
from effnet.scaling.budget import SMALLEST_RESOLUTION, Budget, count_resources
from effnet.scaling.compound import RESOLUTION_STEP, RULES, Rule, implied_phis, read_rule
from effnet.scaling.curve import CountedNetworks, CurveSearch
from effnet.scaling.latency import Measure, NetworkTimer, TimedNetwork, within_latency

MORE = 1.1  # factor on the binding limit, to show what a little more of it would buy
BETTER = 1.02  # factor in multiply-adds by which another rule must win to be suggested
TIMES = ("median_ms", "spread_ms")
SMALLER = 0.25  # of the chosen network's multiply-adds; smaller published networks are not timed


@dataclass(frozen=True)
class ResourceUse:
    """The chosen network's use of a resource, in multiply-adds, parameters, bytes or seconds."""

    resource: str
    value: float
    limit: float | None

    @property
    def share(self) -> float | None:
        """The used share of the limit."""
        return None if self.limit is None else self.value / self.limit


@dataclass(frozen=True)
class PublishedFit:
    """A published variant within the budget."""

    variant: Variant
    spec: NetworkSpec  # at the resolution that meets the budget, with the baseline's classes and input channels

    @property
    def share(self) -> float:
        """The resolution, relative to that of its published accuracy."""
        return self.spec.resolution / self.variant.resolution

    @property
    def as_published(self) -> bool:
        """Whether its accuracy was published at this resolution."""
        return self.share == 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        row = self.variant
        values = {"name": row.name, "resolution": self.spec.resolution, "macs": cost(self.spec).macs}
        return values | {"published_top1": row.top1, "published_resolution": row.resolution, "source": row.source}


@dataclass(frozen=True)
class FittedSpec:
    """The network that fits a budget, and why."""

    spec: NetworkSpec
    phi: float  # by multiply-adds
    baseline: NetworkSpec
    rule: Rule
    budget: Budget
    uses: tuple[ResourceUse, ...]
    binding: str
    published: PublishedFit | None
    timings: tuple[TimedNetwork, ...] = ()
    candidates: CountedNetworks | None = field(default=None, repr=False)
    more: NetworkSpec | None = None  # what MORE of the binding resource would buy
    better: tuple[str, NetworkSpec] | None = None  # a named rule that gives more multiply-adds within this budget

    @property
    def use(self) -> float:
        """The share of the binding limit that is used, at most 1."""
        return max(use.share for use in self.uses if use.share is not None)

    @property
    def considered(self) -> int:
        """How many networks were considered."""
        return 0 if self.candidates is None else len(self.candidates["macs"])

    @property
    def is_published(self) -> bool:
        """Whether the chosen network is the published one, for which there may be weights."""
        return self.published is not None and self.published.spec.shape == self.spec.shape

    @property
    def timed(self) -> TimedNetwork | None:
        """The chosen network's timing, if it was measured."""
        return next((timed for timed in self.timings if timed.spec.shape == self.spec.shape), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        names = "name", "dropout", "drop_connect", "num_classes"
        values = {name: getattr(self.spec, name) for name in names} | _brief(self.spec)
        values |= {name: getattr(cost(self.spec), name) for name in ("params", "flops", "activations")}
        in_bytes = "memory", "train_memory", "file_size"
        values |= {f"{use.resource}_bytes": use.value for use in self.uses if use.resource in in_bytes}
        if timed := self.timed:
            values |= {"latency_ms": timed.median_ms, "latency_spread_ms": timed.spread_ms}
        return values | {
            "phi": self.phi,
            "binding": self.binding,
            "uses": [dataclasses.asdict(use) | {"share": use.share} for use in self.uses],
            "baseline": self.baseline.name,
            "rule": dataclasses.asdict(self.rule),
            "published": self.published and self.published.to_dict(),
            "more": self.more and _brief(self.more),
            "better_rule": self.better and {"rule": self.better[0]} | _brief(self.better[1]),
            "trials": [_brief(each.spec) | {name: getattr(each, name) for name in TIMES} for each in self.timings],
            "candidates": self.considered,
        }


def fit_spec(
    budget: Budget,
    from_: str | NetworkSpec = "b0",
    rule: str | Rule = "paper",
    *,
    num_classes: int | None = None,
    resolution_step: int = RESOLUTION_STEP,
    depth_rounding: DepthRounding | None = None,
    measure: Measure | None = None,
    among: Iterable[str] | None = None,
) -> FittedSpec:
    """The largest network by a rule that meets a budget.

    Args:
        budget: the limits, and which sizes are fixed.
        from_: the baseline to scale: a variant's name or a NetworkSpec.
        rule: "paper", "fast", "width", "depth", "resolution", "1.2,1.1,1.15", a rule file or a Rule.
        num_classes: outputs of the classifier; the baseline's by default.
        resolution_step: resolutions are multiples of this many pixels.
        depth_rounding: "ceil" or "nearest"; by default whichever fits better.
        measure: times a network on this machine; needed for a latency.
        among: choose only from these published variants, at their own resolution where possible.

    Raises:
        ArgumentError: a value is outside its range, or the budget cannot be met; the message says what the smallest
            network needs.
    """
    if not isinstance(budget, Budget):
        raise ArgumentError("budget", budget, "must be a Budget, as in effnet.Budget(macs='1G').")
    if budget.latency is not None and measure is None:
        raise ArgumentError("latency", budget.latency, "is measured: fit_spec needs `measure`, a timing function.")
    baseline = make_spec(from_, num_classes=num_classes)
    search = CurveSearch(budget, baseline, read_rule(rule), resolution_step, depth_rounding)
    timer = NetworkTimer(measure)
    published: PublishedFit | None
    if among is not None:
        published = best = _only_published(search, tuple(among), timer)
        chosen, everything = best.spec, None
    elif budget.latency is not None:
        chosen, everything = within_latency(search, cast(float, budget.latency), timer)
        published = _best_published(search, VARIANTS, timer, SMALLER * cost(chosen).macs)
    else:
        chosen, everything = search.best()
        published = _best_published(search, VARIANTS, timer)
    counts = count_resources(chosen, budget)
    uses = [ResourceUse(name, counts[name], budget.limits.get(name)) for name in budget.counted]
    if budget.latency is not None:
        uses.append(ResourceUse("latency", timer(chosen).median_ms / 1e3, cast(float, budget.latency)))
    binding = max(uses, key=lambda use: use.share or 0).resource
    only_counted = among is None and budget.latency is None
    return FittedSpec(
        spec=chosen,
        phi=implied_phis(baseline, chosen, search.rule).macs,
        baseline=baseline,
        rule=search.rule,
        budget=budget,
        uses=tuple(uses),
        binding=binding,
        published=published,
        timings=tuple(timer.timed.values()),
        candidates=everything,
        more=_more(search, binding, chosen) if only_counted else None,
        better=_better_rule(search, chosen) if only_counted else None,
    )


def _only_published(search: CurveSearch, among: Sequence[str], timer: NetworkTimer) -> PublishedFit:
    """The best of these published variants; an error if none meets the budget, or width or depth is fixed."""
    budget = search.budget
    for pin in ("width", "depth"):
        if getattr(budget, pin) is not None:
            raise ArgumentError(pin, getattr(budget, pin), "cannot be fixed: published networks have their own.")
    best = _best_published(search, among, timer)
    if best is None:
        pixels = f"{budget.resolution} px" if budget.resolution else f"{SMALLEST_RESOLUTION} px or more"
        raise ArgumentError("among", ", ".join(among), f"has no network that meets the budget at {pixels}.")
    return best


def _best_published(
    search: CurveSearch, among: Iterable[str], timer: NetworkTimer, floor: float = 0
) -> PublishedFit | None:
    """The variant within the budget with the highest published accuracy; at a lower resolution only if none fits.

    Fixed widths and depths are ignored, since published networks have their own. `floor`: multiply-adds below which
    networks are not timed, unless no other is fast enough.
    """
    found = [fit for row in map(variant, among) for fit in _fitting(row, search)[-1:]]
    if search.budget.latency is not None:
        found = _fast_enough(found, search, timer, floor)
    return max(found, key=lambda fit: (fit.share, fit.variant.top1), default=None)


def _fitting(row: Variant, search: CurveSearch) -> list[PublishedFit]:
    """A variant at each resolution up to its own at which it meets the computed limits, ascending."""
    budget, step = search.budget, search.step
    smaller = range(-(-SMALLEST_RESOLUTION // step) * step, row.resolution, step)
    most = budget.max_resolution or row.resolution
    allowed = [n for n in (*smaller, row.resolution) if n <= most and budget.resolution in (None, n)]
    outside: dict[str, Any] = {name: getattr(search.baseline, name) for name in ("num_classes", "in_channels")}

    def at(resolution: int) -> NetworkSpec:
        return make_spec(row.spec, resolution=resolution, **outside)

    def exceeds(resolution: int) -> bool:
        counts = count_resources(at(resolution), budget, tuple(budget.limits))
        return any(counts[name] > limit for name, limit in budget.limits.items())

    fitting = allowed[: bisect_left(allowed, True, key=exceeds)]  # costs do not fall with the resolution
    return [PublishedFit(row, at(resolution)) for resolution in fitting]


def _fast_enough(
    found: list[PublishedFit], search: CurveSearch, timer: NetworkTimer, floor: float
) -> list[PublishedFit]:
    """The fits that were timed and are fast enough: as published, or else one variant at a lower resolution."""

    def too_slow(fit: PublishedFit) -> bool:
        return timer(fit.spec).median_ms > 1e3 * cast(float, search.budget.latency)

    passed, slow = [], 0
    for fit in sorted(found, key=lambda fit: cost(fit.spec).macs):
        if not fit.as_published or cost(fit.spec).macs < floor:
            continue
        slow = slow + 1 if too_slow(fit) else 0
        if slow == 0:
            passed.append(fit)
        elif slow == 2:  # multiply-adds predict times only roughly, so stop after two slow networks in a row
            break
    if passed or not found:
        return passed
    if floor:
        return _fast_enough(found, search, timer, 0)
    smaller = _fitting(min(found, key=lambda fit: (-fit.share, cost(fit.spec).macs)).variant, search)
    return smaller[: bisect_left(smaller, True, key=too_slow)][-1:]


def _more(search: CurveSearch, binding: str, chosen: NetworkSpec) -> NetworkSpec | None:
    """The network that a little more of the binding resource would buy, if any."""
    limit: dict[str, Any] = {binding: min(LARGEST, int(MORE * search.budget.limits[binding]))}
    bought, _ = search.with_changes(budget=dataclasses.replace(search.budget, **limit)).best()
    return bought if cost(bought).macs > cost(chosen).macs else None


def _better_rule(search: CurveSearch, chosen: NetworkSpec) -> tuple[str, NetworkSpec] | None:
    """The named rule that reaches most multiply-adds, if clearly more; only rules that grow all three dimensions.

    A single dimension could grow without bound under a limit that does not depend on it.
    """
    most, better = BETTER * cost(chosen).macs, None
    for name, rule in RULES.items():
        if rule != search.rule and min(rule.growths) > 1:
            with suppress(ArgumentError):  # this rule cannot meet the budget
                network, _ = search.with_changes(rule=rule).best()
                if cost(network).macs > most:
                    most, better = cost(network).macs, (name, network)
    return better


def _brief(network: NetworkSpec) -> dict[str, Any]:
    names = "width", "depth", "resolution", "depth_rounding"
    return {name: getattr(network, name) for name in names} | {"macs": cost(network).macs}
