"""Compound scaling: one number, phi, scales depth, width and resolution together (sections 3.2 and 3.3 of the paper).

    d = alpha^phi, w = beta^phi, r = gamma^phi; the multiply-adds grow like d w^2 r^2 = (alpha beta^2 gamma^2)^phi

The factors are relative to the baseline. Depth only multiplies the layers of the block stages: stem and head stay one
convolution each, whose channels grow with the width and whose maps grow with the resolution, like all others.
EfficientNet-Lite has fixed ends, so that scaled networks stay small: stem and head keep their channels, the first and
last stage their layers.

Departures from the paper's equation 3, because of which every ratio here is given twice, nominal and as built:
- channels are rounded to multiples of 8 and layers to whole numbers, up by the official code's rule;
- the resolution is rounded to a multiple of 8, because a map that halves to an odd size costs up to 17 % more;
- below phi 0, which the paper does not cover, layers are rounded to the nearest number: rounding up hardly shrinks;
- B1-B7 lie near one curve but not on it, and L2 lies far from it; `implied_phis` tells how far.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effnet.arch.blocks import DepthRounding
from effnet.arch.cost import cost
from effnet.arch.spec import LARGEST_FACTOR, NetworkSpec
from effnet.arch.specfile import SUFFIXES, read_mapping
from effnet.arch.variants import B0, LITE, LITE0, PAPER, VARIANTS
from effnet.errors import ArgumentError, UnknownNameError
from effnet.fields import number, positive_float, positive_int, set_field

RESOLUTION_STEP = 8  # pixels


@dataclass(frozen=True)
class Rule:
    """How much depth, width and resolution grow when phi grows by one: equation 3 of the paper.

    Raises:
        ArgumentError: a growth is below 1 or above 100, or nothing grows.
    """

    alpha: float  # of depth
    beta: float  # of width
    gamma: float  # of resolution
    name: str = ""

    def __post_init__(self) -> None:
        for field in ("alpha", "beta", "gamma"):
            growth = positive_float(field, getattr(self, field))
            if not 1 <= growth <= LARGEST_FACTOR:
                rule = f"must be at least 1, by equation 3 of the paper, and at most {LARGEST_FACTOR}."
                raise ArgumentError(field, getattr(self, field), rule)
            set_field(self, field, growth)
        if self.product == 1:
            raise ArgumentError("alpha, beta, gamma", self.growths, "must not all be 1: nothing would grow.")

    @property
    def growths(self) -> tuple[float, float, float]:
        """Alpha, beta and gamma."""
        return self.alpha, self.beta, self.gamma

    @property
    def product(self) -> float:
        """The factor on multiply-adds per phi before rounding; near 2 in the paper."""
        return self.nominal(1)

    def factors(self, phi: float) -> tuple[float, float, float]:
        """The factors on depth, width and resolution; ArgumentError if `phi` is not finite or too large."""
        if not math.isfinite(number("phi", phi)):
            raise ArgumentError("phi", phi, "must be a finite number.")
        try:
            depth, width, resolution = (growth**phi for growth in self.growths)
        except OverflowError:
            raise ArgumentError("phi", phi, "is too large.") from None
        return depth, width, resolution

    def nominal(self, phi: float) -> float:
        """The factor on multiply-adds before rounding: d w^2 r^2."""
        depth, width, resolution = self.factors(phi)
        return depth * width**2 * resolution**2

    def phis(self, depth: float, width: float, resolution: float) -> tuple[float | None, ...]:
        """The phi that gives each dimension its factor; None for a dimension that the rule does not grow."""
        factors = (positive_float("factor", factor) for factor in (depth, width, resolution))
        pairs = zip(factors, self.growths, strict=True)
        return tuple(math.log(factor, growth) if growth > 1 else None for factor, growth in pairs)

    def phi_of_macs(self, ratio: float) -> float:
        """The phi whose nominal multiply-adds are `ratio` times the baseline's."""
        return math.log(positive_float("ratio", ratio), self.product)


RULES = {
    rule.name: rule
    for rule in (
        # alpha, beta, gamma, name
        Rule(1.2, 1.1, 1.15, "paper"),  # found by the paper's grid search on B0
        Rule(2**0.1, 2 ** (0.8 / 2), 2 ** (0.1 / 2), "fast"),  # Dollar, Singh, Girshick 2021, arXiv 2103.06877: dWr
        Rule(1, 2 ** (1 / 2), 1, "width"),  # one dimension only, as in the paper's Figure 3
        Rule(2, 1, 1, "depth"),
        Rule(1, 1, 2 ** (1 / 2), "resolution"),
    )
}


@dataclass(frozen=True)
class ScalingStep:
    """A network compared with its baseline."""

    network: NetworkSpec
    phi: float | None  # None: a published variant, which no phi gives
    nominal_ratio: float  # its multiply-adds before rounding, relative to the baseline's
    realised_ratio: float  # its multiply-adds as built

    @property
    def excess(self) -> float:
        """How much more is built than nominal: .34 is 34 % more."""
        return self.realised_ratio / self.nominal_ratio - 1


@dataclass(frozen=True)
class ImpliedPhis:
    """The phi that each of a network's sizes corresponds to; None for one that the rule does not grow."""

    depth: float | None
    width: float | None
    resolution: float | None
    macs: float


def read_rule(text: str | Path | Rule) -> Rule:
    """A rule by name, from three numbers such as "1.2,1.1,1.15", or from a YAML file.

    The file gives alpha, beta and gamma; other fields, such as how they were found, are ignored. Without a `name`, the
    rule is named after the file.

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
            raise ArgumentError("rule", str(path), f"must give alpha, beta and gamma; it lacks {', '.join(missing)}.")
        try:
            return Rule(values["alpha"], values["beta"], values["gamma"], str(values.get("name") or path.stem))
        except ArgumentError as error:
            raise ArgumentError("rule", str(path), f"is not a rule: {error}") from error
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
    """The network that `phi` makes of a baseline, with every size rounded as built.

    Args:
        baseline: the network to scale; phi 0 returns it.
        phi: 1 for about twice the multiply-adds; below 0 the network shrinks.
        rule: the growth of depth, width and resolution.
        resolution_step: the resolution is the nearest multiple of this many pixels, and at least one step.
        depth_rounding: None keeps the baseline's, which is "ceil" in the official code, for a phi of 0 or more, and
            takes "nearest" below. Multiply-adds at phi -2: .45 times B0's with "ceil", .34 with "nearest", nominally
            .27; at phi 1: 2.23 with "ceil", 1.78 with "nearest", nominally 1.92.

    The dropout is that of `interpolate_dropout`. drop_connect is .2 in every published variant, so it does not change.

    Raises:
        ArgumentError: a value is outside its range, or the network would be.
    """
    for name, value, kind, how in (("baseline", baseline, NetworkSpec, "spec"), ("rule", rule, Rule, "Rule")):
        if not isinstance(value, kind):
            raise ArgumentError(name, value, f"must be a {kind.__name__}, such as effnet.{how} makes.")
    depth, width, resolution = rule.factors(phi)
    step = positive_int("resolution_step", resolution_step)
    if abs(phi) > (limit := largest_phi(baseline, rule)):
        allowed = f"must be between {-limit:.1f} and {limit:.1f} here, so that no factor exceeds {LARGEST_FACTOR}."
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
        resolution=max(1, math.floor(baseline.resolution * resolution / step + 0.5)) * step,
        depth_rounding=depth_rounding or usual,
    )
    return dataclasses.replace(network, dropout=interpolate_dropout(baseline, network)[0])


def largest_phi(baseline: NetworkSpec, rule: Rule) -> float:
    """The phi at which depth, width or resolution reaches the largest factor that a network may have."""
    built = zip((baseline.depth, baseline.width, 1.0), rule.growths, strict=True)
    return min(math.log(LARGEST_FACTOR / factor) / math.log(growth) for factor, growth in built if growth > 1)


def interpolate_dropout(baseline: NetworkSpec, network: NetworkSpec) -> tuple[float, tuple[str, ...]]:
    """The dropout for a network scaled from `baseline`, and the names of the variants that it is taken from.

    The paper only says that dropout grows linearly from .2 to .5 between B0 and B7. Here it is interpolated between the
    published variants of the baseline's family, linearly in the logarithm of d w^2 r^2, clamped to the first and last
    of them, and rounded to thousandths. One name means that variant's own dropout. No name means that the baseline
    belongs to no family or has another dropout than published, which it keeps.
    """
    variants = published_variants(baseline)
    if not variants:
        return baseline.dropout, ()
    points = [math.log(nominal_ratio(baseline, variant)) for variant in variants]
    place = min(max(math.log(nominal_ratio(baseline, network)), points[0]), points[-1])
    right = bisect_left(points, place)
    lower, upper = variants[right - 1], variants[right]
    if points[right] == place:
        return upper.dropout, (upper.name,)
    share = (place - points[right - 1]) / (points[right] - points[right - 1])
    return round(lower.dropout + (upper.dropout - lower.dropout) * share, 3), (lower.name, upper.name)


def published_variants(baseline: NetworkSpec) -> tuple[NetworkSpec, ...]:
    """A baseline and the variants published as scaled from it, with its number of classes; none for other networks.

    B0 has B1-B7, Lite0 has Lite1-4. B8 and L2 came after the paper and leave its curve.
    """
    outside = {name: getattr(baseline, name) for name in ("num_classes", "in_channels", "drop_connect")}
    for first, source in ((B0, PAPER), (LITE0, LITE)):
        if dataclasses.replace(first, **outside, name=baseline.name) == baseline:
            return tuple(dataclasses.replace(row.spec, **outside) for row in VARIANTS.values() if row.source == source)
    return ()


def nominal_ratio(baseline: NetworkSpec, network: NetworkSpec) -> float:
    """A network's multiply-adds by its coefficients, d w^2 r^2, relative to the baseline's."""
    depth, width, resolution = _factors(baseline, network)
    return depth * width**2 * resolution**2


def realised_ratio(baseline: NetworkSpec, network: NetworkSpec) -> float:
    """A network's multiply-adds as built, relative to the baseline's."""
    return cost(network).macs / cost(baseline).macs


def tabulate(
    baseline: NetworkSpec, phis: Iterable[float], rule: Rule = RULES["paper"], **rounding: Any
) -> tuple[ScalingStep, ...]:
    """The network for each phi compared with the baseline; `rounding` and errors as in `scale`."""
    networks = [(phi, scale(baseline, phi, rule, **rounding)) for phi in phis]
    return tuple(
        ScalingStep(network, phi, rule.nominal(phi), realised_ratio(baseline, network)) for phi, network in networks
    )


def implied_phis(baseline: NetworkSpec, network: NetworkSpec, rule: Rule = RULES["paper"]) -> ImpliedPhis:
    """The phi that a network's depth, width, resolution and multiply-adds as built each correspond to."""
    depth, width, resolution = rule.phis(*_factors(baseline, network))
    return ImpliedPhis(depth, width, resolution, rule.phi_of_macs(realised_ratio(baseline, network)))


def _factors(baseline: NetworkSpec, network: NetworkSpec) -> tuple[float, float, float]:
    depth, width = network.depth / baseline.depth, network.width / baseline.width
    return depth, width, network.resolution / baseline.resolution
