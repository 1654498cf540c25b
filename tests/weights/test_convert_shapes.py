"""Which network the shapes of a state dict belong to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.efficientnet import MBConvConfig

from effnet.arch.variants import B0, VARIANTS, spec
from effnet.errors import MismatchError
from effnet.weights.convert import infer_spec
from effnet.weights.layouts import LAYOUTS, NATIVE

FILE = Path("weights.pth")
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)


@layouts
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_known_by_its_shapes(name, layout):
    network = spec(name, num_classes=11)
    assert infer_spec(layout.shapes(network), layout, FILE) == network


@settings(deadline=None, max_examples=25)
@given(
    layout=st.sampled_from(list(LAYOUTS.values())),
    baseline=st.sampled_from(["b0", "lite0"]),
    width=st.integers(25, 250).map(lambda hundredths: hundredths / 100),
    depth=st.floats(0.1, 3.5),
    rounding=st.sampled_from(["ceil", "nearest"]),
    in_channels=st.sampled_from([1, 3, 4]),
    num_classes=st.integers(1, 1000),
)
def test_any_width_and_depth(layout, baseline, width, depth, rounding, in_channels, num_classes):
    scale = {"width": width, "depth": depth, "depth_rounding": rounding}
    network = spec(baseline, **scale, in_channels=in_channels, num_classes=num_classes)
    found = infer_spec(layout.shapes(network), layout, FILE)
    assert NATIVE.shapes(found) == NATIVE.shapes(network)
    assert found.head == 1280, "a width with the official head exists"
    assert [block.stride for block in found.blocks] == [block.stride for block in network.blocks]


@pytest.mark.parametrize("width", [0.3, 0.51, 0.77, 1.3, 2.05])
def test_the_head_that_torchvision_rounds_in_another_order(width):
    rows = [
        MBConvConfig(row.expand_ratio, row.kernel_size, row.stride, channels, row.channels, row.layers, width, 1.0)
        for row, channels in zip(B0.stages, (32, *(row.channels for row in B0.stages)), strict=False)
    ]
    theirs = torchvision.models.EfficientNet(rows, dropout=0.2, num_classes=5).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.items()}
    found = infer_spec(shapes, LAYOUTS["torchvision"], FILE)
    assert LAYOUTS["torchvision"].shapes(found) == shapes


def test_the_roundest_width_and_depth_are_found():
    network = spec("b0", width=1.15, depth=1.3)
    assert infer_spec(NATIVE.shapes(network), NATIVE, FILE).name == "b0-w1.15-d1.3"
    network = spec("b0", depth=1.2, depth_rounding="nearest")
    assert infer_spec(NATIVE.shapes(network), NATIVE, FILE).name == "b0-d1.2-nearest"


def test_the_tutorial_without_dropout():
    network = spec("b1", dropout=0)
    assert infer_spec(LAYOUTS["tutorial"].shapes(network), LAYOUTS["tutorial"], FILE).dropout == 0


@layouts
def test_a_missing_classifier(layout):
    shapes = dict(list(layout.shapes(spec("b0")).items())[:-2])
    with pytest.raises(MismatchError, match=r"weights\.pth has no classifier.*num_classes"):
        infer_spec(shapes, layout, FILE)
    assert infer_spec(shapes, layout, FILE, num_classes=4) == spec("b0", num_classes=4)


@layouts
def test_another_network_is_refused(layout):
    shapes = layout.shapes(spec("b0"))
    wider = next(key for key, shape in shapes.items() if shape[:2] == (40, 144))
    cases = (
        {key: (*shape[:2], 7, 7) if shape[2:] == (5, 5) else shape for key, shape in shapes.items()},
        shapes | {wider: (48, 144, 1, 1)},
        shapes | {"decoder.conv.weight": (8, 1280, 1, 1)},
        dict(list(shapes.items())[:20]),
    )
    for case in cases:
        with pytest.raises(MismatchError, match=r"weights\.pth"):
            infer_spec(case, layout, FILE)


def test_layers_of_another_distribution_are_refused():
    rows = list(B0.stages)
    rows[1], rows[2] = (dataclasses.replace(rows[i], layers=layers) for i, layers in ((1, 3), (2, 1)))
    with pytest.raises(MismatchError, match="not an EfficientNet of any width and depth"):
        infer_spec(NATIVE.shapes(dataclasses.replace(B0, stages=tuple(rows))), NATIVE, FILE)
