"""The published rivals, against Table 2 (v5) of the paper and the ratios that it prints itself."""

import pytest

from effnet.arch.variants import VARIANTS
from effnet.describing.rivals import RIVALS

# EfficientNet's own columns: parameters (M), multiply-adds (B)
EFFICIENTNETS = {"b0": (5.3, 0.39), "b1": (7.8, 0.70), "b2": (9.2, 1.0), "b3": (12, 1.8)} | {
    "b4": (19, 4.2),
    "b5": (30, 9.9),
    "b7": (66, 37),
}
# rival, its group, top-1, top-5, then parameters and multiply-adds as multiples of the group's EfficientNet
TABLE_2 = (
    ("ResNet-50", "b0", 76.0, 93.0, 4.9, 11),
    ("DenseNet-169", "b0", 76.2, 93.2, 2.6, 8.9),
    ("ResNet-152", "b1", 77.8, 93.8, 7.6, 16),
    ("DenseNet-264", "b1", 77.9, 93.9, 4.3, 8.6),
    ("Inception-v3", "b1", 78.8, 94.4, 3.0, 8.1),
    ("Xception", "b1", 79.0, 94.5, 3.0, 12),
    ("Inception-v4", "b2", 80.0, 95.0, 5.2, 13),
    ("Inception-resnet-v2", "b2", 80.1, 95.1, 6.1, 13),
    ("ResNeXt-101", "b3", 80.9, 95.6, 7.0, 18),
    ("PolyNet", "b3", 81.3, 95.8, 7.7, 19),
    ("SENet", "b4", 82.7, 96.2, 7.7, 10),
    ("NASNet-A", "b4", 82.7, 96.2, 4.7, 5.7),
    ("AmoebaNet-A", "b4", 82.8, 96.1, 4.6, 5.5),
    ("PNASNet", "b4", 82.9, 96.2, 4.5, 5.5),  # printed as 6.0x beside 23B, and 23 / 4.2 is 5.5
    ("AmoebaNet-C", "b5", 83.5, 96.5, 5.2, 4.1),
    ("GPipe", "b7", 84.3, 97.0, 8.4, None),
)


def test_names_groups_and_accuracies():
    printed = [row[:4] for row in TABLE_2]
    assert [(rival.name, rival.compared_with, rival.top1, rival.top5) for rival in RIVALS] == printed


def test_sizes_reproduce_the_printed_ratios():
    """The ratios are printed with two digits, hence 5 per cent."""
    for rival, (*_, params_ratio, macs_ratio) in zip(RIVALS, TABLE_2, strict=True):
        params, macs = EFFICIENTNETS[rival.compared_with]
        assert rival.params_millions / params == pytest.approx(params_ratio, rel=0.05), rival.name
        if macs_ratio is None:
            assert rival.macs_billions is None
        else:
            assert rival.macs_billions / macs == pytest.approx(macs_ratio, rel=0.05), rival.name


def test_each_efficientnet_beats_its_rivals():
    for rival in RIVALS:
        assert VARIANTS[rival.compared_with].top1 >= rival.top1
