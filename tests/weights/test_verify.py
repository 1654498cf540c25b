"""The logit check sees what is right and what is wrong, and says when it saw less."""

from __future__ import annotations

import dataclasses
import os
import sys

import pytest
import timm
import torch
import torchvision
from efficientnet_pytorch import EfficientNet as Lukemelas
from random_weights import shaken
from safetensors.torch import load_file, save_file

from effnet.arch.spec import InputSpec, NumericPolicy
from effnet.arch.variants import VARIANTS, spec
from effnet.errors import CheckpointError
from effnet.models.efficientnet import EfficientNet
from effnet.weights import layouts
from effnet.weights.convert import foreign_state
from effnet.weights.layouts import LAYOUTS
from effnet.weights.verify import LogitDifference, check_size, logit_difference
from effnet.weights.writers import write_checkpoint

os.environ.setdefault("KERAS_BACKEND", "torch")
ALLOWED = 1e-4
SAME = NumericPolicy(padding="same")


def make(policy=None, **changes) -> EfficientNet:
    return shaken(EfficientNet(spec("b0", num_classes=5, **changes), policy=policy))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_size_pads_as_the_native_one(name):
    network = VARIANTS[name].spec
    smaller = dataclasses.replace(network, resolution=check_size(network.resolution))
    assert smaller.resolution == network.resolution if network.resolution <= 300 else 268 < smaller.resolution <= 300
    parities = [[block.input_size % 2 for block in s.blocks if block.stride == 2] for s in (network, smaller)]
    assert parities[0] == parities[1]
    assert network.resolution % 2 == smaller.resolution % 2


def test_a_small_size_is_kept():
    assert [check_size(size) for size in (32, 300, 301, 332, 333)] == [32, 300, 269, 300, 301 - 32]


READ = {
    "torchvision": lambda: torchvision.models.efficientnet_b0(num_classes=5),
    "timm": lambda: timm.create_model("efficientnet_b0", num_classes=5),
    "timm-tf": lambda: timm.create_model("tf_efficientnet_lite0", num_classes=5),
    "lukemelas": lambda: Lukemelas.from_name("efficientnet-b0", num_classes=5, image_size=224),
}


@pytest.mark.parametrize("source", READ)
def test_what_was_read(tmp_path, source):
    torch.save(shaken(READ[source](), 224).state_dict(), tmp_path / "a.pth")
    check = logit_difference(tmp_path / "a.pth", source)
    package = {"timm-tf": "timm", "lukemelas": "efficientnet-pytorch"}.get(source, source)
    assert check.against.startswith(f"{package} ")
    assert (check.size, check.note) == (224, "")
    assert check.absolute >= 0
    assert check.relative < ALLOWED


def test_transformers_file_without_its_config(tmp_path):
    network = make(SAME)
    torch.save(foreign_state(network.state_dict(), network.spec, LAYOUTS["hf"]), tmp_path / "a.pth")
    check = logit_difference(tmp_path / "a.pth", "hf")
    assert check.against.startswith("transformers ")
    assert check.relative < ALLOWED


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' way to numpy
def test_keras(tmp_path):
    keras = pytest.importorskip("keras")
    theirs = keras.applications.EfficientNetB0(weights=None, input_shape=(64, 64, 3), classes=5)
    for layer in theirs.layers:  # fresh filters are so small that nothing would arrive at the logits
        if type(layer).__name__ == "DepthwiseConv2D":
            layer.set_weights([weights * 20 for weights in layer.get_weights()])
    theirs.save_weights(tmp_path / "a.weights.h5")
    check = logit_difference(tmp_path / "a.weights.h5", "keras")
    assert check.against.startswith("keras ")
    assert check.relative < ALLOWED


@pytest.mark.parametrize(
    ("to", "policy", "suffix"),
    [("torchvision", None, ".pth"), ("timm", None, ""), ("timm-tf", SAME, ""), ("hf", SAME, "")],
)
def test_what_was_written(tmp_path, to, policy, suffix):
    network = make(policy, resolution=96)
    write_checkpoint(network, to, tmp_path / f"a{suffix}", see=InputSpec(70, 80))
    check = logit_difference(tmp_path / f"a{suffix}", to, network)
    assert not check.against.startswith("round trip")
    assert check.size == (70 if to == "hf" else 96)  # its padding is written for what the network sees
    assert check.relative < ALLOWED
    path = tmp_path / f"a{suffix}" / ("" if suffix else "model.safetensors")
    state = torch.load(path, weights_only=True) if suffix else load_file(path)
    key = next(key for key in state if key.endswith("running_mean"))
    state[key] += 1
    torch.save(state, path) if suffix else save_file(state, path)
    assert logit_difference(tmp_path / f"a{suffix}", to, network).relative > 100 * ALLOWED
    del state[key]
    torch.save(state, path) if suffix else save_file(state, path)
    with pytest.raises(CheckpointError, match=rf"(?s)refuses.*{key}"):
        logit_difference(tmp_path / f"a{suffix}", to, network)


def test_custom_networks(tmp_path):
    network = make(SAME, width=0.6, depth=1.3, resolution=100)
    write_checkpoint(network, "hf", tmp_path / "hf", see=InputSpec(100, 100))
    checks = [logit_difference(tmp_path / "hf", "hf", network), logit_difference(tmp_path / "hf", "hf")]
    for layout in ("lukemelas", "timm"):
        foreign = foreign_state(network.state_dict(), network.spec, LAYOUTS[layout])
        torch.save(foreign, tmp_path / f"{layout}.pth")
    checks.append(logit_difference(tmp_path / "lukemelas.pth", "lukemelas"))
    assert [check.against.partition(" ")[0] for check in checks] == [
        "transformers",
        "transformers",
        "efficientnet-pytorch",
    ]
    checks.append(logit_difference(tmp_path / "timm.pth", "timm-tf"))
    assert (checks[-1].against, checks[-1].note) == ("round trip", "timm builds its named networks alone")
    network = make(width=0.51)
    write_checkpoint(network, "torchvision", tmp_path / "a.pth", see=InputSpec(64, 64))
    checks.append(logit_difference(tmp_path / "a.pth", "torchvision", network))
    assert max(check.relative for check in checks) < ALLOWED


def test_a_wrong_name_is_seen(tmp_path, monkeypatch):
    """Two names swapped in our rule: the round trip cannot see it, the library can."""
    network = shaken(torchvision.models.efficientnet_b0(num_classes=5))
    torch.save(network.state_dict(), tmp_path / "a.pth")
    rule = LAYOUTS["torchvision"]

    def swapped(step):
        conv, norm = rule.names(step)
        return conv, norm.replace("block.1.", "block.0.") if step.role == "depthwise" else norm

    def crossed(step):
        conv, norm = swapped(step)
        return conv, norm.replace("block.0.", "block.1.") if step.role == "expand" else norm

    monkeypatch.setitem(layouts.LAYOUTS, "torchvision", dataclasses.replace(rule, names=crossed))
    assert logit_difference(tmp_path / "a.pth", "torchvision").relative > 100 * ALLOWED
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    check = logit_difference(tmp_path / "a.pth", "torchvision")
    assert (check.against, check.note) == ("round trip", "torchvision is not installed")
    assert check.relative == 0


def test_a_wrong_policy_is_seen(tmp_path):
    torch.save(shaken(timm.create_model("tf_efficientnet_b0")).state_dict(), tmp_path / "a.pth")
    assert logit_difference(tmp_path / "a.pth", "timm-tf").relative < ALLOWED
    network = make(resolution=64)
    write_checkpoint(network, "timm", tmp_path / "timm", see=InputSpec(64, 64))
    other = EfficientNet(network.spec, policy=SAME)
    other.load_state_dict(network.state_dict())
    assert logit_difference(tmp_path / "timm", "timm", other).relative > 100 * ALLOWED


def test_the_tutorial_has_no_library(tmp_path):
    network = make(width=0.5, depth=0.4)
    write_checkpoint(network, "tutorial", tmp_path / "a.pth", see=InputSpec(64, 64))
    for check in (
        logit_difference(tmp_path / "a.pth", "tutorial"),
        logit_difference(tmp_path / "a.pth", "tutorial", network),
    ):
        assert check == LogitDifference("round trip", 224, 0, 0)


def test_without_a_classifier(tmp_path):
    state = shaken(timm.create_model("efficientnet_b0")).state_dict()
    torch.save({key: tensor for key, tensor in state.items() if "classifier" not in key}, tmp_path / "a.pth")
    assert logit_difference(tmp_path / "a.pth", "timm").relative < ALLOWED


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_never_the_same(tmp_path, value):
    network = make(width=0.5, depth=0.4)
    network.classifier.bias.data[0] = value
    write_checkpoint(network, "tutorial", tmp_path / "a.pth", see=InputSpec(64, 64))
    assert logit_difference(tmp_path / "a.pth", "tutorial").relative == float("inf")


def test_the_network_is_left_as_it_was(tmp_path):
    network = make(width=0.5, depth=0.4).train()
    write_checkpoint(network, "tutorial", tmp_path / "a.pth", see=InputSpec(64, 64))
    counts = network.stem.norm.num_batches_tracked.item()
    logit_difference(tmp_path / "a.pth", "tutorial", network)
    assert network.training
    assert network.stem.norm.num_batches_tracked.item() == counts


def test_keys_of_another_library(tmp_path):
    torch.save(make(width=0.5, depth=0.4).state_dict(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="does not have the keys of timm"):
        logit_difference(tmp_path / "a.pth", "timm")


def test_in_words():
    words = str(LogitDifference("timm 1.0.31", 284, 1.5e-6, 2.1e-7, "a note"))
    assert words == "against timm 1.0.31 at 284 px: logits differ by at most 1.5e-06 (2.1e-07 of the largest); a note"
