"""Compound scaling: one number phi grows depth, width and resolution together (sections 3.2 and 3.3 of the paper).

    d = alpha^phi, w = beta^phi, r = gamma^phi; the multiply-adds grow like d w^2 r^2 = (alpha beta^2 gamma^2)^phi

The factors multiply what the baseline has. Depth multiplies the layers of the block stages alone: stem and head remain
one convolution each at any depth, for they only enter and leave the network. Their channels grow with the width, and
their maps with the resolution, like everything else. EfficientNet-Lite's ends are fixed, so that scaled networks stay
small: stem and head keep their channels, first and last stage their layers.

Departures from the paper's equation 3, which is why every ratio here comes twice, as promised and as counted:
- channels are rounded to multiples of 8 and layers to whole numbers, up where the official code's rule is kept;
- the resolution is rounded to a multiple of 8, for a map that halves to an odd size costs up to 17 % more;
- phi below 0, of which the paper does not speak, rounds layers to the nearest number: rounding up hardly shrinks;
- B1-B7 lie near one curve and not on it, and L2 is far from it; `implied` says how far.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from effnet.arch.blocks import DepthRounding
from effnet.arch.cost import cost
from effnet.arch.spec import LARGEST_FACTOR, NetworkSpec
from effnet.arch.specfile import SUFFIXES, read_mapping
from effnet.arch.variants import B0, LITE, LITE0, PAPER, VARIANTS
from effnet.errors import ArgumentError, UnknownNameError
from effnet.fields import positive_float, positive_int

RESOLUTION_STEP = 8  # pixels


@dataclass(frozen=True)
class Rule:
    """How much depth, width and resolution grow when phi grows by one: equation 3 of the paper."""

    alpha: float  # of depth
    beta: float  # of width
    gamma: float  # of resolution
    name: str = ""

    def __post_init__(self) -> None:
        """Check every number.

        Raises:
            ArgumentError: a growth is below 1 or above 100, or nothing grows.
        """
        for field in ("alpha", "beta", "gamma"):
            growth = positive_float(field, getattr(self, field))
            if not 1 <= growth <= LARGEST_FACTOR:
                rule = f"must be at least 1, as equation 3 of the paper demands, and at most {LARGEST_FACTOR}."
                raise ArgumentError(field, getattr(self, field), rule)
            object.__setattr__(self, field, growth)  # once, while it is made
        if self.product == 1:
            raise ArgumentError("alpha, beta, gamma", self.growths, "must not all be 1: nothing would grow.")

    @property
    def growths(self) -> tuple[float, float, float]:
        """Alpha, beta and gamma."""
        return self.alpha, self.beta, self.gamma

    @property
    def product(self) -> float:
        """What the multiply-adds grow by per phi before rounding; the paper wants it near 2."""
        return self.alpha * self.beta**2 * self.gamma**2

    def factors(self, phi: float) -> tuple[float, float, float]:
        """The factors on depth, width and resolution.

        Raises:
            ArgumentError: `phi` is no finite number, or a factor would be too large for one.
        """
        if isinstance(phi, (bool, str)) or not hasattr(phi, "__float__") or not math.isfinite(phi):
            raise ArgumentError("phi", phi, "must be a finite number.")
        try:
            depth, width, resolution = (growth**phi for growth in self.growths)
        except OverflowError:
            raise ArgumentError("phi", phi, "is too large.") from None
        return depth, width, resolution

    def nominal(self, phi: float) -> float:
        """What the multiply-adds are promised to grow by: d w^2 r^2."""
        depth, width, resolution = self.factors(phi)
        return depth * width**2 * resolution**2

    def phi_of_depth(self, factor: float) -> float | None:
        """The phi that multiplies depth by `factor`; None where depth does not grow."""
        return _exponent("factor", factor, self.alpha)

    def phi_of_width(self, factor: float) -> float | None:
        """The phi that multiplies width by `factor`; None where width does not grow."""
        return _exponent("factor", factor, self.beta)

    def phi_of_resolution(self, factor: float) -> float | None:
        """The phi that multiplies resolution by `factor`; None where resolution does not grow."""
        return _exponent("factor", factor, self.gamma)

    def phi_of_macs(self, ratio: float) -> float:
        """The phi that is promised to multiply the multiply-adds by `ratio`."""
        return math.log(positive_float("ratio", ratio)) / math.log(self.product)


RULES = {
    rule.name: rule
    for rule in (
        # alpha, beta, gamma, name
        Rule(1.2, 1.1, 1.15, "paper"),  # found by the paper's grid search on B0
        Rule(2**0.1, 2 ** (0.8 / 2), 2 ** (0.1 / 2), "fast"),  # Dollar, Singh, Girshick 2021, arXiv 2103.06877: dWr
        Rule(1, 2 ** (1 / 2), 1, "width"),  # one dimension alone, as in the paper's Figure 3
        Rule(2, 1, 1, "depth"),
        Rule(1, 1, 2 ** (1 / 2), "resolution"),
    )
}


@dataclass(frozen=True)
class Step:
    """A network beside its baseline."""

    network: NetworkSpec
    phi: float | None  # None for a published variant, which no phi gives
    nominal_ratio: float  # what the multiply-adds are promised to be, the baseline's being 1
    realised_ratio: float  # what they are
    params: int
    macs: int
    activations: int

    @property
    def excess(self) -> float:
        """How much more is built than promised: .34 is 34 % more."""
        return self.realised_ratio / self.nominal_ratio - 1


@dataclass(frozen=True)
class Implied:
    """The phi that each of a network's numbers speaks for; None where the rule does not grow that number."""

    depth: float | None
    width: float | None
    resolution: float | None
    macs: float


def read_rule(text: str | Path | Rule) -> Rule:
    """A rule by its name, from three numbers such as "1.2,1.1,1.15", or from a YAML file.

    The file names alpha, beta and gamma. It may hold more, such as how they were found, which is not read; without a
    `name` the rule has the file's.

    Raises:
        UnknownNameError: no rule has that name.
        ArgumentError: the file or its numbers cannot be used.
    """
    if isinstance(text, Rule):
        return text
    if isinstance(text, str) and text in RULES:
        return RULES[text]
    path = Path(text)
    if path.suffix.lower() in SUFFIXES or path.is_file():
        values = read_mapping(path)
        missing = [name for name in ("alpha", "beta", "gamma") if name not in values]
        if missing:
            raise ArgumentError("rule", str(path), f"must name alpha, beta and gamma; it lacks {', '.join(missing)}.")
        try:
            return Rule(values["alpha"], values["beta"], values["gamma"], str(values.get("name") or path.stem))
        except ArgumentError as error:
            raise ArgumentError("rule", str(path), f"holds no rule: {error}") from error
    if "," not in str(text):
        raise UnknownNameError("rule", str(text), RULES)
    try:
        alpha, beta, gamma = (float(number) for number in str(text).split(","))
    except ValueError:
        raise ArgumentError("rule", text, "must be alpha,beta,gamma: three numbers as in 1.2,1.1,1.15") from None
    return Rule(alpha, beta, gamma)


def scale(
    baseline: NetworkSpec,
    phi: float,
    rule: Rule = RULES["paper"],
    *,
    resolution_step: int = RESOLUTION_STEP,
    depth_rounding: DepthRounding | None = None,
) -> NetworkSpec:
    """The network that `phi` makes of a baseline, with every number rounded as it is built.

    Args:
        baseline: what the factors multiply.
        phi: 1 for about twice the multiply-adds; below 0 it shrinks. On the curve, 0 gives the baseline.
        rule: what depth, width and resolution grow by.
        resolution_step: the resolution is the nearest multiple of this many pixels, and at least one step.
        depth_rounding: None keeps the baseline's, which is "ceil" in the official code, for a phi of 0 or more, and
            takes "nearest" below. Multiply-adds of B0 at phi -2: .45 times B0's with "ceil", .34 with "nearest", where
            .27 are promised; at phi 1: 2.23 with "ceil", 1.78 with "nearest", where 1.92 are promised.

    `dropout` says where the dropout comes from. drop_connect is .2 in every published variant, so it stays as it is.

    Raises:
        ArgumentError: a value is outside its range, or the network would be.
    """
    depth, width, resolution = rule.factors(phi)
    pixels = positive_int("resolution_step", resolution_step)
    if abs(phi) > (limit := largest_phi(baseline, rule)):
        allowed = f"must be between {-limit:.1f} and {limit:.1f} here, so that no factor goes beyond {LARGEST_FACTOR}."
        raise ArgumentError("phi", phi, allowed)
    usual: DepthRounding = "nearest" if phi < 0 else baseline.depth_rounding
    pieces = [baseline.name, f"phi{phi:g}"]
    if rule != RULES["paper"]:
        pieces.append(rule.name or "a{:g}-b{:g}-g{:g}".format(*rule.growths))
    if depth_rounding not in (None, usual):
        pieces.append(str(depth_rounding))
    network = dataclasses.replace(
        baseline,
        name="-".join(pieces),
        depth=baseline.depth * depth,
        width=baseline.width * width,
        resolution=max(1, math.floor(baseline.resolution * resolution / pixels + 0.5)) * pixels,
        depth_rounding=depth_rounding or usual,
    )
    return dataclasses.replace(network, dropout=dropout(baseline, network)[0])


def largest_phi(baseline: NetworkSpec, rule: Rule) -> float:
    """The phi at which depth, width or resolution reaches the largest factor that a network may have."""
    built = zip((baseline.depth, baseline.width, 1.0), rule.growths, strict=True)
    return min(math.log(LARGEST_FACTOR / factor) / math.log(growth) for factor, growth in built if growth > 1)


def dropout(baseline: NetworkSpec, network: NetworkSpec) -> tuple[float, tuple[str, ...]]:
    """The dropout for a network scaled from `baseline`, and the names of the variants that it was taken from.

    The paper says only that dropout grows linearly from .2 to .5 between B0 and B7. Here it lies on straight lines
    between the published variants of the baseline's family, over the logarithm of d w^2 r^2, and does not go beyond
    the first and the last of them; to thousandths. One name: that variant's own. No name: the baseline belongs to no
    family, or has another dropout than published, and keeps its own.
    """
    variants = published(baseline)
    if not variants:
        return baseline.dropout, ()
    points = [(math.log(nominal(baseline, variant)), variant) for variant in variants]
    place = math.log(nominal(baseline, network))
    place = min(max(place, points[0][0]), points[-1][0])
    for (left, lower), (right, upper) in pairwise(points):
        if place in (left, right):
            variant = lower if place == left else upper
            return variant.dropout, (variant.name,)
        if place < right:
            rate = lower.dropout + (upper.dropout - lower.dropout) * (place - left) / (right - left)
            return round(rate, 3), (lower.name, upper.name)
    raise AssertionError("a family has at least two variants")


def published(baseline: NetworkSpec) -> tuple[NetworkSpec, ...]:
    """The published variants scaled from `baseline` and itself, for its number of classes; none if it is no baseline.

    B0 has B1-B7, Lite0 has Lite1-4. B8 and L2 came after the paper and leave its curve.
    """
    outside = {name: getattr(baseline, name) for name in ("num_classes", "in_channels", "drop_connect")}
    for first, source in ((B0, PAPER), (LITE0, LITE)):
        if dataclasses.replace(first, **outside, name=baseline.name) == baseline:
            return tuple(dataclasses.replace(row.spec, **outside) for row in VARIANTS.values() if row.source == source)
    return ()


def nominal(baseline: NetworkSpec, network: NetworkSpec) -> float:
    """What a network's coefficients promise its multiply-adds to be, the baseline's being 1: d w^2 r^2."""
    depth, width, resolution = _factors(baseline, network)
    return depth * width**2 * resolution**2


def realised(baseline: NetworkSpec, network: NetworkSpec) -> float:
    """What a network's multiply-adds are, the baseline's being 1."""
    return cost(network).macs / cost(baseline).macs


def step(baseline: NetworkSpec, network: NetworkSpec, promised: float, phi: float | None = None) -> Step:
    """A network beside its baseline; `promised` is the ratio of multiply-adds that was to be expected."""
    price = cost(network)
    return Step(network, phi, promised, price.macs / cost(baseline).macs, price.params, price.macs, price.activations)


def table(
    baseline: NetworkSpec,
    phis: Iterable[float],
    rule: Rule = RULES["paper"],
    *,
    resolution_step: int = RESOLUTION_STEP,
    depth_rounding: DepthRounding | None = None,
) -> tuple[Step, ...]:
    """What each phi promises and what it builds.

    Raises:
        ArgumentError: a value is outside its range.
    """
    rows = []
    for phi in phis:
        network = scale(baseline, phi, rule, resolution_step=resolution_step, depth_rounding=depth_rounding)
        rows.append(step(baseline, network, rule.nominal(phi), phi))
    return tuple(rows)


def implied(baseline: NetworkSpec, network: NetworkSpec, rule: Rule = RULES["paper"]) -> Implied:
    """The phi that a network's depth, width, resolution and counted multiply-adds each speak for."""
    depth, width, resolution = _factors(baseline, network)
    return Implied(
        rule.phi_of_depth(depth),
        rule.phi_of_width(width),
        rule.phi_of_resolution(resolution),
        rule.phi_of_macs(realised(baseline, network)),
    )


def _factors(baseline: NetworkSpec, network: NetworkSpec) -> tuple[float, float, float]:
    """A network's depth, width and resolution as factors on the baseline's."""
    return (
        network.depth / baseline.depth,
        network.width / baseline.width,
        network.resolution / baseline.resolution,
    )


def _exponent(argument: str, factor: float, growth: float) -> float | None:
    """The phi for which growth^phi = factor."""
    return math.log(positive_float(argument, factor)) / math.log(growth) if growth > 1 else None
