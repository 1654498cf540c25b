"""Time of many networks, measured in turn, and how well multiply-adds and activations predict it.

Everything runs eagerly in float32 on the processor, in eval mode. Weights are random: time does not depend on them.
The networks of other families are torchvision's.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from effnet.arch.cost import Cost, cost
from effnet.arch.variants import VARIANTS, spec
from effnet.errors import UnknownNameError
from effnet.metrics.timing import Conditions, Timing, measure_in_turn, random_images
from effnet.models.efficientnet import EfficientNet
from effnet.plots.style import BLUE, LEFT, RED, RIGHT, decades, footnote, name_point, picture
from effnet.profiling.profile import DEFAULTS, TimingOptions
from effnet.progress import SILENT, Progress
from effnet.runtime.torch import torch_threads

# The other networks: their names in the paper's spelling, and torchvision's. All take 224 px.
RIVALS = {
    "ResNet-50": "resnet50",
    "ResNet-152": "resnet152",
    "DenseNet-169": "densenet169",
    "MobileNetV2": "mobilenet_v2",
    "MobileNetV3-L": "mobilenet_v3_large",
    "ShuffleNetV2": "shufflenet_v2_x1_0",
}
COMPARED = ("b0", "b1", "b2", "b3", "lite0", *(name for name in RIVALS if name != "ResNet-152"))


@dataclass(frozen=True)
class Contestant:
    """A network of the comparison; its cost is per image, its time per batch."""

    cost: Cost
    resolution: int
    time: Timing


@dataclass(frozen=True)
class Comparison:
    """Networks of many families, timed in turn."""

    conditions: Conditions
    rows: tuple[Contestant, ...]

    @property
    def correlations(self) -> dict[str, float]:
        """Pearson's r of the logarithm of time with those of the multiply-adds and of the activations."""
        times = [row.time.median_ms for row in self.rows]
        return {
            key: log_correlation([getattr(row.cost, key) for row in self.rows], times)
            for key in ("macs", "activations")
        }

    @property
    def inversions(self) -> list[tuple[float, Contestant, Contestant]]:
        """Pairs (slowdown, fewer, more) where fewer multiply-adds take longer; the largest slowdown first."""
        pairs = [
            (fewer.time.median_ms / more.time.median_ms, fewer, more)
            for fewer, more in itertools.permutations(self.rows, 2)
            if fewer.cost.macs < more.cost.macs and fewer.time.median_ms > more.time.median_ms
        ]
        return sorted(pairs, key=lambda pair: pair[0], reverse=True)

    def to_dict(self) -> dict[str, Any]:
        """Every figure, and what it was measured on."""
        rows = [{**row.cost.to_dict(), "resolution": row.resolution, **row.time.to_dict()} for row in self.rows]
        inversions = [
            {"fewer": fewer.cost.name, "more": more.cost.name, "slowdown": slowdown}
            for slowdown, fewer, more in self.inversions
        ]
        return self.conditions.to_dict() | {"rows": rows, "correlations": self.correlations, "inversions": inversions}

    def draw(self, out: Path) -> None:
        """Draw measured time against multiply-adds and against activations. See `picture` for errors."""
        rows = self.rows
        title = f"Measured time against counted work: {len(rows)} networks, batch {self.conditions.batch}"
        with picture(out, 13, 6.6, title) as figure:
            panels = figure.subplots(1, 2, sharey=True)
            for axes, key, work in zip(panels, ("macs", "activations"), ("multiply-adds", "activations"), strict=True):
                axes.set(xscale="log", yscale="log", xlabel=f"{work} per image, millions")
                axes.set_title(f"log time with log {work}: r = {self.correlations[key]:.3f}", loc="left", fontsize=12)
                for number, row in enumerate(sorted(rows, key=lambda row: row.cost.macs)):
                    point = getattr(row.cost, key) / 1e6, row.time.median_ms
                    ours = row.cost.name in VARIANTS
                    axes.scatter(*point, 45, BLUE if ours else RED, marker="o" if ours else "D")
                    name_point(axes, row.cost.name, point, ((LEFT, RIGHT)[number % 2], 0), fontsize=11)
                axes.margins(x=0.25)
                decades(axes)
            for label, colour, mark in (("EfficientNet", BLUE, "o"), ("other networks", RED, "D")):
                panels[1].scatter([], [], 45, colour, marker=mark, label=label)
            panels[0].set_ylabel("median time, ms")
            panels[1].legend(loc="lower right", frameon=False)
            footnote(figure, str(self.conditions))


def compare_networks(options: TimingOptions = DEFAULTS, *, progress: Progress = SILENT) -> Comparison:
    """Time the networks of COMPARED in turn, each at its own resolution and in channels_last.

    Raises:
        ImportError: torchvision is not installed.
    """
    batch = options.batch or 1
    costs = {name: count(name) for name in COMPARED}
    with torch_threads(options.threads), torch.random.fork_rng(()):
        conditions = Conditions.now(batch, "channels_last", "torchvision")
        functions = {}
        for name, (_, resolution) in costs.items():
            network = build_network(name).to(memory_format=torch.channels_last)
            functions[name] = partial(network, random_images(batch, resolution))
        times = measure_in_turn(functions, runs=options.runs, progress=progress)
    return Comparison(conditions, tuple(Contestant(*costs[name], times[name]) for name in COMPARED))


def count(name: str) -> tuple[Cost, int]:
    """Cost per image of a variant or a network of RIVALS, and its resolution in pixels.

    Variants are counted from their spec; rivals by torch on the meta device, which computes nothing.

    Raises:
        UnknownNameError: the name is neither a variant nor among RIVALS.
        ImportError: torchvision is not installed.
    """
    if name in VARIANTS:
        return cost(spec(name)), spec(name).resolution
    activations = 0

    def add(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal activations
        activations += output.numel()

    with torch.device("meta"):
        network = build_network(name)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(add)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, 224, 224))
    params = sum(parameter.numel() for parameter in network.parameters())
    return Cost(name, params, counter.get_total_flops() // 2, activations), 224


def build_network(name: str) -> nn.Module:
    """A variant or a network of RIVALS with random weights, in eval mode."""
    if name in VARIANTS:
        return EfficientNet(spec(name)).eval()
    if name not in RIVALS:
        raise UnknownNameError("name", name, (*VARIANTS, *RIVALS))
    import torchvision

    network: nn.Module = getattr(torchvision.models, RIVALS[name])()
    return network.eval()


def log_correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Pearson's r of the logarithms: 1 if one is a power of the other."""
    return statistics.correlation([math.log(x) for x in xs], [math.log(y) for y in ys])
