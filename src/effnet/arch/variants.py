"""The named networks: the baselines' rows and the coefficients of every published variant.

Coefficients: official code (tensorflow/tpu, efficientnet_builder.py and lite/efficientnet_lite_builder.py). Accuracies
are published ones on the ImageNet validation set and were not measured here.

The paper's other baselines (section 5.1, Table 3) are here as well: MobileNetV1 (Howard et al. 2017, Table 1),
MobileNetV2 (Sandler et al. 2018, Table 2) and ResNet-50 (He et al. 2016, Table 1), built as in torchvision and timm, to
the unit. Their own papers train them without stochastic depth, and so does effnet by default.

Departures from the papers: B8, L2 and Lite0-4 were published after the paper, which has only B0-B7. B1's width is 1.0,
which no phi gives: B1-B7 lie near one curve of compound scaling and not on it. Each stage of MobileNetV1 begins with a
block of stride 2.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from effnet.arch.blocks import DepthRounding
from effnet.arch.spec import NetworkSpec, StageSpec
from effnet.arch.specfile import SUFFIXES, read_spec
from effnet.errors import ArgumentError, UnknownNameError

# Table 1, stages 2-8. Stage 1 is the stem (3x3, stride 2, 32 channels); stage 9 is the head (1x1, 1280 channels).
B0_STAGES = (
    # expand_ratio, kernel_size, stride, channels, layers
    StageSpec(1, 3, 1, 16, 1),
    StageSpec(6, 3, 2, 24, 2),
    StageSpec(6, 5, 2, 40, 2),
    StageSpec(6, 3, 2, 80, 3),
    StageSpec(6, 5, 1, 112, 3),
    StageSpec(6, 5, 2, 192, 4),
    StageSpec(6, 3, 1, 320, 1),
)
B0 = NetworkSpec("b0", B0_STAGES)
LITE0 = NetworkSpec("lite0", B0_STAGES, activation="relu6", squeeze_ratio=0.0, fixed_ends=True)

PAPER = "paper, Table 2 (v5)"
ADVPROP = "official README, AdvProp"
NOISY_STUDENT = "official README, Noisy Student with unlabelled images"
LITE = "official Lite README"

BASELINES = {
    network.name: network
    for network in (
        NetworkSpec(
            "mobilenetv1",
            (
                # expand_ratio, kernel_size, stride, channels, layers, op
                StageSpec(1, 3, 1, 64, 1, "separable"),
                StageSpec(1, 3, 2, 128, 2, "separable"),
                StageSpec(1, 3, 2, 256, 2, "separable"),
                StageSpec(1, 3, 2, 512, 6, "separable"),
                StageSpec(1, 3, 2, 1024, 2, "separable"),
            ),
            dropout=0.001,  # the official code's keep probability is .999
            drop_connect=0.0,
            activation="relu6",
            stem=32,
            head=0,
        ),
        NetworkSpec(
            "mobilenetv2",
            (
                # expand_ratio, kernel_size, stride, channels, layers
                StageSpec(1, 3, 1, 16, 1),
                StageSpec(6, 3, 2, 24, 2),
                StageSpec(6, 3, 2, 32, 3),
                StageSpec(6, 3, 2, 64, 4),
                StageSpec(6, 3, 1, 96, 3),
                StageSpec(6, 3, 2, 160, 3),
                StageSpec(6, 3, 1, 320, 1),
            ),
            drop_connect=0.0,
            activation="relu6",
            squeeze_ratio=0.0,
            stem=32,
            head=1280,
        ),
        NetworkSpec(
            "resnet50",
            (
                # expand_ratio, kernel_size, stride, channels, layers, op
                StageSpec(4, 3, 1, 256, 3, "bottleneck"),
                StageSpec(4, 3, 2, 512, 4, "bottleneck"),
                StageSpec(4, 3, 2, 1024, 6, "bottleneck"),
                StageSpec(4, 3, 2, 2048, 3, "bottleneck"),
            ),
            dropout=0.0,
            drop_connect=0.0,
            activation="relu",
            stem=64,
            head=0,
            stem_kernel=7,
            stem_pool=True,
        ),
    )
}


@dataclass(frozen=True)
class Variant:
    """A published row of coefficients, with its published accuracy in per cent."""

    name: str
    width: float
    depth: float
    resolution: int
    dropout: float
    top1: float
    top5: float | None
    source: str  # of the accuracy

    @property
    def spec(self) -> NetworkSpec:
        """The network of this row."""
        values = {name: getattr(self, name) for name in ("name", "width", "depth", "resolution", "dropout")}
        return dataclasses.replace(LITE0 if self.name.startswith("lite") else B0, **values)


VARIANTS = {
    row.name: row
    for row in (
        # name, width, depth, resolution, dropout, top-1, top-5, source of the accuracy
        Variant("b0", 1.0, 1.0, 224, 0.2, 77.1, 93.3, PAPER),
        Variant("b1", 1.0, 1.1, 240, 0.2, 79.1, 94.4, PAPER),
        Variant("b2", 1.1, 1.2, 260, 0.3, 80.1, 94.9, PAPER),
        Variant("b3", 1.2, 1.4, 300, 0.3, 81.6, 95.7, PAPER),
        Variant("b4", 1.4, 1.8, 380, 0.4, 82.9, 96.4, PAPER),
        Variant("b5", 1.6, 2.2, 456, 0.4, 83.6, 96.7, PAPER),
        Variant("b6", 1.8, 2.6, 528, 0.5, 84.0, 96.8, PAPER),
        Variant("b7", 2.0, 3.1, 600, 0.5, 84.3, 97.0, PAPER),
        Variant("b8", 2.2, 3.6, 672, 0.5, 85.5, None, ADVPROP),
        Variant("l2", 4.3, 5.3, 800, 0.5, 88.4, None, NOISY_STUDENT),
        Variant("lite0", 1.0, 1.0, 224, 0.2, 75.1, None, LITE),
        Variant("lite1", 1.0, 1.1, 240, 0.2, 76.7, None, LITE),
        Variant("lite2", 1.1, 1.2, 260, 0.3, 77.6, None, LITE),
        Variant("lite3", 1.2, 1.4, 280, 0.3, 79.8, None, LITE),
        Variant("lite4", 1.4, 1.8, 300, 0.3, 81.5, None, LITE),
    )
}


def spec(
    network: str | NetworkSpec,
    *,
    width: float | None = None,
    depth: float | None = None,
    resolution: int | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    dropout: float | None = None,
    drop_connect: float | None = None,
    depth_rounding: DepthRounding | None = None,
    stem_stride: int | None = None,
) -> NetworkSpec:
    """A named network, or a given one, with the values that are given here changed.

    Args:
        network: "b0" ... "b8", "l2", "lite0" ... "lite4", "mobilenetv1", "mobilenetv2", "resnet50", a spec.yaml, or a
            NetworkSpec.
        width: factor on the baseline's channels. Absolute: `spec("b4", width=1.1)` is 1.1 times B0, not 1.1 times B4.
        depth: factor on the baseline's layers, absolute in the same way.
        resolution: height and width of the input in pixels.
        num_classes: outputs of the classifier; `in_channels` are those of the image.
        dropout: rate before the classifier; `drop_connect`: of stochastic depth, which skips block b of n with the
            probability drop_connect * b / n.
        depth_rounding: "ceil" as the official code, or "nearest".
        stem_stride: 2, or 1 for small images, which makes every map twice as high and wide.

    Raises:
        UnknownNameError: no network has that name.
        ArgumentError: a value is outside its range.
    """
    changes = {name: value for name, value in locals().items() if name != "network" and value is not None}
    base = network if isinstance(network, NetworkSpec) else _named(network)
    changed = dataclasses.replace(base, **changes)
    return dataclasses.replace(changed, name=_name(base, changed))


def variant(name: str) -> Variant:
    """The published row of that name, which may have a prefix as in "efficientnet_b0".

    Raises:
        UnknownNameError: there is none.
        ArgumentError: it is not a name.
    """
    if not isinstance(name, str):
        raise ArgumentError("network", name, "must be a name such as 'b0', a spec.yaml, or a NetworkSpec.")
    short = name.lower().removeprefix("tf_").removeprefix("efficientnet").lstrip("-_")
    if short not in VARIANTS:
        # without its prefix the nearest name is found
        raise UnknownNameError("network", short or name, (*VARIANTS, *BASELINES))
    return VARIANTS[short]


def _named(network: str) -> NetworkSpec:
    """The network of a variant, another baseline, or a spec.yaml."""
    if isinstance(network, (str, Path)) and Path(network).suffix.lower() in SUFFIXES:
        return read_spec(network)
    if isinstance(network, str) and network.lower() in BASELINES:
        return BASELINES[network.lower()]
    return variant(network).spec


def _name(base: NetworkSpec, changed: NetworkSpec) -> str:
    """The base's name and, behind it, each dimension that is no longer the base's: b0-w1.1-r260."""
    dimensions = {"w": "width", "d": "depth", "r": "resolution", "s": "stem_stride"}
    changes = {
        letter: getattr(changed, f) for letter, f in dimensions.items() if getattr(changed, f) != getattr(base, f)
    }
    kept = re.sub(rf"-[{''.join(changes)}][\d.]+", "", base.name) if changes else base.name  # b0-r260 becomes b0-r300
    pieces = (f"-{letter}{value:g}" for letter, value in changes.items())
    rounding = "" if changed.depth_rounding == base.depth_rounding else f"-{changed.depth_rounding}"
    return kept + "".join(pieces) + rounding
