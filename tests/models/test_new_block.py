"""A new kind of block needs only an entry in arch/blocks.py and a module in models/blocks.py."""

import copy
import dataclasses

import pytest
import torch
from alive import Alive
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import effnet
from effnet.arch.blocks import OPS, Layer, Op
from effnet.arch.cost import stage_rows
from effnet.arch.memory import training_memory
from effnet.arch.recompute import RecomputePlan, find_plan
from effnet.arch.segments import Keep
from effnet.arch.spec import NetworkSpec, StageSpec
from effnet.arch.specfile import read_spec, spec_text
from effnet.errors import ArgumentError
from effnet.models.blocks import BLOCKS, ConvNormAct, SqueezeExcitation, StochasticDepth
from effnet.models.efficientnet import EfficientNet
from effnet.training.optimizer import make_optimizer
from effnet.training.recipe import RECIPES
from effnet.weights.inherit import inherit


def layers(block):
    """A k x k convolution to e times the input, squeeze-and-excitation, 1x1 linear."""
    wide, before, after = block.expanded_channels, block.input_size, block.output_size
    return (
        Layer("conv", block.in_channels, wide, block.kernel_size, before, after),
        Layer("project", wide, block.out_channels, 1, after, after, activation=False),
    )


class Fused(nn.Module):
    """Fused-MBConv (Gupta & Tan 2019)."""

    def __init__(self, block, *, norm, activation, padding):
        super().__init__()
        common = {"norm": norm, "padding": padding}
        channels, wide = (block.in_channels, block.expanded_channels), block.expanded_channels
        self.conv = ConvNormAct(channels, block.kernel_size, stride=block.stride, activation=activation, **common)
        self.se = SqueezeExcitation(wide, block.squeeze_channels, activation)
        self.project = ConvNormAct((wide, block.out_channels), activation=None, **common)
        self.drop = StochasticDepth(block.drop_rate) if block.has_shortcut else None

    def forward(self, x):
        y = self.project(self.se(self.conv(x)))
        return y if self.drop is None else x + self.drop(y)


@pytest.fixture(autouse=True)
def register(monkeypatch):
    op = Op(
        "fused",
        layers,
        lambda block: f"Fused{block.expand_ratio}",
        shortcut=lambda block: block.stride == 1 and block.in_channels == block.out_channels,
        squeezes=True,
    )
    monkeypatch.setitem(OPS, "fused", op)
    monkeypatch.setitem(BLOCKS, "fused", Fused)


@pytest.fixture
def spec(register):
    rows = (StageSpec(4, 3, 1, 16, 2, "fused"), StageSpec(4, 3, 2, 24, 3, "fused"), StageSpec(4, 5, 2, 40, 2))
    return NetworkSpec("new", rows, resolution=32, num_classes=5, head=64, dropout=0, drop_connect=0)


def test_it_is_described_and_counted(spec, tmp_path):
    (tmp_path / "spec.yaml").write_text(spec_text(spec))
    assert read_spec(tmp_path / "spec.yaml") == spec
    assert [row.operator for row in stage_rows(spec)][1:3] == ["Fused4", "Fused4"]
    network = EfficientNet(spec).eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(1, 3, 32, 32))
    price = effnet.cost(spec)
    assert price.flops == counter.get_total_flops()
    assert price.params == sum(weight.numel() for weight in network.parameters())


@pytest.mark.parametrize("keep", [None, *Keep], ids=str)
def test_its_memory_is_what_torch_keeps(spec, keep):
    spec = effnet.spec(spec, dropout=0.2)
    alive = []
    for batch in (1, 2):
        with torch.device("meta"):
            network, images = EfficientNet(spec).train(), torch.empty(batch, 3, 32, 32)
        network.recompute(None if keep is None else RecomputePlan.uniform(spec, keep))
        with Alive() as counter:
            counter.add(images)
            logits = network(images)
            alive.append(counter.bytes - logits.untyped_storage().nbytes())
    memory = training_memory(spec, 1, plan=keep)
    assert memory.activations + memory.images == pytest.approx(alive[1] - alive[0], rel=1e-3)


def test_it_learns_under_a_plan_what_it_learns_without(spec):
    plan = find_plan(spec, training_memory(spec, 4).peak * 6 // 10, 4)
    plain = EfficientNet(spec).double().train()
    planned = copy.deepcopy(plain)
    planned.recompute(plan)
    before = plain.stages["2"][0].conv.conv.weight.detach().clone()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for network in (plain, planned):
        network(images).square().sum().backward()
        make_optimizer(network, RECIPES["scratch"]).step()
    for (name, weight), other in zip(plain.named_parameters(), planned.parameters(), strict=True):
        torch.testing.assert_close(other.grad, weight.grad, rtol=1e-8, atol=1e-9, msg=name)
        torch.testing.assert_close(other, weight, rtol=1e-6, atol=1e-9, msg=name)
    assert not torch.equal(plain.stages["2"][0].conv.conv.weight, before)


def test_what_cannot_be_recomputed_trains_without_a_plan(spec, monkeypatch):
    monkeypatch.setitem(OPS, "fused", dataclasses.replace(OPS["fused"], recomputes=False))
    network = EfficientNet(spec).train()
    for refused in (
        lambda: network.recompute(RecomputePlan.uniform(spec, "convolutions")),
        lambda: training_memory(spec, 4, plan=Keep.CONVOLUTIONS),
        lambda: find_plan(spec, 10**9, 4),
    ):
        with pytest.raises(ArgumentError, match=r"`plan` .*stages\.2\.0.*fused"):
            refused()
    network.recompute(None)
    network(torch.randn(4, 3, 32, 32)).sum().backward()
    assert training_memory(spec, 4).peak > 0


def test_its_weights_are_inherited(spec):
    source = EfficientNet(spec).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for width, depth, outcomes in ((1.5, 1.0, {"grown"}), (1.0, 1.5, {"copied", "added"}), (0.5, 1.0, {"sliced"})):
        target = EfficientNet(effnet.spec(spec, width=width, depth=depth)).double().eval()
        report = inherit(target, source, noise=0)
        found = {report.outcomes[name] for name in report.outcomes if name.startswith(("stages.2", "stages.3"))}
        assert found == outcomes, report
        if width >= 1:
            torch.testing.assert_close(target(images), source(images))
