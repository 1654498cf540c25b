"""The kinds of blocks that a stage can hold: what a row's numbers mean for each, as a list of convolutions.

Costs, memory, tensors' names and the stage tables read this list, so a new kind is an entry here and a module of the
same name in models/blocks.py. All arithmetic works on arrays, see shape.py.

| op | layers | expand_ratio | shortcut |
|---|---|---|---|
| mbconv | 1x1 to e times the input, k x k depthwise, squeeze-and-excitation, 1x1 linear | e | where shapes agree |
| separable | k x k depthwise, 1x1 (MobileNetV1, Howard et al. 2017) | 1 | never |
| bottleneck | 1x1, k x k, 1x1 to e times the inner channels (ResNet, He et al. 2016) | e | always; a first one is 1x1 |

A bottleneck's stride is in its middle convolution, as in torchvision and unlike the paper, and its activation follows
the sum. With a ratio of 1, an mbconv has no first layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from effnet.errors import ArgumentError

if TYPE_CHECKING:
    from effnet.arch.shape import BlockSpec
    from effnet.arch.spec import StageSpec


# What a block's output is: its last layer's, as it is or activated; or what an activation makes of the shortcut's sum
Ending = Literal["linear", "activated", "sum"]


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
    level: int = 0  # of a plan, from which on its output is kept: see memory.py

    @property
    def map(self) -> int:
        """Elements of its output per image."""
        return self.outputs * self.output_size**2

    @property
    def filter(self) -> tuple[int, int, int, int]:
        """The shape of its weight as torch has it: (out, in / groups, kernel, kernel)."""
        return self.outputs, 1 if self.depthwise else self.inputs, self.kernel_size, self.kernel_size


@dataclass(frozen=True)
class Op:
    """A kind of block."""

    name: str
    layers: Callable[[BlockSpec], tuple[Layer, ...]]
    title: Callable[[BlockSpec], str]  # as a table names it
    ending: Ending
    shortcut: Callable[[BlockSpec], bool] = lambda block: False  # whether the input is added to the output as it is
    squeezes: bool = False  # whether squeeze-and-excitation fits in
    rule: Callable[[StageSpec], str | None] = lambda row: None  # what is wrong with a row

    def check(self, row: StageSpec) -> None:
        """Raise ArgumentError where a row's numbers mean nothing for this kind."""
        if row.squeeze_ratio and not self.squeezes:
            raise ArgumentError("squeeze_ratio", row.squeeze_ratio, f"must be 0: {self.name} has no such part.")
        if wrong := self.rule(row):
            raise ArgumentError("expand_ratio", row.expand_ratio, wrong)


def _mbconv(block: BlockSpec) -> tuple[Layer, ...]:
    wide, before, after = block.expanded_channels, block.input_size, block.output_size
    expand = (Layer("expand", block.in_channels, wide, 1, before, before, level=2),) if block.expand_ratio != 1 else ()
    return (
        *expand,
        Layer("depthwise", wide, wide, block.kernel_size, before, after, depthwise=True, level=1),
        Layer("project", wide, block.out_channels, 1, after, after, activation=False),
    )


def _separable(block: BlockSpec) -> tuple[Layer, ...]:
    narrow, before, after = block.in_channels, block.input_size, block.output_size
    return (
        Layer("depthwise", narrow, narrow, block.kernel_size, before, after, depthwise=True, level=1),
        Layer("pointwise", narrow, block.out_channels, 1, after, after),
    )


def _bottleneck(block: BlockSpec) -> tuple[Layer, ...]:
    inner, before, after = block.out_channels // block.expand_ratio, block.input_size, block.output_size
    shortcut = Layer("shortcut", block.in_channels, block.out_channels, 1, before, after, activation=False)
    return (
        Layer("reduce", block.in_channels, inner, 1, before, before, level=2),
        Layer("conv", inner, inner, block.kernel_size, before, after, level=1),
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
            "linear",
            shortcut=lambda block: block.stride == 1 and block.in_channels == block.out_channels,
            squeezes=True,
        ),
        Op(
            "separable",
            _separable,
            lambda block: f"Separable, {_kernel(block)}",
            "activated",
            rule=lambda row: None if row.expand_ratio == 1 else "must be 1: separable widens nothing in between.",
        ),
        Op(
            "bottleneck",
            _bottleneck,
            lambda block: f"Bottleneck{block.expand_ratio}, {_kernel(block)}",
            "sum",
            shortcut=lambda block: block.index > 0,
            # channels are multiples of 8 at any width
            rule=lambda row: None if row.expand_ratio in (1, 2, 4, 8) else "must be 1, 2, 4 or 8 for a bottleneck.",
        ),
    )
}
