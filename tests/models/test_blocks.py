"""The blocks, against formulas written here and TensorFlow's padding rule."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torchvision.ops import FrozenBatchNorm2d

import effnet
from effnet.arch.blocks import BlockSpec
from effnet.models.blocks import ConvNormAct, MBConv, SamePad, SqueezeExcitation, StochasticDepth, batch_norm
from effnet.models.efficientnet import EfficientNet

# in, out, kernel, stride, expand ratio, squeeze channels
WITH_SHORTCUT = (16, 16, 5, 1, 6, 4)
KINDS = {
    "shortcut": WITH_SHORTCUT,
    "shortcut, not expanded": (16, 16, 3, 1, 1, 4),
    "shortcut, no squeeze": (16, 16, 3, 1, 6, 0),
    "strided": (16, 16, 5, 2, 6, 4),
    "widened": (16, 24, 3, 1, 6, 4),
    "widened, not expanded, no squeeze": (16, 24, 3, 1, 1, 0),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def block_spec(kind, drop_rate=0.0):
    inputs, outputs, kernel, stride, expand, squeeze = kind
    return BlockSpec("block", 2, 0, inputs, outputs, kernel, stride, expand, squeeze, drop_rate, input_size=11)


def mbconv(kind, *, drop_rate=0.0, norm=None, activation="silu", padding="symmetric"):
    """A block in float64 whose normalisation has statistics unlike 0 and 1."""
    norm = norm or batch_norm(1e-3, 0.01)
    block = MBConv(block_spec(kind, drop_rate), norm=norm, activation=activation, padding=padding).double()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2),
            ):
                nn.init.uniform_(tensor, low, high)
    return block


def tensorflow_padding(size, kernel, stride):
    """TensorFlow's documentation of "SAME": padding before and after, for `size` pixels."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from([1, 3, 5, 7]), st.sampled_from([1, 2]), st.integers(1, 40), st.integers(1, 40))
def test_same_pad_is_tensorflows(kernel, stride, height, width):
    x = torch.rand(1, 2, height, width)
    padding = *tensorflow_padding(width, kernel, stride), *tensorflow_padding(height, kernel, stride)
    assert torch.equal(SamePad(kernel, stride)(x), functional.pad(x, padding))


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [7, 8])
def test_paddings_agree_on_odd_maps_only(kernel, size):
    x = torch.rand(1, 4, size, size)
    symmetric, same = (
        ConvNormAct((4, 8), kernel, stride=2, norm=batch_norm(1e-3, 0.1), activation=None, padding=padding).eval()
        for padding in ("symmetric", "same")
    )
    same.load_state_dict(symmetric.state_dict())
    assert symmetric(x).shape == same(x).shape == (1, 8, 4, 4)
    assert torch.allclose(symmetric(x), same(x), atol=1e-6) == (size == 7)


@pytest.mark.parametrize(
    ("name", "activation"), [("silu", lambda x: x * torch.sigmoid(x)), ("relu6", lambda x: x.clamp(0, 6))]
)
def test_squeeze_excitation(name, activation):
    """x * sigmoid(W2 f(W1 mean(x) + b1) + b2)"""
    module = SqueezeExcitation(12, 3, name).double()
    x = 10 * torch.randn(2, 12, 5, 7, dtype=torch.float64)
    squeezed = activation(x.mean((2, 3)) @ module.squeeze.weight.flatten(1).T + module.squeeze.bias)
    scale = torch.sigmoid(squeezed @ module.excite.weight.flatten(1).T + module.excite.bias)
    torch.testing.assert_close(module(x), x * scale[:, :, None, None])


@kinds
@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("activation", ["silu", "relu6"])
def test_mbconv(kind, padding, activation):
    """expand -> depthwise -> squeeze and excite -> project without activation -> add, in float64 on an even map."""
    inputs, outputs, kernel, stride, expand, squeeze = kind
    block = mbconv(kind, activation=activation, padding=padding).eval()
    x = torch.randn(2, inputs, 8, 10, dtype=torch.float64)
    act = {"silu": functional.silu, "relu6": functional.relu6}[activation]

    def normalised(part, y):
        mean, var, weight, bias = (
            tensor[:, None, None]
            for tensor in (part.norm.running_mean, part.norm.running_var, part.norm.weight, part.norm.bias)
        )
        return (y - mean) / (var + 1e-3).sqrt() * weight + bias

    def pointwise(part, y):
        return normalised(part, torch.einsum("oi,nihw->nohw", part.conv.weight[:, :, 0, 0], y))

    y = act(pointwise(block.expand, x)) if expand > 1 else x
    if padding == "same":
        border = *tensorflow_padding(10, kernel, stride), *tensorflow_padding(8, kernel, stride)
    else:
        border = [kernel // 2] * 4
    windows = functional.pad(y, border).unfold(2, kernel, stride).unfold(3, kernel, stride)
    y = act(normalised(block.depthwise, torch.einsum("cij,nchwij->nchw", block.depthwise.conv.weight[:, 0], windows)))
    if squeeze:
        scale = act(block.se.squeeze(y.mean((2, 3), keepdim=True)))
        y = y * torch.sigmoid(block.se.excite(scale))
    y = pointwise(block.project, y)
    if stride == 1 and inputs == outputs:
        y = y + x
    torch.testing.assert_close(block(x), y)


@kinds
def test_the_shortcut_stands_only_where_shapes_agree(kind):
    """With the last normalisation at 0, a block is its shortcut: the input, or nothing."""
    inputs, outputs, _, stride, *_ = kind
    block = mbconv(kind).eval()
    nn.init.zeros_(block.project.norm.weight)
    nn.init.zeros_(block.project.norm.bias)
    x = torch.randn(1, inputs, 6, 6, dtype=torch.float64)
    assert torch.equal(block(x), x if (inputs, stride) == (outputs, 1) else torch.zeros_like(block(x)))


@kinds
@pytest.mark.parametrize("norm", [None, FrozenBatchNorm2d, nn.Identity], ids=["batch", "frozen", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_a_block_leaves_its_input_alone(kind, norm, training):
    block = mbconv(kind, drop_rate=0.5, norm=norm).train(training)
    x = torch.randn(4, kind[0], 6, 6, dtype=torch.float64)
    before = x.clone()
    block(x)
    assert torch.equal(x, before)


@kinds
def test_gradients_are_those_of_the_function(kind):
    """Activations work in place, on maps that nobody else needs."""
    x = torch.randn(2, kind[0], 5, 4, dtype=torch.float64, requires_grad=True)
    block = mbconv(kind)
    assert torch.autograd.gradcheck(block, x, fast_mode=True)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    samples, rate = 20_000, 0.3
    y = StochasticDepth(rate).train()(torch.ones(samples, 3, 2, 2))
    per_sample = y.flatten(1)
    assert torch.equal(per_sample.min(1).values, per_sample.max(1).values)
    torch.testing.assert_close(y.unique(), torch.tensor([0, 1 / (1 - rate)]))
    deviation = math.sqrt(rate * (1 - rate) / samples)
    assert abs((per_sample[:, 0] == 0).double().mean() - rate) < 5 * deviation
    assert abs(per_sample.double().mean() - 1) < 5 * deviation / (1 - rate)


def test_stochastic_depth_draws_anew_and_keeps_the_type():
    drop = StochasticDepth(0.5).train()
    x = torch.ones(64, 1, 1, 1, dtype=torch.bfloat16)
    assert drop(x).dtype == torch.bfloat16
    assert not torch.equal(drop(x), drop(x))


@pytest.mark.parametrize(("rate", "training"), [(0.9, False), (0.0, True)])
def test_stochastic_depth_is_off_in_eval_mode_and_at_rate_0(rate, training):
    x = torch.randn(8, 3, 2, 2)
    assert StochasticDepth(rate).train(training)(x) is x


def test_a_dropped_block_is_its_shortcut():
    block = mbconv(WITH_SHORTCUT, drop_rate=0.999999).train()
    x = torch.randn(4, 16, 6, 6, dtype=torch.float64)
    assert torch.equal(block(x), x)


def test_rates_grow_linearly_and_only_shortcuts_have_them():
    """Official: rate .2 * index / 16 in B0; a block without a shortcut is never dropped."""
    with torch.device("meta"):
        network = EfficientNet(effnet.spec("b0"))
    blocks = [module for module in network.modules() if isinstance(module, MBConv)]
    rates = {index: block.drop.rate for index, block in enumerate(blocks) if isinstance(block.drop, StochasticDepth)}
    shortcuts = [2, 4, 6, 7, 9, 10, 12, 13, 14]  # all but the first of each stage
    assert rates == pytest.approx({index: 0.2 * index / 16 for index in shortcuts})
