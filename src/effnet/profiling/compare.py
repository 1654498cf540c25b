"""Measured time of many networks in turn: how well multiply-adds and activations predict it, and Table 4 of the paper.

Everything runs eagerly in float32 on the processor, in eval mode, with random weights, on which time does not depend.
The networks of other kinds are torchvision's.

Departure from the paper: Table 4's processor is another one, and its memory layout is not known, so both are measured.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from effnet.arch.cost import Cost, cost
from effnet.arch.variants import VARIANTS, spec
from effnet.errors import ArgumentError, MissingExtraError, UnknownNameError
from effnet.fields import positive_int
from effnet.metrics.conditions import LAYOUTS, Conditions, random_images, torch_threads
from effnet.metrics.timing import Progress, Timing, measure_in_turn
from effnet.models.efficientnet import EfficientNet

# The other networks: their names in the paper's spelling, and torchvision's. All see 224 px.
RIVALS = {
    "ResNet-50": "resnet50",
    "ResNet-152": "resnet152",
    "DenseNet-169": "densenet169",
    "MobileNetV2": "mobilenet_v2",
    "MobileNetV3-L": "mobilenet_v3_large",
    "ShuffleNetV2": "shufflenet_v2_x1_0",
}
COMPARED = ("b0", "b1", "b2", "b3", "lite0", *(name for name in RIVALS if name != "ResNet-152"))
# Table 4 of the paper, one core of a Xeon E5-2690, batch 1, mean of 20 runs: ours, seconds, theirs, seconds.
TABLE_4 = ("b1", 0.098, "ResNet-152", 0.554)
TABLE_4_RUNS = 20
GPIPE = (
    "The table's other row is published and cannot be repeated:\n"
    "GPipe 19.0 s, B7 3.1 s, 6.1x. GPipe's network of 557 M parameters is not available."
)


@dataclass(frozen=True)
class Contestant:
    """A network of the comparison; its cost is of one image, its time of a batch."""

    cost: Cost
    resolution: int
    ours: bool
    batch: int
    time: Timing

    @property
    def images_per_second(self) -> float:
        """At the median."""
        return 1e3 * self.batch / self.time.median_ms

    def to_dict(self) -> dict[str, Any]:
        """The columns under the names of the attributes."""
        head = self.cost.to_dict() | {"resolution": self.resolution, "ours": self.ours}
        return head | self.time.to_dict() | {"images_per_second": self.images_per_second}


@dataclass(frozen=True)
class Inversion:
    """Two networks, the one with fewer multiply-adds taking longer."""

    fewer: Contestant
    more: Contestant

    @property
    def slowdown(self) -> float:
        """How many times as long the one with fewer takes."""
        return self.fewer.time.median_ms / self.more.time.median_ms

    @property
    def clear(self) -> bool:
        """Whether even the spreads lie apart; where they overlap, the next run may turn the pair round."""
        return self.fewer.time.spread_ms[0] > self.more.time.spread_ms[1]

    def to_dict(self) -> dict[str, Any]:
        """Both names, their multiply-adds and medians."""
        pair = {
            key: {"name": one.cost.name, "macs": one.cost.macs, "median_ms": one.time.median_ms}
            for key, one in (("fewer", self.fewer), ("more", self.more))
        }
        return {**pair, "slowdown": self.slowdown, "clear": self.clear}


@dataclass(frozen=True)
class Comparison:
    """Networks of many kinds, timed in turn."""

    conditions: Conditions
    rows: tuple[Contestant, ...]

    @property
    def correlations(self) -> dict[str, float]:
        """Pearson's r of the logarithm of time with those of the multiply-adds and of the activations."""
        times = [row.time.median_ms for row in self.rows]
        return {
            key: correlation([getattr(row.cost, key) for row in self.rows], times) for key in ("macs", "activations")
        }

    @property
    def inversions(self) -> tuple[Inversion, ...]:
        """The pairs where fewer multiply-adds took longer, the most striking first."""
        pairs = [
            Inversion(fewer, more)
            for fewer, more in itertools.permutations(self.rows, 2)
            if fewer.cost.macs < more.cost.macs and fewer.time.median_ms > more.time.median_ms
        ]
        return tuple(sorted(pairs, key=lambda pair: pair.slowdown, reverse=True))

    def to_dict(self) -> dict[str, Any]:
        """Every figure, and what it was measured on."""
        inversions = [pair.to_dict() for pair in self.inversions]
        rows = [row.to_dict() for row in self.rows]
        return self.conditions.to_dict() | {"rows": rows, "correlations": self.correlations, "inversions": inversions}


@dataclass(frozen=True)
class Repeated:
    """Table 4's pair on this machine, both networks in one memory layout."""

    conditions: Conditions
    ours: Timing
    theirs: Timing

    @property
    def ratio(self) -> float:
        """How many times faster ours is, by the means as in the paper."""
        return self.theirs.mean_ms / self.ours.mean_ms

    def to_dict(self) -> dict[str, Any]:
        """Every figure, the published ones among them."""
        ours, ours_seconds, theirs, their_seconds = TABLE_4
        measured = {"ours": {"name": ours} | self.ours.to_dict(), "theirs": {"name": theirs} | self.theirs.to_dict()}
        published = {"ours_ms": 1e3 * ours_seconds, "theirs_ms": 1e3 * their_seconds}
        published |= {"ratio": their_seconds / ours_seconds}
        return self.conditions.to_dict() | measured | {"ratio": self.ratio, "published": published}


def compare(
    names: Sequence[str] = COMPARED,
    *,
    batch: int = 1,
    threads: int | None = None,
    runs: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Time networks in turn, each at its own resolution and in channels_last.

    Args:
        names: of variants, and of RIVALS, which torchvision builds.
        batch: images that go through together.
        threads: of torch; its present number by default. The present number is back in place afterwards.
        runs: rounds that count; by default as many as fit into 20 seconds, at least 7 and at most 30.
        progress: called with the number of rounds done and of all, after each round.

    Raises:
        ArgumentError: there are fewer than two networks, or a number is no positive whole number.
        UnknownNameError: a network has another name.
        MissingExtraError: torchvision is not installed.
    """
    batch, names = positive_int("batch", batch), tuple(dict.fromkeys(names))
    if len(names) < 2:
        raise ArgumentError("names", names, "must hold at least two networks.")
    counted = {name: count(name) for name in names}
    libraries = ("torchvision",) if set(names) & set(RIVALS) else ()
    with torch_threads(threads):
        conditions = Conditions.now(batch, "channels_last", *libraries)
        functions = {name: _forward(name, px, batch, "channels_last") for name, (_, px) in counted.items()}
        times = measure_in_turn(functions, runs=runs, progress=progress)
    rows = (Contestant(*counted[name], name in VARIANTS, batch, times[name]) for name in names)
    return Comparison(conditions, tuple(rows))


def paper_protocol(*, runs: int = TABLE_4_RUNS, progress: Progress | None = None) -> tuple[Repeated, ...]:
    """Table 4 of the paper on this machine: batch 1, one thread, the mean of 20 runs; once in each memory layout.

    All four contestants take turns. The paper's layout is not known, so neither is left out, and both networks of a
    row have the same.

    Raises:
        MissingExtraError: torchvision is not installed.
    """
    pair = TABLE_4[0], TABLE_4[2]
    sizes = {name: count(name)[1] for name in pair}
    with torch_threads(1):
        conditions = [Conditions.now(1, layout, "torchvision") for layout in LAYOUTS]
        functions = {f"{name} {layout}": _forward(name, sizes[name], 1, layout) for layout in LAYOUTS for name in pair}
        times = measure_in_turn(functions, runs=runs, progress=progress)
    return tuple(Repeated(here, *(times[f"{name} {here.layout}"] for name in pair)) for here in conditions)


def count(name: str) -> tuple[Cost, int]:
    """What one image costs in a variant or a network of RIVALS, and the resolution in pixels.

    Ours is counted from its spec; for a rival torch counts on its meta device, where nothing is computed.

    Raises:
        UnknownNameError: a network has another name.
        MissingExtraError: torchvision is not installed.
    """
    if name in VARIANTS:
        return cost(spec(name)), spec(name).resolution
    activations = 0

    def add(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal activations
        activations += output.numel()

    with torch.device("meta"):
        network = _rival(name)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(add)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, 224, 224))
    params = sum(parameter.numel() for parameter in network.parameters())
    return Cost(name, params, counter.get_total_flops() // 2, activations), 224


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Pearson's r of the logarithms: 1 where one is a power of the other."""
    return statistics.correlation([math.log(x) for x in xs], [math.log(y) for y in ys])


def _forward(name: str, resolution: int, batch: int, layout: str) -> Callable[[], Tensor]:
    """A function that runs a fresh network on one batch."""
    network = (EfficientNet(spec(name)) if name in VARIANTS else _rival(name)).eval()
    network.to(memory_format=LAYOUTS[layout])
    images = random_images(batch, resolution, layout=layout)

    def run() -> Tensor:
        logits: Tensor = network(images)
        return logits

    return run


def _rival(name: str) -> nn.Module:
    if name not in RIVALS:
        raise UnknownNameError("name", name, (*VARIANTS, *RIVALS))
    try:
        models = import_module("torchvision.models")
    except ImportError as error:
        raise MissingExtraError(f"{name}, a network of torchvision,", "compare") from error
    network: nn.Module = getattr(models, RIVALS[name])()
    return network.eval()
