"""Which network a state dict belongs to, by the shapes of its tensors only.

Published variants are tried first. Then width and depth are searched on a grid of tenths, hundredths and thousandths:
the head's 1280 channels change every .00625 of width, so thousandths distinguish all networks, and the roundest number
that gives the same network is the one that somebody typed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

from effnet.arch.blocks import DepthRounding, round_channels
from effnet.arch.spec import NetworkSpec
from effnet.arch.variants import B0, LITE0, VARIANTS, spec
from effnet.errors import MismatchError
from effnet.weights.layouts import Layout, LayoutStep, walk

Shapes = Mapping[str, tuple[int, ...]]
LARGEST = 12  # the largest width and depth of the search; L2, the largest network ever trained, has 4.3 and 5.3


def infer_spec(shapes: Shapes, layout: Layout, path: Path, num_classes: int | None = None) -> NetworkSpec:
    """The network whose tensors have these names and shapes, at its published resolution or else at 224 pixels.

    `path` names the file in errors; `num_classes` allows the classifier to be missing. Raises MismatchError where no
    width and depth of the family gives these shapes.
    """
    stem, head, classifier = (shapes.get(key, ()) for key in _ends(shapes, layout))
    if len(stem) != 4 or (len(head) != 4 and not layout.baseline) or len(classifier) not in (0, 2):
        raise MismatchError(f"{path} has no stem or no head of {layout.name}: it is cut short or only a part")
    if not classifier and num_classes is None:
        raise MismatchError(f"{path} has no classifier; give `num_classes` to start with a fresh one")
    dropout = 0.0 if "classifier.0.weight" in shapes and layout.name == "tutorial" else None
    for candidate in [spec(layout.baseline)] if layout.baseline else _candidates(shapes, stem[0], head):
        found = spec(candidate, num_classes=(*classifier, num_classes)[0], in_channels=stem[1], dropout=dropout)
        if _fits(found, shapes, layout):
            return found
    family = f"a {layout.baseline}" if layout.baseline else "an EfficientNet of any width and depth"
    raise MismatchError(f"{path} is not {family}: its {layout.name} tensors do not fit")


def _candidates(shapes: Shapes, stem: int, head: tuple[int, ...]) -> Iterator[NetworkSpec]:
    """Networks with the stem, head and number of blocks of `shapes`; published ones first."""
    blocks = sum(len(shape) == 4 and shape[1] == 1 and shape[0] > 1 and shape[2] > 1 for shape in shapes.values())
    counts = (blocks, blocks - 1)  # a grey network's stem looks like a depthwise convolution
    for row in VARIANTS.values():
        if len(row.spec.blocks) in counts and row.spec.head_channels == head[0]:
            yield row.spec
    for baseline in (B0, LITE0):
        for width in _widths(baseline, stem, head):
            for depth, rounding in (pair for count in counts for pair in _depths(baseline, count)):
                scaled = spec(baseline, width=width, depth=depth, depth_rounding=rounding)
                if scaled.head_channels != head[0]:  # torchvision rounds 4 * 320 channels, not the official 1280
                    channels = head[0] if scaled.fixed_ends else max(1, round(head[0] / scaled.width))
                    scaled = dataclasses.replace(scaled, head=channels)
                yield scaled


def _depths(baseline: NetworkSpec, blocks: int) -> Iterator[tuple[float, DepthRounding]]:
    """The roundest depths that give this number of blocks, one rounded up and one to the nearest."""
    for rounding in get_args(DepthRounding):
        for depth in _grid():
            if sum(baseline.scaled_layers(depth, rounding)) == blocks:
                yield depth, rounding
                break


def _widths(baseline: NetworkSpec, stem: int, head: tuple[int, ...]) -> list[float]:
    """The roundest width of each network with this stem and last stage; those with this head come first."""
    fit, misfit = dict[tuple[int, ...], float](), dict[tuple[int, ...], float]()
    for width in _grid():
        stems = baseline.stem if baseline.fixed_ends else round_channels(baseline.stem * width)
        if stems != stem or round_channels(baseline.stages[-1].channels * width) != head[1]:
            continue
        channels = tuple(round_channels(row.channels * width) for row in baseline.stages)
        heads = baseline.head if baseline.fixed_ends else round_channels(baseline.head * width)
        (fit if heads == head[0] else misfit).setdefault(channels, width)
    return [*fit.values(), *misfit.values()]


def _grid() -> Iterator[float]:
    for per_unit in (10, 100, 1000):
        yield from (step / per_unit for step in range(1, LARGEST * per_unit + 1) if per_unit == 10 or step % 10)


def _ends(shapes: Shapes, layout: Layout) -> Iterator[str]:
    dropout = "classifier.0.weight" not in shapes  # only the tutorial's names depend on it
    for role in ("stem", "head", "classifier"):
        convs = 0
        if role == "head":  # in Keras' numbered layout, the last convolution
            numbers = (re.fullmatch(r"conv2d_(\d+)/0", key) for key in shapes)
            convs = max((int(number[1]) for number in numbers if number), default=0)
        yield layout.weight_key(LayoutStep(role, (), dropout=dropout, convs=convs))


def _fits(candidate: NetworkSpec, shapes: Shapes, layout: Layout) -> bool:
    """Whether `shapes` has exactly the candidate's convolutions; the classifier may be missing."""
    steps = 0
    for step in walk(candidate):
        key, shape = next(layout.keys(step))
        if shapes.get(key) != shape and not (step.role == "classifier" and key not in shapes):
            return False
        steps += len(shape) == 4
    return steps == sum(len(shape) == 4 for shape in shapes.values())
