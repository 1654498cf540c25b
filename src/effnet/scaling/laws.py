"""What doubling one dimension costs: by the textbook, as built, and why they differ (section 3.2 of the paper).

A convolution's multiply-adds grow like d w^2 r^2. A network's do not quite, for reasons whose effects can be computed:
parts that do not grow, parts that grow with the width and not with its square, and rounding. The effects of a law's
reasons add up to the whole difference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from effnet.arch.blocks import CHANNEL_DIVISOR
from effnet.arch.cost import cost
from effnet.arch.spec import NetworkSpec
from effnet.arch.variants import spec

Explain = Callable[[NetworkSpec, NetworkSpec], list["Reason"]]

SHOWN = 5e-4  # effects below this round to 0 thousandths
NOISE = 1e-9  # effects below this are floating-point errors


@dataclass(frozen=True)
class Growth:
    """A network's costs relative to its baseline's."""

    macs: float
    params: float
    activations: float


@dataclass(frozen=True)
class Reason:
    """A reason why the multiply-adds do not grow as in the textbook."""

    effect: float  # on their ratio
    text: str


@dataclass(frozen=True)
class Law:
    """What happens when a dimension doubles."""

    dimension: str
    textbook: Growth
    counted: Growth
    reasons: tuple[Reason, ...]  # for the difference in multiply-adds

    @property
    def reason(self) -> str:
        """The reasons in one sentence, each with its effect."""
        shown = [f"{reason.text} ({reason.effect:+.3f})" for reason in self.reasons if abs(reason.effect) >= SHOWN]
        return "; ".join(shown) or "as the textbook has it"


def laws(baseline: NetworkSpec) -> tuple[Law, ...]:
    """The laws for a baseline's depth, width and resolution, each doubled.

    Raises:
        ArgumentError: the doubled network would be too large.
    """
    return (
        _law("depth", Growth(2, 2, 2), baseline, _depth),
        _law("width", Growth(4, 4, 2), baseline, _width),
        _law("resolution", Growth(4, 1, 4), baseline, _resolution),
    )


def _law(dimension: str, textbook: Growth, baseline: NetworkSpec, explain: Explain) -> Law:
    """A law from its reasons; the last one is rounding, which accounts for the rest."""
    doubled = spec(baseline, **{dimension: 2 * getattr(baseline, dimension)})
    before, after = cost(baseline), cost(doubled)
    counted = Growth(*(getattr(after, name) / getattr(before, name) for name in ("macs", "params", "activations")))
    *known, rounding = explain(baseline, doubled)
    rest = counted.macs - textbook.macs - sum(reason.effect for reason in known)
    known.append(dataclasses.replace(rounding, effect=rest))
    return Law(dimension, textbook, counted, tuple(reason for reason in known if abs(reason.effect) > NOISE))


def _depth(baseline: NetworkSpec, deeper: NetworkSpec) -> list[Reason]:
    """The ends do not deepen, and stages gain only repeats, which cost other than a first block."""
    price = cost(baseline)
    stages = dict(zip((block.stage for block in baseline.blocks if block.index == 0), price.stages[1:-1], strict=True))
    macs = {block.name: block.macs for block in cost(deeper).blocks}
    shallow, names = [price.stages[0], price.stages[-1]], ["stem", "head", "classifier"]
    gains: dict[str, int] = {}  # by stage: a repeat's multiply-adds minus the first block's
    for (number, part), old, new in zip(stages.items(), baseline.layers, deeper.layers, strict=True):
        if old == new:  # one of Lite's ends, or rounding
            shallow.append(part)
            names.append(f"stage {number}")
        else:
            gains[str(number)] = macs[f"stages.{number}.1"] - macs[f"stages.{number}.0"]
    share = sum(part.macs for part in shallow) / price.macs
    dearer, cheaper = ([stage for stage, gain in gains.items() if sign * gain > 0] for sign in (1, -1))
    costs = [
        f"{amount} in stage{'s' if len(numbers) > 1 else ''} {_listed(numbers)}"
        for amount, numbers in (("more", dearer), ("less", cheaper))
        if numbers
    ]
    rule = "up" if baseline.depth_rounding == "ceil" else "to the nearest whole number"
    repeats = "stages gain only repeats, which unlike a first block read the stage's own channels and cost"
    return [
        Reason(-share, f"{_listed(names)}, {share:.1%} of the MACs, do not deepen"),
        Reason(sum(gains.values()) / price.macs, f"{repeats} {' and '.join(costs)}"),
        Reason(0, f"layers are rounded {rule}: {len(baseline.blocks)} blocks become {len(deeper.blocks)}"),
    ]


def _width(baseline: NetworkSpec, _wider: NetworkSpec) -> list[Reason]:
    """A layer with one scaled side grows with the width, one with none does not grow."""
    price, first = cost(baseline), baseline.blocks[0]
    stem, opening, *_, head, classifier = (part.macs for part in price.blocks)
    linear = sum(b.expanded_channels * b.kernel_size**2 * b.output_size**2 for b in baseline.blocks)  # depthwise
    if baseline.fixed_ends:  # the first block reads the stem, so only its projection has a scaled side
        projection = first.expanded_channels * first.out_channels * first.output_size**2
        linear += projection + head - first.expanded_channels * first.kernel_size**2 * first.output_size**2
        constant = stem + classifier + opening - projection
        growing = "depthwise convolutions, the first projection and the head"
    else:
        linear, constant = linear + stem + classifier, 0
        growing = "depthwise convolutions, stem and classifier"
    linear_share, constant_share = linear / price.macs, constant / price.macs
    return [
        Reason(-2 * linear_share, f"{growing}, {linear_share:.1%} of the MACs, grow with the width, not its square"),
        Reason(-3 * constant_share, f"stem, classifier and the first depthwise, {constant_share:.1%}, do not grow"),
        Reason(0, f"channels are rounded to multiples of {CHANNEL_DIVISOR}"),
    ]


def _resolution(baseline: NetworkSpec, _finer: NetworkSpec) -> list[Reason]:
    """Layers on pooled features cost the same at any resolution."""
    price = cost(baseline)
    squeezing = price.macs - cost(dataclasses.replace(baseline, squeeze_ratio=0)).macs
    share = (squeezing + price.blocks[-1].macs) / price.macs
    names = f"{'squeeze-and-excitation and ' if squeezing else ''}classifier"
    return [
        Reason(-3 * share, f"{names}, {share:.2%} of the MACs, read pooled features and do not grow"),
        Reason(0, "maps of an odd size are rounded up when they are halved"),
    ]


def _listed(names: Iterable[str]) -> str:
    """Join names: a, b and c."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
