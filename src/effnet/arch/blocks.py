"""The blocks of a network: their kinds, the layers of each, and sizes after rounding.

| op | layers | expand_ratio | shortcut |
|---|---|---|---|
| mbconv | 1x1 to e times the input, k x k depthwise, squeeze-and-excitation, 1x1 linear | e | where shapes agree |
| separable | k x k depthwise, 1x1 (MobileNetV1, Howard et al. 2017) | 1 | never |
| bottleneck | 1x1, k x k, 1x1 to e times the inner channels (ResNet, He et al. 2016) | e | always; 1x1 in the first |

A bottleneck's stride is in its middle convolution, as in torchvision and unlike the paper, and its activation follows
the sum. An mbconv with a ratio of 1 has no first layer.

A new kind of block is an entry in OPS and a module in models/blocks.py. Costs, memory, tensor names, recomputation,
inheritance and engine graphs follow from the entry. Its path must not end in a depthwise layer; Op checks that.

Arithmetic on sizes has no branches here, in cost.py and in memory.py, so every number may be an int or a numpy array
with an entry per network: a budget prices ten thousand candidates with the formulas of a single network. The
annotation `int` stands for both.

Rounding is the official code's (tensorflow/tpu, efficientnet_builder.py); "nearest" layers are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from effnet.errors import ArgumentError

Activation = Literal["silu", "relu6", "relu"]
DepthRounding = Literal["ceil", "nearest"]

CHANNEL_DIVISOR = 8
FIRST_STAGE = 2  # of the blocks: the paper counts the stem as stage 1


@dataclass(frozen=True)
class Layer:
    """A convolution with its normalisation. `name` is also the attribute in the block's module."""

    name: str
    inputs: int
    outputs: int
    kernel_size: int
    input_size: int  # height and width in pixels
    output_size: int
    depthwise: bool = False
    activation: bool = True
    shortcut: bool = False  # reads the block's input and is added to its output

    @property
    def elements(self) -> int:
        """Elements of its output per image."""
        return self.outputs * self.output_size**2

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """In torch's order: (out, in / groups, kernel, kernel)."""
        return self.outputs, 1 if self.depthwise else self.inputs, self.kernel_size, self.kernel_size


@dataclass(frozen=True)
class BlockSpec:
    """A block as built. `name` is also its path in the module."""

    name: str
    stage: int  # the paper's number, 2 ... 8
    index: int  # position in its stage, from 0
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    expand_ratio: int
    squeeze_channels: int  # of squeeze-and-excitation; 0 if there is none
    drop_rate: float  # stochastic depth: the probability that a sample skips this block in training
    input_size: int  # height and width of its input in pixels, at the network's resolution
    op: str = "mbconv"  # its kind, a name in OPS

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Its convolutions in the order of computation, a shortcut's last."""
        return OPS[self.op].layers(self)

    @cached_property
    def path(self) -> tuple[Layer, ...]:
        """Its convolutions from input to output, without the shortcut's."""
        return tuple(layer for layer in self.layers if not layer.shortcut)

    @property
    def expanded_channels(self) -> int:
        """Channels of an MBConv's depthwise convolution."""
        return self.in_channels * self.expand_ratio

    @property
    def scaled_channels(self) -> int:
        """Channels that squeeze-and-excitation scales, before the last layer of the path."""
        return self.path[-1].inputs

    @property
    def output_size(self) -> int:
        """Height and width of its output in pixels."""
        return strided_size(self.input_size, self.stride)

    @property
    def output_elements(self) -> int:
        """Elements of its output per image."""
        return self.out_channels * self.output_size**2

    @property
    def has_shortcut(self) -> bool:
        """Whether the input is added to the output unchanged."""
        return OPS[self.op].shortcut(self)


@dataclass(frozen=True)
class BlockRun:
    """Equal consecutive blocks: the first block of a stage, or the others, if any."""

    block: BlockSpec  # the first of them, with stochastic depth 0
    count: int


@dataclass(frozen=True)
class Shape:
    """A network as built: everything that its costs depend on. Specs with equal shapes are the same network.

    So it includes the few fields of the spec that no factor scales.
    """

    in_channels: int
    resolution: int
    stem_channels: int
    stem_stride: int
    stem_kernel: int
    stem_pool: bool
    runs: tuple[BlockRun, ...]
    head: bool  # whether there is one
    head_channels: int  # of the pooled features
    num_classes: int
    activation: Activation

    @property
    def stem_size(self) -> int:
        """Height and width in pixels of the stem's output."""
        return strided_size(self.resolution, self.stem_stride)

    @property
    def features(self) -> int:
        """Channels of the last block's output."""
        return self.runs[-1].block.out_channels

    @property
    def final_size(self) -> int:
        """Height and width in pixels of the last feature map."""
        return self.runs[-1].block.output_size


@dataclass(frozen=True)
class Op:
    """A kind of block."""

    name: str
    layers: Callable[[BlockSpec], tuple[Layer, ...]]
    title: Callable[[BlockSpec], str]  # in a table of stages
    shortcut: Callable[[BlockSpec], bool] = lambda block: False  # whether the input is added to the output unchanged
    squeezes: bool = False  # whether squeeze-and-excitation may precede the last layer
    activates_sum: bool = False  # whether the activation follows the sum with the shortcut, not the last layer
    expand_ratios: tuple[int, ...] = ()  # allowed values; (): any
    trains: bool = False  # whether native/training.h computes the whole block
    recomputes: bool = (
        True  # whether the module computes exactly these layers, so that recomputation can replace its forward
    )

    def __post_init__(self) -> None:
        ratio = self.expand_ratios[0] if self.expand_ratios else 2
        sample = BlockSpec("stages.2.0", 2, 0, 8, 16, 3, 1, ratio, 0, 0.0, 8, self.name)
        if [layer for layer in self.layers(sample) if not layer.shortcut][-1].depthwise:
            rule = "must not end in a depthwise layer, which cannot change the number of channels."
            raise ArgumentError("layers", self.name, rule)

    def check(self, expand_ratio: int, squeeze_ratio: float | None) -> None:
        """Raise ArgumentError if a stage's numbers are invalid for this kind."""
        if squeeze_ratio and not self.squeezes:
            raise ArgumentError("squeeze_ratio", squeeze_ratio, f"must be 0: {self.name} blocks never squeeze.")
        if self.expand_ratios and expand_ratio not in self.expand_ratios:
            allowed = " or ".join(map(str, self.expand_ratios))
            raise ArgumentError("expand_ratio", expand_ratio, f"must be {allowed} for {self.name}.")


def round_channels(channels: float) -> int:
    """Round channels to a multiple of 8, at least 8 and 90 % of the exact number (official `round_filters`)."""
    rounded = (channels + CHANNEL_DIVISOR / 2) // CHANNEL_DIVISOR * CHANNEL_DIVISOR
    return _whole(rounded + CHANNEL_DIVISOR * ((rounded == 0) | (rounded < 0.9 * channels)))


def round_layers(layers: float, rule: DepthRounding) -> int:
    """Round layers to a whole number: up (official `round_repeats`) or to the nearest, at least 1."""
    rounded = -(-layers // 1) if rule == "ceil" else (layers + 0.5) // 1
    return _whole(rounded + (rounded < 1))


def round_squeeze(channels: int, ratio: float) -> int:
    """Channels inside squeeze-and-excitation, from those of the block's input; 0 without it."""
    if not ratio:
        return 0
    squeezed = channels * ratio // 1
    return _whole(squeezed + (squeezed < 1))


def strided_size(size: int, stride: int) -> int:
    """The output size of a convolution of `stride`, which is the same for both kinds of padding."""
    return -(-size // stride)


def _whole(number: Any) -> int:
    """An int from a float without a fraction; an array of ints from an array."""
    return number.astype("int64") if hasattr(number, "astype") else int(number)


def _mbconv(block: BlockSpec) -> tuple[Layer, ...]:
    wide, before, after = block.expanded_channels, block.input_size, block.output_size
    expand = (Layer("expand", block.in_channels, wide, 1, before, before),) if block.expand_ratio != 1 else ()
    return (
        *expand,
        Layer("depthwise", wide, wide, block.kernel_size, before, after, depthwise=True),
        Layer("project", wide, block.out_channels, 1, after, after, activation=False),
    )


def _separable(block: BlockSpec) -> tuple[Layer, ...]:
    narrow, before, after = block.in_channels, block.input_size, block.output_size
    return (
        Layer("depthwise", narrow, narrow, block.kernel_size, before, after, depthwise=True),
        Layer("pointwise", narrow, block.out_channels, 1, after, after),
    )


def _bottleneck(block: BlockSpec) -> tuple[Layer, ...]:
    inner, before, after = block.out_channels // block.expand_ratio, block.input_size, block.output_size
    ends = block.in_channels, block.out_channels
    shortcut = Layer("shortcut", *ends, 1, before, after, activation=False, shortcut=True)
    return (
        Layer("reduce", block.in_channels, inner, 1, before, before),
        Layer("conv", inner, inner, block.kernel_size, before, after),
        Layer("widen", inner, block.out_channels, 1, after, after, activation=False),
        *((shortcut,) if block.index == 0 else ()),
    )


def _kernel(block: BlockSpec) -> str:
    return f"k{block.kernel_size}x{block.kernel_size}"


OPS = {
    op.name: op
    for op in (
        Op(
            "mbconv",
            _mbconv,
            lambda block: f"MBConv{block.expand_ratio}, {_kernel(block)}",
            shortcut=lambda block: block.stride == 1 and block.in_channels == block.out_channels,
            squeezes=True,
            trains=True,
        ),
        Op("separable", _separable, lambda block: f"Separable, {_kernel(block)}", expand_ratios=(1,), trains=True),
        Op(
            "bottleneck",
            _bottleneck,
            lambda block: f"Bottleneck{block.expand_ratio}, {_kernel(block)}",
            shortcut=lambda block: block.index > 0,
            activates_sum=True,
            expand_ratios=(1, 2, 4, 8),  # channels are multiples of 8 at any width
        ),
    )
}
