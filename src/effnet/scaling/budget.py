"""The network that fits a budget: the paper's equation 2, with the memory limit that the paper wrote and never used.

Accuracy is not computed here. What is maximised is what the paper grows accuracy with: multiply-adds along the curve of
a rule. First the largest network on the curve that meets every constraint is found. Rounding wastes a part of the
budget there, so its neighbourhood is searched: of all networks whose depth, width and resolution each lie within 5 % of
a point of the curve, the one is taken that uses most of the constraint that binds. Every candidate is priced exactly.

A latency is measured, never modelled: `measure` is passed in, and a handful of real networks on the curve are timed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from effnet.arch.cost import cost, total_cost
from effnet.arch.memory import Keep, Precision, file_bytes, inference_memory, level, training_memory
from effnet.arch.shape import DepthRounding, Shape, shape_of
from effnet.arch.spec import LARGEST_FACTOR, NetworkSpec, one_of, positive_float, positive_int
from effnet.arch.variants import VARIANTS, Variant
from effnet.arch.variants import spec as make_spec
from effnet.errors import ArgumentError
from effnet.scaling import compound
from effnet.scaling.compound import RESOLUTION_STEP, RULES, Rule, read_rule
from effnet.scaling.units import parse_bytes, parse_count, parse_seconds

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

RESOURCES = ("macs", "params", "memory", "train_memory", "file_size")  # priced by formula
NEAR = 0.05  # how far depth, width and resolution may each be from the curve
SMALLEST_RESOLUTION = 32  # the last map is then one pixel
SMALLEST_FACTOR = 0.05  # of depth and width
CURVE_STEP = 0.02  # of phi
AROUND = 40  # points of the curve on either side whose neighbourhood is searched: 0.8 of phi
OFFSETS = 7  # of depth and of width in each neighbourhood
LEVEL = 0.005  # shares of the binding constraint that are as good as equal; then more multiply-adds win
MORE = 1.1  # what a little more of the binding constraint would buy
BETTER = 1.02  # multiply-adds by which another rule must win to be named
TRIALS = 6  # networks that are timed between the two that enclose a latency
AIM = 0.985  # of a latency: what a network that is to be timed next should take
ENOUGH = 0.97  # of a latency: nothing closer is looked for
SMALLER = 0.25  # times the chosen network's multiply-adds: a published one below that is not timed


Measure = Callable[[NetworkSpec], Any]  # returns an analysis.timing.Timing, or what has its median_ms and spread_ms


@dataclass(frozen=True)
class Budget:
    """What a network may cost at most, and what is settled beforehand. Amounts are numbers or as people write them.

    Attributes:
        macs: multiply-adds per image: "1G", "390M".
        params: learned numbers: "10M".
        memory: bytes of inference: weights, one image and the feature maps beside them, fp32: "100MB", "100MiB".
        train_memory: bytes of a training step of `batch` images with all that training holds.
        file_size: bytes of the file of weights.
        latency: seconds for one image on this machine: "20ms", .02.
        batch: images per training step.
        optimizer, ema, precision, keep: how it is trained; see effnet.arch.memory.training_memory.
        resolution, width, depth: fixed values; width and depth count from the baseline's rows.
        max_resolution: the resolution does not grow beyond it.
    """

    macs: int | str | None = None
    params: int | str | None = None
    memory: int | str | None = None
    train_memory: int | str | None = None
    file_size: int | str | None = None
    latency: float | str | None = None
    batch: int | None = None
    optimizer: str = "rmsprop"
    ema: bool = True
    precision: Precision = "fp32"
    keep: Keep | str | None = None
    resolution: int | None = None
    width: float | None = None
    depth: float | None = None
    max_resolution: int | None = None

    def __post_init__(self) -> None:
        """Turn amounts into numbers and check everything.

        Raises:
            ArgumentError: a value is outside its range, contradicts another, or there is no limit at all.
        """
        parsers: dict[str, Callable[[str, Any], float]] = {"macs": parse_count, "params": parse_count}
        parsers |= dict.fromkeys(("memory", "train_memory", "file_size"), parse_bytes) | {"latency": parse_seconds}
        parsers |= dict.fromkeys(("batch", "resolution", "max_resolution"), positive_int)
        parsers |= dict.fromkeys(("width", "depth"), positive_float)
        for name, parse in parsers.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, parse(name, getattr(self, name)))
        for name in ("width", "depth"):
            if (getattr(self, name) or 0) > LARGEST_FACTOR:
                raise ArgumentError(name, getattr(self, name), f"must be at most {LARGEST_FACTOR}.")
        if self.keep is not None:
            object.__setattr__(self, "keep", level(self.keep))
        one_of("precision", self.precision, Precision)
        if (self.batch is None) != (self.train_memory is None):
            given, missing = ("batch", "train_memory") if self.train_memory is None else ("train_memory", "batch")
            raise ArgumentError(given, getattr(self, given), f"needs `{missing}`: how much memory for how many images.")
        if not self.limits and self.latency is None:
            raise ArgumentError(
                "budget", "nothing", f"must limit something: {', '.join((*RESOURCES[:-1], 'file_size or latency'))}."
            )
        if self.resolution and self.max_resolution and self.resolution > self.max_resolution:
            raise ArgumentError(
                "resolution", self.resolution, f"is more than `max_resolution` (={self.max_resolution})."
            )

    @property
    def limits(self) -> dict[str, int]:
        """The limits that are priced by formula, under the names of RESOURCES."""
        return {name: getattr(self, name) for name in RESOURCES if getattr(self, name) is not None}

    @property
    def priced(self) -> tuple[str, ...]:
        """The resources that can be told of a network: training memory only for a batch."""
        return tuple(name for name in RESOURCES if name != "train_memory" or self.batch)


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
class Trial:
    """A network that was timed."""

    spec: NetworkSpec
    macs: int
    median_ms: float
    spread_ms: tuple[float, float]


@dataclass(frozen=True)
class Published:
    """A published variant within the budget."""

    variant: Variant
    resolution: int  # at which it meets the budget
    macs: int

    @property
    def as_published(self) -> bool:
        """Whether its accuracy was published at this resolution."""
        return self.resolution == self.variant.resolution


@dataclass(frozen=True)
class Candidates:
    """Realised networks, an entry each, and what they cost."""

    width: Floats
    depth: Floats
    resolution: Ints
    roundings: tuple[DepthRounding, ...]
    rounding: Ints  # index into roundings
    prices: dict[str, Ints]

    def __len__(self) -> int:
        return len(self.width)


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
    timer = _Timer(measure)
    known = None if among is None else tuple(among)
    if among is not None:
        known = tuple(among)
        alternative = _best_published(budget, baseline, resolution_step, known, timer)
        if alternative is None:
            rule_ = "has no network that meets the budget at any resolution."
            raise ArgumentError("pretrained", ", ".join(known), rule_)
        chosen = make_spec(_published_spec(alternative.variant, baseline), resolution=alternative.resolution)
        return _report(chosen, None, baseline, growth, budget, alternative, timer)

    search = _Search(budget, baseline, growth, resolution_step, depth_rounding)
    if budget.latency is not None:
        chosen = _within_latency(search, cast(float, budget.latency), timer)
        floor = SMALLER * cost(chosen).macs
        alternative = _best_published(budget, baseline, resolution_step, tuple(VARIANTS), timer, floor)
        return _report(chosen, None, baseline, growth, budget, alternative, timer)
    chosen, candidates = search.best()
    alternative = _best_published(budget, baseline, resolution_step, tuple(VARIANTS), timer)
    report = _report(chosen, candidates, baseline, growth, budget, alternative, timer)
    return dataclasses.replace(report, more=_more(search, report), better=_better_rule(search, chosen))


class _Search:
    """The candidates of one budget, baseline and rule."""

    def __init__(
        self, budget: Budget, baseline: NetworkSpec, rule: Rule, step: int, rounding: DepthRounding | None
    ) -> None:
        self.budget, self.baseline, self.rule = budget, baseline, rule
        self.step = positive_int("resolution_step", step)
        self.given = rounding
        self.roundings: tuple[DepthRounding, ...] = (rounding,) if rounding else ("ceil", "nearest")

    def best(self) -> tuple[NetworkSpec, Candidates]:
        """The network that makes most of the budget, and everything that was looked at."""
        import numpy as np

        phis = self._phis()
        curve = self._price(*self._curve(phis))
        fits = self._fits(curve)
        if not fits.any():
            raise self._impossible(curve)
        # Along the curve of the first rounding and then the second: the point of largest macs.
        top = int(np.where(fits, curve.prices["macs"], -1).argmax())
        binding = self._binding(curve, top)
        near = self._price(*self._neighbours(phis, float(np.tile(phis, len(self.roundings))[top])))
        everything = _joined(curve, near)
        allowed = self._fits(everything)
        share = np.where(allowed, everything.prices[binding] / self.budget.limits[binding], 0)
        best = allowed & (share >= share.max() - LEVEL)
        chosen = int(np.where(best, everything.prices["macs"], -1).argmax())
        return self.spec_at(everything, chosen), everything

    def curve_spec(self, phi: float) -> NetworkSpec | None:
        """The larger of the curve's networks at this phi that meet the limits."""
        import numpy as np

        at = self._price(*self._curve(np.array([phi])))
        fits = self._fits(at) if self.budget.limits else np.ones(len(at), bool)
        return self.spec_at(at, int(np.where(fits, at.prices["macs"], -1).argmax())) if fits.any() else None

    def near(self, phi: float) -> Candidates:
        """Every network near the curve around `phi` that meets the limits."""
        networks = self._price(*self._neighbours(self._phis(), phi))
        fits = self._fits(networks)
        arrays = {name: getattr(networks, name)[fits] for name in ("width", "depth", "resolution", "rounding")}
        prices = {name: values[fits] for name, values in networks.prices.items()}
        return Candidates(roundings=networks.roundings, prices=prices, **arrays)

    @property
    def smallest_phi(self) -> float:
        """Where the curve begins."""
        return float(self._phis()[0])

    @property
    def largest_phi(self) -> float:
        """Where it ends."""
        return float(self._phis()[-1])

    def spec_at(self, candidates: Candidates, index: int) -> NetworkSpec:
        """One of the candidates as a spec."""
        network = dataclasses.replace(
            self.baseline,
            width=float(candidates.width[index]),
            depth=float(candidates.depth[index]),
            resolution=int(candidates.resolution[index]),
            depth_rounding=candidates.roundings[int(candidates.rounding[index])],
        )
        name = f"{self.baseline.name}-{cost(network).macs / 1e6:.0f}m"
        return dataclasses.replace(network, name=name, dropout=compound.dropout(self.baseline, network)[0])

    def _phis(self) -> Floats:
        """The curve, as far as factors and resolution are allowed to go."""
        import numpy as np

        largest = compound.largest_phi(self.baseline, self.rule)
        ends = [largest]
        floors = (
            SMALLEST_FACTOR / self.baseline.depth,
            SMALLEST_FACTOR / self.baseline.width,
            SMALLEST_RESOLUTION / self.baseline.resolution,
        )
        for floor, growth in zip(floors, self.rule.growths, strict=True):
            if growth > 1:
                ends.append(-math.log(floor) / math.log(growth))
        return np.arange(-min(ends), largest, CURVE_STEP)

    def _curve(self, phis: Floats) -> tuple[Floats, Floats, Floats]:
        """Depth, width and resolution in pixels on the curve, not yet rounded; what is settled is settled."""
        import numpy as np

        alpha, beta, gamma = self.rule.growths
        budget = self.budget
        depth = self.baseline.depth * alpha**phis if budget.depth is None else np.full_like(phis, budget.depth)
        width = self.baseline.width * beta**phis if budget.width is None else np.full_like(phis, budget.width)
        pixels = self.baseline.resolution * gamma**phis
        if budget.resolution is not None:
            pixels = np.full_like(phis, budget.resolution)
        elif budget.max_resolution is not None:
            pixels = np.minimum(pixels, budget.max_resolution)
        return depth, width, pixels

    def _neighbours(self, phis: Floats, phi: float) -> tuple[Floats, Floats, Floats]:
        """Everything near the curve around `phi`: depth, width and resolution each within NEAR of a point of it."""
        import numpy as np

        around = phis[np.abs(phis - phi) <= AROUND * CURVE_STEP][:: max(1, AROUND // 8)]
        depth, width, pixels = self._curve(around)
        offsets = np.linspace(1 - NEAR, 1 + NEAR, OFFSETS)
        deep = offsets if self.budget.depth is None else np.ones(1)
        wide = offsets if self.budget.width is None else np.ones(1)
        grid = [(d, w, r) for d, w, r in zip(depth, width, pixels, strict=True) for r in self._resolutions(float(r))]
        points = np.array(grid)
        shape = (len(points), len(deep), len(wide))
        return (
            np.broadcast_to(points[:, 0, None, None] * deep[None, :, None], shape).ravel(),
            np.broadcast_to(points[:, 1, None, None] * wide[None, None, :], shape).ravel(),
            np.broadcast_to(points[:, 2, None, None], shape).ravel(),
        )

    def _resolutions(self, pixels: float) -> Iterator[int]:
        """The multiples of the step within NEAR of `pixels`, or the nearest one."""
        if self.budget.resolution is not None:
            yield self.budget.resolution
            return
        low, high = (1 - NEAR) * pixels / self.step, (1 + NEAR) * pixels / self.step
        if self.budget.max_resolution is not None:
            high = min(high, self.budget.max_resolution / self.step)
        inside = range(max(1, math.ceil(low)), math.floor(high) + 1)
        for number in inside or (max(1, round(pixels / self.step)),):
            yield number * self.step

    def _price(self, depth: Floats, width: Floats, pixels: Floats) -> Candidates:
        """Realised networks, for each way to round the depth, with all that the budget can tell of them."""
        import numpy as np

        if self.budget.resolution is not None:
            resolution = np.full(len(pixels), self.budget.resolution, np.int64)
        else:
            steps = np.maximum(1, np.floor(pixels / self.step + 0.5))
            if self.budget.max_resolution is not None:
                steps = np.minimum(steps, max(1, self.budget.max_resolution // self.step))
            resolution = (steps * self.step).astype(np.int64)
        priced = [self._prices(depth, width, resolution, rounding) for rounding in self.roundings]
        times = len(self.roundings)
        return Candidates(
            np.tile(width, times),
            np.tile(depth, times),
            np.tile(resolution, times),
            self.roundings,
            np.repeat(np.arange(times), len(width)),
            {name: np.concatenate([prices[name] for prices in priced]) for name in priced[0]},
        )

    def _prices(self, depth: Floats, width: Floats, resolution: Ints, rounding: DepthRounding) -> dict[str, Ints]:
        base = dataclasses.replace(self.baseline, depth_rounding=rounding)
        shape = shape_of(base, cast(float, width), cast(float, depth), cast(int, resolution))
        price = total_cost(shape)
        budget = self.budget
        prices = {"macs": price.macs, "params": price.params}
        if budget.memory is not None:
            prices["memory"] = inference_memory(shape)
        if budget.batch is not None:
            prices["train_memory"] = _training(shape, budget)
        if budget.file_size is not None:
            prices["file_size"] = file_bytes(shape)
        return cast("dict[str, Ints]", prices)

    def _fits(self, candidates: Candidates) -> NDArray[np.bool_]:
        import numpy as np

        fits = np.ones(len(candidates), bool)
        for name, limit in self.budget.limits.items():
            fits &= candidates.prices[name] <= limit
        return fits

    def _binding(self, candidates: Candidates, index: int) -> str:
        """The limit of which a candidate uses most; without one, multiply-adds stand for all."""
        shares = {name: candidates.prices[name][index] / limit for name, limit in self.budget.limits.items()}
        return max(shares, key=lambda name: float(shares[name]))

    def _impossible(self, curve: Candidates) -> ArgumentError:
        """Which limit the smallest network breaks most, and what it needs."""
        smallest = int(curve.prices["macs"].argmin())
        over = {name: curve.prices[name].min() / limit for name, limit in self.budget.limits.items()}
        worst = max(over, key=lambda name: float(over[name]))
        if over[worst] <= 1:  # each can be met, but not all by one network
            over = {name: curve.prices[name][smallest] / limit for name, limit in self.budget.limits.items()}
            worst = max(over, key=lambda name: float(over[name]))
        network = self.spec_at(curve, int(curve.prices[worst].argmin()))
        needs = f"{int(curve.prices[worst].min()):,} {'bytes' if worst not in ('macs', 'params') else worst}"
        settled = [name for name in ("width", "depth", "resolution") if getattr(self.budget, name) is not None]
        pins = f", with {' and '.join(settled)} settled" if settled else ""
        sizes = f"width {network.width:.3g}, depth {network.depth:.3g}, {network.resolution} px"
        smallest_network = f"the smallest network of the rule {self.rule.name or 'given'} from {self.baseline.name}"
        words = f"cannot be met{pins}: {smallest_network} needs {needs} ({sizes})."
        return ArgumentError(worst, self.budget.limits[worst], words)


class _Timer:
    """Times networks, each once."""

    def __init__(self, measure: Measure | None) -> None:
        self.measure = measure
        self.trials: dict[Shape, Trial] = {}  # names and unrounded factors make no other network

    def __call__(self, spec: NetworkSpec) -> Trial:
        if spec.shape not in self.trials:
            assert self.measure is not None
            timed = self.measure(spec)
            self.trials[spec.shape] = Trial(spec, cost(spec).macs, timed.median_ms, timed.spread_ms)
        return self.trials[spec.shape]


def _within_latency(search: _Search, latency: float, timer: _Timer) -> NetworkSpec:
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


def _close_in(search: _Search, phi: float, limit: float, timer: _Timer) -> None:
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


def _best_published(
    budget: Budget,
    baseline: NetworkSpec,
    step: int,
    among: Sequence[str],
    timer: _Timer,
    floor: float = 0,
) -> Published | None:
    """The published variant within the budget with the highest published accuracy; a smaller image only if none fits.

    Width and depth that are settled do not count: a published network has the coefficients that it has. `floor`:
    multiply-adds below which no network needs to be timed.
    """
    fitting: list[tuple[float, float, Published]] = []
    for row in (VARIANTS[name] for name in among):
        for resolution in (row.resolution, *range(row.resolution // step * step, SMALLEST_RESOLUTION - 1, -step)):
            network = make_spec(_published_spec(row, baseline), resolution=resolution)
            prices = tell(network, budget)
            allowed = resolution <= (budget.max_resolution or resolution) and budget.resolution in (None, resolution)
            if allowed and all(prices[name] <= limit for name, limit in budget.limits.items()):
                shown = Published(row, resolution, prices["macs"])
                fitting.append((min(1.0, resolution / row.resolution), row.top1, shown))
                break
    fitting.sort(key=lambda entry: entry[:2], reverse=True)
    found = [shown for _, _, shown in fitting]
    if budget.latency is None:
        return found[0] if found else None
    passed, slow = [], 0
    for shown in sorted(found, key=lambda shown: shown.macs):
        if shown.macs < floor:
            continue
        network = make_spec(_published_spec(shown.variant, baseline), resolution=shown.resolution)
        fast_enough = timer(network).median_ms <= 1e3 * cast(float, budget.latency)
        passed += [shown] * fast_enough
        slow = 0 if fast_enough else slow + 1
        if slow == 2:  # multiply-adds order times roughly: one slow network says little, two in a row enough
            break
    return min(passed, key=found.index, default=None)


def _published_spec(row: Variant, baseline: NetworkSpec) -> NetworkSpec:
    """A variant with the baseline's classes."""
    return make_spec(row.spec, num_classes=baseline.num_classes)


def _more(search: _Search, report: Fit) -> NetworkSpec | None:
    """The network that a little more of the binding resource would buy, if it buys anything."""
    name = report.binding
    limit: dict[str, Any] = {name: int(MORE * search.budget.limits[name])}
    larger = dataclasses.replace(search.budget, **limit)
    bought = _Search(larger, search.baseline, search.rule, search.step, search.given).best()[0]
    return bought if cost(bought).macs > cost(report.spec).macs else None


def _better_rule(search: _Search, chosen: NetworkSpec) -> tuple[str, NetworkSpec] | None:
    """The named rule that reaches most multiply-adds, if it reaches clearly more.

    Only rules that grow all three dimensions: one alone can be grown without end under a limit that does not see it.
    """
    found = []
    for name, rule in RULES.items():
        if rule == search.rule or min(rule.growths) <= 1:
            continue
        try:
            network, _ = _Search(search.budget, search.baseline, rule, search.step, search.given).best()
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
    timer: _Timer,
) -> Fit:
    prices: dict[str, float] = dict(tell(chosen, budget))
    uses = [Use(name, prices[name], budget.limits.get(name)) for name in budget.priced]
    if budget.latency is not None:
        uses.append(Use("latency", timer(chosen).median_ms / 1e3, cast(float, budget.latency)))
    binding = max((use for use in uses if use.share is not None), key=lambda use: use.share or 0).resource
    phi = compound.implied(baseline, chosen, rule).macs
    trials = tuple(timer.trials.values())
    return Fit(chosen, phi, baseline, rule, budget, tuple(uses), binding, alternative, None, None, trials, candidates)


def tell(network: NetworkSpec, budget: Budget) -> dict[str, int]:
    """What one network costs of everything that is priced by formula."""
    price = cost(network)
    prices = {"macs": price.macs, "params": price.params, "memory": inference_memory(network)}
    prices["file_size"] = file_bytes(network)
    if budget.batch is not None:
        prices["train_memory"] = _training(network, budget)
    return prices


def _training(network: Any, budget: Budget) -> int:
    how: dict[str, Any] = {name: getattr(budget, name) for name in ("optimizer", "ema", "precision")}
    how["plan"] = budget.keep
    return training_memory(network, cast(int, budget.batch), **how).peak


def _joined(first: Candidates, second: Candidates) -> Candidates:
    import numpy as np

    names = ("width", "depth", "resolution", "rounding")
    arrays = {name: np.concatenate([getattr(first, name), getattr(second, name)]) for name in names}
    prices = {name: np.concatenate([first.prices[name], second.prices[name]]) for name in first.prices}
    return Candidates(roundings=first.roundings, prices=prices, **arrays)


def _brief(network: NetworkSpec) -> dict[str, Any]:
    names = "width", "depth", "resolution", "depth_rounding"
    return {name: getattr(network, name) for name in names} | {"macs": cost(network).macs}
