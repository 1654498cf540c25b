"""Names, order and numeric policy of every library, compared with the libraries' own networks on the meta device."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import keras
import pytest
import timm
import torch
import torchvision
import transformers
from efficientnet_pytorch import EfficientNet as Lukemelas

from effnet.arch.variants import VARIANTS, spec
from effnet.errors import CheckpointError
from effnet.models.efficientnet import EfficientNet
from effnet.weights.layouts import (
    LAYOUTS,
    NATIVE,
    SOURCES,
    detect,
    evenly_padded_blocks,
    first_block_shortcuts,
    layout_of,
    policy_of,
    published_name,
)

TUTORIAL = json.loads((Path(__file__).parents[1] / "models" / "tutorial_tiny.json").read_text())


def shapes_of(network):
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


def torchvision_network(name):
    return getattr(torchvision.models, f"efficientnet_{name}")()


def test_tutorial_names_and_shapes_in_order():
    network = spec("b0", width=TUTORIAL["width"], depth=TUTORIAL["depth"], num_classes=TUTORIAL["num_classes"])
    assert len(TUTORIAL["keys"]) == 530
    assert [[key, list(shape)] for key, shape in LAYOUTS["tutorial"].shapes(network).items()] == TUTORIAL["keys"]


@pytest.mark.parametrize("name", ["b0", "b2", "b5", "b7"])
def test_names_and_positions_agree(name):
    """Tutorial, torchvision and timm hold the same shapes in the same order, so zipping checks every naming rule."""
    with torch.device("meta"):
        plain = shapes_of(timm.create_model(f"efficientnet_{name}"))
        tf = shapes_of(timm.create_model(f"tf_efficientnet_{name}"))
        theirs = shapes_of(torchvision_network(name))
        native = shapes_of(EfficientNet(spec(name)))
    for layout, state in (("torchvision", theirs), ("timm", plain), ("timm", tf), ("native", native)):
        assert list(LAYOUTS[layout].shapes(spec(name)).items()) == list(state.items())
    positions = [list(state.values()) for state in (native, theirs, plain, tf, LAYOUTS["tutorial"].shapes(spec(name)))]
    assert all(shapes == positions[0] for shapes in positions)


@pytest.mark.parametrize("name", ["b8", "l2", "lite0", "lite3"])
def test_timm_names_of_the_other_variants(name):
    with torch.device("meta"):
        assert list(LAYOUTS["timm"].shapes(spec(name)).items()) == list(
            shapes_of(timm.create_model(f"tf_efficientnet_{name}")).items()
        )


def test_lukemelas_names():
    with torch.device("meta"):
        theirs = Lukemelas.from_name("efficientnet-b3")
    assert LAYOUTS["lukemelas"].shapes(spec("b3")) == shapes_of(theirs)


def test_transformers_names():
    scale = {"width_coefficient": 1.2, "depth_coefficient": 1.4, "hidden_dim": 1536}
    config = transformers.EfficientNetConfig(**scale, depthwise_padding=[5, 18], num_labels=1000)
    with torch.device("meta"):
        theirs = transformers.EfficientNetForImageClassification(config)
    assert LAYOUTS["hf"].shapes(spec("b3")) == shapes_of(theirs)


def test_keras_names():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Keras asks numpy for copies in the old way
        theirs = keras.applications.EfficientNetB1(weights=None)
    named = {weight.path: len(weight.shape) for layer in theirs.layers for weight in layer.weights}
    ours = {key: len(shape) for key, shape in LAYOUTS["keras"].shapes(spec("b1")).items()}
    assert ours == {path: rank for path, rank in named.items() if "normalization" not in path and "seed" not in path}


def test_letters_run_on_behind_z():
    keys = LAYOUTS["tutorial"].shapes(spec("b0", depth=8))  # the tutorial's chr(97 + i), 32 blocks in stage 7
    assert "features.6z.block.dwconv.0.weight" in keys
    assert "features.6{.block.dwconv.0.weight" in keys
    assert "features.6\x80.block.dwconv.0.weight" in keys
    assert len(keys) == len(NATIVE.shapes(spec("b0", depth=8)))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_detect(layout):
    assert detect(layout.shapes(spec("b0"))) is layout


def test_detect_names_what_it_found():
    with pytest.raises(CheckpointError, match=r"has these tensors: layer1\.0\.conv1\.weight$"):
        detect({"layer1.0.conv1.weight": ()})
    with pytest.raises(CheckpointError, match="none"):
        detect({})


def norms(network):
    """eps and momentum of all batch normalisations."""
    found = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    return {(module.eps, round(module.momentum, 6)) for module in found}


@pytest.mark.parametrize("name", ["b4", "b5", "b6", "b7"])  # torchvision changes its constants between them
def test_policies_are_the_libraries_own(name):
    with torch.device("meta"):
        theirs = {
            "torchvision": norms(torchvision_network(name)),
            "timm": norms(timm.create_model(f"efficientnet_{name}")),
            "timm-tf": norms(timm.create_model(f"tf_efficientnet_{name}")),
            "lukemelas": norms(Lukemelas.from_name(f"efficientnet-{name}")),
        }
    for source, constants in theirs.items():
        policy = policy_of(source, spec(name, num_classes=7, resolution=97))
        assert constants == {(policy.bn_eps, policy.bn_momentum)}


def test_published_name():
    for name, row in VARIANTS.items():
        assert published_name(row.spec) == name
    assert published_name(spec("b5", num_classes=3, in_channels=1, resolution=99, dropout=0)) == "b5"
    assert published_name(spec("b0", width=1.1, depth=1.2)) == "b2"
    assert published_name(spec("b0", width=1.3)) is None
    assert published_name(spec("b0", stem_stride=1)) is None
    assert published_name(spec("b0", depth=1.2, depth_rounding="nearest")) is None


def test_evenly_padded_blocks_are_the_lists_of_the_converted_weights():
    # transformers/models/efficientnet/convert_efficientnet_to_pytorch.py, dw_padding
    lists = {"b0": [], "b1": [16], "b2": [5, 8, 16], "b3": [5, 18], "b4": [6], "b5": [13, 27], "b6": [31], "b7": [18]}
    assert {name: evenly_padded_blocks(spec(name)) for name in lists} == lists


def test_lone_shortcuts():
    assert first_block_shortcuts(spec("b0")) == []
    assert first_block_shortcuts(spec("b0", width=0.25)) == ["stages.2.0"]  # 32 and 16 channels both shrink to 8


def test_every_source_has_a_layout():
    assert {layout_of(source).name for source in SOURCES} == LAYOUTS.keys() - {"keras-numbered"}
