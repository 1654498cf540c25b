from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import effnet
from effnet.arch.spec import InputSpec, NumericPolicy
from effnet.errors import ArgumentError, CheckpointError, UnknownNameError
from effnet.weights.bundle import save
from effnet.weights.load import create, open_model

TINY = effnet.spec("b0", width=0.25, depth=0.4, resolution=64, num_classes=3)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    network = effnet.EfficientNet(TINY, policy=NumericPolicy(1e-4, 0.05, "same"))
    return save(network, tmp_path / "tiny", classes=["a", "b", "c"], input=InputSpec(64, 64, fit="squash"))


def test_fresh_networks_train_and_pretrained_ones_evaluate(bundle: Path) -> None:
    assert create("b0", num_classes=4, in_channels=1).spec == effnet.spec("b0", num_classes=4, in_channels=1)
    assert create("b0").training
    assert create(TINY).spec == TINY
    assert not create(TINY, weights=bundle).training


def test_weights_are_read_inside_torchs_meta_device(bundle: Path, tmp_path: Path) -> None:
    torch.save(create(TINY, weights=bundle).state_dict(), tmp_path / "bare.pth")
    with torch.device("meta"):
        assert create(TINY).classifier.weight.is_meta
        networks = create(TINY, bundle), create(TINY, tmp_path / "bare.pth", num_classes=7), open_model(bundle).network
    assert not any(tensor.is_meta for network in networks for tensor in network.state_dict().values())


def test_the_default_weights_of_a_variant() -> None:
    network = create("lite0", weights="lite0")
    assert network.policy == NumericPolicy(1e-3, 0.01, "same")
    assert torch.equal(create("lite0", weights="default").classifier.weight, network.classifier.weight)


def test_a_new_classifier_keeps_the_rest_and_says_so(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "effnet"):
        network = create(TINY, weights=bundle, num_classes=7)
    assert "start fresh: classifier.weight, classifier.bias" in caplog.text
    assert network.classifier.out_features == 7
    old = open_model(bundle).network.state_dict()
    for key, tensor in network.state_dict().items():
        assert key.startswith("classifier") or torch.equal(tensor, old[key]), key


def test_other_norms_get_the_weights_and_their_constants(bundle: Path) -> None:
    images = torch.randn(1, 3, 64, 64)
    for norm in (FrozenBatchNorm2d, nn.SyncBatchNorm):
        network = create(TINY, weights=bundle, norm=norm)
        torch.testing.assert_close(network(images), create(TINY, weights=bundle)(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="does not fit this norm"):
        create(TINY, weights=bundle, norm=lambda channels: nn.GroupNorm(8, channels))


def test_another_momentum(bundle: Path, tmp_path: Path) -> None:
    network = create(TINY, weights=bundle)
    network.use_policy(NumericPolicy(1e-4, 0.1, "same"))
    assert {m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    assert open_model(save(network, tmp_path / "x")).config.policy.bn_momentum == 0.1
    with pytest.raises(ArgumentError, match="is built in"):
        network.use_policy(NumericPolicy())


def test_what_is_left_over_or_assumed_is_said(bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = create(TINY, weights=bundle).state_dict() | {"criterion.weight": torch.ones(3)}
    torch.save(state, tmp_path / "bare.pth")
    with caplog.at_level(logging.WARNING, "effnet"):
        open_model(tmp_path / "bare.pth")
    assert "not used: criterion.weight" in caplog.text
    assert "numeric policy" in caplog.text


def test_open_model_knows_the_context(bundle: Path) -> None:
    lite0 = open_model("lite0").config
    assert lite0.classes is not None
    assert lite0.classes[967] == "espresso"
    assert lite0.input == InputSpec(224, 256, (127 / 255,) * 3, (128 / 255,) * 3)
    tiny = open_model(str(bundle)).config
    assert tiny.classes == ("a", "b", "c")
    assert tiny.input.fit == "squash"


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        *((name, {}, CheckpointError, f"{name} does not exist") for name in ("no/such.pth", "gone.pth", "no/folder")),
        ("lit0", {}, UnknownNameError, "Did you mean 'lite0'"),
        ("b9", {}, UnknownNameError, "b8|b1|b0"),
        ("lite0", {"source": "timm"}, ArgumentError, "comes from lukemelas"),
    ],
)
def test_weights_that_are_not_there(name: str, options: dict[str, str], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        open_model(name, **options)  # type: ignore[arg-type]
