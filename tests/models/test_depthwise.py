import pytest
import torch
from torch import nn

from effnet.models.depthwise import DepthwiseConv2d


def pair(stride):
    ours = DepthwiseConv2d(16, 3, stride, 1)
    theirs = nn.Conv2d(16, 16, 3, stride, 1, groups=16, bias=False)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("stride", [1, 2])
def test_is_torchs_convolution(stride):
    x = torch.randn(2, 16, 9, 9)
    ours, theirs = pair(stride)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_in_autocast_are_float32s(stride):
    """Of the rounded inputs; torch's own differ from them by bfloat16's rounding."""
    x = torch.randn(2, 16, 9, 9).bfloat16().float().requires_grad_()
    ours, theirs = pair(stride)
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
    x = torch.randn(2, 16, 9, 9)
    ours, theirs = pair(1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
