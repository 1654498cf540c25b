"""Table 2 of the paper (v5): the published networks that EfficientNet is compared with, group by group.

Nothing here was measured by us. Accuracies are in per cent on the ImageNet validation set, single crop, single model.
`macs` are in billions, parameters in millions; the paper calls the multiply-adds FLOPS.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rival:
    """A published network of Table 2, in the group of the EfficientNet that it is compared with."""

    name: str
    compared_with: str
    top1: float
    top5: float
    params_millions: float
    macs_billions: float | None  # the paper leaves GPipe's out


RIVALS = (
    # name, compared with, top-1, top-5, parameters (M), multiply-adds (B)
    Rival("ResNet-50", "b0", 76.0, 93.0, 26, 4.1),
    Rival("DenseNet-169", "b0", 76.2, 93.2, 14, 3.5),
    Rival("ResNet-152", "b1", 77.8, 93.8, 60, 11),
    Rival("DenseNet-264", "b1", 77.9, 93.9, 34, 6.0),
    Rival("Inception-v3", "b1", 78.8, 94.4, 24, 5.7),
    Rival("Xception", "b1", 79.0, 94.5, 23, 8.4),
    Rival("Inception-v4", "b2", 80.0, 95.0, 48, 13),
    Rival("Inception-resnet-v2", "b2", 80.1, 95.1, 56, 13),
    Rival("ResNeXt-101", "b3", 80.9, 95.6, 84, 32),
    Rival("PolyNet", "b3", 81.3, 95.8, 92, 35),
    Rival("SENet", "b4", 82.7, 96.2, 146, 42),
    Rival("NASNet-A", "b4", 82.7, 96.2, 89, 24),
    Rival("AmoebaNet-A", "b4", 82.8, 96.1, 87, 23),
    Rival("PNASNet", "b4", 82.9, 96.2, 86, 23),
    Rival("AmoebaNet-C", "b5", 83.5, 96.5, 155, 41),
    Rival("GPipe", "b7", 84.3, 97.0, 557, None),
)
