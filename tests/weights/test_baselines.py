"""The other baselines against torchvision's and timm's networks: parameters, multiply-adds, names and logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from random_weights import shaken
from torch import nn

import effnet
from effnet.arch.cost import cost
from effnet.arch.variants import BASELINES
from effnet.errors import ArgumentError
from effnet.models.efficientnet import EfficientNet
from effnet.weights.bundle import open_bundle
from effnet.weights.convert import read_checkpoint
from effnet.weights.load import build
from effnet.weights.verify import logit_difference
from effnet.weights.writers import write_checkpoint

THEIRS = {
    "mobilenetv1": lambda: timm.create_model("mobilenetv1_100"),
    "mobilenetv2": torchvision.models.mobilenet_v2,
    "resnet50": torchvision.models.resnet50,
}
PAPER = {"mobilenetv1": 0.569e9, "mobilenetv2": 0.301e9, "resnet50": 4.089e9}  # multiply-adds, recounted
by_name = pytest.mark.parametrize("name", BASELINES)


def counted(network: nn.Module, size: int) -> int:
    """Multiply-adds of convolutions and fully connected layers, seen as they run."""
    total = 0

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        total += output[0].numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, size, size))
    return total


@by_name
def test_counts_to_the_unit(name: str) -> None:
    with torch.device("meta"):
        theirs, price = THEIRS[name](), cost(effnet.spec(name))
        assert price.params == sum(weight.numel() for weight in theirs.parameters())
        assert price.macs == counted(theirs, 224) == pytest.approx(PAPER[name], rel=1e-3)
        ours = EfficientNet(effnet.spec(name, resolution=96, width=1.3, depth=1.5))
        assert cost(ours.spec).params == sum(weight.numel() for weight in ours.parameters())
        assert cost(ours.spec).macs == counted(ours, 96)


@by_name
def test_logits(name: str, tmp_path: Path) -> None:
    torch.save(shaken(THEIRS[name](), images=2).state_dict(), tmp_path / "theirs.pth")
    read = read_checkpoint(tmp_path / "theirs.pth")
    assert read.spec.name == name
    assert read.left_over == read.fresh == ()
    difference = logit_difference(read, build(read))
    assert difference.relative < 1e-5
    assert difference.against.split()[0] in ("torchvision", "timm")


@by_name
def test_it_is_written_as_a_bundle_only(name: str, tmp_path: Path) -> None:
    network = effnet.create(effnet.spec(name, width=0.25), num_classes=7)
    with pytest.raises(ArgumentError, match="Write a bundle"):
        write_checkpoint(network, "torchvision", tmp_path / "no.pth", input_spec=effnet.InputSpec())
    folder = effnet.save(network, tmp_path / "bundle")
    assert read_checkpoint(folder).spec == open_bundle(folder).network.spec == network.spec
