"""A network as built: channels, layers and sizes after rounding, for one network or for thousands at once.

The arithmetic here and in cost.py and memory.py has no branches on sizes, so every number may be an int or a numpy
array of ints with an entry for each network. That is how a budget prices ten thousand candidates exactly: with the
formulas of a single network, not with a second set of them. Types say int for either.

Rounding is the official code's (tensorflow/tpu, efficientnet_builder.py); "nearest" layers are ours.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from effnet.arch.ops import OPS, Layer

if TYPE_CHECKING:
    from effnet.arch.spec import NetworkSpec

Activation = Literal["silu", "relu6", "relu"]
DepthRounding = Literal["ceil", "nearest"]

CHANNEL_DIVISOR = 8
FIRST_STAGE = 2  # of blocks: the paper counts the stem as stage 1


@dataclass(frozen=True)
class BlockSpec:
    """One block as it is built. `name` is also its path in the module."""

    name: str
    stage: int  # the paper's number, 2 ... 8
    index: int  # position in its stage, from 0
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    expand_ratio: int
    squeeze_channels: int  # of squeeze-and-excitation; 0 where there is none
    drop_rate: float  # stochastic depth: the chance that a sample skips this block in training
    input_size: int  # height and width of its input in pixels, at the network's resolution
    op: str = "mbconv"  # its kind, see ops.py

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Its convolutions, in the order of computation."""
        return OPS[self.op].layers(self)

    @property
    def expanded_channels(self) -> int:
        """Channels of an MBConv's depthwise convolution."""
        return self.in_channels * self.expand_ratio

    @property
    def output_size(self) -> int:
        """Height and width of its output in pixels."""
        return strided(self.input_size, self.stride)

    @property
    def has_shortcut(self) -> bool:
        """Whether the input is added to the output as it is."""
        return OPS[self.op].shortcut(self)


@dataclass(frozen=True)
class Run:
    """Equal blocks in a row: the first block of a stage, or the others, of which there may be none."""

    block: BlockSpec  # the first of them; its stochastic depth is left at 0
    count: int


@dataclass(frozen=True)
class Shape:
    """The sizes of a network from input to output."""

    in_channels: int
    resolution: int
    stem_channels: int
    stem_stride: int
    stem_kernel: int
    stem_pool: bool
    runs: tuple[Run, ...]
    head: bool  # whether there is one
    head_channels: int  # of the pooled features
    num_classes: int
    activation: Activation

    @property
    def stem_size(self) -> int:
        """Height and width in pixels of the stem's output."""
        return strided(self.resolution, self.stem_stride)

    @property
    def features(self) -> int:
        """Channels of the last block's output."""
        return self.runs[-1].block.out_channels

    @property
    def final_size(self) -> int:
        """Height and width in pixels of the last feature map."""
        return self.runs[-1].block.output_size


def shape_of(spec: NetworkSpec, width: float, depth: float, resolution: int) -> Shape:
    """The shape of `spec` at this width, depth and resolution, each a number or an array of numbers."""
    stem = spec.stem if spec.fixed_ends else round_channels(spec.stem * width)
    channels, size = stem, strided(resolution, spec.stem_stride * (1 + spec.stem_pool))
    runs = []
    layers = spec.scaled_layers(depth, spec.depth_rounding)
    for number, (row, count) in enumerate(zip(spec.stages, layers, strict=True), start=FIRST_STAGE):
        ratio = spec.squeeze_ratio if row.squeeze_ratio is None else row.squeeze_ratio
        ratio = ratio if OPS[row.op].squeezes else 0.0
        first = BlockSpec(
            name=f"stages.{number}.0",
            stage=number,
            index=0,
            in_channels=channels,
            out_channels=round_channels(row.channels * width),
            kernel_size=row.kernel_size,
            stride=row.stride,
            expand_ratio=row.expand_ratio,
            squeeze_channels=_squeezed(channels, ratio),
            drop_rate=0.0,
            input_size=size,
            op=row.op,
        )
        channels, size = first.out_channels, first.output_size
        others = replace(
            first,
            name=f"stages.{number}.1",
            index=1,
            in_channels=channels,
            stride=1,
            squeeze_channels=_squeezed(channels, ratio),
            input_size=size,
        )
        runs += [Run(first, 1), Run(others, count - 1)]
    head = (spec.head if spec.fixed_ends else round_channels(spec.head * width)) if spec.head else channels
    return Shape(
        in_channels=spec.in_channels,
        resolution=resolution,
        stem_channels=stem,
        stem_stride=spec.stem_stride,
        stem_kernel=spec.stem_kernel,
        stem_pool=spec.stem_pool,
        runs=tuple(runs),
        head=spec.head > 0,
        head_channels=head,
        num_classes=spec.num_classes,
        activation=spec.activation,
    )


def round_channels(channels: float) -> int:
    """Channels to a multiple of 8, at least 8 and nine tenths of the exact number (official `round_filters`)."""
    rounded = (channels + CHANNEL_DIVISOR / 2) // CHANNEL_DIVISOR * CHANNEL_DIVISOR
    return _whole(rounded + CHANNEL_DIVISOR * ((rounded == 0) | (rounded < 0.9 * channels)))


def round_layers(layers: float, rule: DepthRounding) -> int:
    """Layers to a whole number: up (official `round_repeats`) or to the nearest, at least 1."""
    rounded = -(-layers // 1) if rule == "ceil" else (layers + 0.5) // 1
    return _whole(rounded + (rounded < 1))


def strided(size: int, stride: int) -> int:
    """The output size of a convolution of `stride`, which is the same for both kinds of padding."""
    return -(-size // stride)


def largest(values: Iterable[int]) -> int:
    """The largest value, for each network where there are many."""
    return functools.reduce(_larger, values)


def _larger(a: int, b: int) -> int:
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    import numpy as np

    return np.maximum(a, b)


def _squeezed(channels: int, ratio: float) -> int:
    if not ratio:
        return 0
    squeezed = channels * ratio // 1
    return _whole(squeezed + (squeezed < 1))


def _whole(number: Any) -> int:
    """An int from a float without a fraction; an array of ints from an array."""
    return number.astype("int64") if hasattr(number, "astype") else int(number)
