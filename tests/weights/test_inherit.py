"""What a network inherits from another one, tested by its outputs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torchvision
from random_weights import shaken
from torch import Tensor, nn

from effnet.arch.spec import NetworkSpec, NumericPolicy, StageSpec
from effnet.arch.variants import spec
from effnet.errors import ArgumentError
from effnet.models.efficientnet import EfficientNet
from effnet.weights.inherit import Inheritance, inherit
from effnet.weights.load import create

ALLOWED = 1e-4  # largest difference by largest logit; 1e-6 is usual
SMALL = spec("b0", width=0.5, depth=0.6, depth_rounding="nearest", num_classes=5)  # (1, 1, 1, 2, 2, 2, 1) blocks
LITE = spec("lite0", width=0.5, depth=0.6, depth_rounding="nearest", num_classes=5)
# Stages 2 and 3 add to one stream, and so do 4 and 5: their first blocks have a shortcut.
TIED = dataclasses.replace(
    SMALL, name="tied", stages=tuple(StageSpec(6, 3, *row) for row in ((1, 16, 1), (1, 16, 2), (2, 40, 1), (1, 40, 2)))
)


def trained(network: NetworkSpec, **options) -> EfficientNet:
    """A network whose tensors are all as different as trained ones."""
    return shaken(EfficientNet(network, **options))


def fresh(network: NetworkSpec, **options) -> EfficientNet:
    torch.manual_seed(7)
    return EfficientNet(network, **options).eval()


@torch.no_grad()
def difference(a: nn.Module, b: nn.Module) -> float:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(next(a.parameters()).dtype)
    expected = b(images)
    return ((a(images) - expected).abs().max() / expected.abs().max()).item()


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in network.state_dict().items()}


# the same network


@pytest.mark.parametrize("network", [SMALL, LITE])
def test_the_same_network_is_copied_to_the_bit(network):
    source, target = trained(network), fresh(spec(network, resolution=96))  # no tensor depends on it
    report = inherit(target, source)
    assert set(report.outcomes.values()) == {"copied"}
    assert (report.share, report.dropped, report.rewired) == (1, (), ())
    for key, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], tensor), key
    assert difference(target, source) == 0


def test_real_weights():
    source = create("lite0", weights="lite0")
    target = fresh(spec("lite0", width=1.1, depth=1.1), policy=source.policy)
    report = inherit(target, source, noise=0)
    assert difference(target, source) < ALLOWED
    inherit(target, source)
    assert ALLOWED < difference(target, source) < 0.02  # by default there is noise
    assert str(report) == "inherited from lite0: 85 % of 6.09 M parameters (modules: 5 copied, 14 grown, 5 added)"
    sizes = {name: parameter.numel() for name, parameter in target.named_parameters()}
    assert report.params == sum(sizes.values())
    assert report.share == sum(size for name, size in sizes.items() if not is_in(name, report)) / report.params


def is_in(name: str, report: Inheritance, outcome: str = "added") -> bool:
    return name.startswith(tuple(f"{part}." for part in report.names(outcome)))


# wider and deeper: the same function

GROWTHS = [(SMALL, 0.5, 1.3), (SMALL, 0.8, 1.3), (SMALL, 1.6, 0.6), (LITE, 0.8, 1.3), (TIED, 0.9, 1.8)]


@pytest.mark.parametrize(("network", "width", "depth"), GROWTHS)
def test_growing_keeps_the_logits(network, width, depth):
    source, target = trained(network).double(), fresh(spec(network, width=width, depth=depth)).double()
    before = snapshot(target)
    report = inherit(target, source, noise=0)
    assert difference(target, source) < 1e-12
    assert (report.names("fresh"), report.dropped, report.rewired) == ((), (), ())
    assert ("grown" in report.outcomes.values()) == (width > 0.5)
    known = {block.name for block in network.blocks}
    assert set(report.names("added")) == {block.name for block in target.spec.blocks} - known
    changed = [key for key, tensor in target.state_dict().items() if not torch.equal(tensor, before[key])]
    assert {key.split(".", 3)[3] for key in changed if is_in(key, report)} <= {"project.norm.weight"}  # its bias was 0


def test_added_blocks_do_nothing_in_training_either_and_can_learn():
    still = spec(SMALL, dropout=0, drop_connect=0)
    source, target = trained(still).train(), fresh(spec(still, depth=1.3)).train()
    report = inherit(target, source)
    assert difference(target, source) < ALLOWED
    target(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for name in report.names("added"):
        assert target.get_submodule(name).project.norm.weight.grad.abs().min() > 0


def test_noise_separates_copies_and_is_repeated():
    source, states = trained(SMALL), []
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ArgumentError, match="`noise`"):
            inherit(fresh(SMALL), source, noise=wrong)
    for noise in (0, 0.01, 0.01):
        target = fresh(spec(SMALL, width=1.0))
        inherit(target, source, noise=noise)
        states.append(target.state_dict())
    clean, noisy, again = states
    for key, old in source.state_dict().items():
        assert torch.equal(noisy[key], again[key]), key
        few, change = len(old) if old.dim() else 0, noisy[key] - clean[key]
        if old.dim() < 4 or len(change) == few:
            assert not change.any(), key
        else:
            assert not change[:few].any(), key
            assert 0.005 < change[few:].std() / clean[key].std() < 0.02, key


# narrower and shallower


@torch.no_grad()
def kill(source: EfficientNet, target: NetworkSpec) -> None:
    """Silence channels of each group, drawn at random, until those that say something are as many as in `target`."""
    random = torch.Generator().manual_seed(3)
    streams: list[tuple[list[nn.Module], int]] = [([source.stem.norm], target.stem_channels)]
    groups = [([source.head.norm], target.head_channels)]
    for block, heir in zip(source.spec.blocks, target.blocks, strict=True):
        module = source.get_submodule(block.name)
        if block.expand_ratio == 1:
            streams[-1][0].append(module.depthwise.norm)
        else:
            groups.append(([module.depthwise.norm], heir.expanded_channels))
        if block.squeeze_channels:
            gone = torch.randperm(block.squeeze_channels, generator=random)[heir.squeeze_channels :]
            module.se.squeeze.weight[gone] = module.se.squeeze.bias[gone] = 0
        if not block.has_shortcut:
            streams.append(([], heir.out_channels))
        streams[-1][0].append(module.project.norm)
    for norms, few in streams + groups:
        gone = torch.randperm(norms[0].num_features, generator=random)[few:]
        for norm in norms:
            norm.weight[gone] = norm.bias[gone] = 0


@pytest.mark.parametrize(("network", "wide"), [(SMALL, 1.0), (LITE, 1.0), (TIED, 0.9)], ids=["b0", "lite", "tied"])
def test_slicing_leaves_out_what_says_nothing(network, wide):
    source, target = trained(spec(network, width=wide)), fresh(network)
    kill(source, network)
    report = inherit(target, source)
    assert difference(target, source) < ALLOWED
    assert (report.share, report.names("fresh"), report.rewired) == (1, (), ())
    assert set(report.outcomes.values()) <= {"copied", "sliced"}


def test_channels_that_nobody_reads_go_first():
    source, target = trained(spec(SMALL, width=1.0)), fresh(SMALL)
    unread = torch.randperm(16, generator=torch.Generator().manual_seed(0))[8:].sort().values  # of stage 2
    with torch.no_grad():
        source.stages["3"][0].expand.conv.weight[:, unread] = 0
    inherit(target, source)
    left = [channel for channel in range(16) if channel not in unread]
    assert torch.equal(target.stages["2"][0].project.norm.bias, source.stages["2"][0].project.norm.bias[left])


def test_shallower_keeps_the_first_blocks():
    source, target = trained(spec(SMALL, depth=1.3)), fresh(SMALL)
    kept = {block.name for block in SMALL.blocks}
    lost = [block.name for block in source.spec.blocks if block.name not in kept]
    with torch.no_grad():
        for name in lost:  # so nothing is lost
            nn.init.zeros_(source.get_submodule(name).project.norm.weight)
            nn.init.zeros_(source.get_submodule(name).project.norm.bias)
    report = inherit(target, source)
    assert list(report.dropped) == lost != []
    assert set(report.outcomes.values()) == {"copied"}
    assert difference(target, source) < ALLOWED


# classes, channels


def test_another_number_of_classes_starts_fresh():
    source, target = trained(SMALL), fresh(spec(SMALL, num_classes=7))
    before = target.classifier.weight.clone()
    report = inherit(target, source)
    assert report.names("fresh") == ("classifier",)
    assert torch.equal(target.classifier.weight, before)
    assert torch.equal(target.embed(torch.ones(1, 3, 64, 64)), source.embed(torch.ones(1, 3, 64, 64)))
    assert str(report).endswith(" M parameters (modules: 12 copied; fresh: classifier)")


def test_classes_are_matched_by_name():
    source, images, names = trained(SMALL), torch.randn(2, 3, 64, 64), list("abcde")
    for wanted in ("edcba", "ca", "abcde"):
        target = fresh(spec(SMALL, num_classes=len(wanted)))
        report = inherit(target, source, classes=(list(wanted), names))
        assert report.names("fresh") == ()
        expected = source(images)[:, [names.index(name) for name in wanted]]
        torch.testing.assert_close(target(images), expected)
    target = fresh(SMALL)
    assert inherit(target, source, classes=(list("abcdx"), names)).names("fresh") == ("classifier",)
    with pytest.raises(ArgumentError, match=r"`classes` \(=4\) must be 5 names"):
        inherit(target, source, classes=(list("abcd"), names))


def test_a_grey_network_sees_what_three_equal_channels_gave():
    source, target = trained(SMALL), fresh(spec(SMALL, in_channels=1, width=0.8))
    report = inherit(target, source, noise=0)
    assert report.outcomes["stem"] == "sliced"
    grey = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(target(grey), source(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


# tables that differ


@pytest.mark.parametrize(
    ("changes", "unlike"), [({"kernel_size": 7}, "01234"), ({"expand_ratio": 4}, "01234"), ({"stride": 1}, "0")]
)
@pytest.mark.parametrize(("width", "depth"), [(0.3, 0.6), (0.8, 1.3)])
def test_blocks_of_another_kind_stay_fresh(changes, unlike, width, depth):
    rows = [dataclasses.replace(row, **changes) if stage == 5 else row for stage, row in enumerate(SMALL.stages, 2)]
    source, target = trained(SMALL), fresh(dataclasses.replace(SMALL, stages=rows, width=width, depth=depth))
    before = snapshot(target)
    report = inherit(target, source)
    blocks = [block for block in target.spec.blocks if block.stage == 5]
    assert report.names("fresh") == tuple(block.name for block in blocks if str(block.index) in unlike)
    assert all(torch.equal(t, before[key]) for key, t in target.state_dict().items() if is_in(key, report, "fresh"))
    assert not torch.equal(target.stages["6"][0].project.conv.weight, before["stages.6.0.project.conv.weight"])


def test_squeeze_and_excitation_on_one_side_only():
    source, target = trained(SMALL), fresh(dataclasses.replace(SMALL, squeeze_ratio=0))
    report = inherit(target, source)
    assert report.names("fresh") == tuple(block.name for block in SMALL.blocks)
    assert {report.outcomes[name] for name in ("stem", "head", "classifier")} == {"copied"}
    assert inherit(fresh(SMALL), target).outcomes["stages.2.0"] == "fresh"


@pytest.mark.parametrize("width", [0.3, 0.5])
def test_another_number_of_stages(width):
    six = dataclasses.replace(SMALL, stages=SMALL.stages[:-1])
    report = inherit(fresh(spec(six, width=width)), trained(SMALL))
    assert report.names("fresh") == ("head", "classifier")  # what they read means something else
    assert report.dropped == ("stages.8.0",)
    report = inherit(fresh(spec(SMALL, width=width)), trained(six))
    assert report.names("fresh") == ("stages.8.0", "head", "classifier")
    more = dataclasses.replace(SMALL, stages=(*SMALL.stages, StageSpec(6, 3, 1, 400, 3)))
    report = inherit(fresh(spec(more, width=width)), trained(SMALL))
    assert report.names("fresh") == ("stages.9.0", "stages.9.1", "head", "classifier")


def test_a_shortcut_on_one_side_only_is_reported():
    report = inherit(fresh(spec(SMALL, width=0.25)), trained(SMALL))  # 8 channels behind the stem and behind stage 2
    assert report.rewired == ("stages.2.0",)
    assert "other shortcut: stages.2.0" in str(report)


# policy, precision, modes

SAME = NumericPolicy(1e-5, 0.1, "same")
GROUPS = {"norm": lambda channels: nn.GroupNorm(8, channels)}


@pytest.mark.parametrize("norm", [None, torchvision.ops.FrozenBatchNorm2d])
def test_it_computes_with_the_sources_policy(norm):
    options = {"policy": NumericPolicy(padding="same"), "norm": norm}
    source, target = trained(SMALL, policy=SAME), fresh(spec(SMALL, width=0.8), **options)
    inherit(target, source, noise=0)
    assert (target.policy, target.head.norm.eps) == (SAME, 1e-5)
    assert difference(target, source) < ALLOWED
    assert "fresh" not in inherit(fresh(SMALL, **options), target).outcomes.values()


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        (SMALL, {}, r"`padding` \(='symmetric'\) is built in, and the source has 'same': EfficientNet\(spec, policy="),
        (dataclasses.replace(SMALL, activation="relu6"), {"policy": SAME}, "`activation` .* the source's silu"),
        (SMALL, {"policy": SAME, **GROUPS}, r"`network` \(='b0-\S+'\) needs batch normalisation, and lacks stem\.norm"),
    ],
)
def test_networks_that_do_not_fit_stay_as_they_are(target, options, words):
    source, network = trained(SMALL, policy=SAME), fresh(target, **options)
    before, policy = snapshot(network), network.policy
    with pytest.raises(ArgumentError, match=words):
        inherit(network, source)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert network.policy == policy


@pytest.mark.parametrize(("old", "new"), [("float64", "float32"), ("float32", "float64"), ("bfloat16", "float32")])
def test_precisions_and_modes_stay(old, new):
    old, new = getattr(torch, old), getattr(torch, new)
    source = trained(SMALL).to(old)
    target = fresh(spec(SMALL, width=0.8)).to(new, memory_format=torch.channels_last).train()
    target.head.eval()
    target.stem.requires_grad_(False)
    before = snapshot(source)
    strides = {name: parameter.stride() for name, parameter in target.named_parameters()}
    inherit(target, source, noise=0)
    assert {tensor.dtype for tensor in target.state_dict().values()} == {new, torch.int64}
    assert (target.training, target.head.training, source.training) == (True, False, False)
    assert [p.requires_grad for p in target.stem.parameters()] == [False] * 3
    assert all(p.requires_grad for p in target.head.parameters())
    assert strides == {name: parameter.stride() for name, parameter in target.named_parameters()}
    assert all(torch.equal(tensor, before[key]) for key, tensor in source.state_dict().items())
    assert difference(target.eval(), source.to(new)) < ALLOWED
