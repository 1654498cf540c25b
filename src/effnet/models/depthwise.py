"""The depthwise convolution, with gradients computed the way the processor does best.

Torch's weight gradient of a depthwise convolution is slow on small maps; kernels.py has faster ways to the same
numbers. Each layer has a `kernel`: "auto", which goes by a fixed rule, or the name of one. It is used where torch
trains eagerly on a CPU in float32, and nowhere else: inference, export, tracing, compiling, torch.func and other
devices have torch's own convolution. A second derivative is there as well.

Inside bfloat16 autocast on a CPU the forward pass stays in bfloat16 and the gradients are computed in float32: the
bfloat16 ones took 249 of the 493 ms of a B0 step on a processor with AMX, the float32 ones 87.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from effnet.errors import UnknownNameError
from effnet.fields import positive_int
from effnet.models.kernels import AUTO, KERNELS, Filter, check_kernel, input_gradient, weight_gradient

if TYPE_CHECKING:
    from effnet.models.efficientnet import EfficientNet

ENOUGH = 2**22  # elements of a map on which a kernel is timed: more images tell nothing new
ROUNDS = 3  # that count, behind one that warms up
HOPELESS = 4.0  # times as slow as the best while warming up: not timed again
CLEARLY = 0.9  # of torch's own time, at most, to be taken in its place


class DepthwiseConv2d(nn.Conv2d):
    """One filter per channel, without bias; weights (C, 1, K, K)."""

    kernel: str = AUTO  # how its weight gradient is computed: "auto" or a name among kernels.KERNELS

    def __init__(self, channels: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__(channels, channels, kernel_size, stride, padding, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H', W')."""
        if not (torch.is_grad_enabled() and _eager(x)):
            return super().forward(x)
        if torch.is_autocast_enabled("cpu"):
            ours = torch.get_autocast_dtype("cpu") == torch.bfloat16
        else:
            known = (torch.float32,) if self.kernel == AUTO else (torch.float32, torch.float64)
            ours = self.weight.requires_grad and self.weight.dtype == x.dtype in known and self.kernel != "torch"
        return _OwnGradients.apply(x, self.weight, self.shape, self.kernel) if ours else super().forward(x)

    @property
    def shape(self) -> Filter:
        """The filter's geometry."""
        return Filter(self.kernel_size[0], self.stride[0], cast(int, self.padding[0]))

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """In training without the filter's rim: torch takes 100 times as long for a 5x5 filter on one pixel."""
        if self.training and _eager(input):
            return _convolve(input, weight, self.shape)
        return super()._conv_forward(input, weight, bias)


class _OwnGradients(torch.autograd.Function):
    """The convolution, in autocast's precision where that is on; gradients in float32 or float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shape: Filter, kernel: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shape, ctx.kernel = shape, kernel
        return _convolve(x, weight, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        dtype = torch.promote_types(weight.dtype, torch.float32)
        grad, wide = grad.to(dtype), x.to(dtype)
        if ctx.needs_input_grad[0]:
            rim = ctx.shape.rim(*x.shape[-2:])
            of_x = input_gradient(wide, grad, _inner(weight.to(dtype), rim), ctx.shape.without(rim)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = weight_gradient(ctx.kernel, wide, grad, ctx.shape).to(weight.dtype)
        return of_x, of_weight, None, None


def choose_kernels(
    network: EfficientNet, batch: int, resolution: int | None = None, *, channels_last: bool = True
) -> dict[str, str]:
    """Time the kernels of each depthwise layer here, with the threads of now: a second or two for B0.

    Args:
        network: its depthwise layers are timed, each shape once; nothing of it is changed.
        batch: images of a training step.
        resolution: height and width of the images in pixels; by default the network's.
        channels_last: the memory layout of the training.

    Returns:
        The fastest kernel of each layer, by the layer's name: torch's own unless another is clearly faster.

    Raises:
        ArgumentError: `batch` or `resolution` is no positive whole number.
    """
    batch = positive_int("batch", batch)
    spec = network.spec if resolution is None else dataclasses.replace(network.spec, resolution=resolution)
    chosen: dict[tuple[int, int, int, Filter], str] = {}
    result = {}
    for block in spec.blocks:
        if not any(layer.depthwise for layer in block.layers):
            continue
        layer = network.get_submodule(f"{block.name}.depthwise")
        conv = cast(DepthwiseConv2d, layer.conv)
        image = torch.ones(1, block.expanded_channels, block.input_size, block.input_size)
        padded = layer.pad(image) if hasattr(layer, "pad") else image  # type: ignore[operator]  # torch types it as Tensor
        rows, columns = padded.shape[-2:]
        key = conv.in_channels, rows, columns, conv.shape
        if key not in chosen:
            images = min(batch, max(1, ENOUGH // (conv.in_channels * rows * columns)))
            chosen[key] = _fastest((images, conv.in_channels, rows, columns), conv.shape, channels_last)
        result[f"{block.name}.depthwise.conv"] = chosen[key]
    return result


def use_kernels(network: nn.Module, kernels: Mapping[str, str]) -> None:
    """Compute the weight gradients of these layers with these kernels from now on; the other layers stay.

    Raises:
        UnknownNameError: no depthwise layer, or no kernel, has that name; then nothing is changed.
    """
    layers = {name: module for name, module in network.named_modules() if isinstance(module, DepthwiseConv2d)}
    for name, kernel in kernels.items():
        if name not in layers:
            raise UnknownNameError("layer", name, layers)
        if kernel != AUTO:
            check_kernel(kernel)
    for name, kernel in kernels.items():
        layers[name].kernel = kernel


def _fastest(size: tuple[int, int, int, int], shape: Filter, channels_last: bool) -> str:
    """The kernel for one layer."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.ones(size).contiguous(memory_format=layout)
    with torch.no_grad():
        grad = _convolve(x, x.new_ones(size[1], 1, shape.size, shape.size), shape)
        times: dict[str, list[float]] = {name: [] for name in KERNELS}
        for turn in range(1 + ROUNDS):
            for name, taken in times.items():
                if turn and min(taken) > HOPELESS * min(map(min, times.values())):
                    continue
                started = time.perf_counter()
                weight_gradient(name, x, grad, shape)
                taken.append(time.perf_counter() - started)
    best = {name: min(taken[1:] or taken) for name, taken in times.items()}
    fastest = min(best, key=best.__getitem__)
    return fastest if best[fastest] < CLEARLY * best["torch"] else "torch"


def _convolve(x: Tensor, weight: Tensor, shape: Filter) -> Tensor:
    rim = shape.rim(*x.shape[-2:])
    inner = shape.without(rim)
    return functional.conv2d(x, _inner(weight, rim), None, inner.stride, inner.padding, 1, x.shape[1])


def _inner(weight: Tensor, rim: int) -> Tensor:
    return weight[..., rim:-rim, rim:-rim] if rim else weight


def _eager(x: Tensor) -> bool:
    """Whether `x` is a plain tensor on a CPU, and nobody looks on who wants torch's own operations.

    The type is asked first: a tracer has no answer to the rest.
    """
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and torch._C._get_tracing_state() is None
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )
