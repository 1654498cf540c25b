"""The network that fits a budget, and why it is this one.

Accuracy is not computed here. What is maximised is what the paper grows accuracy with: multiply-adds along the curve of
a rule. Published accuracies are quoted with their source.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from effnet.arch.blocks import DepthRounding
from effnet.arch.cost import cost
from effnet.arch.spec import NetworkSpec
from effnet.arch.variants import VARIANTS, Variant, variant
from effnet.arch.variants import spec as make_spec
from effnet.errors import ArgumentError
from effnet.fields import LARGEST
from effnet.scaling import compound
from effnet.scaling.budget import SMALLEST_RESOLUTION, Budget, tell
from effnet.scaling.candidates import Candidates, Search
from effnet.scaling.compound import RESOLUTION_STEP, RULES, Rule, read_rule
from effnet.scaling.latency import Measure, Timer, Trial, within_latency

MORE = 1.1  # what a little more of the binding constraint would buy
BETTER = 1.02  # multiply-adds by which another rule must win to be named
SMALLER = 0.25  # times the chosen network's multiply-adds: a published one below that is not timed


@dataclass(frozen=True)
class Use:
    """A resource as the chosen network uses it, in multiply-adds, numbers, bytes or seconds."""

    resource: str
    value: float
    limit: float | None

    @property
    def share(self) -> float | None:
        """Of the limit."""
        return None if self.limit is None else self.value / self.limit


@dataclass(frozen=True)
class Published:
    """A published variant within the budget."""

    variant: Variant
    resolution: int  # at which it meets the budget
    macs: int

    @property
    def share(self) -> float:
        """Of the resolution that its accuracy was published at."""
        return self.resolution / self.variant.resolution

    @property
    def as_published(self) -> bool:
        """Whether its accuracy was published at this resolution."""
        return self.resolution == self.variant.resolution


@dataclass(frozen=True)
class Fit:
    """The network that fits a budget, and why it is this one."""

    spec: NetworkSpec
    phi: float  # by multiply-adds
    baseline: NetworkSpec
    rule: Rule
    budget: Budget
    uses: tuple[Use, ...]
    binding: str
    published: Published | None
    more: NetworkSpec | None = None  # what MORE of the binding resource would buy
    better: tuple[str, NetworkSpec] | None = None  # a named rule that makes more of this budget
    trials: tuple[Trial, ...] = ()
    candidates: Candidates | None = field(default=None, repr=False)

    @property
    def use(self) -> float:
        """The share of the binding constraint that is used, at most 1."""
        return max(use.share for use in self.uses if use.share is not None)

    @property
    def is_published(self) -> bool:
        """Whether the chosen network is the published one, for which there may be weights."""
        shown = self.published
        return (
            shown is not None and _published_spec(shown.variant, self.spec, shown.resolution).shape == self.spec.shape
        )

    @property
    def timed(self) -> Trial | None:
        """How fast the chosen network was, where that was measured."""
        return next((trial for trial in self.trials if trial.spec.shape == self.spec.shape), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        price = cost(self.spec)
        names = "name", "width", "depth", "resolution", "depth_rounding", "dropout", "drop_connect", "num_classes"
        values = {name: getattr(self.spec, name) for name in names}
        values |= {"phi": self.phi, "params": price.params, "macs": price.macs, "flops": price.flops}
        values["activations"] = price.activations
        units = {"memory": "memory_bytes", "train_memory": "train_memory_bytes", "file_size": "file_size_bytes"}
        values |= {units[use.resource]: use.value for use in self.uses if use.resource in units}
        chosen = self.timed
        if chosen is not None:
            values |= {"latency_ms": chosen.median_ms, "latency_spread_ms": chosen.spread_ms}
        shown = self.published
        return values | {
            "binding": self.binding,
            "uses": [dataclasses.asdict(use) | {"share": use.share} for use in self.uses],
            "baseline": self.baseline.name,
            "rule": {
                "name": self.rule.name,
                "alpha": self.rule.alpha,
                "beta": self.rule.beta,
                "gamma": self.rule.gamma,
            },
            "published": shown
            and {
                "name": shown.variant.name,
                "resolution": shown.resolution,
                "macs": shown.macs,
                "published_top1": shown.variant.top1,
                "published_resolution": shown.variant.resolution,
                "source": shown.variant.source,
            },
            "more": self.more and _brief(self.more),
            "better_rule": self.better and {"rule": self.better[0]} | _brief(self.better[1]),
            "trials": [
                _brief(trial.spec) | {"median_ms": trial.median_ms, "spread_ms": trial.spread_ms}
                for trial in self.trials
            ],
            "candidates": 0 if self.candidates is None else len(self.candidates),
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
) -> Fit:
    """The largest network of a rule that meets a budget.

    Args:
        budget: the limits, and what is settled beforehand.
        from_: the baseline that is scaled: a variant's name or a NetworkSpec.
        rule: "paper", "fast", "width", "depth", "resolution", "1.2,1.1,1.15", a rule file or a Rule.
        num_classes: outputs of the classifier; the baseline's by default.
        resolution_step: resolutions are multiples of this many pixels.
        depth_rounding: "ceil" or "nearest"; by default whichever fits better.
        measure: times a network on this machine; a latency needs it.
        among: choose only from these published variants, at their own resolution where possible.

    Raises:
        ArgumentError: a value is outside its range, or the budget cannot be met; the message says what the smallest
            network needs.
    """
    if not isinstance(budget, Budget):
        raise ArgumentError("budget", budget, "must be a Budget, as in effnet.Budget(macs='1G').")
    baseline = make_spec(from_, num_classes=num_classes)
    growth = read_rule(rule)
    if budget.latency is not None and measure is None:
        raise ArgumentError(
            "latency", budget.latency, "is measured, so fit_spec needs `measure`; effnet scale has one."
        )
    timer = Timer(measure)
    search = Search(budget, baseline, growth, resolution_step, depth_rounding)
    if among is not None:
        known = tuple(among)
        for pin in ("width", "depth"):
            if getattr(budget, pin) is not None:
                raise ArgumentError(pin, getattr(budget, pin), "cannot be settled: a published network has its own.")
        alternative = _best_published(budget, baseline, resolution_step, known, timer)
        if alternative is None:
            pixels = f"{budget.resolution} px" if budget.resolution else f"{SMALLEST_RESOLUTION} px or more"
            raise ArgumentError("among", ", ".join(known), f"has no network that meets the budget at {pixels}.")
        chosen = _published_spec(alternative.variant, baseline, alternative.resolution)
        return _report(chosen, None, baseline, growth, budget, alternative, timer)
    if budget.latency is not None:
        chosen, candidates = within_latency(search, cast(float, budget.latency), timer)
        floor = SMALLER * cost(chosen).macs
        alternative = _best_published(budget, baseline, resolution_step, tuple(VARIANTS), timer, floor)
        return _report(chosen, candidates, baseline, growth, budget, alternative, timer)
    chosen, candidates = search.best()
    alternative = _best_published(budget, baseline, resolution_step, tuple(VARIANTS), timer)
    report = _report(chosen, candidates, baseline, growth, budget, alternative, timer)
    return dataclasses.replace(report, more=_more(search, report), better=_better_rule(search, chosen))


def _best_published(
    budget: Budget,
    baseline: NetworkSpec,
    step: int,
    among: Sequence[str],
    timer: Timer,
    floor: float = 0,
) -> Published | None:
    """The published variant within the budget with the highest published accuracy; a smaller image only if none fits.

    Width and depth that are settled do not count: a published network has the coefficients that it has. `floor`:
    multiply-adds below which no network needs to be timed, unless no other is fast enough.
    """
    found = [
        _published(row, baseline, pixels)
        for row in map(variant, among)
        for pixels in _fitting(row, budget, baseline, step)[-1:]
    ]
    if budget.latency is not None:
        found = _fast_enough(found, budget, baseline, step, timer, floor)
    return max(found, key=lambda shown: (shown.share, shown.variant.top1), default=None)


def _fitting(row: Variant, budget: Budget, baseline: NetworkSpec, step: int) -> list[int]:
    """The resolutions, growing, at which a variant meets what is priced by formula; beyond its own there is none."""
    smaller = range(-(-SMALLEST_RESOLUTION // step) * step, row.resolution, step)
    most = budget.max_resolution or row.resolution
    allowed = [n for n in (*smaller, row.resolution) if n <= most and budget.resolution in (None, n)]

    def exceeds(resolution: int) -> bool:
        prices = tell(_published_spec(row, baseline, resolution), budget, tuple(budget.limits))
        return any(prices[name] > limit for name, limit in budget.limits.items())

    return allowed[: bisect_left(allowed, True, key=exceeds)]  # no price falls when the resolution grows


def _fast_enough(
    found: list[Published], budget: Budget, baseline: NetworkSpec, step: int, timer: Timer, floor: float
) -> list[Published]:
    """Those of `found` that were timed and are fast enough: as published, or else one variant with smaller images."""

    def too_slow(shown: Published) -> bool:
        network = _published_spec(shown.variant, baseline, shown.resolution)
        return timer(network).median_ms > 1e3 * cast(float, budget.latency)

    passed, slow = [], 0
    for shown in sorted(found, key=lambda shown: shown.macs):
        if not shown.as_published or shown.macs < floor:
            continue
        slow = slow + 1 if too_slow(shown) else 0
        if slow == 0:
            passed.append(shown)
        elif slow == 2:  # multiply-adds order times roughly: one slow network says little, two in a row enough
            break
    if passed or not found:
        return passed
    if floor:
        return _fast_enough(found, budget, baseline, step, timer, 0)
    row = min(found, key=lambda shown: (-shown.share, shown.macs)).variant
    smaller = [_published(row, baseline, pixels) for pixels in _fitting(row, budget, baseline, step)]
    return smaller[: bisect_left(smaller, True, key=too_slow)][-1:]


def _published(row: Variant, baseline: NetworkSpec, resolution: int) -> Published:
    return Published(row, resolution, cost(_published_spec(row, baseline, resolution)).macs)


def _published_spec(row: Variant, baseline: NetworkSpec, resolution: int) -> NetworkSpec:
    """A variant with the baseline's classes and channels of the input."""
    classes, channels = baseline.num_classes, baseline.in_channels
    return make_spec(row.spec, resolution=resolution, num_classes=classes, in_channels=channels)


def _more(search: Search, report: Fit) -> NetworkSpec | None:
    """The network that a little more of the binding resource would buy, if it buys anything."""
    name = report.binding
    limit: dict[str, Any] = {name: min(LARGEST, int(MORE * search.budget.limits[name]))}
    larger = dataclasses.replace(search.budget, **limit)
    bought = Search(larger, search.baseline, search.rule, search.step, search.given).best()[0]
    return bought if cost(bought).macs > cost(report.spec).macs else None


def _better_rule(search: Search, chosen: NetworkSpec) -> tuple[str, NetworkSpec] | None:
    """The named rule that reaches most multiply-adds, if it reaches clearly more.

    Only rules that grow all three dimensions: one alone can be grown without end under a limit that does not see it.
    """
    found = []
    for name, rule in RULES.items():
        if rule == search.rule or min(rule.growths) <= 1:
            continue
        try:
            network, _ = Search(search.budget, search.baseline, rule, search.step, search.given).best()
        except ArgumentError:
            continue  # this rule cannot meet the budget
        found.append((cost(network).macs, name, network))
    if not found:
        return None
    macs, name, network = max(found, key=lambda entry: entry[0])
    return (name, network) if macs > BETTER * cost(chosen).macs else None


def _report(
    chosen: NetworkSpec,
    candidates: Candidates | None,
    baseline: NetworkSpec,
    rule: Rule,
    budget: Budget,
    alternative: Published | None,
    timer: Timer,
) -> Fit:
    prices: dict[str, float] = dict(tell(chosen, budget))
    uses = [Use(name, prices[name], budget.limits.get(name)) for name in budget.priced]
    if budget.latency is not None:
        uses.append(Use("latency", timer(chosen).median_ms / 1e3, cast(float, budget.latency)))
    binding = max((use for use in uses if use.share is not None), key=lambda use: use.share or 0).resource
    phi = compound.implied(baseline, chosen, rule).macs
    trials = tuple(timer.trials.values())
    return Fit(chosen, phi, baseline, rule, budget, tuple(uses), binding, alternative, None, None, trials, candidates)


def _brief(network: NetworkSpec) -> dict[str, Any]:
    names = "width", "depth", "resolution", "depth_rounding"
    return {name: getattr(network, name) for name in names} | {"macs": cost(network).macs}
