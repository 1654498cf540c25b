"""The depthwise convolution, with a weight gradient by the fastest kernel for its shape.

Torch leaves this gradient to oneDNN, whose kernel for it takes filters up to three columns wide and maps that are no
smaller than the filter. Everything else falls back to one that is slow on large maps and very slow on small ones: a 5x5
filter on a 4x4 map takes 30 times as long as its forward pass. So the gradient is expressed in a form that is fast:

    torch     torch's own
    columns   two or three columns of the filter at a time, on zero-padded maps
    maps      all maps of the batch as channels of one image, their gradients as its filters: a forward pass

| the map | channels_last | NCHW |
|---|---|---|
| smaller than the filter | columns; with AVX-512 at stride 1 and above TINY maps | columns up to TINY, else as below |
| else, filters up to 3x3 | torch | torch |
| else, larger filters | columns up to MIDDLE, then torch | maps |

Outer rings of a filter that see only padding have no gradient and are left out by all of them except torch.

They agree up to rounding. `select_kernel` is a fixed rule, so the same seed gives the same weights to the bit;
benchmarks/kernels.py measures what the rule loses against the best kernel of each layer. It applies only to eager
training on a CPU: inference, export, tracing, compiling, torch.func and other devices use torch's own convolution.
Second derivatives work as well.

Inside bfloat16 autocast on a CPU the forward pass stays in bfloat16 and the gradients are computed in float32: the
bfloat16 ones took 249 of the 493 ms of a B0 step on a processor with AMX, the float32 ones 87.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from effnet.machine import this_machine

WIDEST = 3  # most columns of a filter for oneDNN's kernel
# Pixels, times the stride squared, of the largest map for which copies in columns pay off, without and with AVX-512
MIDDLE, MIDDLE_AVX512 = 16 * 16, 28 * 28
TINY = 2  # largest height and width in pixels for which `maps` has no fast forward pass

aten = torch.ops.aten


@dataclass(frozen=True)
class Filter:
    """The geometry of a square filter."""

    size: int
    stride: int
    padding: int

    def rim(self, rows: int, columns: int) -> int:
        """How many of the filter's outer rings see only padding on a map of this size."""
        return max(0, self.padding - max(rows, columns) + 1)

    def without(self, rim: int) -> Filter:
        """The filter without `rim` outer rings and the padding that they need."""
        return Filter(self.size - 2 * rim, self.stride, self.padding - rim)


class DepthwiseConv2d(nn.Conv2d):
    """One filter per channel, without bias; weights (C, 1, K, K)."""

    def __init__(self, channels: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__(channels, channels, kernel_size, stride, padding, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H', W')."""
        if not (torch.is_grad_enabled() and is_eager(x)):
            return super().forward(x)
        kernel = select_kernel(x, self.filter, this_machine().features)
        if torch.is_autocast_enabled("cpu"):
            own = torch.get_autocast_dtype("cpu") == torch.bfloat16
        else:
            known = self.weight.dtype == x.dtype in (torch.float32, torch.float64)
            own = known and self.weight.requires_grad and kernel != "torch"
        return _OwnGradients.apply(x, self.weight, self.filter, kernel) if own else super().forward(x)

    @property
    def filter(self) -> Filter:
        """The filter's geometry."""
        return Filter(self.kernel_size[0], self.stride[0], cast(int, self.padding[0]))

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Leave out the filter's rim in training: torch takes 100 times as long for a 5x5 filter on one pixel."""
        if self.training and is_eager(input):
            return _convolve(input, weight, self.filter)
        return super()._conv_forward(input, weight, bias)


def select_kernel(x: Tensor, filter: Filter, features: Collection[str]) -> str:
    """Choose the weight gradient's kernel in KERNELS, only by shape, memory layout and processor.

    Args:
        x: the convolution's input (N, C, H, W).
        filter: its geometry.
        features: the processor's, as in machine.Machine.
    """
    rows, columns = x.shape[-2:]
    size, wide, avx512 = min(rows, columns), filter.size > WIDEST, "avx512f" in features
    small, tiny = size < filter.size, size <= TINY
    if x.stride(1) != 1:  # NCHW
        return "columns" if tiny and small else "maps" if wide else "torch"
    if small:
        return "maps" if avx512 and not tiny and filter.stride == 1 else "columns"
    middle = rows * columns * filter.stride**2 <= (MIDDLE_AVX512 if avx512 else MIDDLE)
    return "columns" if wide and middle else "torch"


def weight_gradient(kernel: str, x: Tensor, grad: Tensor, filter: Filter) -> Tensor:
    """The gradient (C, 1, K, K) of a depthwise filter.

    Args:
        kernel: a name in KERNELS.
        x: the convolution's input (N, C, H, W).
        grad: the gradient of its output (N, C, H', W').
        filter: the filter's geometry.
    """
    if x.numel() == 0:
        return x.new_zeros(x.shape[1], 1, filter.size, filter.size)
    rim = 0 if kernel == "torch" else filter.rim(*x.shape[-2:])
    inner = KERNELS[kernel](x, grad, filter.without(rim))
    return functional.pad(inner, (rim,) * 4) if rim else inner


class _OwnGradients(torch.autograd.Function):
    """The convolution, in autocast's precision if it is enabled; gradients in float32 or float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, filter: Filter, kernel: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.filter, ctx.kernel = filter, kernel
        return _convolve(x, weight, filter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x_gradient = filter_gradient = None
        dtype = torch.promote_types(weight.dtype, torch.float32)
        grad, wide = grad.to(dtype), x.to(dtype)
        if ctx.needs_input_grad[0]:
            rim = ctx.filter.rim(*x.shape[-2:])
            inner, weight_inside = ctx.filter.without(rim), _inside(weight.to(dtype), rim)
            x_gradient = _backward(wide, grad, weight_inside, inner.stride, (inner.padding,) * 2, "input").to(x.dtype)
        if ctx.needs_input_grad[1]:
            filter_gradient = weight_gradient(ctx.kernel, wide, grad, ctx.filter).to(weight.dtype)
        return x_gradient, filter_gradient, None, None


def _convolve(x: Tensor, weight: Tensor, filter: Filter) -> Tensor:
    rim = filter.rim(*x.shape[-2:])
    inner = filter.without(rim)
    return functional.conv2d(x, _inside(weight, rim), None, inner.stride, inner.padding, 1, x.shape[1])


def _inside(weight: Tensor, rim: int) -> Tensor:
    return weight[..., rim:-rim, rim:-rim] if rim else weight


def is_eager(x: Tensor) -> bool:
    """Whether `x` is a plain CPU tensor, outside of everything that expects torch's own operations.

    The type is checked first: a tracer's tensor does not support the other checks.
    """
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and torch._C._get_tracing_state() is None
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _torch(x: Tensor, grad: Tensor, filter: Filter) -> Tensor:
    return _gradient(x, grad, (filter.size,) * 2, filter.stride, (filter.padding,) * 2)


def _columns(x: Tensor, grad: Tensor, filter: Filter) -> Tensor:
    """Split columns evenly, because a filter of one column may not be strided."""
    if filter.size == 1 and filter.stride == 1 and not filter.padding:
        return (x * grad).sum((0, 2, 3)).view(-1, 1, 1, 1)
    pieces = -(-filter.size // WIDEST)
    bounds = [number * filter.size // pieces for number in range(pieces + 1)]
    return torch.cat([_piece(x, grad, filter, *edges) for edges in pairwise(bounds)], 3)


def _piece(x: Tensor, grad: Tensor, filter: Filter, first: int, end: int) -> Tensor:
    """Columns `first` to `end` of the gradient. The zeros around the map that they reach are materialised.

    Above and below, the kernel pads by itself, unless the map is smaller than the filter.
    """
    rows, columns = (filter.stride * (size - 1) for size in grad.shape[-2:])  # first to last output
    left = filter.padding - first
    right = columns + end - first - x.shape[-1] - left
    if min(left, right) < -x.shape[-1]:  # on a narrow map these columns see only padding
        return x.new_zeros(x.shape[1], 1, filter.size, end - first)
    above = below = 0
    inside = filter.padding
    if x.shape[-2] < filter.size + -filter.padding % filter.stride:
        above, below = filter.padding, rows + filter.size - x.shape[-2] - filter.padding
        inside = 0
    wide = functional.pad(x, (left, right, above, below))
    return _gradient(wide, grad, (filter.size, end - first), filter.stride, (inside, 0))


def _maps(x: Tensor, grad: Tensor, filter: Filter) -> Tensor:
    """An output's gradient becomes a filter tap, and the stride becomes a dilation."""
    batch, channels = x.shape[:2]
    filters = grad.reshape(batch * channels, 1, *grad.shape[-2:])
    image = x.reshape(1, batch * channels, *x.shape[-2:])
    found = functional.conv2d(image, filters, None, 1, filter.padding, filter.stride, batch * channels)
    found = found[..., : filter.size, : filter.size]  # drop rows and columns beyond the last output
    return found.reshape(batch, channels, 1, filter.size, filter.size).sum(0)


def _gradient(x: Tensor, grad: Tensor, size: tuple[int, int], stride: int, padding: tuple[int, int]) -> Tensor:
    shapeless = x.new_empty(1).expand(x.shape[1], 1, *size)  # only its shape is read
    return _backward(x, grad, shapeless, stride, padding, "weight")


def _backward(x: Tensor, grad: Tensor, weight: Tensor, stride: int, padding: tuple[int, int], of: str) -> Tensor:
    needs = [of == "input", of == "weight", False]
    geometry = [stride, stride], list(padding), [1, 1], False, [0, 0]
    found = aten.convolution_backward(grad, x, weight, None, *geometry, x.shape[1], needs)
    return cast(Tensor, found[needs.index(True)])


KERNELS: dict[str, Callable[[Tensor, Tensor, Filter], Tensor]] = {"torch": _torch, "columns": _columns, "maps": _maps}
