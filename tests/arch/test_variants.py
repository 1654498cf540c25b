"""The named networks, against the official coefficients and the published accuracies."""

import dataclasses
import re

import pytest

import effnet
from effnet.arch.variants import BASELINES, VARIANTS, variant
from effnet.errors import UnknownNameError

# Official builders (efficientnet_builder.py, lite/efficientnet_lite_builder.py): width, depth, resolution, dropout;
# then top-1 and top-5 of the paper's Table 2 (v5), or the official READMEs' top-1
OFFICIAL = {
    "b0": (1.0, 1.0, 224, 0.2, 77.1, 93.3),
    "b1": (1.0, 1.1, 240, 0.2, 79.1, 94.4),
    "b2": (1.1, 1.2, 260, 0.3, 80.1, 94.9),
    "b3": (1.2, 1.4, 300, 0.3, 81.6, 95.7),
    "b4": (1.4, 1.8, 380, 0.4, 82.9, 96.4),
    "b5": (1.6, 2.2, 456, 0.4, 83.6, 96.7),
    "b6": (1.8, 2.6, 528, 0.5, 84.0, 96.8),
    "b7": (2.0, 3.1, 600, 0.5, 84.3, 97.0),
    "b8": (2.2, 3.6, 672, 0.5, 85.5, None),  # AdvProp
    "l2": (4.3, 5.3, 800, 0.5, 88.4, None),  # Noisy Student
    "lite0": (1.0, 1.0, 224, 0.2, 75.1, None),
    "lite1": (1.0, 1.1, 240, 0.2, 76.7, None),
    "lite2": (1.1, 1.2, 260, 0.3, 77.6, None),
    "lite3": (1.2, 1.4, 280, 0.3, 79.8, None),
    "lite4": (1.4, 1.8, 300, 0.3, 81.5, None),
}


def test_coefficients():
    assert {name: dataclasses.astuple(row)[1:-1] for name, row in VARIANTS.items()} == OFFICIAL
    for name, (width, depth, resolution, dropout, *_) in OFFICIAL.items():
        network = effnet.spec(name)
        assert (network.name, network.num_classes, network.in_channels) == (name, 1000, 3)
        assert (network.width, network.depth, network.resolution) == (width, depth, resolution)
        assert (network.dropout, network.drop_connect) == (dropout, 0.2)


def test_only_lite_goes_without_squeeze_and_swish():
    for name in OFFICIAL:
        network, lite = effnet.spec(name), name.startswith("lite")
        assert (network.activation, network.squeeze_ratio) == (("relu6", 0) if lite else ("silu", 0.25))


@pytest.mark.parametrize(
    "name", ["b3", "B3", "efficientnet_b3", "efficientnet-b3", "EfficientNet-B3", "tf_efficientnet_b3"]
)
def test_other_libraries_names_are_understood(name):
    assert variant(name).name == "b3"


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match=re.escape("`network` (='b9') is not known")) as error:
        effnet.spec("b9")
    assert str(error.value).endswith("Did you mean 'b8'?")
    assert error.value.known == (*OFFICIAL, *BASELINES)
    with pytest.raises(UnknownNameError, match=r"Did you mean 'lite2'\?"):
        effnet.spec("efficientnet_lit2")


def test_width_and_depth_are_absolute():
    """spec("b4", width=1.1) has B2's channels, because both count from B0."""
    b2, changed = effnet.spec("b2"), effnet.spec("b4", width=1.1, depth=1.2, resolution=260)
    assert changed.blocks == b2.blocks
    assert changed.head_channels == b2.head_channels
    assert effnet.spec(effnet.spec("b0", width=2), width=1.1).stem_channels == b2.stem_channels


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 0.5),
        ("depth", 0.5),
        ("resolution", 100),
        ("num_classes", 2),
        ("in_channels", 1),
        ("dropout", 0),
        ("drop_connect", 0),
        ("depth_rounding", "nearest"),
        ("stem_stride", 1),
    ],
)
def test_each_argument_changes_its_field_alone(field, value):
    b1 = effnet.spec("b1")
    changed = effnet.spec("b1", **{field: value})
    assert getattr(changed, field) == value
    assert dataclasses.replace(changed, **{field: getattr(b1, field)}, name="b1") == b1


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "b0"),
        ({"width": 1.0, "resolution": 224}, "b0"),
        ({"num_classes": 10, "dropout": 0.5}, "b0"),
        ({"width": 1.1}, "b0-w1.1"),
        ({"resolution": 260, "depth": 1.25, "width": 2}, "b0-w2-d1.25-r260"),
        ({"depth": 0.5, "depth_rounding": "nearest"}, "b0-d0.5-nearest"),
        ({"stem_stride": 2}, "b0"),
        ({"stem_stride": 1}, "b0-s1"),
        ({"resolution": 32, "stem_stride": 1}, "b0-r32-s1"),
    ],
)
def test_changed_dimensions_show_in_the_name(changes, name):
    assert effnet.spec("b0", **changes).name == name
    assert effnet.spec(effnet.spec("b0"), **changes).name == name


def test_a_dimension_changed_again_shows_once():
    changed = effnet.spec(effnet.spec("b0", resolution=260), width=1.1)
    assert effnet.spec(changed, resolution=300).name == "b0-w1.1-r300"
