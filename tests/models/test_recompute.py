"""A network under a plan learns what the plain network learns."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import effnet
from effnet.arch.recompute import RecomputePlan
from effnet.arch.segments import Keep
from effnet.arch.spec import NetworkSpec, NumericPolicy, StageSpec
from effnet.errors import ArgumentError
from effnet.models.efficientnet import EfficientNet

SMALL = effnet.spec("b0", width=0.25, depth=0.5, depth_rounding="nearest", resolution=48, num_classes=5)
SPECS = {
    "silu, squeeze-and-excitation": SMALL,
    "relu6, none": effnet.spec("lite0", width=0.25, depth=0.5, depth_rounding="nearest", resolution=48, num_classes=5),
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
CASES = [(name, "mixed", "same") for name in SPECS]
CASES += [("silu, squeeze-and-excitation", keep, "symmetric") for keep in Keep]
each_level = pytest.mark.parametrize("keep", Keep, ids=lambda keep: keep.name)
two_levels = pytest.mark.parametrize("keep", [Keep.BOTTLENECKS, Keep.CONVOLUTIONS], ids=lambda keep: keep.name)


def twins(
    keep: Keep | str, spec: NetworkSpec = SMALL, padding: str = "symmetric", dtype: torch.dtype = torch.float64
) -> tuple[EfficientNet, EfficientNet]:
    """A network and its copy under a plan: a level everywhere, or with "mixed" another one for each part."""
    network = EfficientNet(spec, policy=NumericPolicy(padding=padding)).to(dtype).train()
    network.native(False)  # a plan computes by torch's operations
    planned = copy.deepcopy(network)
    plan = RecomputePlan.uniform(spec, Keep.ACTIVATIONS if keep == "mixed" else keep)
    if keep == "mixed":
        plan = RecomputePlan({name: Keep(number % len(Keep)) for number, name in enumerate(plan)})
    planned.recompute(plan)
    return network, planned


def photos(count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, 48, 48, dtype=dtype)


def learn(network: EfficientNet, *, seed: int = 3):
    """Two steps: loss, gradients of the second and the state behind it."""
    spec = network.spec
    torch.manual_seed(seed)  # of stochastic depth and dropout
    images = torch.randn(4, spec.in_channels, spec.resolution, spec.resolution, dtype=torch.float64, requires_grad=True)
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


def gradients_of(network: nn.Module, loss) -> dict[str, Tensor]:
    """Of all that need one, with the same random numbers for each network."""
    torch.manual_seed(1)
    loss(network).backward()
    return {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-8) -> None:
    assert found.keys() == expected.keys() != set()
    scale = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=relative, atol=1e-11 * scale, msg=name)


@pytest.mark.parametrize(("name", "keep", "padding"), CASES, ids=str)
def test_a_plan_changes_nothing_but_memory(name, keep, padding):
    (loss, gradients, state), (loss_too, gradients_too, state_too) = map(learn, twins(keep, SPECS[name], padding))
    torch.testing.assert_close(loss_too, loss, rtol=1e-12, atol=0)
    assert_same(gradients_too, gradients, 1e-9)
    for key, tensor in state.items():
        torch.testing.assert_close(state_too[key], tensor, rtol=1e-9, atol=1e-11, msg=key)
    assert int(state_too["stem.norm.num_batches_tracked"]) == 2


@each_level
def test_first_outputs_and_statistics_to_the_bit_in_float32(keep):
    images = photos(4, torch.float32).contiguous(memory_format=torch.channels_last)
    results = []
    for each in twins(keep, dtype=torch.float32):
        torch.manual_seed(1)
        logits = each(images)
        logits.sum().backward()
        results.append([logits, *(value for name, value in each.state_dict().items() if "running" in name)])
    assert all(map(torch.equal, *results))


@two_levels
def test_frozen_normalisation(keep):
    """Fine-tuning often leaves batch normalisation in eval mode."""
    pair = twins(keep)
    for each in pair:
        for module in each.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                module.running_mean.normal_(generator=torch.Generator().manual_seed(0))
                module.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    (_, gradients, state), (_, gradients_too, state_too) = map(learn, pair)
    assert_same(gradients_too, gradients)
    assert torch.equal(state["stem.norm.running_mean"], state_too["stem.norm.running_mean"])


@two_levels
def test_frozen_weights(keep):
    """The head first: only part of the network needs gradients."""
    pair, images = twins(keep), photos(4)
    for each in pair:
        for name, weight in each.named_parameters():
            weight.requires_grad_(name.startswith(("stages.8", "head", "classifier")))
    expected, found = (gradients_of(each, lambda network: network(images).square().sum()) for each in pair)
    assert_same(found, expected)


def test_momentum_none_averages_over_all_batches():
    pair = twins(Keep.CONVOLUTIONS)
    for module in (module for each in pair for module in each.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    state, state_too = (learn(each)[2] for each in pair)
    torch.testing.assert_close(state_too["head.norm.running_var"], state["head.norm.running_var"])


def test_inference_and_eval_ignore_the_plan():
    network, planned = (each.eval() for each in twins(Keep.BOTTLENECKS))
    images = photos()
    assert torch.equal(planned(images), network(images))
    with torch.no_grad():
        assert torch.equal(planned(images), network(images))
        planned.train()(images)  # without gradients there is nothing to keep


def go_backward_twice(network: nn.Module) -> None:
    logits = network(photos()).sum()
    logits.backward(retain_graph=True)
    logits.backward()


def test_a_plan_goes_backward_once_and_none_takes_it_back():
    _, planned = twins(Keep.BOTTLENECKS)
    for twin in (planned, copy.deepcopy(planned), pickle.loads(pickle.dumps(planned))):
        with pytest.raises(RuntimeError, match="retain_graph"):
            go_backward_twice(twin)
    assert twin.state_dict().keys() == planned.state_dict().keys()
    assert all(weight.grad is not None for weight in twin.parameters())
    planned.recompute(None)
    go_backward_twice(planned)


def test_writing_into_a_map_is_seen():
    """A recipe would make the map anew, without what somebody wrote into it."""
    pair = twins(Keep.CONVOLUTIONS)
    for each in pair:
        each.stem.register_forward_hook(lambda module, inputs, output: output.mul_(2))
    images = torch.ones(2, 3, 48, 48, dtype=torch.float64).cumsum(3)
    expected, found = (gradients_of(each, lambda network: network(images).square().sum()) for each in pair)
    assert_same(found, expected)


@two_levels
def test_bf16_autocast(keep):
    images = photos(4, torch.float32)
    results = []
    for each in twins(keep, dtype=torch.float32):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = each(images)
        logits.float().square().sum().backward()
        results.append((logits, torch.cat([weight.grad.flatten() for weight in each.parameters()])))
    assert torch.equal(results[0][0], results[1][0])
    cosine = torch.nn.functional.cosine_similarity(results[0][1], results[1][1], dim=0)
    assert cosine > 0.99  # eight bits of mantissa, and other orders of rounding


def test_another_networks_plan_is_refused():
    with pytest.raises(ArgumentError, match="`plan`"):
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
    network = nn.SyncBatchNorm.convert_sync_batchnorm(twins(Keep.BOTTLENECKS)[1])
    with pytest.raises(ArgumentError, match="BatchNorm2d"):
        network(photos())


@two_levels
def test_weights_that_are_passed_in(keep):
    """torch.func.functional_call takes its weights out of the module before the backward pass."""
    pair, images = twins(keep), photos()
    others = {name: (1.1 * weight).detach().requires_grad_() for name, weight in pair[0].named_parameters()}
    gradients = []
    for each in pair:
        torch.manual_seed(1)
        logits = torch.func.functional_call(each, others, (images,))
        found = torch.autograd.grad(logits.square().sum(), list(others.values()))
        gradients.append(dict(zip(others, found, strict=True)))
    assert_same(gradients[1], gradients[0])


@two_levels
def test_one_value_per_channel_is_refused_as_torch_does(keep):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        twins(keep)[1](torch.randn(1, 3, 32, 32, dtype=torch.float64))
