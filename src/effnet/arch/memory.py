"""A network's memory in inference and in training, in closed form, without building it.

Inference: weights, the image, and the peak of the feature maps that are alive together, in eager torch.
Training: weights, gradients, the optimizer's state, the moving average, the images, and what autograd keeps per image
for the backward pass. The last is nearly all of it, and a RecomputePlan reduces it: see segments.py.

What the backward pass holds in addition is the largest sum within a block, so the peak of an unusual network can be
overestimated (by up to a quarter where one tiny block is everything). Not counted: torch itself, the scratch of a
convolution's kernel, and what the allocator cannot reuse.

On a CUDA GPU torch's allocator rounds every tensor up to BLOCK. `gpu_memory` adds that, the two parts of a batch that
are kept as pixels, and WORKSPACE for cuDNN and cuBLAS, an assumption made without a GPU. What the allocator takes
from the driver beyond its tensors (about 22 MB) and the driver's own context (some hundreds) are not included.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from effnet.arch.blocks import Shape
from effnet.arch.cost import total_cost
from effnet.arch.segments import COUNTER, FLOAT, Keep, SegmentMemory, largest, segment_memories, shape_of, uses_kernels
from effnet.arch.spec import NetworkSpec
from effnet.errors import UnknownNameError
from effnet.fields import one_of, positive_int
from effnet.machine import StepPrecision

ACTIVATION = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}  # bytes of an element of a feature map
TENSOR_ENTRY = 144  # most bytes of a tensor's name, type, shape and offset in a safetensors file
BLOCK = 512  # bytes; kMinBlockSize of torch's CUDACachingAllocator
WORKSPACE = 96 * 2**20  # bytes: 32 MiB for cuBLAS, as torch gives it on Hopper, and 64 MiB for cuDNN
PARTS = 2  # of a batch, kept on a GPU as pixels: one is copied while the other is computed
# Numbers that torch's optimizers store per weight
OPTIMIZERS = {"sgd": 0, "momentum": 1, "rmsprop": 2, "adam": 2, "adamw": 2}


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of a training step in bytes. Gradients replace activations, so the peak is below the sum."""

    weights: int  # including bf16 copies
    gradients: int
    optimizer: int
    ema: int
    images: int
    activations: int  # kept when the backward pass begins
    peak: int  # of the sum


def inference_memory(network: NetworkSpec | Shape) -> int:
    """Bytes of weights, one image and the feature maps alive at the worst moment, fp32.

    As eager torch runs it in eval mode without gradients: a block's input waits for the shortcut, the stage's input for
    its end, and batch normalisation reads one map while it writes the next.
    """
    shape = shape_of(network)
    peaks = [2 * shape.stem_channels * shape.stem_size**2]
    stage = 0
    for run in shape.runs:
        entered = run.block.input_size**2 * run.block.in_channels
        if run.block.index == 0:
            stage = entered
        waiting = stage * (run.block.index > 0)
        read, steps = 0, []
        for layer in run.block.layers:
            steps.append(read + 2 * layer.elements)
            read = layer.elements
        peaks.append((waiting + entered + largest(steps)) * (run.count > 0))
    peaks.append(shape.final_size**2 * (shape.features + 2 * shape.head_channels * shape.head))
    return FLOAT * (total_cost(shape).params + shape.in_channels * shape.resolution**2 + largest(peaks))


def file_bytes(network: NetworkSpec | Shape) -> int:
    """At most the bytes of the network's weights in a bundle: a safetensors file of fp32 tensors and their names."""
    shape = shape_of(network)
    channels = shape.stem_channels + shape.head_channels * shape.head
    for run in shape.runs:
        channels = channels + run.count * sum(layer.outputs for layer in run.block.layers)
    layers, squeezes = _count_layers(shape)
    tensors = 6 * layers + 4 * squeezes + 2  # each layer: a weight, and normalisation's four vectors and counter
    return FLOAT * (total_cost(shape).params + 2 * channels) + COUNTER * layers + TENSOR_ENTRY * tensors


def training_memory(
    network: NetworkSpec | Shape,
    batch: int,
    *,
    optimizer: str = "rmsprop",
    ema: bool = True,
    precision: StepPrecision = "fp32",
    plan: Mapping[str, Keep] | Keep | None = None,
    kernels: bool | None = None,
) -> TrainingMemory:
    """What a training step of `batch` images holds.

    Args:
        network: one network, or the shape of many.
        batch: images per step.
        optimizer: "sgd" (without momentum), "momentum", "rmsprop" (with momentum, as the paper), "adam", "adamw".
        ema: whether a moving average of the weights is kept.
        precision: "bf16" and "fp16" halve the activations; weights, gradients and states stay fp32.
        plan: what each segment keeps (a RecomputePlan; for one network), or one level for all; None keeps everything.
        kernels: whether the compiled kernels compute the blocks that they know, as on a CPU, or torch's modules compute
            all, as on a GPU; None: as on a CPU with this process's installation and environment.

    Raises:
        ArgumentError: a value is outside its range or unknown, or the network cannot follow the plan.
    """
    batch = positive_int("batch", batch)
    one_of("precision", precision, StepPrecision)
    if optimizer not in OPTIMIZERS:
        raise UnknownNameError("optimizer", optimizer, OPTIMIZERS)
    shape = shape_of(network)
    kernels = uses_kernels(shape, kernels)
    params, element = total_cost(shape).params, ACTIVATION[precision]
    segments = segment_memories(network, plan, kernels, element)
    cast_params = (shape.head_channels + 1) * shape.num_classes if kernels else params  # the kernels read fp32
    copies = 0 if element == FLOAT else element * cast_params
    images = FLOAT * batch * shape.in_channels * shape.resolution**2
    states = OPTIMIZERS[optimizer], int(ema)
    once = 0 if element == FLOAT else images * element // FLOAT  # the stem's convolution keeps its own copy
    once = once + FLOAT * sum(each.count * each.statistics for each in segments)
    fixed = FLOAT * params * (1 + sum(states)) + copies + images
    return TrainingMemory(
        weights=FLOAT * params + copies,
        gradients=FLOAT * params,
        optimizer=FLOAT * params * states[0],
        ema=FLOAT * params * states[1],
        images=images,
        activations=element * batch * sum(each.count * each.kept for each in segments) + once,
        peak=fixed + once + _peak(segments, element * batch),
    )


def gpu_memory(network: NetworkSpec | Shape, batch: int, memory: TrainingMemory) -> int:
    """Bytes of tensors in a step of `batch` images on a CUDA GPU, as torch.cuda.max_memory_allocated() counts them."""
    shape = shape_of(network)
    layers, squeezes = _count_layers(shape)
    params, buffers = 3 * layers + 4 * squeezes + 2, 3 * layers
    copies = (memory.weights + memory.gradients + memory.optimizer) // memory.gradients  # of each parameter
    average = memory.ema > 0
    tensors = params * (copies + average) + buffers * (1 + average)
    pixels = PARTS * batch * shape.in_channels * shape.resolution**2
    return memory.peak + pixels + tensors * BLOCK // 2 + WORKSPACE


def kept_per_image(network: NetworkSpec | Shape, kernels: bool | None = None) -> int:
    """Bytes that one more image of the batch costs in training: itself and what is kept of it, fp32, without a plan."""
    shape = shape_of(network)
    kept = sum(each.count * each.kept for each in segment_memories(shape, None, uses_kernels(shape, kernels)))
    return FLOAT * (shape.in_channels * shape.resolution**2 + kept)


def largest_batch(spec: NetworkSpec, limit: int, **settings: Any) -> int:
    """The most images per step whose training memory stays within `limit` bytes; 0 if not even one fits.

    `settings` are the keyword arguments of training_memory.
    """

    def is_too_large(batch: int) -> bool:
        return training_memory(spec, batch, **settings).peak > limit

    beyond = 1
    while not is_too_large(beyond):
        beyond *= 2
    return bisect.bisect_left(range(1, beyond + 1), True, key=is_too_large)


def _count_layers(shape: Shape) -> tuple[int, int]:
    """Convolutions with their normalisation, and squeeze-and-excitations."""
    layers, squeezes = 1 + shape.head, 0
    for run in shape.runs:
        layers = layers + run.count * len(run.block.layers)
        squeezes = squeezes + run.count * (run.block.squeeze_channels > 0)
    return layers, squeezes


def _peak(segments: list[SegmentMemory], scale: int) -> int:
    """The most bytes of activations and gradients together, as the backward pass goes from the last segment on.

    `scale`: bytes of one element of each image of the batch.
    """
    moments = []
    kept, recomputed, gradients = 0, 0, sum(each.count * each.params for each in segments)
    for each in segments:
        # Within equal segments the sum changes evenly, so its largest value is at one of their ends.
        first = scale * (kept + each.kept + each.working + recomputed) + FLOAT * gradients
        kept = kept + each.count * each.kept
        gradients = gradients - each.count * each.params
        last = scale * (kept + each.working + recomputed * (each.count == 1)) + FLOAT * (gradients + each.params)
        moments += [first * (each.count > 0), last * (each.count > 0)]
        recomputed = each.recomputed * (each.count > 0) + recomputed * (each.count == 0)
    return largest(moments)
