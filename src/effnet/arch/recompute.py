"""Which parts of a network to compute again so that training fits into a given memory, at the least extra work.

Work is counted in multiply-adds. Computing a map again is mostly writing it, so each element that is written counts as
many multiply-adds as a pointwise convolution does in the time: WRITTEN. The search is Lagrange's: a price for a byte
is raised until the plan that is cheapest at this price fits; then single parts get back what still fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from effnet.arch.cost import cost
from effnet.arch.memory import (
    Keep,
    Part,
    Plan,
    Precision,
    block_part,
    head_part,
    stem_part,
    training_memory,
)
from effnet.arch.shape import Run
from effnet.arch.spec import NetworkSpec
from effnet.errors import ArgumentError

# Multiply-adds that are worth an element kept, from the least to more than any convolution costs
PRICES = (0.0, *(2 ** (step / 4) for step in range(72)))
# Multiply-adds of a pointwise convolution in the time in which one element of a map is written (24 to 96 channels, 56
# and 112 px, an AVX2 processor)
WRITTEN = 50


@dataclass(frozen=True)
class Work:
    """What is computed again in the backward pass, per image."""

    macs: int
    elements: int  # of normalised maps, activations and products

    @property
    def weighed(self) -> int:
        """Both in multiply-adds."""
        return self.macs + WRITTEN * self.elements


def extra_work(spec: NetworkSpec, plan: Plan) -> Work:
    """What a plan computes twice."""
    works = [_work(spec, name, keep) for name, keep in plan.keeps.items()]
    return Work(sum(work.macs for work in works), sum(work.elements for work in works))


def find_plan(
    spec: NetworkSpec,
    limit: int,
    batch: int,
    *,
    optimizer: str = "rmsprop",
    ema: bool = True,
    precision: Precision = "fp32",
) -> Plan:
    """The plan with the least extra work under which a step of `batch` images holds at most `limit` bytes.

    Raises:
        ArgumentError: the limit is below what the smallest plan needs, which the message says.
    """
    levels = _levels(spec)

    def peak(plan: Plan) -> int:
        return training_memory(spec, batch, optimizer=optimizer, ema=ema, precision=precision, plan=plan).peak

    def cheapest(price: float) -> Plan:
        return Plan(
            # on a tie the level that keeps more, which min meets first
            {name: min(rows, key=lambda keep: rows[keep][0] + price * rows[keep][1]) for name, rows in levels.items()}
        )

    plans = [*(cheapest(price) for price in PRICES), Plan.uniform(spec, Keep.BOTTLENECKS)]
    plan = next((plan for plan in plans if peak(plan) <= limit), None)
    if plan is None:
        least = min(peak(plan) for plan in plans)
        raise ArgumentError(
            "limit", limit, f"is too little for {spec.name} at batch {batch}: {least:,} bytes at least."
        )
    fitting = plan
    for name in sorted(levels, key=lambda name: levels[name][plan.keeps[name]], reverse=True):
        for keep, (work, _) in levels[name].items():
            richer = Plan({**fitting.keeps, name: keep})
            if work < levels[name][fitting.keeps[name]][0] and peak(richer) <= limit:
                fitting = richer
                break
    return fitting


def _levels(spec: NetworkSpec) -> dict[str, dict[Keep, tuple[int, int]]]:
    """Extra work and elements kept of each part at each level, those that keep most first."""
    parts: dict[str, Callable[[Keep], Part]] = {"stem": partial(stem_part, spec.shape)}
    parts |= {block.name: partial(block_part, Run(block, 1), activation=spec.activation) for block in spec.blocks}
    parts["head"] = partial(head_part, spec.shape)
    order = sorted(Keep, reverse=True)
    return {
        name: {keep: (_work(spec, name, keep).weighed, part(keep).kept) for keep in order}
        for name, part in parts.items()
    }


def _work(spec: NetworkSpec, name: str, keep: Keep) -> Work:
    """What a part computes again, per image."""
    if name == "head" and not spec.head:
        return Work(0, 0)
    if name in ("stem", "head"):
        part = cost(spec).blocks[0 if name == "stem" else -2]
        passes = 1 + (keep < Keep.ACTIVATIONS and name == "stem")  # nobody reads the head's activation again
        again = keep is Keep.BOTTLENECKS
        return Work(part.macs * again, part.activations * (passes + again))
    block = next(block for block in spec.blocks if block.name == name)
    elements = macs = 0
    for layer in block.layers:
        activated = layer.map * layer.activation
        elements += activated * (1 + (keep < Keep.ACTIVATIONS))  # normalised again at every level
        if keep < layer.level:
            elements, macs = elements + layer.map, macs + layer.map * math.prod(layer.filter[1:])
    if block.squeeze_channels and keep < Keep.ACTIVATIONS:
        elements += block.expanded_channels * block.output_size**2
    return Work(macs, elements)
