"""Whichever kernel computes the gradients, they are torch's."""

import copy

import pytest
import torch
from alive import Alive
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import effnet
from effnet.arch.recompute import RecomputePlan
from effnet.arch.segments import Keep
from effnet.arch.spec import NumericPolicy
from effnet.models import depthwise
from effnet.models.depthwise import KERNELS, DepthwiseConv2d, Filter, select_kernel, weight_gradient
from effnet.models.efficientnet import EfficientNet

SMALL = effnet.spec(
    "b0", width=0.25, depth=0.5, depth_rounding="nearest", resolution=32, num_classes=5, dropout=0, drop_connect=0
)


@pytest.fixture(params=["by rule", *KERNELS])
def kernel(request, monkeypatch):
    """Every layer computes with this kernel."""
    if request.param != "by rule":
        monkeypatch.setattr(depthwise, "select_kernel", lambda *_: request.param)
    return request.param


def pair(stride, kernel_size=3, channels=16, padding=None):
    padding = kernel_size // 2 if padding is None else padding
    ours = DepthwiseConv2d(channels, kernel_size, stride, padding)
    theirs = nn.Conv2d(channels, channels, kernel_size, stride, padding, groups=channels, bias=False)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def gradients(conv, x, upstream):
    x = x.detach().requires_grad_()
    y = conv(x)
    return y.detach(), *torch.autograd.grad(y, (x, conv.weight), upstream(y))


def close(found, expected, relative):
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * float(expected.abs().max().clamp_min(1e-30)))


def agree(ours, theirs, x, upstream, relative):
    for found, expected in zip(gradients(ours, x, upstream), gradients(theirs, x, upstream), strict=True):
        assert found.shape == expected.shape
        close(found, expected, relative)


def random_upstream(y):
    return torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
def test_gradients_are_torchs(kernel, layout):
    """Maps from 14 pixels to 1, odd ones among them, with filters of 3 and 5 and both strides."""
    for size in (1, 2, 3, 5, 8, 14):
        for kernel_size in (3, 5):
            for stride in (1, 2):
                x = torch.randn(3, 16, size, size).contiguous(memory_format=layout)
                agree(*pair(stride, kernel_size), x, random_upstream, 1e-5)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kernel=st.sampled_from(tuple(KERNELS)),
    batch=st.integers(1, 5),
    channels=st.integers(1, 20),
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    half=st.integers(0, 4),
    stride=st.sampled_from((1, 2)),
    same=st.booleans(),
    channels_last=st.booleans(),
    double=st.booleans(),
)
def test_gradients_of_any_shape(kernel, batch, channels, rows, columns, half, stride, same, channels_last, double):
    """Any map and odd filter; `same`: padded before the convolution, by TensorFlow's rule."""
    dtype, size = torch.float64 if double else torch.float32, 2 * half + 1
    x = torch.randn(batch, channels, rows, columns, dtype=dtype)
    if same:
        x = nn.functional.pad(x, (0, size - 1, size - 1, 1))
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    ours, theirs = (conv.to(dtype) for conv in pair(stride, size, channels, 0 if same else half))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depthwise, "select_kernel", lambda *_: kernel)
        agree(ours, theirs, x, random_upstream, 1e-10 if double else 1e-5)


@pytest.mark.parametrize(
    "upstream",
    [
        lambda y: torch.ones((), dtype=y.dtype).expand(y.shape),
        lambda y: random_upstream(y).transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda y: random_upstream(y.repeat(1, 1, 2, 2))[..., ::2, ::2],
        lambda y: random_upstream(y).contiguous(memory_format=torch.channels_last),
    ],
    ids=["expanded", "transposed", "strided", "other layout"],
)
def test_gradients_in_any_layout(kernel, upstream):
    for size in (2, 8):
        ours, theirs = (conv.double() for conv in pair(1, 5))
        agree(ours, theirs, torch.randn(2, 16, size, size, dtype=torch.float64), upstream, 1e-10)
        view = torch.randn(2, 32, 2 * size, size, dtype=torch.float64)[:, ::2, ::2]
        agree(ours, theirs, view, upstream, 1e-10)


def test_an_empty_batch_has_a_gradient_of_zeros(kernel):
    ours, _ = pair(2, 5)
    ours(torch.randn(0, 16, 4, 4)).sum().backward()
    assert torch.equal(ours.weight.grad, torch.zeros_like(ours.weight))


def test_only_the_gradients_that_are_needed(kernel):
    x = torch.randn(2, 16, 4, 4)
    ours, theirs = pair(1, 5)
    for conv in (ours, theirs):
        conv(x).square().sum().backward()  # the images need no gradient
    close(ours.weight.grad, theirs.weight.grad, 1e-5)
    ours.weight.requires_grad_(False)
    x.requires_grad_()
    ours(x).square().sum().backward()
    found, x.grad = x.grad, None
    theirs(x).square().sum().backward()
    close(found, x.grad, 1e-5)


@pytest.mark.parametrize(("size", "kernel_size", "stride"), [(1, 5, 1), (4, 5, 2), (5, 3, 2)])
def test_second_derivatives(kernel, size, kernel_size, stride):
    ours, _ = pair(stride, kernel_size, channels=2)
    ours.double()
    x = torch.randn(2, 2, size, size, dtype=torch.float64, requires_grad=True)

    def convolve(x, weight):
        return torch.func.functional_call(ours, {"weight": weight}, (x,))

    torch.autograd.gradgradcheck(convolve, (x, ours.weight))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("stride", [1, 2])
def test_each_kernel_by_hand(name, stride):
    """A tap's gradient is the sum of what met it."""
    x = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    grad = torch.randn(3, 2, -(-5 // stride), -(-4 // stride), dtype=torch.float64)
    expected = torch.zeros(2, 1, 5, 5, dtype=torch.float64)
    wide = nn.functional.pad(x, (2, 5, 2, 5))
    for row in range(5):
        for column in range(5):
            met = wide[
                ..., row : row + stride * grad.shape[2] : stride, column : column + stride * grad.shape[3] : stride
            ]
            expected[:, 0, row, column] = (met * grad).sum((0, 2, 3))
    torch.testing.assert_close(weight_gradient(name, x, grad, Filter(5, stride, 2)), expected)


@pytest.mark.parametrize(("features", "middle"), [(("avx2",), 16), (("avx512f", "avx2"), 28)])
def test_the_rule(features, middle):
    """Slow in torch, and chosen otherwise: filters wider than oneDNN's three columns, maps smaller than the filter."""

    def rule(size, kernel_size, stride=1, layout=torch.channels_last):
        x = torch.empty(2, 8, size, size, device="meta").contiguous(memory_format=layout)
        return select_kernel(x, Filter(kernel_size, stride, kernel_size // 2), features)

    between = "maps" if middle == 28 else "columns"
    assert [rule(size, 3) for size in (1, 2, 3, 4, 112)] == ["columns"] * 2 + ["torch"] * 3
    assert [rule(size, 5) for size in (2, 3, 4)] == ["columns", between, between]
    assert [rule(size, 5) for size in (5, middle, middle + 1)] == ["columns", "columns", "torch"]
    assert [rule(size, 5, 2) for size in (2, 4, middle // 2, middle)] == ["columns"] * 3 + ["torch"]
    planar = torch.contiguous_format
    assert [rule(size, 3, 1, planar) for size in (1, 2, 3, 112)] == ["columns"] * 2 + ["torch"] * 2
    assert [rule(size, 5, 2, planar) for size in (1, 2, 3, 112)] == ["columns"] * 2 + ["maps"] * 2


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_in_autocast_are_float32s(stride, kernel):
    """Of the rounded inputs; torch's own differ from them by bfloat16's rounding."""
    for size in (2, 9):
        x = torch.randn(2, 16, size, size).bfloat16().float().requires_grad_()
        ours, theirs = pair(stride, 5)
        with torch.no_grad():
            for conv in (ours, theirs):
                conv.weight.copy_(conv.weight.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            y = ours(x)
        assert y.dtype == torch.bfloat16
        upstream = torch.randn(y.shape).bfloat16()
        y.backward(upstream)
        found = x.grad.clone(), ours.weight.grad
        assert found[1].dtype == torch.float32
        x.grad = None
        theirs(x).backward(upstream.float())
        torch.testing.assert_close(found[0], x.grad, rtol=1e-2, atol=1e-2)  # handed on in the input's precision
        torch.testing.assert_close(found[1], theirs.weight.grad, rtol=1e-5, atol=1e-5)


def test_fp16_and_inference_stay_torchs():
    for size, kernel_size in ((9, 3), (1, 5)):
        x = torch.randn(2, 16, size, size)
        ours, theirs = pair(1, kernel_size)
        for conv in (ours.eval(), theirs):
            conv.requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert torch.equal(ours(x), theirs(x))
        assert torch.equal(ours(x), theirs(x))
        ours.requires_grad_()
        with torch.autocast("cpu", torch.float16):
            assert "Convolution" in ours(x).grad_fn.name()


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # and torch uses it itself
def test_where_torchs_own_convolution_stays(monkeypatch):
    monkeypatch.setattr(depthwise, "select_kernel", lambda x, *_: "columns" if x.shape[-1] < 5 else "torch")
    ours, _ = pair(1, 5)
    x = torch.randn(2, 16, 4, 4)
    assert "OwnGradients" in ours(x).grad_fn.name()
    assert "Convolution" in ours(torch.randn(2, 16, 5, 5)).grad_fn.name()
    traced = torch.jit.trace(ours, x, check_trace=False)
    assert "aten::_convolution" in str(traced.inlined_graph)
    exported = torch.export.export(ours, (x,), strict=False)
    assert "aten.conv2d.default" in str(exported.graph)
    assert torch.equal(exported.module()(x), ours(x))
    torch.compile(ours, backend="aot_eager", fullgraph=True)(x).sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # and torch uses it itself
def test_torchs_function_transforms():
    """Gradients of each sample, and forward derivatives."""
    ours, theirs = pair(1, 5)
    x = torch.randn(3, 16, 4, 4)

    def loss(conv):
        def run(weights, image):
            return torch.func.functional_call(conv, weights, (image[None],)).square().sum()

        weights = {name: weight.detach() for name, weight in conv.named_parameters()}
        return torch.func.vmap(torch.func.grad(run), (None, 0))(weights, x)["weight"]

    torch.testing.assert_close(loss(ours), loss(theirs))
    tangents = []
    for conv in (ours, theirs):
        with torch.autograd.forward_ad.dual_level():
            y = conv(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
            tangents.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*tangents)


def networks(padding="symmetric"):
    """The same network with torch's gradients and with ours; maps of 16 to 1 pixels."""
    torch.manual_seed(0)
    ours = EfficientNet(SMALL, policy=NumericPolicy(padding=padding)).train()
    plain = copy.deepcopy(ours)
    for module in plain.modules():
        if isinstance(module, DepthwiseConv2d):
            module.__class__ = nn.Conv2d
    return plain, ours


@pytest.mark.parametrize(("keep", "padding"), [(None, "same"), (Keep.BOTTLENECKS, "symmetric")], ids=str)
def test_networks_with_and_without_a_plan(keep, padding, monkeypatch):
    monkeypatch.setattr(depthwise, "select_kernel", lambda *_: "columns")
    plain, ours = (network.double() for network in networks(padding))
    if keep is not None:
        ours.recompute(RecomputePlan.uniform(SMALL, keep))
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    for network in (plain, ours):
        network(images).square().sum().backward()
    scale = max(float(weight.grad.abs().max()) for weight in plain.parameters())
    for (name, weight), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, theirs.grad, rtol=1e-9, atol=1e-11 * scale, msg=name)


@pytest.mark.parametrize("keep", [None, *Keep], ids=str)
def test_a_kernel_keeps_what_torch_keeps(keep, monkeypatch):
    """The map that is saved for a gradient must be the very one that a plan replaces."""
    monkeypatch.setattr(depthwise, "select_kernel", lambda *_: "columns")
    held = []
    for network in networks():
        network.recompute(keep if keep is None else RecomputePlan.uniform(SMALL, keep))
        network(torch.randn(4, 3, 32, 32)).sum().backward()  # statistics and caches are there
        network.zero_grad()
        with Alive() as alive:
            images = torch.randn(4, 3, 32, 32)
            alive.add(images)
            logits = network(images)
            held.append(alive.bytes)
        logits.sum().backward()
    assert held[0] == held[1] > 0
