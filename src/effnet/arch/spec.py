"""A network as plain numbers: the one truth that the module, the costs, the layouts and the tables all read.

StageSpec is a row of Table 1 of the paper (Tan & Le 2019, arXiv 1905.11946v5), NetworkSpec is the table with its
scaling coefficients; blocks.py holds the kinds of blocks. InputSpec, NumericPolicy and Calibration belong to a set of
weights and not to an architecture. All of them raise ArgumentError where a value is outside its range.

Departures from the paper, all of them the official code's (tensorflow/tpu, models/official/efficientnet):
- scaled channels are rounded to multiples of 8 and never fall below nine tenths of the exact number;
- scaled depths are rounded up; `depth_rounding="nearest"` is ours, because rounding up hardly shrinks a network;
- EfficientNet-Lite keeps its stem, its head and the depth of its first and last stage (`fixed_ends`).
Only here: `stem_stride=1` keeps the size of small images in the stem. No tensor has another shape for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from effnet.arch.blocks import (
    FIRST_STAGE,
    OPS,
    Activation,
    BlockRun,
    BlockSpec,
    DepthRounding,
    Shape,
    round_channels,
    round_layers,
    round_squeeze,
    strided_size,
)
from effnet.errors import ArgumentError, UnknownNameError
from effnet.fields import (
    check_fields,
    finite_floats,
    mapping,
    one_of,
    positive_float,
    positive_int,
    rate,
    ratio,
    read_fields,
    set_field,
)

Padding = Literal["symmetric", "same"]
FitMode = Literal["crop", "pad", "squash"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

LARGEST_FACTOR = 100  # of width and depth: a slip of the keyboard must not fill the memory


@dataclass(frozen=True)
class StageSpec:
    """A row of Table 1, before scaling: blocks of one kind."""

    expand_ratio: int  # MBConv1, MBConv6: how much wider the depthwise convolution is than the block's input
    kernel_size: int  # of the depthwise convolution; in a bottleneck of the middle one
    stride: int  # of the first block; the others have stride 1
    channels: int  # output channels
    layers: int  # how many blocks
    op: str = "mbconv"  # the kind of block, a name in blocks.OPS
    squeeze_ratio: float | None = None  # of this stage; None: the network's

    def __post_init__(self) -> None:
        check_fields(self, positive_int, "expand_ratio", "kernel_size", "stride", "channels", "layers")
        _check_geometry("kernel_size", self.kernel_size, "stride", self.stride)
        if not isinstance(self.op, str):
            raise ArgumentError("op", self.op, f"must be one of {', '.join(OPS)}.")
        if self.op not in OPS:
            raise UnknownNameError("op", self.op, OPS)
        if self.squeeze_ratio is not None:
            check_fields(self, ratio, "squeeze_ratio")
        OPS[self.op].check(self.expand_ratio, self.squeeze_ratio)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; what only some networks have is left out where this one has not."""
        usual = {"op": "mbconv", "squeeze_ratio": None}
        return {name: value for name, value in dataclasses.asdict(self).items() if usual.get(name, ()) != value}


@dataclass(frozen=True)
class NetworkSpec:
    """A network of the family: the baseline's rows and how they are scaled.

    `width`, `depth` and `resolution` are the paper's w, d and r in absolute terms: factors on the baseline's channels
    and layers, and the input's height and width in pixels. They count from the baseline, never from another variant.
    """

    name: str
    stages: tuple[StageSpec, ...]
    width: float = 1.0
    depth: float = 1.0
    resolution: int = 224
    num_classes: int = 1000
    in_channels: int = 3
    dropout: float = 0.2  # before the classifier
    drop_connect: float = 0.2  # stochastic depth's rate behind the last block; it grows linearly from 0
    depth_rounding: DepthRounding = "ceil"
    activation: Activation = "silu"
    squeeze_ratio: float = 0.25  # of an MBConv's input channels; 0 builds no squeeze-and-excitation
    fixed_ends: bool = False  # Lite: scaling leaves stem, head and the layers of the first and last stage alone
    stem: int = 32  # channels of the stem before scaling
    head: int = 1280  # channels of the head before scaling; 0: there is none, the last stage is pooled
    stem_stride: int = 2  # 1 is for images of 28 to 64 px: at 32 px a stride of 2 leaves a last map of one pixel
    stem_kernel: int = 3
    stem_pool: bool = False  # 3x3 max pooling of stride 2 behind the stem, as in ResNet

    def __post_init__(self) -> None:
        check_fields(self, positive_float, "width", "depth")
        for field in ("width", "depth"):
            if (value := getattr(self, field)) > LARGEST_FACTOR:
                raise ArgumentError(field, value, f"must be at most {LARGEST_FACTOR}; L2 has 4.3 and 5.3.")
        whole = "resolution", "num_classes", "in_channels", "stem", "stem_stride", "stem_kernel"
        check_fields(self, positive_int, *whole)
        if self.head != 0 or isinstance(self.head, bool):
            check_fields(self, positive_int, "head")
        _check_geometry("stem_kernel", self.stem_kernel, "stem_stride", self.stem_stride)
        for field in ("stem_pool", "fixed_ends"):
            if not isinstance(value := getattr(self, field), bool):
                raise ArgumentError(field, value, "must be true or false.")
        check_fields(self, rate, "dropout", "drop_connect")
        check_fields(self, ratio, "squeeze_ratio")
        one_of("depth_rounding", self.depth_rounding, DepthRounding)
        one_of("activation", self.activation, Activation)
        stages = tuple(self.stages or ())
        if not stages or not all(isinstance(row, StageSpec) for row in stages):
            raise ArgumentError("stages", self.stages, "must hold at least one StageSpec and nothing else.")
        set_field(self, "stages", stages)

    @cached_property
    def shape(self) -> Shape:
        """Channels, layers and sizes as built."""
        return self.shape_at(self.width, self.depth, self.resolution)

    def shape_at(self, width: float, depth: float, resolution: int) -> Shape:
        """The shape at another width, depth and resolution, each a number or an array of numbers."""
        stem = self.stem if self.fixed_ends else round_channels(self.stem * width)
        channels, size = stem, strided_size(resolution, self.stem_stride * (1 + self.stem_pool))
        runs = []
        layers = self.scaled_layers(depth, self.depth_rounding)
        for number, (row, count) in enumerate(zip(self.stages, layers, strict=True), start=FIRST_STAGE):
            ratio = self.squeeze_ratio if row.squeeze_ratio is None else row.squeeze_ratio
            for index, blocks in enumerate((1, count - 1)):  # the first block, and the equal ones behind it
                block = BlockSpec(
                    name=f"stages.{number}.{index}",
                    stage=number,
                    index=index,
                    in_channels=channels,
                    out_channels=round_channels(row.channels * width),
                    kernel_size=row.kernel_size,
                    stride=row.stride if index == 0 else 1,
                    expand_ratio=row.expand_ratio,
                    squeeze_channels=round_squeeze(channels, ratio if OPS[row.op].squeezes else 0.0),
                    drop_rate=0.0,
                    input_size=size,
                    op=row.op,
                )
                runs.append(BlockRun(block, blocks))
                channels, size = block.out_channels, block.output_size
        head = (self.head if self.fixed_ends else round_channels(self.head * width)) if self.head else channels
        return Shape(
            in_channels=self.in_channels,
            resolution=resolution,
            stem_channels=stem,
            stem_stride=self.stem_stride,
            stem_kernel=self.stem_kernel,
            stem_pool=self.stem_pool,
            runs=tuple(runs),
            head=self.head > 0,
            head_channels=head,
            num_classes=self.num_classes,
            activation=self.activation,
        )

    @property
    def stem_channels(self) -> int:
        """Channels of the stem as built."""
        return self.shape.stem_channels

    @property
    def head_channels(self) -> int:
        """Channels of the head as built, or of the last stage: the length of the pooled features."""
        return self.shape.head_channels

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks in each stage as built."""
        counts = [run.count for run in self.shape.runs]
        return tuple(first + others for first, others in zip(counts[::2], counts[1::2], strict=True))

    def scaled_layers(self, depth: float, rounding: DepthRounding) -> tuple[int, ...]:
        """Blocks in each stage at another depth."""
        ends = (0, len(self.stages) - 1) if self.fixed_ends else ()
        return tuple(
            row.layers if i in ends else round_layers(row.layers * depth, rounding) for i, row in enumerate(self.stages)
        )

    @cached_property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """All blocks as built, from the stem to the head."""
        blocks: list[BlockSpec] = []
        total = sum(self.layers)
        for run in self.shape.runs:
            for index in range(run.block.index, run.block.index + run.count):
                rate = self.drop_connect * len(blocks) / total
                name = f"stages.{run.block.stage}.{index}"
                blocks.append(dataclasses.replace(run.block, name=name, index=index, drop_rate=rate))
        return tuple(blocks)

    @property
    def final_size(self) -> int:
        """Height and width in pixels of the last feature map, at the network's resolution."""
        return self.shape.final_size

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON or YAML; `from_dict` reads them back."""
        optional = {"stem_kernel": 3, "stem_pool": False}
        values = {name: value for name, value in dataclasses.asdict(self).items() if optional.get(name, ()) != value}
        return values | {"stages": tuple(row.to_dict() for row in self.stages)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NetworkSpec:
        """The spec that `to_dict` wrote; ArgumentError where a value is unknown, missing or outside its range."""
        stages = tuple(read_fields(StageSpec, row) for row in mapping(cls, values).get("stages") or ())
        return read_fields(cls, {**values, "stages": stages})


@dataclass(frozen=True)
class InputSpec:
    """How a photo becomes the input of a network; belongs to a set of weights, never to an architecture.

    The photo's shorter side is resized to `resize` pixels, the middle `size` x `size` pixels are cut out, scaled to
    0 ... 1 and normalised: (x - mean) / std, channel by channel. One mean value stands for greyscale, three for RGB;
    with any other number there are no photos, only arrays.
    """

    size: int = 224  # height and width in pixels of what the network sees
    resize: int = 256  # shorter side in pixels before the centre crop; only `fit="crop"` uses it
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bicubic"
    fit: FitMode = "crop"  # crop: cut the sides off; pad: add borders of the mean colour; squash: ignore the aspect

    def __post_init__(self) -> None:
        check_fields(self, positive_int, "size", "resize")
        if self.fit == "crop" and self.resize < self.size:
            rule = f"must be at least `size` (={self.size}), which is cut out of it."
            raise ArgumentError("resize", self.resize, rule)
        check_fields(self, finite_floats, "mean", "std")
        if not self.mean:
            raise ArgumentError("mean", self.mean, "must have a value for each channel: 1 for greyscale, 3 for RGB.")
        if len(self.std) != len(self.mean) or not all(value > 0 for value in self.std):
            raise ArgumentError("std", self.std, f"must have {len(self.mean)} positive values, as many as `mean`.")
        one_of("interpolation", self.interpolation, Interpolation)
        one_of("fit", self.fit, FitMode)

    @property
    def channels(self) -> int:
        """1 for greyscale, 3 for RGB."""
        return len(self.mean)

    def at(self, size: int, side: int) -> InputSpec:
        """The same for another size; images of `side` pixels, the shorter side, are not enlarged just to be cropped."""
        enlarged = self.fit == "crop" and side <= size
        resize = size if enlarged else max(size, round(size * self.resize / self.size))
        return dataclasses.replace(self, size=size, resize=resize)

    def with_channels(self, channels: int) -> InputSpec:
        """The same for another number of channels, each with the averages of these."""
        if channels == self.channels:
            return self
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        return dataclasses.replace(self, mean=(mean,) * channels, std=(std,) * channels)


@dataclass(frozen=True)
class NumericPolicy:
    """How a set of weights computes: what differs between libraries while keys and shapes agree.

    The defaults are those of a fresh network. `bn_momentum` is in torch's terms, the share of the newest batch in the
    running statistics: .01 is what TensorFlow calls .99. It averages over hundreds of steps, so after a short run of
    fewer steps the statistics still hold their starting values: train briefly with .1, or estimate them anew.
    `padding`: "symmetric" pads both sides by (kernel - 1) / 2; "same" is TensorFlow's rule, which pads a strided
    convolution's even input more at the end, and costs about 14 % of the speed (timm's published figures, RTX 4090).
    """

    bn_eps: float = 1e-3
    bn_momentum: float = 0.01
    padding: Padding = "symmetric"

    def __post_init__(self) -> None:
        check_fields(self, positive_float, "bn_eps", "bn_momentum")
        if self.bn_momentum > 1:
            raise ArgumentError("bn_momentum", self.bn_momentum, "must be at most 1; TensorFlow's .99 is .01 here.")
        one_of("padding", self.padding, Padding)


@dataclass(frozen=True)
class Calibration:
    """How far a network's confidence can be believed, fitted on images that it was not trained on."""

    temperature: float  # logits are divided by it before they become probabilities
    threshold: float | None  # confidence below which to abstain; 0 never, None always: no answer is sure enough
    error: float  # share of wrong answers that the threshold was chosen for
    n: int  # images that both were fitted on
    split: str  # the split of the data that these are

    def __post_init__(self) -> None:
        positive_float("temperature", self.temperature)
        for name, value in (("threshold", self.threshold), ("error", self.error)):
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value <= 1):
                raise ArgumentError(name, value, "must be from 0 to 1.")
        positive_int("n", self.n)

    def abstains(self, confidence: float) -> bool:
        """Whether an answer of this confidence, at the temperature, is better not given."""
        return self.threshold is None or confidence < self.threshold


def _check_geometry(kernel: str, kernel_size: int, step: str, stride: int) -> None:
    """Raise ArgumentError where a convolution has another filter or stride than the formulas know."""
    if kernel_size % 2 == 0:
        raise ArgumentError(kernel, kernel_size, "must be odd, so that a pixel is its own centre.")
    if stride > 2:
        raise ArgumentError(step, stride, "must be 1 or 2.")
