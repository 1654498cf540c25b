"""A network under a plan learns what the plain network learns."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import effnet
from effnet.arch.memory import Keep, training_memory
from effnet.arch.recompute import RecomputePlan, find_plan
from effnet.arch.spec import NetworkSpec, NumericPolicy, StageSpec
from effnet.errors import ArgumentError
from effnet.models.efficientnet import EfficientNet

SMALL = effnet.spec("b0", width=0.25, depth=0.5, depth_rounding="nearest", resolution=48, num_classes=5)
SPECS = {
    "silu, squeeze-and-excitation": SMALL,
    "relu6, none": effnet.spec("lite0", width=0.25, resolution=48, num_classes=5),
    "one channel, no expansion, dropout 0": NetworkSpec(
        "odd",
        (StageSpec(1, 5, 1, 8, 2), StageSpec(2, 3, 2, 16, 2)),
        in_channels=1,
        resolution=33,
        num_classes=3,
        dropout=0,
        squeeze_ratio=0.5,
        head=24,
    ),
    "separable": effnet.spec("mobilenetv1", width=0.25, resolution=48, num_classes=5),
    "bottleneck": effnet.spec("resnet50", width=0.125, depth=0.5, resolution=48, num_classes=5, drop_connect=0.2),
}
CASES = [
    *((name, "same") for name in SPECS),
    ("silu, squeeze-and-excitation", "symmetric"),
    ("bottleneck", "symmetric"),
]
each_level = pytest.mark.parametrize("keep", Keep, ids=lambda keep: keep.name)


def plan_of(spec: NetworkSpec, keep: Keep | str) -> RecomputePlan:
    """A level everywhere, or with "mixed" a new one for each part."""
    if keep != "mixed":
        return RecomputePlan.uniform(spec, keep)
    parts = RecomputePlan.uniform(spec, Keep.ACTIVATIONS).keeps
    return RecomputePlan({name: Keep(number % len(Keep)) for number, name in enumerate(parts)})


def learn(network: EfficientNet, *, seed: int = 3, device_dtype: torch.dtype = torch.float64):
    """Two steps: loss, gradients of the second and the state behind it."""
    spec = network.spec
    torch.manual_seed(seed)  # of stochastic depth and dropout
    images = torch.randn(4, spec.in_channels, spec.resolution, spec.resolution, dtype=device_dtype, requires_grad=True)
    labels = torch.arange(4) % spec.num_classes
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        images.grad = None
        loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        gradients = {name: weight.grad.clone() for name, weight in network.named_parameters()}
        optimizer.step()
    return loss.detach(), gradients | {"images": images.grad}, network.state_dict()


def fresh(spec: NetworkSpec, policy: NumericPolicy | None = None) -> EfficientNet:
    torch.manual_seed(0)
    return EfficientNet(spec, policy=policy).double().train()


@pytest.mark.parametrize(("name", "padding"), CASES)
@pytest.mark.parametrize("keep", [*Keep, "mixed"], ids=str)
def test_a_plan_changes_nothing_but_memory(name, keep, padding):
    spec = SPECS[name]
    network = fresh(spec, NumericPolicy(padding=padding))
    under_plan = copy.deepcopy(network)
    under_plan.recompute(plan_of(spec, keep))
    loss, gradients, state = learn(network)
    loss_too, gradients_too, state_too = learn(under_plan)
    torch.testing.assert_close(loss_too, loss, rtol=1e-12, atol=0)
    scale = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_too[name], gradient, rtol=1e-9, atol=1e-11 * float(scale), msg=name)
    for name, tensor in state.items():
        torch.testing.assert_close(state_too[name], tensor, rtol=1e-9, atol=1e-11, msg=name)
    assert int(state_too["stem.norm.num_batches_tracked"]) == 2


@each_level
def test_first_outputs_and_statistics_to_the_bit_in_float32(keep):
    network = fresh(SMALL).float()
    under_plan = copy.deepcopy(network)
    under_plan.recompute(RecomputePlan.uniform(SMALL, keep))
    images = torch.randn(4, 3, 48, 48).contiguous(memory_format=torch.channels_last)
    results = []
    for each in (network, under_plan):
        torch.manual_seed(1)
        logits = each(images)
        logits.sum().backward()
        results.append((logits, [value for name, value in each.state_dict().items() if "running" in name]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(map(torch.equal, results[0][1], results[1][1]))


@each_level
def test_frozen_normalisation(keep):
    """Fine-tuning often leaves batch normalisation in eval mode."""
    network = fresh(SMALL)
    under_plan = copy.deepcopy(network)
    under_plan.recompute(RecomputePlan.uniform(SMALL, keep))
    for each in (network, under_plan):
        for module in each.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                module.running_mean.normal_(generator=torch.Generator().manual_seed(0))
                module.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    _, gradients, state = learn(network)
    _, gradients_too, state_too = learn(under_plan)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_too[name], gradient, rtol=1e-8, atol=1e-12, msg=name)
    assert torch.equal(state["stem.norm.running_mean"], state_too["stem.norm.running_mean"])


@each_level
def test_frozen_weights(keep):
    """The head first: only part of the network needs gradients."""
    network = fresh(SMALL)
    under_plan = copy.deepcopy(network)
    under_plan.recompute(RecomputePlan.uniform(SMALL, keep))
    images = torch.randn(4, 3, 48, 48, dtype=torch.float64)
    results = []
    for each in (network, under_plan):
        for name, weight in each.named_parameters():
            weight.requires_grad_(name.startswith(("stages.8", "head", "classifier")))
        torch.manual_seed(1)
        each(images).square().sum().backward()
        results.append({name: weight.grad for name, weight in each.named_parameters() if weight.grad is not None})
    assert results[0].keys() == results[1].keys() != set()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-8, atol=1e-9, msg=name)


def test_momentum_none_averages_over_all_batches():
    network = fresh(SMALL)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    under_plan = copy.deepcopy(network)
    under_plan.recompute(RecomputePlan.uniform(SMALL, Keep.CONVOLUTIONS))
    state, state_too = learn(network)[2], learn(under_plan)[2]
    torch.testing.assert_close(state_too["head.norm.running_var"], state["head.norm.running_var"])


def test_inference_and_eval_ignore_the_plan():
    network = fresh(SMALL).float().eval()
    images = torch.randn(2, 3, 48, 48)
    before = network(images)
    network.recompute(RecomputePlan.uniform(SMALL, Keep.BOTTLENECKS))
    assert torch.equal(network(images), before)
    with torch.no_grad():
        assert torch.equal(network(images), before)
        network.train()(images)  # without gradients there is nothing to keep


def test_none_takes_the_plan_back():
    network = fresh(SMALL)
    network.recompute(RecomputePlan.uniform(SMALL, Keep.BOTTLENECKS))
    network.recompute(None)
    logits = network(torch.randn(2, 3, 48, 48, dtype=torch.float64)).sum()
    logits.backward(retain_graph=True)
    logits.backward()


def test_twice_backward_is_refused_in_words():
    network = fresh(SMALL)
    network.recompute(RecomputePlan.uniform(SMALL, Keep.BOTTLENECKS))
    logits = network(torch.randn(2, 3, 48, 48, dtype=torch.float64)).sum()
    logits.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph does not work"):
        logits.backward()


def test_writing_into_a_map_is_seen():
    """A recipe would make the map anew, without what somebody wrote into it."""
    network = fresh(SMALL)
    under_plan = copy.deepcopy(network)
    under_plan.recompute(RecomputePlan.uniform(SMALL, Keep.CONVOLUTIONS))
    gradients = []
    for each in (network, under_plan):
        each.stem.register_forward_hook(lambda module, inputs, output: output.mul_(2))
        torch.manual_seed(1)
        each(torch.ones(2, 3, 48, 48, dtype=torch.float64).cumsum(3)).square().sum().backward()
        gradients.append(each.stages["2"][0].depthwise.conv.weight.grad)
    torch.testing.assert_close(*gradients)


def test_copies_and_pickles_follow_the_plan():
    network = fresh(SMALL)
    network.recompute(RecomputePlan.uniform(SMALL, Keep.BOTTLENECKS))
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert twin.state_dict().keys() == network.state_dict().keys()
        learn(twin)
        logits = twin(torch.randn(2, 3, 48, 48, dtype=torch.float64)).sum()
        logits.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="retain_graph"):
            logits.backward()


def test_pyramid_under_a_plan():
    network = fresh(SMALL)
    under_plan = copy.deepcopy(network)
    under_plan.recompute(RecomputePlan.uniform(SMALL, Keep.BOTTLENECKS))
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    weights = []
    for each in (network, under_plan):
        torch.manual_seed(1)
        sum(level.square().mean() for level in each.pyramid(images)).backward()
        weights.append(each.stages["4"][0].expand.conv.weight.grad)
    torch.testing.assert_close(*weights, rtol=1e-8, atol=1e-10)


@each_level
def test_bf16_autocast(keep):
    network = fresh(SMALL).float()
    under_plan = copy.deepcopy(network)
    under_plan.recompute(RecomputePlan.uniform(SMALL, keep))
    images = torch.randn(4, 3, 48, 48)
    results = []
    for each in (network, under_plan):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = each(images)
        logits.float().square().sum().backward()
        results.append((logits, torch.cat([weight.grad.flatten() for weight in each.parameters()])))
    assert torch.equal(results[0][0], results[1][0])
    cosine = torch.nn.functional.cosine_similarity(results[0][1], results[1][1], dim=0)
    assert cosine > 0.99  # eight bits of mantissa, and other orders of rounding


def test_a_found_plan_is_followed():
    spec = SMALL
    limit = training_memory(spec, 4).peak * 17 // 20
    plan = find_plan(spec, limit, 4)
    assert len(set(plan.keeps.values())) > 1
    network = fresh(spec)
    under_plan = copy.deepcopy(network)
    under_plan.recompute(plan)
    torch.testing.assert_close(learn(under_plan)[0], learn(network)[0])


def test_another_networks_plan_is_refused():
    with pytest.raises(ArgumentError, match="part of only one"):
        EfficientNet(SMALL).recompute(RecomputePlan.uniform(effnet.spec("b1"), Keep.BOTTLENECKS))


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "norm",
    [lambda channels: nn.GroupNorm(4, channels), Doubled, nn.SyncBatchNorm, partial(nn.BatchNorm2d, affine=False)],
)
def test_another_norm_is_refused(norm):
    network = EfficientNet(SMALL, norm=norm)
    with pytest.raises(ArgumentError, match="BatchNorm2d with weight and bias"):
        network.recompute(RecomputePlan.uniform(SMALL, Keep.BOTTLENECKS))
    network.recompute(None)


def test_a_norm_that_came_later_is_refused_too():
    network = EfficientNet(SMALL)
    network.recompute(RecomputePlan.uniform(SMALL, Keep.BOTTLENECKS))
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    with pytest.raises(ArgumentError, match="BatchNorm2d"):
        network.train()(torch.randn(2, 3, 48, 48))


@each_level
def test_weights_that_are_passed_in(keep):
    """torch.func.functional_call takes its weights out of the module before the backward pass."""
    network = fresh(SMALL)
    under_plan = copy.deepcopy(network)
    under_plan.recompute(RecomputePlan.uniform(SMALL, keep))
    others = {name: (1.1 * weight).detach().requires_grad_() for name, weight in network.named_parameters()}
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    gradients = []
    for each in (network, under_plan):
        torch.manual_seed(1)
        logits = torch.func.functional_call(each, others, (images,))
        gradients.append(torch.autograd.grad(logits.square().sum(), list(others.values())))
    scale = max(float(gradient.abs().max()) for gradient in gradients[0])
    for plain, planned in zip(*gradients, strict=True):
        torch.testing.assert_close(planned, plain, rtol=1e-8, atol=1e-11 * scale)


@each_level
def test_one_value_per_channel_is_refused_as_torch_does(keep):
    network = fresh(SMALL)
    network.recompute(RecomputePlan.uniform(SMALL, keep))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network(torch.randn(1, 3, 32, 32, dtype=torch.float64))
