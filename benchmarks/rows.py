"""Rows of the inference benchmarks: a network at a resolution, with random weights that are confident on two photos."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn

import effnet
from effnet.data.image import open_photo
from effnet.models.efficientnet import EfficientNet

SURE = 10.0  # mean logit of a photo's crops
PHOTOS = Path(effnet.__file__).parent / "data" / "photos"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Row:
    """A network at a resolution with a batch size."""

    variant: str
    px: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> Row:
        """`b0@224x1`."""
        variant, _, rest = text.partition("@")
        px, _, batch = rest.partition("x")
        return cls(variant, int(px), int(batch))

    def __str__(self) -> str:
        return f"{self.variant}@{self.px}, {self.batch} image{'' if self.batch == 1 else 's'}"


def photo_pixels(count: int, px: int, seed: int = 0) -> Pixels:
    """Crops (N, px, px, 3) of the packaged photos, at random places and scales."""
    rng = np.random.default_rng(seed)
    photos = [open_photo(path) for path in sorted(PHOTOS.glob("*.png"))]
    cuttings = []
    for number in range(count):
        photo = photos[number % len(photos)]
        side = int(rng.integers(100, min(photo.size) + 1))
        left, top = (int(rng.integers(whole - side + 1)) for whole in photo.size)
        cuttings.append(np.asarray(photo.resize((px, px), box=(left, top, left + side, top + side))))
    return np.stack(cuttings)


def normalised(pixels: Pixels) -> Tensor:
    """Pixels as torchvision's networks take them: (N, 3, px, px) float32."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std).contiguous()


def network_of(row: Row) -> nn.Module:
    """torchvision's network with random weights, but activations and confidence like those of a trained network.

    Normalisation statistics are those of photos. The first two classes are the packaged photos, separated by the mean
    features of their crops: plain random weights give ties, and a precision that is refused for ties means nothing.
    """
    torch.manual_seed(0)
    network = untrained(row)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # average over all batches
    with torch.no_grad():
        for seed in (1, 2):
            network.train()(normalised(photo_pixels(8, row.px, seed)))
        network.eval()
        images = normalised(photo_pixels(32, row.px, 3))
        body = network.forward_features if isinstance(network, EfficientNet) else network.features
        features = body(images).mean((2, 3))
        first, second = features[::2].mean(0), features[1::2].mean(0)  # crops of the two photos alternate
        apart, linear = first - second, next(m for m in network.modules() if isinstance(m, nn.Linear))
        linear.weight[:2] = 2 * SURE * torch.stack((apart, -apart)) / apart.square().sum()
        linear.bias[:2] = -linear.weight[:2] @ (first + second) / 2
    return network


def untrained(row: Row) -> nn.Module:
    """torchvision's network, or effnet's where torchvision has none."""
    if row.variant.startswith("lite"):
        return EfficientNet(effnet.spec(row.variant, resolution=row.px))
    network: nn.Module = getattr(torchvision.models, f"efficientnet_{row.variant}")()
    return network
