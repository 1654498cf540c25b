"""Which network a state dict belongs to, told from the shapes of its tensors alone.

Published variants are tried first. Then width and depth are looked for on a grid of tenths, hundredths and thousandths:
the head's 1280 channels change every .00625 of width, so thousandths tell every network apart, and the roundest number
that gives exactly the same network is the one a person would have typed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

from effnet.arch.spec import DepthRounding, NetworkSpec, round_channels
from effnet.arch.variants import B0, LITE0, VARIANTS, spec
from effnet.errors import MismatchError
from effnet.weights.layouts import Layout, Step, walk

Shapes = Mapping[str, tuple[int, ...]]
LARGEST = 12  # width and depth beyond this are not looked for; L2, the largest that was ever trained, has 4.3 and 5.3


def infer_spec(shapes: Shapes, layout: Layout, path: Path) -> NetworkSpec:
    """The network whose tensors have these names and shapes, at its published resolution or else at 224 pixels.

    Raises:
        MismatchError: no width and depth of the family gives these shapes.
    """
    ends = _ends(shapes, layout)
    if ends is None:
        raise MismatchError(f"{path} has no stem, head or classifier of {layout.name}: it is cut short or only a part")
    stem, head, classifier = ends
    dropout = 0.0 if "classifier.0.weight" in shapes and layout.name == "tutorial" else None
    for candidate in _candidates(shapes, stem[0], head):
        found = spec(candidate, num_classes=classifier[0], in_channels=stem[1], dropout=dropout)
        if _fits(found, shapes, layout):
            return found
    raise MismatchError(
        f"{path} is no EfficientNet of any width and depth: its {layout.name} tensors have other shapes"
    )


def _candidates(shapes: Shapes, stem: int, head: tuple[int, ...]) -> Iterator[NetworkSpec]:
    """Networks whose stem, head and number of blocks are those of `shapes`; published ones first."""
    blocks = sum(len(shape) == 4 and shape[1] == 1 and shape[0] > 1 and shape[2] > 1 for shape in shapes.values())
    for row in VARIANTS.values():
        if len(row.spec.blocks) in (blocks, blocks - 1) and row.spec.head_channels == head[0]:
            yield row.spec
    for baseline in (B0, LITE0):
        for depth, rounding in (*_depths(baseline, blocks), *_depths(baseline, blocks - 1)):
            for width in _widths(baseline, stem, head[1]):
                scaled = spec(baseline, width=width, depth=depth, depth_rounding=rounding)
                yield scaled if scaled.head_channels == head[0] else _with_head(scaled, head[0])


def _depths(baseline: NetworkSpec, blocks: int) -> Iterator[tuple[float, DepthRounding]]:
    """The roundest depth that gives so many blocks, rounded up and to the nearest."""
    for rounding in get_args(DepthRounding):
        for depth in _grid():
            if sum(baseline.scaled_layers(depth, rounding)) == blocks:
                yield depth, rounding
                break


def _widths(baseline: NetworkSpec, stem: int, last: int) -> Iterator[float]:
    """The roundest width of each network that has this stem and last stage."""
    seen = set()
    for width in _grid():
        channels = tuple(round_channels(row.channels * width) for row in baseline.stages)
        stems = baseline.stem if baseline.fixed_ends else round_channels(baseline.stem * width)
        if (stems, channels[-1]) == (stem, last) and channels not in seen:
            seen.add(channels)
            yield width


def _grid() -> Iterator[float]:
    """Tenths, then hundredths, then thousandths."""
    for per_unit in (10, 100, 1000):
        yield from (step / per_unit for step in range(1, LARGEST * per_unit + 1) if per_unit == 10 or step % 10)


def _with_head(scaled: NetworkSpec, channels: int) -> NetworkSpec:
    """The network with another head: torchvision rounds 4 * 320 channels in another order than the official 1280."""
    return dataclasses.replace(scaled, head=channels if scaled.fixed_ends else max(1, round(channels / scaled.width)))


def _ends(shapes: Shapes, layout: Layout) -> tuple[tuple[int, ...], ...] | None:
    """The shapes of stem, head and classifier."""
    keys = []
    for step in (Step("stem", ()), Step("head", ()), Step("classifier", ())):
        moved = dataclasses.replace(step, dropout="classifier.0.weight" not in shapes)
        name, _ = layout.names(moved)
        keys.append(name + layout.weight[0])
    if layout.name == "keras-numbered":  # there, the head is the last convolution
        last = max((int(key.split("_")[1].split("/")[0]) for key in shapes if key.startswith("conv2d_")), default=0)
        keys[1] = f"conv2d_{last}{layout.weight[0]}"
    ends = tuple(shapes.get(key, ()) for key in keys)
    return ends if [len(end) for end in ends] == [4, 4, 2] else None


def _fits(candidate: NetworkSpec, shapes: Shapes, layout: Layout) -> bool:
    """Whether all convolutions and the classifier are there with these shapes, and no convolution is left over."""
    steps = 0
    for step in walk(candidate):
        key, shape = next(layout.keys(step))
        if shapes.get(key) != shape:
            return False
        steps += len(shape) == 4
    return steps == sum(len(shape) == 4 for shape in shapes.values())
