"""Ways to compute a depthwise convolution's weight gradient; they agree up to rounding, and each is best somewhere.

Torch leaves this gradient to oneDNN, whose kernel for it takes filters up to three columns wide and maps that are no
smaller than the filter. Everything else falls back to one that is slow on large maps and very slow on small ones: a 5x5
filter on a 4x4 map takes 30 times as long as its forward pass. So the gradient is asked for in a form that is fast:

| kernel | how | where |
|---|---|---|
| torch | as torch does it | 3x3 filters on all but tiny maps; large maps in channels_last |
| columns | two or three columns of the filter at a time, on maps with zeros around | channels_last, not large |
| maps | all maps of the batch as channels of one image, their gradients as its filters: a forward pass | NCHW |

A filter's rim that touches nothing but padding has no gradient and is left out by all of them but torch.

`static_kernel` is the choice of a fresh network: by shape and memory layout alone, so the same run gives the same bits.
It was found on a processor with AVX2; depthwise.choose_kernels times the kernels where it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from effnet.errors import UnknownNameError

AUTO = "auto"
WIDEST = 3  # columns of a filter that oneDNN's kernel takes
MIDDLE = 256  # pixels of the largest map for which copies in columns pay: measured between 16 x 16 and 28 x 28
TINY = 2  # height and width in pixels up to which `maps` has no fast forward pass to use

aten = torch.ops.aten


@dataclass(frozen=True)
class Filter:
    """The geometry of a square filter."""

    size: int
    stride: int
    padding: int

    def rim(self, rows: int, columns: int) -> int:
        """How many of the filter's outer rings touch nothing but padding on a map of that size."""
        return max(0, self.padding - max(rows, columns) + 1)

    def without(self, rim: int) -> Filter:
        """The same without that many outer rings, and without the padding that they need."""
        return Filter(self.size - 2 * rim, self.stride, self.padding - rim)


Kernel = Callable[[Tensor, Tensor, Filter], Tensor]


def weight_gradient(kernel: str, x: Tensor, grad: Tensor, shape: Filter) -> Tensor:
    """The gradient (C, 1, K, K) of a depthwise filter.

    Args:
        kernel: "auto", or a name among KERNELS.
        x: the convolution's input (N, C, H, W).
        grad: the gradient of its output (N, C, H', W').
        shape: the filter.

    Raises:
        UnknownNameError: no kernel has that name.
    """
    if kernel == AUTO:
        kernel = static_kernel(x, grad, shape)
    check_kernel(kernel)
    if x.numel() == 0:
        return x.new_zeros(x.shape[1], 1, shape.size, shape.size)
    rim = 0 if kernel == "torch" else shape.rim(*x.shape[-2:])
    inner = KERNELS[kernel](x, grad, shape.without(rim))
    return functional.pad(inner, (rim,) * 4) if rim else inner


def static_kernel(x: Tensor, grad: Tensor, shape: Filter) -> str:
    """The kernel for this filter, map and memory layout, by rule."""
    size = min(x.shape[-2:])
    tiny = size <= TINY and size < shape.size
    if x.stride(1) != 1:  # NCHW
        return "columns" if tiny else "maps" if shape.size > WIDEST else "torch"
    middle = grad.shape[-2] * grad.shape[-1] * shape.stride**4 <= MIDDLE
    return "columns" if size < shape.size or (shape.size > WIDEST and middle) else "torch"


def check_kernel(kernel: str) -> None:
    """Raise UnknownNameError unless there is a kernel of that name."""
    if kernel not in KERNELS:
        raise UnknownNameError("kernel", kernel, (AUTO, *KERNELS))


def input_gradient(x: Tensor, grad: Tensor, weight: Tensor, shape: Filter) -> Tensor:
    """The gradient (N, C, H, W) of the convolution's input, which torch computes fast."""
    return _backward(x, grad, weight, shape.stride, (shape.padding, shape.padding), "input")


def _torch(x: Tensor, grad: Tensor, shape: Filter) -> Tensor:
    return _filter(x, grad, (shape.size, shape.size), shape.stride, (shape.padding, shape.padding))


def _columns(x: Tensor, grad: Tensor, shape: Filter) -> Tensor:
    """Columns are split evenly, because a filter of one column may not be strided."""
    if shape.size == 1 and shape.stride == 1 and not shape.padding:
        return (x * grad).sum((0, 2, 3)).view(-1, 1, 1, 1)
    pieces = -(-shape.size // WIDEST)
    bounds = [number * shape.size // pieces for number in range(pieces + 1)]
    return torch.cat([_piece(x, grad, shape, *edges) for edges in pairwise(bounds)], 3)


def _piece(x: Tensor, grad: Tensor, shape: Filter, first: int, end: int) -> Tensor:
    """Columns `first` to `end` of the gradient. All zeros around the map that they reach are written out.

    Above and below, the kernel itself pads as long as the map is no smaller than the filter.
    """
    rows, columns = (shape.stride * (size - 1) for size in grad.shape[-2:])  # first to last output
    left = shape.padding - first
    right = columns + end - first - x.shape[-1] - left
    if min(left, right) < -x.shape[-1]:  # on a narrow map these columns touch nothing but padding
        return x.new_zeros(x.shape[1], 1, shape.size, end - first)
    above = below = 0
    inside = shape.padding
    if x.shape[-2] < shape.size + -shape.padding % shape.stride:
        above, below = shape.padding, rows + shape.size - x.shape[-2] - shape.padding
        inside = 0
    wide = functional.pad(x, (left, right, above, below))
    return _filter(wide, grad, (shape.size, end - first), shape.stride, (inside, 0))


def _maps(x: Tensor, grad: Tensor, shape: Filter) -> Tensor:
    """Where an output's gradient is a filter's tap, a stride between outputs is a dilation."""
    batch, channels = x.shape[:2]
    filters = grad.reshape(batch * channels, 1, *grad.shape[-2:])
    image = x.reshape(1, batch * channels, *x.shape[-2:])
    found = functional.conv2d(image, filters, None, 1, shape.padding, shape.stride, batch * channels)
    found = found[..., : shape.size, : shape.size]  # the rows and columns behind the last output lie outside
    return found.reshape(batch, channels, 1, shape.size, shape.size).sum(0)


def _filter(x: Tensor, grad: Tensor, size: tuple[int, int], stride: int, padding: tuple[int, int]) -> Tensor:
    shapeless = x.new_empty(1).expand(x.shape[1], 1, *size)  # only its shape is read
    return _backward(x, grad, shapeless, stride, padding, "weight")


def _backward(x: Tensor, grad: Tensor, weight: Tensor, stride: int, padding: tuple[int, int], of: str) -> Tensor:
    needs = [of == "input", of == "weight", False]
    strides, none = [stride, stride], [0, 0]
    found: Tensor = aten.convolution_backward(
        grad, x, weight, None, strides, list(padding), [1, 1], False, none, x.shape[1], needs
    )[needs.index(True)]
    return found


KERNELS: dict[str, Kernel] = {"torch": _torch, "columns": _columns, "maps": _maps}
