"""The building blocks: ConvNormAct, SqueezeExcitation, StochasticDepth, and a module for each kind in arch/blocks.py.

Attribute names are the paper's terms, in the order of computation, so a state dict reads like the network.

Departures from the tutorial's blocks: squeeze-and-excitation and stochastic depth are modules of their own; nothing is
added in place, and an activation overwrites its input only if nothing can observe it (`activate`), so a feature map
that a caller or a hook keeps never changes.

In training on a CPU, compiled kernels compute the blocks and layers that they support: see native.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook

from effnet.arch.blocks import Activation, BlockSpec
from effnet.arch.spec import Padding
from effnet.models import native
from effnet.models.depthwise import DepthwiseConv2d

Norm = Callable[[int], nn.Module]  # channels -> a normalisation layer


ACTIVATIONS: dict[Activation, type[nn.Module]] = {"silu": nn.SiLU, "relu6": nn.ReLU6, "relu": nn.ReLU}
OVERWRITING: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.SiLU: partial(functional.silu, inplace=True),
    nn.ReLU6: partial(functional.relu6, inplace=True),
    nn.ReLU: partial(functional.relu, inplace=True),
}


class SamePad(nn.Module):
    """TensorFlow's SAME padding, computed from the input size: ceil(size / stride) outputs, odd pixel at the end."""

    PART = "pad"

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H + pad, W + pad), for strides 1 and 2."""
        if self.kernel_size < self.stride:  # nothing is missing, and the rest below would be negative
            return x
        rows = self.kernel_size - self.stride + x.shape[-2] % self.stride
        columns = self.kernel_size - self.stride + x.shape[-1] % self.stride
        return functional.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}"


class ConvNormAct(nn.Sequential):
    """Convolution, normalisation and, unless `activation` is None, an activation."""

    PART, native = "layer", True

    def __init__(
        self,
        channels: tuple[int, int],
        kernel_size: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        norm: Norm,
        activation: Activation | None,
        padding: Padding,
    ) -> None:
        super().__init__()
        symmetric = (kernel_size - 1) // 2
        # With stride 1 both kinds of padding are the same, and SAME needs no extra pass.
        if padding == "same" and stride > 1:
            self.pad = SamePad(kernel_size, stride)
            symmetric = 0
        self.conv: nn.Conv2d
        if groups == 1:
            self.conv = nn.Conv2d(*channels, kernel_size, stride, symmetric, bias=False)
        else:
            self.conv = DepthwiseConv2d(groups, kernel_size, stride, symmetric)
        self.norm = norm(channels[1])
        if activation is not None:
            self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, ceil(H / stride), ceil(W / stride))."""
        if (y := native.run(self, x)) is not None:
            return y
        for name, module in self._modules.items():  # pad, conv, norm, act
            assert module is not None
            x = activate(module, x, self) if name == "act" else module(x)
        return x


class SqueezeExcitation(nn.Module):
    """Scales each channel by a factor between 0 and 1, computed from the means of all channels.

    Squeezed to a quarter of the block's input channels (`BlockSpec.squeeze_channels`), not of the expanded ones.
    """

    PART = "se"

    def __init__(self, channels: int, squeeze_channels: int, activation: Activation) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(channels, squeeze_channels, 1)
        self.act = ACTIVATIONS[activation]()
        self.excite = nn.Conv2d(squeeze_channels, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return x * self.scale(x)

    def scale(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the factors (N, C, 1, 1)."""
        scale = self.pool(x)
        scale = self.act(self.squeeze(scale))
        return self.gate(self.excite(scale))


class StochasticDepth(nn.Module):
    """In training, drops the block for a share `rate` of the samples and scales the others up (Huang et al. 2016).

    The expectation stays the same. In eval mode it does nothing. The official code calls it drop connect.
    """

    PART = "drop"

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W), each sample either 0 or divided by 1 - rate."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"rate={self.rate:g}"


class MBConv(nn.Module):
    """Mobile inverted bottleneck: MobileNetV2's block with squeeze-and-excitation inside."""

    native = True

    def __init__(self, block: BlockSpec, *, norm: Norm, activation: Activation, padding: Padding) -> None:
        super().__init__()
        conv = partial(ConvNormAct, norm=norm, padding=padding)
        inputs, wide, outputs = block.in_channels, block.expanded_channels, block.out_channels

        # expand: 1x1, left out if expand_ratio is 1
        self.expand = conv((inputs, wide), activation=activation) if block.expand_ratio != 1 else nn.Identity()

        # depthwise: one filter per channel
        self.depthwise = conv((wide, wide), block.kernel_size, stride=block.stride, groups=wide, activation=activation)

        # squeeze and excitation
        squeezed = block.squeeze_channels
        self.se = SqueezeExcitation(wide, squeezed, activation) if squeezed else nn.Identity()

        # project: 1x1, linear
        self.project = conv((wide, outputs), activation=None)

        # shortcut
        self.has_shortcut = block.has_shortcut
        self.drop = StochasticDepth(block.drop_rate) if block.has_shortcut else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, ceil(H / stride), ceil(W / stride))."""
        if (whole := native.run(self, x, self.has_shortcut)) is not None:
            return whole
        y = self.expand(x)
        y = self.depthwise(y)
        y = self.se(y)
        y = self.project(y)
        if self.has_shortcut:
            y = x + self.drop(y)
        return y


class SeparableConv(nn.Module):
    """MobileNetV1's block: a depthwise convolution and a pointwise one, both activated, without a shortcut."""

    native = True

    def __init__(self, block: BlockSpec, *, norm: Norm, activation: Activation, padding: Padding) -> None:
        super().__init__()
        conv = partial(ConvNormAct, norm=norm, padding=padding, activation=activation)
        inputs = block.in_channels
        self.depthwise = conv((inputs, inputs), block.kernel_size, stride=block.stride, groups=inputs)
        self.pointwise = conv((inputs, block.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, ceil(H / stride), ceil(W / stride))."""
        if (y := native.run(self, x)) is not None:
            return y
        x = self.depthwise(x)
        return self.pointwise(x)


class Bottleneck(nn.Module):
    """ResNet's block, with the stride in the middle convolution and the activation after the sum."""

    def __init__(self, block: BlockSpec, *, norm: Norm, activation: Activation, padding: Padding) -> None:
        super().__init__()
        conv = partial(ConvNormAct, norm=norm, padding=padding)
        inputs, inner, outputs = block.in_channels, block.layers[0].outputs, block.out_channels

        # reduce, 3x3, expand
        self.reduce = conv((inputs, inner), activation=activation)
        self.conv = conv((inner, inner), block.kernel_size, stride=block.stride, activation=activation)
        self.widen = conv((inner, outputs), activation=None)

        # shortcut
        identity = block.has_shortcut
        self.shortcut = nn.Identity() if identity else conv((inputs, outputs), stride=block.stride, activation=None)
        self.drop = StochasticDepth(block.drop_rate) if identity else nn.Identity()
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, ceil(H / stride), ceil(W / stride))."""
        y = self.reduce(x)
        y = self.conv(y)
        y = self.widen(y)
        return activate(self.act, self.shortcut(x) + self.drop(y))


# The module of each kind in arch/blocks.py. A kind that `recomputes` names each layer's ConvNormAct as its entry does,
# squeeze-and-excitation `se`, the stochastic depth before a sum `drop`, and the sum's activation `act`.
BLOCKS: dict[str, type[nn.Module]] = {"mbconv": MBConv, "separable": SeparableConv, "bottleneck": Bottleneck}


def activate(act: nn.Module, x: Tensor, layer: nn.Module | None = None) -> Tensor:
    """`act(x)`, in place if nothing can observe `x`, which saves the memory of a map and the time of writing it.

    Tracers and compilers can, and hooks: of `act`, of the modules of `layer`, which computed `x`, or global ones.
    SiLU's gradient reads its input, so autograd would copy the map first.
    """
    kind = type(act)
    if (
        kind not in OVERWRITING
        or torch.compiler.is_compiling()
        or type(x) is not Tensor
        or (kind is nn.SiLU and torch.is_grad_enabled())
        or torch._C._get_tracing_state() is not None
        or _has_any_global_hook()  # type: ignore[no-untyped-call]  # of torch's own
    ):
        return cast(Tensor, act(x))
    for module in (act,) if layer is None else layer._modules.values():
        assert module is not None
        hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        if hooks or module._backward_pre_hooks or module._modules:  # modules inside it may have hooks of their own
            return cast(Tensor, act(x))
    return OVERWRITING[kind](x)


def initialise(network: nn.Module) -> None:
    """Draw weights as the official code does.

    | tensor | distribution | remark |
    |---|---|---|
    | convolution | normal, std sqrt(2 / fan_out) | fan_out = kernel^2 * outputs |
    | depthwise convolution | normal, std sqrt(2 / kernel^2) | one output per filter; torch's fan_out counts all |
    | fully connected | uniform within 1 / sqrt(outputs) | |
    | biases | 0 | |
    Normalisation layers keep torch's initialisation: weight 1, bias 0.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, 0, (2 / fan_out) ** 0.5)
        elif isinstance(module, nn.Linear):
            bound = module.out_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def batch_norm(eps: float, momentum: float) -> Norm:
    """The family's normalisation: torch's BatchNorm2d with these constants."""

    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels, eps=eps, momentum=momentum)

    return norm
