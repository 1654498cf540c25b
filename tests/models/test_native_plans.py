"""The kernels give the same bits with and without a plan; below CONVOLUTIONS a segment's maps are recomputed."""

import copy

import pytest
import torch
from native_block import SEGMENTS, SPEC, assert_same, images, learn
from torch import nn

import effnet
from effnet import native
from effnet.arch.recompute import RecomputePlan
from effnet.arch.segments import Keep
from effnet.arch.spec import NumericPolicy
from effnet.models.efficientnet import EfficientNet

pytestmark = pytest.mark.skipif(not native.instruction_sets(), reason="nothing was compiled")
SPECS = {
    "dropping": effnet.spec(SPEC, drop_connect=0.5, dropout=0.3),
    "relu6": effnet.spec("lite0", width=0.25, depth=0.5, resolution=16, num_classes=5),
    "separable": effnet.spec("mobilenetv1", width=0.25, resolution=16, num_classes=5),
}


def planned(network: EfficientNet, keep: Keep) -> EfficientNet:
    twin = copy.deepcopy(network)
    twin.recompute(RecomputePlan.uniform(network.spec, keep))
    return twin


@pytest.mark.parametrize("keep", Keep)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("low", [False, True])
def test_a_step_to_the_bit(name, keep, padding, low, calls):
    """Outputs, gradients and running statistics, which move once; dropped images stay dropped."""
    network = EfficientNet(SPECS[name], policy=NumericPolicy(padding=padding)).train()
    twin, x = planned(network, keep), images(8)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        expected = learn(network, x)
        before = len(calls)
        assert_same(learn(twin, x), expected)
    assert len(calls) == 2 * before
    assert int(twin.stem.norm.num_batches_tracked) == 1


def test_segments_have_levels_of_their_own():
    network = EfficientNet(SPEC).train()
    plan = RecomputePlan.uniform(SPEC, Keep.CONVOLUTIONS)
    kept = []
    for keep in (Keep.CONVOLUTIONS, Keep.BOTTLENECKS):
        network.recompute(RecomputePlan({**plan, "stages.3.0": keep}))
        assert "training=native\n" in repr(network)
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(tensors.append, lambda tensor: tensor):
            network(images())
        kept.append(sum(isinstance(tensor, torch.Tensor) for tensor in tensors))
    assert kept[0] - kept[1] == 4  # three maps and the statistics


def test_a_plan_may_go_backward_twice():
    network = planned(EfficientNet(SPEC).train(), Keep.BOTTLENECKS)
    logits = network(images()).sum()
    logits.backward(retain_graph=True)
    once = {name: weight.grad.clone() for name, weight in network.named_parameters()}
    statistics = network.head.norm.running_var.clone()
    logits.backward()
    for name, weight in network.named_parameters():
        torch.testing.assert_close(weight.grad, 2 * once[name], msg=name)
    assert torch.equal(network.head.norm.running_var, statistics)


def test_what_the_kernels_do_not_cover_follows_the_plan_in_torch(calls):
    network = planned(EfficientNet(SPEC).train(), Keep.BOTTLENECKS)
    network.stem.norm.momentum = None
    network.native(False)
    network.head.native = True
    learn(network, images())
    assert len(calls) == 1
    network.native()
    learn(network, images())
    assert len(calls) == 1 + SEGMENTS - 1
    network.eval()
    assert isinstance(network.head.norm, nn.BatchNorm2d)
    network(images())
    assert len(calls) == SEGMENTS


def test_other_weights_before_the_backward_pass_are_refused():
    """The forward pass would be another one."""
    network = planned(EfficientNet(SPEC).train(), Keep.BOTTLENECKS)
    loss = network(images()).sum()
    with torch.no_grad():
        network.head.conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
