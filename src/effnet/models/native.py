"""Training by the compiled kernels: a block, or a layer with its normalisation and activation, is one step of autograd.

Autograd then keeps a segment's input and the outputs of its convolutions; normalised, activated and gated maps are
computed again while the backward pass reads them. Gradients and running statistics are those of torch's modules but
for rounding. Parameters, their gradients and statistics are float32, maps too, or bfloat16 inside autocast.

What the kernels do not cover is computed by the modules as ever: other devices and types, other normalisations,
normalisation in eval mode, anything that watches inner layers (hooks, compilers, tracers, functorch). So is everything
where EFFNET_NATIVE=0 is set, and what `EfficientNet.native(False)` was said to.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from effnet import native

SWITCH = "EFFNET_NATIVE"
KERNELS, STRIDES = (3, 5, 7), (1, 2)  # of a depthwise convolution
ACTIVATIONS: dict[type[nn.Module] | None, int] = {None: 0, nn.SiLU: 1, nn.ReLU6: 2, nn.ReLU: 3}  # as in network.h
LAST = torch.channels_last

_Pointer, _Int, _Float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


def _fields(*groups: tuple[Any, str]) -> list[tuple[str, Any]]:
    return [(name, kind) for kind, names in groups for name in names.split()]


class _Norm(ctypes.Structure):
    """TrainingNorm of native/training.h."""

    _fields_ = _fields(
        (_Pointer, "weight bias running_mean running_variance saved weight_gradient bias_gradient"),
        (_Float, "eps momentum"),
    )


class _Layer(ctypes.Structure):
    """TrainingLayer of native/training.h."""

    _fields_ = _fields((_Pointer, "weights gradient map"), (_Norm, "norm"), (_Int, "channels activation"))


class _Segment(ctypes.Structure):
    """TrainingSegment of native/training.h."""

    _fields_ = _fields(
        (_Layer, "expand depthwise project"),
        (_Pointer, "squeeze_weights squeeze_bias excite_weights excite_bias"),
        (_Pointer, "squeeze_gradient squeeze_bias_gradient excite_gradient excite_bias_gradient"),
        (_Pointer, "pooled squeezed gate x y drop y_gradient x_gradient scaled_gradient expanded_gradient scratch"),
        (_Int, "images height width inputs out_height out_width kernel stride pad_top pad_left"),
        (_Int, "squeeze shortcut recompute"),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The kernels, with torch's own OpenMP threads; None where either is missing."""
    library = native.library()
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        openmp = ctypes.CDLL(str(torch_cpu))  # finds symbols in what it depends on, too
        functions = openmp.GOMP_parallel, openmp.omp_get_thread_num, openmp.omp_get_num_threads
    except (OSError, AttributeError):
        return None
    if library is not None:
        library.effnet_use_openmp(*(ctypes.cast(function, _Pointer) for function in functions))
    return library


def segment_parts(module: Any) -> dict[str, Any]:
    """The layers of a block or of a single layer by their names in native/training.h, and what else it has."""
    if hasattr(module, "conv"):
        return {"project": module}
    if hasattr(module, "pointwise"):
        return {"depthwise": module.depthwise, "project": module.pointwise}
    return {name: getattr(module, name) for name in ("expand", "depthwise", "se", "project", "drop")}


class Step(torch.autograd.Function):
    """A segment's forward pass, and its backward pass."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, drop: Tensor | None, *parameters: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        parameters = tuple(parameter.contiguous() for parameter in parameters)  # not channels_last
        segment = plan.segment(x)
        maps = [torch.empty(shape, dtype=x.dtype, memory_format=LAST) for shape in plan.maps(x)]
        y = torch.empty_like(maps[-1], memory_format=LAST)
        kept = x.new_empty(plan.kept(x), dtype=torch.float32)
        plan.point(segment, x, maps, kept, drop, parameters)
        for layer, norm in plan.norms(segment):
            layer.norm.running_mean, layer.norm.running_variance = map(_address, (norm.running_mean, norm.running_var))
        segment.y = _address(y)
        _run(segment, x, backward=False)
        ctx.save_for_backward(x, kept, drop, *([] if plan.recompute else maps), *parameters)
        ctx.plan = plan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of `forward`'s arguments."""
        plan: Plan = ctx.plan
        x, kept, drop, *rest = ctx.saved_tensors
        segment = plan.segment(x)
        shapes = plan.maps(x)
        count = 0 if plan.recompute else len(shapes)
        maps, parameters = rest[:count], rest[count:]
        if plan.recompute:
            maps = [torch.empty(shape, dtype=x.dtype, memory_format=LAST) for shape in shapes]
        plan.point(segment, x, maps, kept, drop, parameters)
        gradient = gradient.to(x.dtype).contiguous(memory_format=LAST)
        room = [torch.empty_like(one, memory_format=LAST) for one in maps[:-1]]
        gradients = [torch.empty_like(one, memory_format=torch.contiguous_format) for one in parameters]
        x_gradient = torch.empty_like(x, memory_format=LAST) if ctx.needs_input_grad[1] else None
        segment.y_gradient, segment.x_gradient = _address(gradient), _address(x_gradient)
        if room:
            segment.scaled_gradient, segment.expanded_gradient = _address(room[-1]), _address(room[0])
        plan.point_gradients(segment, gradients)
        _run(segment, x, backward=True)
        needed = ctx.needs_input_grad[3:]
        return None, x_gradient, None, *(one if need else None for one, need in zip(gradients, needed, strict=True))


class Plan:
    """What a segment is made of: fixed sizes, and where its parameters stand.

    Args:
        parts: its layers, as `segment_parts` gives them.
    """

    def __init__(self, parts: dict[str, nn.Module], shortcut: bool) -> None:
        self.layers: dict[str, Any] = {
            n: parts[n] for n in ("expand", "depthwise", "project") if hasattr(parts.get(n), "conv")
        }
        se = parts.get("se")
        self.se: Any = se if hasattr(se, "squeeze") else None
        self.shortcut = shortcut
        self.single = "depthwise" not in self.layers
        spatial = self.layers["project" if self.single else "depthwise"]
        self.kernel, self.stride = spatial.conv.kernel_size[0], spatial.conv.stride[0]
        self.same = hasattr(spatial, "pad")
        self.recompute = self.single and self.kernel > 1

    @property
    def parameters(self) -> list[nn.Parameter]:
        """In the order in which `point` expects them."""
        found = []
        for layer in self.layers.values():
            found += [layer.conv.weight, layer.norm.weight, layer.norm.bias]
        if self.se:
            found += [self.se.squeeze.weight, self.se.squeeze.bias, self.se.excite.weight, self.se.excite.bias]
        return found

    def norms(self, segment: _Segment) -> Iterator[tuple[_Layer, Any]]:
        """Each layer's struct with its normalisation."""
        for name, layer in self.layers.items():
            yield getattr(segment, name), layer.norm

    def out_size(self, size: int) -> int:
        """Rows or columns behind the strided convolution."""
        return -(-size // self.stride)

    def segment(self, x: Tensor) -> _Segment:
        """The sizes for that input."""
        segment = _Segment()
        segment.images, segment.inputs, segment.height, segment.width = x.shape
        segment.out_height, segment.out_width = self.out_size(x.shape[2]), self.out_size(x.shape[3])
        segment.kernel, segment.stride = self.kernel, self.stride
        missing = [max(0, self.kernel - self.stride + size % self.stride) for size in x.shape[2:]]
        pads = [(amount // 2 if self.same else (self.kernel - 1) // 2) for amount in missing]
        segment.pad_top, segment.pad_left = pads
        segment.shortcut, segment.recompute = self.shortcut, self.recompute
        for name, layer in self.layers.items():
            struct = getattr(segment, name)
            struct.channels = layer.conv.out_channels
            struct.activation = ACTIVATIONS[type(layer.act) if hasattr(layer, "act") else None]
            struct.norm.eps, struct.norm.momentum = layer.norm.eps, layer.norm.momentum
        if self.se:
            segment.squeeze = self.se.squeeze.out_channels
        return segment

    def maps(self, x: Tensor) -> list[tuple[int, int, int, int]]:
        """The shapes of the layers' maps."""
        n, _, h, w = x.shape
        small = self.out_size(h), self.out_size(w)
        return [
            (n, layer.conv.out_channels, *((h, w) if name == "expand" else small))
            for name, layer in self.layers.items()
        ]

    def kept(self, x: Tensor) -> int:
        """Numbers that are kept beside the maps."""
        sizes = 4 * sum(layer.conv.out_channels for layer in self.layers.values())
        if self.se:
            sizes += x.shape[0] * (2 * self.se.squeeze.in_channels + self.se.squeeze.out_channels)
        return sizes

    def point(
        self,
        segment: _Segment,
        x: Tensor,
        maps: Sequence[Tensor],
        kept: Tensor,
        drop: Tensor | None,
        parameters: Sequence[Tensor],
    ) -> None:
        """Write the addresses of what both passes read."""
        segment.x, segment.drop = _address(x), _address(drop)
        numbers = iter(parameters)
        at = kept.data_ptr()
        for (layer, _), found in zip(self.norms(segment), maps, strict=True):
            layer.weights, layer.norm.weight, layer.norm.bias = (_address(next(numbers)) for _ in range(3))
            layer.map, layer.norm.saved = _address(found), at
            at += 4 * 4 * layer.channels
        if self.se:
            names = "squeeze_weights", "squeeze_bias", "excite_weights", "excite_bias"
            for name in names:
                setattr(segment, name, _address(next(numbers)))
            wide = 4 * segment.images * segment.depthwise.channels
            segment.pooled, segment.gate, segment.squeezed = at, at + wide, at + 2 * wide

    def point_gradients(self, segment: _Segment, gradients: Sequence[Tensor]) -> None:
        """Write the addresses of the parameters' gradients."""
        numbers = iter(gradients)
        for layer, _ in self.norms(segment):
            layer.gradient, layer.norm.weight_gradient, layer.norm.bias_gradient = (
                _address(next(numbers)) for _ in range(3)
            )
        if self.se:
            for name in ("squeeze_gradient", "squeeze_bias_gradient", "excite_gradient", "excite_bias_gradient"):
                setattr(segment, name, _address(next(numbers)))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _run(segment: _Segment, x: Tensor, backward: bool) -> None:
    library = _library()
    assert library is not None
    low, parts, it = x.dtype == torch.bfloat16, torch.get_num_threads(), ctypes.byref(segment)
    isa = str(native.instruction_set()).encode()
    message = ctypes.create_string_buffer(native.MESSAGE)
    size = library.effnet_training_scratch(isa, low, parts, it, message, native.MESSAGE)
    scratch = torch.empty(max(0, size), dtype=torch.uint8)
    segment.scratch = _address(scratch)
    if size < 0 or library.effnet_train(isa, low, parts, backward, it, message, native.MESSAGE):
        raise RuntimeError(message.value.decode())


def run(module: nn.Module, x: Tensor, shortcut: bool = False) -> Tensor:
    """Compute a segment."""
    parts = segment_parts(module)
    plan = Plan(parts, shortcut)
    drop = None
    rate = getattr(parts.get("drop"), "rate", 0)
    if shortcut and rate:
        drop = x.new_empty(x.shape[0], dtype=torch.float32).bernoulli_(1 - rate).div_(1 - rate)
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.bfloat16)
    x = x.contiguous(memory_format=LAST)
    for layer in plan.layers.values():
        layer.norm.num_batches_tracked.add_(1)
    return Step.apply(plan, x, drop, *plan.parameters)
