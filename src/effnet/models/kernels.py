"""A segment's training pass in the compiled kernels: its arguments, and its autograd function.

Tensors' addresses are read in one place (`Call`), and only of tensors that were created here or that `_fit` and
`_are_usual` have checked: with a wrong shape or type the kernels would write to other memory.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effnet import native

ACTIVATIONS: dict[type, int] = {nn.Identity: 0, nn.SiLU: 1, nn.ReLU6: 2, nn.ReLU: 3}  # as in native/network.h
LAYERS = ("expand", "depthwise", "project")
LAST = torch.channels_last
INPUTS = 64  # input shapes that a segment caches

# TrainingSegment of native/training.h, field by field; sizes come last, so that no field needs padding before it
_LAYER = (
    ("P", "weights gradient map scale shift running_mean running_variance saved scale_gradient shift_gradient"),
    ("f", "eps momentum"),
    ("i", "channels activation"),
)
_SEGMENT = (
    ("P", "squeeze_weights squeeze_bias excite_weights excite_bias"),
    ("P", "squeeze_gradient squeeze_bias_gradient excite_gradient excite_bias_gradient"),
    ("P", "pooled squeezed gate x y drop y_gradient x_gradient scaled_gradient expanded_gradient scratch"),
    ("i", "images height width inputs out_height out_width kernel stride pad_top pad_left"),
    ("i", "squeeze shortcut"),
)
_FIELDS = [(f"{layer}.{name}", kind) for layer in LAYERS for kind, names in _LAYER for name in names.split()]
_FIELDS += [(name, kind) for kind, names in _SEGMENT for name in names.split()]
_PLACES = {name: place for place, (name, _) in enumerate(_FIELDS)}
_PACK = struct.Struct("@" + "".join(kind for _, kind in _FIELDS) + "0P").pack
_FORWARD = [_PLACES[name] for name in ("x", "drop", "y")]
_BACKWARD = [
    _PLACES[name] for name in ("x", "drop", "y_gradient", "x_gradient", "scaled_gradient", "expanded_gradient")
]
_SCRATCH = _PLACES["scratch"]
_USUAL = {Tensor, nn.Parameter}

TensorShape = tuple[int, ...]


@functools.cache
def open_library() -> ctypes.CDLL | None:
    """The kernels, using torch's OpenMP threads; None if either is missing."""
    library = native.library()
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        openmp = ctypes.CDLL(str(torch_cpu))  # also finds symbols in its dependencies
        functions = openmp.GOMP_parallel, openmp.omp_get_thread_num, openmp.omp_get_num_threads
    except (OSError, AttributeError):
        return None
    if library is not None:
        library.effnet_use_openmp(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))
    return library


class Step(torch.autograd.Function):
    """A segment's forward pass, and its backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        running: list[Tensor],
        x: Tensor,
        drop: Tensor | None,
        low: bool,
        again: bool,
        *parameters: Tensor,
    ) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W'). `again`: the backward pass recomputes the maps, so only x is kept."""
        ctx.plan, ctx.shape, ctx.low, ctx.dtype = plan, x.shape, low, x.dtype
        call = plan.call(x.shape, low)
        (x,) = _fit([x], [x.shape], call.dtype, LAST)
        weights = [one.contiguous() for one in parameters]  # a stem's may be channels_last
        kept, maps = call.empty(x)
        y = torch.empty_like(maps[-1])
        call(False, plan.forward, [*weights, *maps, *running, x, drop, y], kept)
        ctx.save_for_backward(x, drop, *parameters, *([] if again else [kept, *maps]))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of `forward`'s arguments."""
        if torch.is_grad_enabled():
            rule = "call network.native(False) before the forward pass, or set EFFNET_NATIVE=0."
            raise RuntimeError(f"The training kernels have no second derivative (create_graph=True): {rule}")
        plan: Plan = ctx.plan
        call = plan.call(ctx.shape, ctx.low)
        x, drop, *rest = ctx.saved_tensors
        parameters, saved = rest[: len(plan.shapes)], rest[len(plan.shapes) :]
        x, gradient = _fit([x, gradient], [ctx.shape, call.maps[-1]], call.dtype, LAST)
        weights = _fit(parameters, plan.shapes, torch.float32)
        if drop is not None:
            (drop,) = _fit([drop], [ctx.shape[:1]], torch.float32)
        if saved:
            (kept,), maps = _fit(saved[:1], [(call.kept,)], torch.float32), _fit(saved[1:], call.maps, call.dtype, LAST)
        else:  # the running statistics are updated already, and the output is not used
            kept, maps = call.empty(x)
            call(False, plan.forward, [*weights, *maps, *[None] * len(plan.buffers), x, drop, None], kept)
        # With the strides of the weights, which DistributedDataParallel compares.
        gradients = [torch.empty_like(one) for one in weights]
        needed = ctx.needs_input_grad
        x_gradient = torch.empty_like(x) if needed[2] or plan.writes_x_gradient else None
        room: list[Tensor | None] = [torch.empty_like(one) for one in maps[:-1]] or [None]
        call(True, plan.backward, [*weights, *maps, *gradients, x, drop, gradient, x_gradient, room[-1], room[0]], kept)
        of_x = x_gradient.to(ctx.dtype) if x_gradient is not None and needed[2] else None
        of_parameters = (one if need else None for one, need in zip(gradients, needed[6:], strict=True))
        return None, None, of_x, None, None, None, *of_parameters


@dataclass(frozen=True)
class Call:
    """A call of the kernels for inputs of one shape and type and a number of threads."""

    arguments: tuple[bytes, bool, int]  # instruction set, bfloat16, threads
    dtype: torch.dtype
    values: list[Any]  # of the fields, without addresses
    maps: list[TensorShape]
    kept: int  # floats kept besides the maps
    inside: list[tuple[int, int]]  # fields that point into `kept`, and their offsets in bytes
    scratch: int  # bytes

    def empty(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Memory for statistics and means, and for the convolutions' outputs."""
        maps = [x.new_empty_strided(shape, (c * h * w, 1, c * w, c)) for shape in self.maps for _, c, h, w in (shape,)]
        return torch.empty(self.kept, dtype=torch.float32, device="cpu"), maps

    def __call__(self, backward: bool, places: list[int], tensors: Sequence[Tensor | None], kept: Tensor) -> None:
        """Run a pass over tensors, each at the index of its field; all were created here or checked before."""
        values = self.values.copy()
        for place, tensor in zip(places, tensors, strict=True):
            if tensor is not None:
                values[place] = tensor.data_ptr()
        address = kept.data_ptr()
        for place, offset in self.inside:
            values[place] = address + offset
        scratch = torch.empty(self.scratch, dtype=torch.uint8, device="cpu")
        values[_SCRATCH] = scratch.data_ptr()
        library = open_library()
        assert library is not None
        if library.effnet_train(*self.arguments, backward, _PACK(*values), None, 0):
            raise RuntimeError("The training kernels failed.")  # unexpected: the call was checked when created


class Plan:
    """The structure of a segment: its sizes, and the fields of its parameters.

    Args:
        layers: its ConvNormActs by their names in _LAYERS.
        se: its squeeze-and-excitation.
        drop: its stochastic depth, if any.
        shortcut: whether the input is added to the output.
    """

    def __init__(self, layers: dict[str, Any], se: Any = None, drop: Any = None, shortcut: bool = False) -> None:
        # No reference to the segment itself, which would keep it alive.
        self.convs = [layer.conv for layer in layers.values()]
        self.norms = [layer.norm for layer in layers.values()]
        self.squeezes = [se.squeeze, se.excite] if se else []
        self.drop = drop
        self.inputs = self.convs[0].in_channels
        self.expands, single = "expand" in layers, len(layers) == 1
        spatial = layers.get("depthwise", layers["project"])
        self.kernel, self.stride = spatial.conv.kernel_size[0], spatial.conv.stride[0]
        self.same = "pad" in spatial._modules
        self.patches = single and (self.kernel, self.stride) != (1, 1)  # the input is an image, which gets no gradient
        self.again = single and self.kernel > 1  # an image is kept anyway, and its map is large
        self.writes_x_gradient = not single and not self.expands  # wanted or not

        self.channels = [conv.out_channels for conv in self.convs]
        self.odd = any(count % 2 for count in (self.channels if self.patches else [self.inputs, *self.channels]))
        self.shapes: list[TensorShape] = []
        for conv in self.convs:
            filters = conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size
            self.shapes += filters, *[(conv.out_channels,)] * 2
        for conv in self.squeezes:
            self.shapes += (conv.out_channels, conv.in_channels, 1, 1), (conv.out_channels,)
        self.usual = [*self.shapes, *((count,) for count in self.channels for _ in range(2))]
        self._calls: dict[Any, Call] = {}

        # Where tensors come from, and the indices of their fields
        self.parameters = [
            owner
            for conv, norm in zip(self.convs, self.norms, strict=True)
            for owner in ((conv, "weight"), (norm, "weight"), (norm, "bias"))
        ] + [(conv, name) for conv in self.squeezes for name in ("weight", "bias")]
        self.buffers = [(norm, name) for norm in self.norms for name in ("running_mean", "running_var")]
        weights = _places(
            layers, "weights scale shift", se and "squeeze_weights squeeze_bias excite_weights excite_bias"
        )
        maps = _places(layers, "map")
        self.forward = [*weights, *maps, *_places(layers, "running_mean running_variance"), *_FORWARD]
        gradients = se and "squeeze_gradient squeeze_bias_gradient excite_gradient excite_bias_gradient"
        gradients = _places(layers, "gradient scale_gradient shift_gradient", gradients)
        self.backward = [*weights, *maps, *gradients, *_BACKWARD]
        self.kept = _places(layers, "saved", se and "pooled gate squeezed")

        # Values that do not depend on the input
        self.fixed: dict[str, Any] = {"kernel": self.kernel, "stride": self.stride, "inputs": self.inputs}
        self.fixed |= {"squeeze": se.squeeze.out_channels if se else 0}
        self.fixed |= {"shortcut": shortcut}
        for name, layer in layers.items():
            act = ACTIVATIONS[type(layer._modules.get("act", nn.Identity()))]
            values = layer.norm.eps, layer.norm.momentum, layer.conv.out_channels, act
            fields = (f"{name}.{field}" for field in ("eps", "momentum", "channels", "activation"))
            self.fixed |= zip(fields, values, strict=True)

    def takes(self, x: Tensor, low: bool) -> bool:
        """Whether the kernels support this input; `low`: in bfloat16."""
        if x.ndim != 4 or x.layout is not torch.strided or (low and self.odd) or (self.patches and x.requires_grad):
            return False
        n, c, h, w = x.shape
        values = n * -(-h // self.stride) * -(-w // self.stride)  # per channel
        return c == self.inputs and values > 1 and all(norm.training for norm in self.norms)

    def tensors(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]] | None:
        """The modules' current parameters, running statistics and counters; None if the kernels do not support one."""
        parameters = [module._parameters[name] for module, name in self.parameters]
        running = [module._buffers[name] for module, name in self.buffers]
        counters = [norm._buffers["num_batches_tracked"] for norm in self.norms]
        for conv, counter in zip(self.convs, counters, strict=True):
            if conv._parameters["bias"] is not None or counter is None or counter.dtype is not torch.int64:
                return None
        if not _are_usual(parameters + running, self.usual) or {counter.is_cpu for counter in counters} != {True}:
            return None
        if {one.is_contiguous() for one in running} != {True}:  # they are written to
            return None
        return parameters, running, counters

    def draw(self, images: int) -> Tensor | None:
        """Stochastic depth's factor per image, from the random numbers that StochasticDepth would draw."""
        if self.drop is None or not self.drop.training or self.drop.rate == 0:
            return None
        keep = 1 - self.drop.rate
        return torch.empty(images, dtype=torch.float32, device="cpu").bernoulli_(keep).div_(keep)

    def call(self, shape: TensorShape, low: bool) -> Call:
        """The call for an input of this shape; `low`: in bfloat16."""
        key = shape, low, torch.get_num_threads(), native.training_instruction_set() or ""
        found = self._calls.get(key)
        if found is None:
            if len(self._calls) >= INPUTS:
                self._calls.clear()
            found = self._calls[key] = self._make_call(*key)
        return found

    def _make_call(self, shape: TensorShape, low: bool, threads: int, isa: str) -> Call:
        n, _, *size = shape
        small = [-(-pixels // self.stride) for pixels in size]
        pads = [(self.kernel - 1) // 2] * 2
        if self.same:
            pads = [max(0, self.kernel - self.stride + pixels % self.stride) // 2 for pixels in size]
        names = "images", "height", "width", "out_height", "out_width", "pad_top", "pad_left"
        given = self.fixed | dict(zip(names, (n, *size, *small, *pads), strict=True))
        values = [given.get(name, 0) for name, _ in _FIELDS]
        maps = [(n, count, *small) for count in self.channels]
        if self.expands:
            maps[0] = n, self.channels[0], *size

        lengths = [4 * count for count in self.channels]
        if self.squeezes:
            squeezed, wide = (conv.out_channels for conv in self.squeezes)
            lengths += n * wide, n * wide, n * squeezed
        inside = [(place, 4 * sum(lengths[:i])) for i, place in enumerate(self.kept)]  # 4 bytes each
        library = open_library()
        assert library is not None
        arguments = isa.encode(), low, threads
        message = ctypes.create_string_buffer(native.MESSAGE)
        scratch = library.effnet_training_scratch(*arguments, _PACK(*values), message, native.MESSAGE)
        if scratch < 0:
            raise RuntimeError(f"The training kernels: {message.value.decode()}")
        dtype = torch.bfloat16 if low else torch.float32
        return Call(arguments, dtype, values, maps, sum(lengths), inside, scratch)


def count_batch(counters: list[Tensor]) -> None:
    """Add 1 to each, in place of torch's operator, which takes four times as long; `Plan.tensors` has checked them."""
    for counter in counters:
        ctypes.c_int64.from_address(counter.data_ptr()).value += 1


def _places(layers: Iterable[str], names: str, others: str | None = None) -> list[int]:
    """The indices of each layer's fields, and of other fields."""
    found = [f"{layer}.{name}" for layer in layers for name in names.split()]
    return [_PLACES[name] for name in (*found, *(others or "").split())]


def _are_usual(tensors: list[Any], shapes: list[TensorShape]) -> bool:
    """Whether all are plain float32 CPU tensors of these shapes."""
    return (
        _USUAL.issuperset(map(type, tensors))
        and [one.shape for one in tensors] == shapes
        and {one.dtype for one in tensors} == {torch.float32}
        and {one.is_cpu for one in tensors} == {True}
    )


def _fit(
    tensors: Sequence[Tensor],
    shapes: Sequence[TensorShape],
    dtype: torch.dtype,
    layout: torch.memory_format = torch.contiguous_format,
) -> list[Tensor]:
    """Convert the tensors to the type and memory layout that the kernels read.

    Gradients come in any layout, and hooks of saved tensors may return another layout and type.

    Raises:
        RuntimeError: one has another shape or device.
    """
    found = []
    for one, shape in zip(tensors, shapes, strict=True):
        if one.shape != shape or not one.is_cpu:
            fact = f"{tuple(one.shape)} on {one.device}"
            raise RuntimeError(f"The training kernels need a tensor of {tuple(shape)} on the CPU and got {fact}.")
        if one.dtype is not dtype or not one.is_contiguous(memory_format=layout):
            one = one.to(dtype).contiguous(memory_format=layout)
        found.append(one)
    return found
