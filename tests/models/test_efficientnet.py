"""The network as a module: how it starts, what it returns, and what torch's tools can do with it."""

import copy
import dataclasses
import math
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.export import Dim, export
from torchvision.ops import FrozenBatchNorm2d

import effnet
from effnet.arch.spec import NumericPolicy
from effnet.errors import ArgumentError
from effnet.models.blocks import activate
from effnet.models.efficientnet import EfficientNet

# All kinds of block, 10 of them, a quarter of the channels
SMALL = effnet.spec("b0", width=0.25, depth=0.5, depth_rounding="nearest", resolution=64, num_classes=10)
# Two of them, for compilers: one strided, one with a shortcut
FEW = {"stages": SMALL.stages[1:2], "depth": 1.0}
TINY = dataclasses.replace(SMALL, **FEW, dropout=0.0, drop_connect=0.0)

# name: entries of the state dict, the same in the tutorial's, torchvision's and timm's networks
STATE_ENTRIES = {"b0": 360, "b1": 508, "b2": 508, "b3": 574, "b4": 706, "b5": 854, "b6": 986, "b7": 1200}

paddings = pytest.mark.parametrize("padding", ["symmetric", "same"])


def small(padding="symmetric", **changes):
    """A small network in eval mode whose normalisation has statistics unlike 0 and 1."""
    network = EfficientNet(dataclasses.replace(SMALL, **changes), policy=NumericPolicy(padding=padding))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval()


# --- how it starts ---------------------------------------------------------------------------------------------------


def test_weights_start_as_the_official_ones():
    """Normal with std sqrt(2 / (kernel^2 * outputs)); depthwise has one output per filter; dense uniform; biases 0."""
    network = EfficientNet(effnet.spec("b0"))
    depthwise = 0
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            outputs = 1 if module.groups > 1 else module.out_channels
            depthwise += module.groups > 1
            std = math.sqrt(2 / (module.kernel_size[0] ** 2 * outputs))
            count = module.weight.numel()
            assert abs(module.weight.std(correction=0) / std - 1) < 5 / math.sqrt(2 * count), name
            assert abs(module.weight.mean()) < 5 * std / math.sqrt(count), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.running_var == 1).all()
            assert (module.running_mean == 0).all()
        if getattr(module, "bias", None) is not None:
            assert (module.bias == 0).all(), name
    assert depthwise == 16
    bound = 1 / math.sqrt(1000)
    assert network.classifier.weight.abs().max() <= bound
    assert abs(network.classifier.weight.std() / bound * math.sqrt(3) - 1) < 0.01


@pytest.mark.parametrize(
    ("policy", "eps", "momentum"),
    [(None, 1e-3, 0.01), (NumericPolicy(bn_eps=1e-5, bn_momentum=0.1), 1e-5, 0.1)],
)
def test_normalisation_constants(policy, eps, momentum):
    """Official: eps 1e-3, momentum .99, which is .01 in torch's terms."""
    norms = [m for m in EfficientNet(SMALL, policy=policy).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 1 + 10 * 3 - 1 + 1
    assert {(norm.eps, norm.momentum) for norm in norms} == {(eps, momentum)}


@pytest.mark.parametrize("name", STATE_ENTRIES)
def test_constructors(name):
    with torch.device("meta"):
        network = getattr(effnet, f"efficientnet_{name}")()
        changed = getattr(effnet, f"efficientnet_{name}")(7, 1, policy=NumericPolicy(padding="same"), norm=nn.Identity)
    assert network.spec == effnet.spec(name)
    assert len(network.state_dict()) == STATE_ENTRIES[name]
    assert changed.spec == effnet.spec(name, num_classes=7, in_channels=1)
    assert changed.policy.padding == "same"
    assert not any(isinstance(module, nn.BatchNorm2d) for module in changed.modules())


def test_modules_stand_under_their_blocks_names():
    network = small()
    for block in SMALL.blocks:
        assert network.get_submodule(block.name).depthwise.conv.out_channels == block.expanded_channels


def test_a_name_is_no_spec():
    with pytest.raises(ArgumentError, match=r"`spec` \(='b0'\) must be a NetworkSpec"):
        EfficientNet("b0")


# --- what it returns -------------------------------------------------------------------------------------------------


@paddings
@pytest.mark.parametrize("size", [(64, 64), (65, 33), (47, 96), (1, 5)])
def test_any_size_will_do(padding, size):
    network = small(padding)
    images = torch.randn(2, 3, *size)
    height, width = (math.ceil(n / 32) for n in size)
    assert network.forward_features(images).shape == (2, SMALL.head_channels, height, width)
    assert network.embed(images).shape == (2, SMALL.head_channels)
    assert network(images).shape == (2, 10)


@paddings
@pytest.mark.parametrize("size", [(32, 32), (28, 33), (1, 5)])
def test_a_stem_stride_of_1_keeps_twice_the_size(padding, size):
    network = small(padding, stem_stride=1)
    images = torch.randn(2, 3, *size)
    height, width = (math.ceil(n / 16) for n in size)
    assert network.stem(images).shape[2:] == size
    assert network.forward_features(images).shape == (2, SMALL.head_channels, height, width)
    sizes = [(math.ceil(size[0] / stride), math.ceil(size[1] / stride)) for stride in (1, 2, 4, 8, 16)]
    shapes = [(2, count, *each) for count, each in zip(network.pyramid_channels, sizes, strict=True)]
    assert [tuple(level.shape) for level in network.pyramid(images)] == shapes


def test_logits_are_the_classifier_on_the_mean_of_the_features():
    network, images = small(), torch.randn(2, 3, 70, 90)
    mean = network.forward_features(images).mean((2, 3))
    torch.testing.assert_close(network.embed(images), mean)
    torch.testing.assert_close(network(images), mean @ network.classifier.weight.T + network.classifier.bias)


@pytest.mark.parametrize("name", ["b2", "lite0"])
def test_pyramid_channels_are_timms(name):
    with torch.device("meta"):
        network = EfficientNet(effnet.spec(name))
        judge = timm.create_model(f"tf_efficientnet_{name}", features_only=True)
        shapes = [tuple(level.shape) for level in network.eval().pyramid(torch.empty(1, 3, 97, 130))]
    channels = judge.feature_info.channels()
    assert list(network.pyramid_channels) == channels
    sizes = [(math.ceil(97 / stride), math.ceil(130 / stride)) for stride in judge.feature_info.reduction()]
    assert shapes == [(1, count, *size) for count, size in zip(channels, sizes, strict=True)]


def test_pyramid_maps_are_timms():
    judge = timm.create_model("tf_efficientnet_b0", features_only=True).eval()
    network = EfficientNet(effnet.spec("b0"), policy=NumericPolicy(bn_eps=judge.bn1.eps, padding="same")).eval()
    ours = network.state_dict()
    theirs = judge.state_dict()  # the same tensors in the same order, but for the head
    network.load_state_dict(dict(zip(ours, theirs.values(), strict=False)), strict=False)
    images = torch.randn(1, 3, 70, 97)
    with torch.no_grad():
        for level, expected in zip(network.pyramid(images), judge(images), strict=True):
            torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


# --- changing it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_reset_classifier_keeps_the_rest(dtype):
    network = small().to(dtype)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items() if "classifier" not in name}
    network.reset_classifier(3)
    assert network.spec == dataclasses.replace(SMALL, num_classes=3)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in before.items())
    assert network.classifier.weight.dtype == network.classifier.bias.dtype == dtype
    assert network(torch.randn(2, 3, 64, 64, dtype=dtype)).shape == (2, 3)
    assert 0 < network.classifier.weight.abs().max() <= 1 / math.sqrt(3)
    assert (network.classifier.bias == 0).all()


def test_reset_classifier_keeps_the_device_and_wants_classes():
    with torch.device("meta"):
        network = EfficientNet(SMALL)
    network.reset_classifier(3)
    assert network.classifier.weight.device.type == "meta"
    with pytest.raises(ArgumentError, match=r"`num_classes` \(=0\)"):
        network.reset_classifier(0)


def test_parameter_groups_hold_every_parameter_once_in_order():
    network = small()
    groups = network.parameter_groups()
    assert [group["name"] for group in groups] == ["stem", *(f"stages.{n}" for n in range(2, 9)), "head", "classifier"]
    assert [id(weight) for group in groups for weight in group["params"]] == [id(w) for w in network.parameters()]
    torch.optim.SGD(groups, lr=0.1)


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.SyncBatchNorm, lambda channels: nn.GroupNorm(8, channels)])
def test_normalisation_is_injectable(norm):
    network = EfficientNet(SMALL, norm=norm).eval()
    kinds = {type(module) for module in network.modules() if "Norm" in type(module).__name__} - {type(network.stem)}
    assert kinds == {type(norm(8))}
    assert network(torch.randn(2, 3, 64, 64)).isfinite().all()


def test_copies_and_pickles_are_the_same_network():
    network, images = small(), torch.randn(2, 3, 64, 64)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert (twin.spec, twin.policy) == (network.spec, network.policy)
        assert torch.equal(twin(images), network(images))


# --- training --------------------------------------------------------------------------------------------------------


def test_training_moves_the_statistics_by_the_momentum():
    network = EfficientNet(SMALL, policy=NumericPolicy(bn_momentum=0.25)).train()
    images = torch.randn(4, 3, 64, 64)
    written = network.stem.conv(images)
    network(images)
    torch.testing.assert_close(network.stem.norm.running_mean, 0.25 * written.mean((0, 2, 3)))
    torch.testing.assert_close(network.stem.norm.running_var, 0.75 + 0.25 * written.var((0, 2, 3)))
    counters = [buffer for name, buffer in network.named_buffers() if name.endswith("num_batches_tracked")]
    assert {int(counter) for counter in counters} == {1}
    before = copy.deepcopy(network.state_dict())
    network.eval()(images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_dropout_is_the_specs_and_only_in_training():
    network, images = small(dropout=0.5, drop_connect=0.0), torch.randn(2, 3, 64, 64)
    assert torch.equal(network(images), network(images))
    features = network.embed(images)
    kept = network.dropout.train()(torch.ones_like(features).repeat(20, 1))
    assert (kept == 0).float().mean() == pytest.approx(0.5, abs=0.05)


# --- torch's tools ---------------------------------------------------------------------------------------------------


@paddings
def test_channels_last_gives_the_same_numbers(padding):
    network, images = small(padding), torch.randn(2, 3, 65, 48)
    expected = network(images)
    network, images = network.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    assert network.forward_features(images).is_contiguous(memory_format=torch.channels_last)


@paddings
def test_symbolic_trace_holds_for_any_size(padding):
    network = small(padding)
    traced = torch.fx.symbolic_trace(network)
    for size in [(64, 64), (65, 48), (33, 97)]:
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(traced(images), network(images))


@paddings
def test_export(padding):
    """Sizes from 33 pixels on: below, the last map has a single pixel, which torch treats differently."""
    network, dynamic = small(padding, **FEW), {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    exported = export(network, (torch.randn(2, 3, 64, 64),), dynamic_shapes=(dynamic,)).module()
    for shape in [(2, 3, 64, 64), (1, 3, 65, 90), (3, 3, 97, 33)]:
        images = torch.randn(*shape)
        torch.testing.assert_close(exported(images), network(images))


@pytest.mark.slow
def test_compiled_training_gives_the_same_gradients():
    network, images = EfficientNet(TINY).train(), torch.randn(4, 3, 32, 32)
    twin = copy.deepcopy(network)
    network.native(False)  # compiled, it does not train by the kernels either
    network(images).square().sum().backward()
    torch.compile(twin, backend="aot_eager", fullgraph=True)(images).square().sum().backward()
    for weight, other in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, weight.grad, rtol=1e-3, atol=1e-4 * weight.grad.abs().max().item())


@pytest.mark.slow
def test_compile_with_inductor():
    """Needs a C++ compiler."""
    network, images = EfficientNet(TINY, policy=NumericPolicy(padding="same")).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True)
        torch.testing.assert_close(compiled(images), network(images), rtol=1e-4, atol=1e-6)


def watched(name):
    network = EfficientNet(effnet.spec(name, width=0.25, dropout=0, drop_connect=0, num_classes=3))
    return network, [module for module in network.modules() if not list(module.children())]


NAMES = pytest.mark.parametrize("name", ["b0", "lite0", "mobilenetv1", "resnet50"])


@NAMES
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_map_that_a_hook_keeps_stays_as_it_was(name, grad, everywhere):
    network, leaves = watched(name)
    kept = []

    def keep(module, inputs, output):
        kept.extend((each.detach(), each.detach().clone()) for each in (*inputs, output))

    if everywhere:
        handles = [nn.modules.module.register_module_forward_hook(keep)]
    else:
        handles = [module.register_forward_hook(keep) for module in leaves]
    with torch.set_grad_enabled(grad):
        network(torch.randn(2, 3, 64, 64))
    for handle in handles:
        handle.remove()
    assert len(kept) > 100
    assert all(torch.equal(tensor, before) for tensor, before in kept)


@NAMES
def test_full_backward_hooks_see_the_gradients(name):
    network, leaves = watched(name)
    network.native(False)  # as with hooks
    images, gradients, seen = torch.randn(2, 3, 64, 64, requires_grad=True), [], set()
    for hooked in (False, True):
        network.zero_grad()
        for module in leaves if hooked else ():
            module.register_full_backward_hook(lambda module, *_: seen.add(module))
            module.register_full_backward_pre_hook(lambda *_: None)
        network(images).square().sum().backward()
        gradients.append([weight.grad for weight in network.parameters()])
    assert seen >= {module for module in leaves if isinstance(module, (nn.ReLU, nn.ReLU6, nn.SiLU, nn.BatchNorm2d))}
    assert all(torch.equal(plain, hooked) for plain, hooked in zip(*gradients, strict=True))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
@NAMES
def test_a_traced_network_passes_torchs_own_check(name):
    network, images = watched(name)[0].eval(), torch.randn(1, 3, 64, 64)
    traced = torch.jit.trace(network, images)  # checks its graph again without gradients
    torch.testing.assert_close(traced(images), network(images))


@NAMES
def test_unwatched_activations_are_written_over_their_input(name):
    network = watched(name)[0].eval()
    layer, x = network.stem, torch.randn(1, network.stem.norm.num_features, 8, 8)
    with torch.no_grad():
        assert activate(layer.act, x, layer) is x
        layer.norm.register_forward_hook(lambda *_: None)
        assert activate(layer.act, x, layer) is not x
