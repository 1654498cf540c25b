"""The logit check passes right weights, finds wrong ones, and says when it checked less."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import timm
import torch
import torchvision
from foreign import ALLOWED, saved, tiny
from random_weights import shaken
from safetensors.torch import load_file, save_file

from effnet.arch.spec import InputSpec, NumericPolicy
from effnet.arch.variants import VARIANTS, spec
from effnet.errors import CheckpointError, MismatchError
from effnet.models.efficientnet import EfficientNet
from effnet.weights import layouts, verify
from effnet.weights.bundle import save
from effnet.weights.convert import foreign_state, read_checkpoint
from effnet.weights.layouts import LAYOUTS
from effnet.weights.load import build
from effnet.weights.verify import LogitDifference, check_size, logit_difference
from effnet.weights.writers import write_checkpoint

SAME = NumericPolicy(padding="same")
INPUT = InputSpec(64, 64)


def make(policy=None, **changes) -> EfficientNet:
    return shaken(EfficientNet(spec("b0", num_classes=5, **changes), policy=policy))


def check(path, source=None, network=None, **options) -> LogitDifference:
    checkpoint = read_checkpoint(path, source=source, **options)
    return logit_difference(checkpoint, network or build(checkpoint))


def test_the_size_pads_as_the_native_one():
    assert [check_size(size) for size in (32, 300, 301, 332, 333)] == [32, 300, 269, 300, 269]
    for row in VARIANTS.values():
        smaller = dataclasses.replace(row.spec, resolution=check_size(row.resolution))
        assert smaller.resolution % 2 == row.resolution % 2
        ours, theirs = ([b.input_size % 2 for b in s.blocks if b.stride == 2] for s in (row.spec, smaller))
        assert ours == theirs, row.name


def test_transformers_file_without_its_config(tmp_path):
    network = make(SAME)
    path = saved(tmp_path / "a.pth", foreign_state(network.state_dict(), network.spec, LAYOUTS["hf"]))
    found = check(path, "hf")
    assert found.against.startswith("transformers ")
    assert found.relative < ALLOWED


@pytest.mark.parametrize(
    ("to", "policy", "suffix"),
    [("torchvision", None, ".pth"), ("timm", None, ""), ("timm-tf", SAME, ""), ("hf", SAME, "")],
)
def test_what_was_written(tmp_path, to, policy, suffix):
    network = make(policy, resolution=96)
    path = tmp_path / f"a{suffix}"
    write_checkpoint(network, to, path, input_spec=InputSpec(70, 80))
    found = check(path, to, network)
    assert not found.against.startswith("round trip")
    assert found.size == (70 if to == "hf" else 96)  # its padding is written for what the network sees
    assert found.relative < ALLOWED
    weights = path if suffix else path / "model.safetensors"
    state = torch.load(weights, weights_only=True) if suffix else load_file(weights)
    key = next(key for key in state if key.endswith("running_mean"))
    state[key] += 1
    torch.save(state, weights) if suffix else save_file(state, weights)
    assert check(path, to, network).relative > 100 * ALLOWED
    del state[key]
    torch.save(state, weights) if suffix else save_file(state, weights)
    with pytest.raises(MismatchError, match=key):
        check(path, to, network)


def test_what_was_written_without_a_library(tmp_path):
    network = make(NumericPolicy(bn_eps=1e-5), width=0.5, depth=0.4)
    write_checkpoint(network, "tutorial", tmp_path / "a.pth", input_spec=INPUT)
    save(network, tmp_path / "bundle")
    for path, same in ((tmp_path / "a.pth", 1e-5), (tmp_path / "bundle", 0)):
        found = check(path, network=network)
        assert (found.against, found.size) == ("round trip", 224)
        assert found.relative <= same
    network.stem.norm.running_mean += 1
    assert check(tmp_path / "bundle", network=network).relative > 100 * ALLOWED
    with pytest.raises(CheckpointError, match="bundle describes another network"):
        check(tmp_path / "bundle", network=make(width=0.5, depth=0.4, stem_stride=1))


def test_custom_networks(tmp_path):
    network = make(SAME, width=0.6, depth=1.3, resolution=100)
    write_checkpoint(network, "hf", tmp_path / "hf", input_spec=InputSpec(100, 100))
    lukemelas, timms = (
        saved(tmp_path / f"{name}.pth", foreign_state(network.state_dict(), network.spec, LAYOUTS[name]))
        for name in ("lukemelas", "timm")
    )
    wide = make(width=0.51, depth=0.4)
    write_checkpoint(wide, "torchvision", tmp_path / "a.pth", input_spec=INPUT)
    checks = [
        check(tmp_path / "hf", network=network),
        check(lukemelas),
        check(tmp_path / "a.pth", network=wide),
        check(timms, "timm-tf"),
    ]
    libraries = ["transformers", "efficientnet-pytorch", "torchvision", "round"]
    assert [found.against.partition(" ")[0] for found in checks] == libraries
    assert "only its named networks" in checks[-1].note
    assert max(found.relative for found in checks) < ALLOWED


def test_a_wrong_name_is_seen(tmp_path, monkeypatch):
    """Two names swapped in our rule: the round trip cannot see it, the library can."""
    path = saved(tmp_path / "a.pth", shaken(torchvision.models.efficientnet_b0(num_classes=5), 64).state_dict())
    rule = LAYOUTS["torchvision"]
    swapped = {"expand": "0.0 1.1", "depthwise": "{at1}.0 0.1"}  # of a block with an expansion, the normalisations
    roles = {**rule.roles, **swapped}
    monkeypatch.setitem(layouts.LAYOUTS, "torchvision", dataclasses.replace(rule, roles=roles))
    assert check(path).relative > 100 * ALLOWED
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    found = check(path)
    assert (found.against, found.note) == ("round trip", "torchvision is not installed")
    assert found.relative == 0


def test_a_wrong_policy_is_seen(tmp_path):
    network = make(resolution=64)
    write_checkpoint(network, "timm", tmp_path / "timm", input_spec=INPUT)
    other = EfficientNet(network.spec, policy=SAME)
    other.load_state_dict(network.state_dict())
    assert check(tmp_path / "timm", network=other).relative > 100 * ALLOWED


def test_a_library_that_refuses_the_tensors(tmp_path, monkeypatch):
    monkeypatch.setitem(verify.LIBRARIES, "torchvision", ("torchvision", lambda *_: torch.nn.Linear(2, 2)))
    with pytest.raises(CheckpointError, match=r"torchvision refuses .*a\.pth"):
        check(saved(tmp_path / "a.pth", tiny("torchvision")))


def test_a_fresh_classifier(tmp_path):
    state = shaken(timm.create_model("efficientnet_b0"), 64).state_dict()
    path = saved(tmp_path / "a.pth", {key: tensor for key, tensor in state.items() if "classifier" not in key})
    assert check(path, "timm", num_classes=2).relative < ALLOWED
    write_checkpoint(make(), "timm", tmp_path / "timm", input_spec=INPUT)
    found = check(tmp_path / "timm", num_classes=7)
    assert found.against.startswith("timm ")
    assert found.relative < ALLOWED


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_never_the_same(tmp_path, value):
    network = make(width=0.5, depth=0.4)
    network.classifier.bias.data[0] = value
    write_checkpoint(network, "tutorial", tmp_path / "a.pth", input_spec=INPUT)
    assert check(tmp_path / "a.pth").relative == float("inf")


def test_the_network_is_left_as_it_was(tmp_path):
    network = make(width=0.5, depth=0.4).train()
    write_checkpoint(network, "tutorial", tmp_path / "a.pth", input_spec=INPUT)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    check(tmp_path / "a.pth", network=network)
    assert network.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
