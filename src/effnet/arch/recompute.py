"""Which segments of a network to recompute, so that training fits into a given memory with the least extra work.

Work is counted in multiply-adds. Writing a feature map takes most of the time of recomputing it, so each written
element counts as the multiply-adds that a pointwise convolution does in the same time: MACS_PER_WRITE. The search is
Lagrangian: it raises the price of a kept element until the cheapest plan at that price fits, then keeps segments that
still fit, one by one.

With the compiled kernels only two levels differ: see segments.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from effnet.arch.blocks import BlockSpec
from effnet.arch.cost import cost
from effnet.arch.memory import training_memory
from effnet.arch.segments import Keep, keeps_output, segment_memories, uses_kernels
from effnet.arch.spec import NetworkSpec
from effnet.errors import ArgumentError
from effnet.machine import StepPrecision

# Prices of a kept element in multiply-adds: from none to more than any convolution costs per element
PRICES = (0.0, *(2 ** (step / 4) for step in range(72)))
# Multiply-adds of a pointwise convolution in the time in which one element of a map is written (24 to 96 channels, 56
# and 112 px, an AVX2 processor)
MACS_PER_WRITE = 50


class RecomputePlan(dict[str, Keep]):
    """What each segment keeps for the backward pass: the stem, each block by its name, and the head."""

    @classmethod
    def uniform(cls, spec: NetworkSpec, keep: Keep | str) -> RecomputePlan:
        """The same level everywhere; raises UnknownNameError for an unknown level."""
        names = ("stem", *(block.name for block in spec.blocks), "head")
        return cls(dict.fromkeys(names, Keep.parse(keep)))

    @classmethod
    def from_dict(cls, values: Mapping[str, str]) -> RecomputePlan:
        """The plan that `to_dict` wrote."""
        return cls({name: Keep.parse(keep) for name, keep in values.items()})

    def to_dict(self) -> dict[str, str]:
        """The segments and the names of their levels."""
        return {name: keep.name.lower() for name, keep in self.items()}

    def __str__(self) -> str:
        """The number of segments per level, as text."""
        levels = list(self.values())
        counts = [(keep.name.lower(), levels.count(keep)) for keep in reversed(Keep) if keep in levels]
        return ", ".join(f"{name} {count}" if len(counts) > 1 else name for name, count in counts)


@dataclass(frozen=True)
class Work:
    """What the backward pass recomputes, per image."""

    macs: int
    elements: int  # of normalised maps, activations and products

    @property
    def equivalent_macs(self) -> int:
        """Both together, in multiply-adds."""
        return self.macs + MACS_PER_WRITE * self.elements


def levels(spec: NetworkSpec, kernels: bool | None = None) -> list[Keep]:
    """The levels that differ for this network, from the most kept to the least; `kernels` as for training_memory."""
    return [Keep.CONVOLUTIONS, Keep.BOTTLENECKS] if uses_kernels(spec, kernels) else sorted(Keep, reverse=True)


def extra_work(spec: NetworkSpec, plan: RecomputePlan, kernels: bool | None = None) -> Work:
    """What a plan computes twice; `kernels` as for training_memory."""
    works = _works(spec, plan, uses_kernels(spec, kernels))
    return Work(sum(work.macs for work in works), sum(work.elements for work in works))


def find_plan(
    spec: NetworkSpec,
    limit: int,
    batch: int,
    *,
    optimizer: str = "rmsprop",
    ema: bool = True,
    precision: StepPrecision = "fp32",
    kernels: bool | None = None,
) -> RecomputePlan:
    """The plan with the least extra work under which a step of `batch` images holds at most `limit` bytes.

    The keyword arguments are those of training_memory.

    Raises:
        ArgumentError: the limit is below the least possible memory, which the message names, or the network has a
            kind of block that cannot be recomputed.
    """
    kernels = uses_kernels(spec, kernels)
    offers: dict[str, dict[Keep, tuple[int, int]]] = {}  # per segment and level: extra work, elements kept
    for keep in levels(spec, kernels):
        same = RecomputePlan.uniform(spec, keep)
        works, memories = _works(spec, same, kernels), segment_memories(spec, same, kernels)
        for name, work, memory in zip(same, works, memories, strict=True):
            offers.setdefault(name, {})[keep] = work.equivalent_macs, memory.kept
    settings: dict[str, Any] = {"optimizer": optimizer, "ema": ema, "precision": precision, "kernels": kernels}

    def peak(plan: RecomputePlan) -> int:
        return training_memory(spec, batch, plan=plan, **settings).peak

    def cheapest(price: float) -> RecomputePlan:
        return RecomputePlan(
            # min returns the first, so ties go to the level that keeps more
            {name: min(rows, key=lambda keep: rows[keep][0] + price * rows[keep][1]) for name, rows in offers.items()}
        )

    plans = [*(cheapest(price) for price in PRICES), RecomputePlan.uniform(spec, Keep.BOTTLENECKS)]
    plan = next((plan for plan in plans if peak(plan) <= limit), None)
    if plan is None:
        least = min(peak(plan) for plan in plans)
        raise ArgumentError(
            "limit", limit, f"is too little for {spec.name} at batch {batch}: {least:,} bytes at least."
        )
    fitting = plan
    for name in sorted(offers, key=lambda name: offers[name][plan[name]], reverse=True):
        for keep, (again, _) in offers[name].items():
            richer = RecomputePlan({**fitting, name: keep})
            if again < offers[name][fitting[name]][0] and peak(richer) <= limit:
                fitting = richer
                break
    return fitting


def _works(spec: NetworkSpec, plan: Mapping[str, Keep], kernels: bool) -> list[Work]:
    """What each segment recomputes: stem, blocks, head."""
    if kernels:
        *costs, head, _ = cost(spec).blocks  # the last is the classifier's
        again = [True, *(plan[name] < Keep.CONVOLUTIONS for name in (*(block.name for block in spec.blocks), "head"))]
        return [
            Work(each.macs * twice, each.activations * twice) for each, twice in zip([*costs, head], again, strict=True)
        ]
    blocks = (_block_work(block, plan[block.name]) for block in spec.blocks)
    return [_end_work(spec, "stem", plan["stem"]), *blocks, _end_work(spec, "head", plan["head"])]


def _end_work(spec: NetworkSpec, name: str, keep: Keep) -> Work:
    price = cost(spec).blocks[0 if name == "stem" else -2]
    passes = 1 + (keep < Keep.ACTIVATIONS and name == "stem")  # the head's activation is never read again
    again = keep is Keep.BOTTLENECKS
    return Work(price.macs * again, price.activations * (passes + again))


def _block_work(block: BlockSpec, keep: Keep) -> Work:
    elements = macs = 0
    for layer in block.layers:
        elements += layer.elements * layer.activation * (1 + (keep < Keep.ACTIVATIONS))  # normalised at every level
        if not keeps_output(block, layer, keep):
            elements, macs = elements + layer.elements, macs + layer.elements * math.prod(layer.weight_shape[1:])
    if block.squeeze_channels and keep < Keep.ACTIVATIONS:
        elements += block.scaled_channels * block.path[-1].input_size ** 2
    return Work(macs, elements)
