"""What is trained by the compiled kernels, and what by torch's modules."""

from __future__ import annotations

import copy

import pytest
import torch
from alive import Alive
from native_block import BLOCK, LAYER, SEGMENTS, SPEC, assert_near, block, images, learn, x_of
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from effnet.models.blocks import ConvNormAct, MBConv
from effnet.models.efficientnet import EfficientNet
from effnet.native import instruction_sets

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="nothing was compiled")


def test_every_segment_of_a_network_trains_by_the_kernels(calls):
    learn(EfficientNet(SPEC).train(), images())
    assert len(calls) == SEGMENTS


def replace_conv(module: MBConv) -> None:
    class Own(nn.Conv2d):
        pass

    module.project.conv = Own(32, 8, 1, bias=False)


def freeze_norm(module: MBConv) -> None:
    module.depthwise.norm.eval()


def average_norm(module: MBConv) -> None:
    module.depthwise.norm.momentum = None


def other_norm(module: MBConv) -> None:
    module.depthwise.norm = nn.GroupNorm(4, 32)


def sync_norm(module: MBConv) -> None:
    module.depthwise.norm = nn.SyncBatchNorm(32)
    module.depthwise.norm.eval()  # in training it needs a GPU


def plain_norm(module: MBConv) -> None:
    module.depthwise.norm = nn.BatchNorm2d(32, affine=False)


def forgetful_norm(module: MBConv) -> None:
    module.depthwise.norm = nn.BatchNorm2d(32, track_running_stats=False)


def other_activation(module: MBConv) -> None:
    module.depthwise.act = nn.Hardswish()


def other_gate(module: MBConv) -> None:
    module.se.gate = nn.Hardsigmoid()


def no_activation(module: MBConv) -> None:
    module.se.act = nn.ReLU()


def hook(module: MBConv) -> None:
    module.depthwise.norm.register_forward_hook(lambda *_: None)


def backward_hook(module: MBConv) -> None:
    module.se.gate.register_full_backward_hook(lambda *_: None)


def method(module: MBConv) -> None:
    norm = module.depthwise.norm
    norm.forward = lambda x: 2 * nn.BatchNorm2d.forward(norm, x)


def parametrize(module: MBConv) -> None:
    parametrizations.weight_norm(module.depthwise.conv)


def pruned(module: MBConv) -> None:
    prune.l1_unstructured(module.depthwise.conv, "weight", 0.5)


def dilate(module: MBConv) -> None:
    module.depthwise.conv.__class__ = nn.Conv2d  # whose settings may change
    module.depthwise.conv.dilation, module.depthwise.conv.padding = (2, 2), (2, 2)


def bias(module: MBConv) -> None:
    module.depthwise.conv.bias = nn.Parameter(torch.ones(32))


def reflect(module: MBConv) -> None:
    module.depthwise.conv.__class__ = nn.Conv2d
    module.depthwise.conv.padding_mode = "reflect"
    module.depthwise.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


def subclass(module: MBConv) -> None:
    class Twice(ConvNormAct):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module.depthwise.__class__ = Twice


UNUSUAL = [replace_conv, freeze_norm, average_norm, other_norm, sync_norm, plain_norm, forgetful_norm, other_activation]
UNUSUAL += [
    other_gate,
    no_activation,
    hook,
    backward_hook,
    method,
    parametrize,
    pruned,
    dilate,
    bias,
    reflect,
    subclass,
]


@pytest.mark.parametrize("change", UNUSUAL)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used before"])
def test_an_unusual_module_is_computed_by_itself(calls, change, used):
    module, x = block(), x_of(block())
    if used:
        learn(module, x)
    twin = copy.deepcopy(module)
    for each in (module, twin):
        torch.manual_seed(2)
        change(each)
    calls.clear()
    found = learn(module, x)
    assert set(calls) <= {LAYER}  # what is left as it was
    for each in twin.modules():
        vars(each)["native"] = False
    assert_near(found, learn(twin, x))


def whole(calls: list[int], module: MBConv, x: Tensor) -> bool:
    """Whether the block goes through the kernels as a whole."""
    calls.clear()
    module(x)
    return calls == [BLOCK]


def test_hooks_come_and_go(calls):
    module, x = block(), x_of(block())
    assert whole(calls, module, x)
    seen: list[Tensor] = []
    handle = module.depthwise.register_forward_hook(lambda _, __, y: seen.append(y))
    assert not whole(calls, module, x)
    assert seen[0].shape == (3, 32, 6, 6)
    handle.remove()
    assert whole(calls, module, x)
    handle = register_module_forward_hook(lambda *_: None)
    try:
        assert not whole(calls, module, x)
    finally:
        handle.remove()
    own: list[Tensor] = []
    module.register_forward_hook(lambda _, __, y: own.append(y))  # of the whole block
    assert whole(calls, module, x)
    assert own[0].shape == x.shape


def test_what_is_not_for_the_kernels(calls, monkeypatch):
    module, x = block(), x_of(block())
    with torch.no_grad():
        module(x)
    with torch.autocast("cpu", torch.float16):
        module(x)
    with torch.autocast("cpu", torch.bfloat16):
        module(x)  # with a shortcut, torch adds a float32 input in float32
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() > 0
    with Alive() as alive:  # sees operators
        module(x)
    assert alive.peak > 0
    copy.deepcopy(module).double()(x.double())
    copy.deepcopy(module).bfloat16()(x.bfloat16())
    copy.deepcopy(module).eval()(x)
    module(x[:0])
    with pytest.raises(RuntimeError, match="channels"):
        module(x[:, :4])
    with pytest.raises(RuntimeError, match="type"):
        module(x.double())
    with pytest.raises(ValueError, match="more than 1 value"):
        module(x[:1, :, :1, :1])
    mixed = copy.deepcopy(module)
    mixed.project.norm.half()
    with pytest.raises(RuntimeError):
        mixed(x)
    monkeypatch.setenv("EFFNET_NATIVE", "0")
    module(x)
    assert BLOCK not in calls


def test_autocast_is_read_at_every_call(calls):
    module, x = block(), x_of(block(), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype is torch.bfloat16
        assert len(calls) == 1
        with torch.autocast("cpu", enabled=False):
            assert module(x.float()).dtype is torch.float32
    assert module(x.float()).dtype is torch.float32
    assert calls == [BLOCK] * 3
    odd = block(9)
    with torch.autocast("cpu", torch.bfloat16):
        assert odd(torch.randn(3, 9, 6, 6).bfloat16()).dtype is torch.bfloat16  # odd channels have no pairs
    assert BLOCK not in calls[3:]


def test_an_images_gradient_is_torchs(calls):
    network = EfficientNet(SPEC).train()
    x = images().requires_grad_()
    network(x).sum().backward()
    assert x.grad is not None
    assert len(calls) == SEGMENTS - 1


def test_switches_and_repr(calls, monkeypatch):
    network = EfficientNet(SPEC).train()
    assert "training=native\n" in repr(network)
    network.native(False)
    assert "training=torch\n" in repr(network)
    network = copy.deepcopy(network)
    learn(network, images())
    assert not calls
    network.native()
    network.head.norm.momentum = None
    assert "training=native and torch" in repr(network)
    learn(network, images())
    assert len(calls) == SEGMENTS - 1
    monkeypatch.setenv("EFFNET_NATIVE", "0")
    assert "training=torch\n" in repr(network)
    monkeypatch.delenv("EFFNET_NATIVE")
    monkeypatch.setattr("effnet.models.native.open_library", lambda: None)
    assert "training=torch\n" in repr(network)
    network(images())
    assert len(calls) == SEGMENTS - 1
