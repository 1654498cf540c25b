"""The table of known weights against torchvision's and timm's own, and the names in it."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import timm.data
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from timm.models.efficientnet import default_cfgs
from torchvision import models as torchvision_models

from effnet.arch.spec import InputSpec
from effnet.arch.variants import VARIANTS, spec
from effnet.data.dataset import Dataset, Sample
from effnet.errors import DataError, UnknownNameError
from effnet.weights.registry import REGISTRY, assume_input, find, imagenet_classes, match_outputs, weights_of

PLAIN = re.compile(r"(tf_)?efficientnet_(b\d|l2|lite\d)")


# The table


def test_every_file_of_torchvision_is_a_row() -> None:
    theirs = {
        f"b{n}" + ("" if weights.name == "IMAGENET1K_V1" else "-v2"): weights
        for n in range(8)
        for weights in getattr(torchvision_models, f"EfficientNet_B{n}_Weights")
    }
    assert {name for name, row in REGISTRY.items() if row.source == "torchvision"} == set(theirs)
    for name, weights in theirs.items():
        row, preset = REGISTRY[name], weights.transforms()
        assert row.location == weights.url
        assert len(row.sha256) == 8
        assert weights.url.endswith(f"-{row.sha256}.pth")
        assert row.top1 == weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
        mean, std = tuple(preset.mean), tuple(preset.std)
        sizes = (preset.crop_size[0], preset.resize_size[0])
        assert row.input == InputSpec(*sizes, mean, std, preset.interpolation.value)
        assert VARIANTS[row.variant].spec.name == name[:2]


def test_every_plain_network_of_timm_on_1000_classes_is_a_row() -> None:
    theirs = {
        f"{cfg.hf_hub_id}{network}.{tag}"
        for network, tags in default_cfgs.items()
        for tag, cfg in tags.cfgs.items()
        if PLAIN.fullmatch(network) and cfg.hf_hub_id and cfg.num_classes == 1000
    }
    assert {name for name, row in REGISTRY.items() if row.location.startswith("timm/")} == theirs


@pytest.mark.parametrize("name", [name for name in REGISTRY if name.startswith("timm/")])
def test_a_row_of_timm_prepares_photos_as_timm_validates(name: str) -> None:
    row, cfg = REGISTRY[name], get_pretrained_cfg(name.removeprefix("timm/"))
    assert cfg is not None
    resize, crop, _, normalise = create_transform(
        **resolve_data_config(pretrained_cfg=cfg.to_dict(), use_test_size=True)
    ).transforms
    assert row.location == name
    assert row.source == ("timm-tf" if cfg.architecture.startswith("tf_") else "timm")
    assert cfg.architecture.endswith(f"efficientnet_{row.variant}")
    assert tuple(crop.size) == (row.input.size, row.input.size)
    assert resize.size == ((row.input.resize,) * 2 if row.input.fit == "squash" else row.input.resize)
    assert resize.interpolation.value == row.input.interpolation
    assert normalise.mean.tolist() == pytest.approx(row.input.mean)
    assert normalise.std.tolist() == pytest.approx(row.input.std)


@pytest.mark.parametrize("name", ["lite0", "lite1", "lite2"])
def test_lite_rows_prepare_photos_as_the_official_code(name: str) -> None:
    row, size = REGISTRY[name], VARIANTS[name].resolution
    padding = round(size * (1 / 0.875 - 1))  # official preprocessing.py
    assert (row.input.size, row.input.resize) == (size, size + padding)
    assert [mean * 255 for mean in row.input.mean] == pytest.approx([127] * 3)
    assert [std * 255 for std in row.input.std] == pytest.approx([128] * 3)
    assert row.source == "lukemelas"


def test_accuracies_are_those_of_the_variant_within_what_recipes_change() -> None:
    for row in REGISTRY.values():
        assert abs(row.top1 - VARIANTS[row.variant].top1) < 3, row.name


# Names


def test_names_are_found_in_any_case() -> None:
    assert find("LITE0") is REGISTRY["lite0"]
    assert find("timm/TF_efficientnet_B0.ns_jft_in1k").top1 == 78.68


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lite3", "choose from timm/tf_efficientnet_lite3.in1k."),
        ("b8", "choose from timm/tf_efficientnet_b8.ap_in1k, timm/tf_efficientnet_b8.ra_in1k."),
        ("b1_v2", "Did you mean 'b1-v2'?"),
        ("tf_efficientnet_b0.ap_in1k", "Did you mean 'timm/tf_efficientnet_b0.ap_in1k'?"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, words: str) -> None:
    with pytest.raises(UnknownNameError, match=re.escape(words)):
        find(name)


def test_every_variant_has_a_default_and_it_comes_first() -> None:
    assert [weights_of(name)[0].source for name in VARIANTS] == (
        ["torchvision"] * 8 + ["timm-tf"] * 2 + ["lukemelas"] * 3 + ["timm-tf"] * 2
    )
    assert [row.name for row in weights_of("efficientnet-b1")][:3] == ["b1", "b1-v2", "timm/tf_efficientnet_b1.in1k"]
    with pytest.raises(UnknownNameError, match="b9"):
        weights_of("b9")


def test_a_bare_file_is_assumed_to_want_what_the_first_row_wants() -> None:
    assert assume_input("torchvision", spec("b3", num_classes=10)) == REGISTRY["b3"].input
    assert assume_input("timm-tf", spec("l2")) == REGISTRY["timm/tf_efficientnet_l2.ns_jft_in1k"].input
    assert assume_input("torchvision", spec("lite0")) is None
    assert assume_input("torchvision", spec("b3", width=1.1)) is None


def test_imagenets_folders_are_its_outputs() -> None:
    wordnet = (Path(timm.data.__file__).parent / "_info" / "imagenet_synsets.txt").read_text().split()
    classes = imagenet_classes()
    shuffled = [*range(1000)]
    random.Random(0).shuffle(shuffled)
    data = Dataset(Path(), tuple(wordnet[i] for i in shuffled), tuple(Sample(str(i), i) for i in range(1000)))
    found = match_outputs(data, classes, "the model's")
    assert [sample.label for sample in found.samples] == shuffled
    assert found.classes == classes
    torchvisions = torchvision_models.EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
    assert [sample.label for sample in match_outputs(data, torchvisions, "").samples] == shuffled
    with pytest.raises(DataError, match="are unknown to it"):
        match_outputs(data, [f"class {i}" for i in range(1000)], "the model's")
    own = match_outputs(data, [*wordnet], "the model's")  # a model that was trained on these folders
    assert [sample.label for sample in own.samples] == shuffled
