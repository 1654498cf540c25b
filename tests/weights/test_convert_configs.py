"""Reading configs of hub folders, and the assumptions for a file without one."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import transformers
from foreign import IMAGENET_STD, saved, tiny, written

from effnet.arch.spec import InputSpec, NumericPolicy
from effnet.arch.variants import spec
from effnet.errors import CheckpointError
from effnet.weights.convert import read_checkpoint
from effnet.weights.layouts import LAYOUTS

TIMM = {
    "architecture": "tf_efficientnet_b0",
    "num_classes": 5,
    "pretrained_cfg": {
        "input_size": [3, 64, 64],
        "crop_pct": 0.875,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.5, 0.5],
        "interpolation": "bilinear",
        "crop_mode": "squash",
        "label_names": list("abcde"),
    },
}


def test_timms_folder(tmp_path):
    read = read_checkpoint(written(tmp_path / "a", tiny("timm"), config=TIMM))
    assert read.source == "timm-tf"
    assert read.spec.resolution == 64
    assert read.input == InputSpec(64, 73, (0.5,) * 3, (0.25, 0.5, 0.5), "bilinear", "squash")
    assert read.classes == tuple("abcde")
    flat = {"architecture": "efficientnet_b0", **TIMM["pretrained_cfg"]}
    read = read_checkpoint(written(tmp_path / "b", tiny("timm"), config=flat))
    assert (read.source, read.input.size) == ("timm", 64)
    with pytest.raises(CheckpointError, match="was written by timm-tf, not by timm"):
        read_checkpoint(tmp_path / "a", source="timm")


def test_timms_arguments_change_the_policy(tmp_path):
    arguments = {"bn_eps": 1e-4, "bn_momentum": 0.05, "pad_type": ""}
    read = read_checkpoint(written(tmp_path / "a", tiny("timm"), config=TIMM | {"model_args": arguments}))
    assert read.policy == NumericPolicy(1e-4, 0.05, "symmetric")
    for changes in ({"model_args": {"act_layer": "relu"}}, {"global_pool": "max"}):
        with pytest.raises(CheckpointError, match=r"changes timm's network by its (act_layer|global_pool)$"):
            read_checkpoint(written(tmp_path / "a", tiny("timm"), config=TIMM | changes))
    harmless = {"global_pool": "avg", "drop_rate": 0.2, "output_stride": 32}
    read_checkpoint(written(tmp_path / "a", tiny("timm"), config=TIMM | {"model_args": harmless}))


def test_timms_other_networks(tmp_path):
    for architecture in ("efficientnet_blur_b0", "mobilenetv3_large_100"):
        folder = written(tmp_path / architecture, tiny("timm"), config=TIMM | {"architecture": architecture})
        with pytest.raises(CheckpointError, match=architecture):
            read_checkpoint(folder)


HF = {
    "image_size": 64,
    "batch_norm_eps": 1e-4,
    "batch_norm_momentum": 0.99,
    "dropout_rate": 0.4,
    "drop_connect_rate": 0.1,
    "id2label": {str(number): f"class {number}" for number in range(5)},
}
# google/efficientnet-b0's
PROCESSOR = {
    "do_center_crop": False,
    "do_normalize": True,
    "do_rescale": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.47853944, 0.4732864, 0.47434163],
    "include_top": True,
    "resample": 0,
    "rescale_factor": 0.00392156862745098,
    "rescale_offset": False,
    "size": {"height": 64, "width": 64},
}


def test_transformers_folder(tmp_path):
    read = read_checkpoint(written(tmp_path / "a", tiny("hf"), config=HF, preprocessor_config=PROCESSOR))
    report = read
    assert report.policy == NumericPolicy(1e-4, 0.01, "same")
    assert (report.spec.resolution, report.spec.dropout, report.spec.drop_connect) == (64, 0.4, 0.1)
    assert read.classes == tuple(f"class {number}" for number in range(5))
    assert report.input.std == pytest.approx(IMAGENET_STD, abs=1e-6)
    assert (report.input.size, report.input.fit, report.input.interpolation) == (64, "squash", "nearest")
    assert report.notes == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"include_top": False},
        {"rescale_offset": True, "rescale_factor": 1 / 127.5},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [120.0] * 3, "image_std": [8.0] * 3},
        {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
        {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 40}},
    ],
)
def test_transformers_processors(tmp_path, changes):
    """A square photo of the right size needs no resizing: the processor's answer is the InputSpec's arithmetic."""
    values = PROCESSOR | changes
    read = read_checkpoint(written(tmp_path / "a", tiny("hf"), config=HF, preprocessor_config=values))
    found = read.input
    side = found.resize if found.fit == "crop" else found.size
    photo = np.random.RandomState(0).randint(0, 256, (side, side, 3), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processor = transformers.EfficientNetImageProcessor(**values)
        theirs = processor(photo, return_tensors="pt")["pixel_values"][0]
    start = (side - found.size) // 2 if found.fit == "crop" else 0
    cut = photo[start : start + found.size, start : start + found.size]
    ours = (cut / 255 - np.array(found.mean)) / np.array(found.std)
    np.testing.assert_allclose(ours.transpose(2, 0, 1), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "value"), [("hidden_act", "gelu"), ("pooling_type", "max")])
def test_transformers_networks_that_compute_something_else(tmp_path, name, value):
    with pytest.raises(CheckpointError, match=value):
        read_checkpoint(written(tmp_path / "a", tiny("hf"), config=HF | {name: value}))


@pytest.mark.parametrize("config", [{"image_size": 65}, {"image_size": 70}, {"depthwise_padding": [2]}])
def test_transformers_padding_that_is_not_tensorflows(tmp_path, config):
    report = read_checkpoint(written(tmp_path / "a", tiny("hf"), config=HF | config))
    assert any("depthwise_padding" in note for note in report.notes)


@pytest.mark.parametrize(
    "changes", [{"resample": 5}, {"size": {"longest_edge": 64}}, {"image_std": [0, 1, 1]}, {"size": "big"}]
)
def test_processors_that_are_not_understood(tmp_path, changes):
    with pytest.raises(CheckpointError, match="how it prepares images"):
        read_checkpoint(written(tmp_path / "a", tiny("hf"), config=HF, preprocessor_config=PROCESSOR | changes))


def test_a_file_alone_gets_an_assumed_input(tmp_path):
    report = read_checkpoint(saved(tmp_path / "a.pth", tiny("tutorial")))
    assert report.input == InputSpec(224, 256)
    assert any("were assumed" in note for note in report.notes)
    state = {key: torch.zeros(shape) for key, shape in LAYOUTS["torchvision"].shapes(spec("b2", num_classes=3)).items()}
    report = read_checkpoint(saved(tmp_path / "b.pth", state))
    assert report.input == InputSpec(288, 288)  # torchvision's own transforms of its B2
    assert any("that of torchvision's b2" in note for note in report.notes)
