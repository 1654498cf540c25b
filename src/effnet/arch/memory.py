"""What a network holds in memory, in inference and in training, in closed form: nothing is built.

Inference: weights, the image, and the feature maps that are alive together at the worst moment, in eager torch.
Training: weights, gradients, the optimizer's state, the moving average, the images, and what autograd keeps of each
image until the backward pass has read it. The last is nearly all of it, and it is what a RecomputePlan saves. A plan
divides a network into segments, as the literature of checkpointing calls them: the stem, each block, and the head.

What is kept of an MBConv block, in feature maps: E at the size of its expand convolution's output, D of the depthwise
one's, P of the projected one's. The reason is what each step's gradient reads:

| level | E | D | P | computed again in the backward pass |
|---|---|---|---|---|
| no plan | 3 | 4 | 2 | nothing |
| ACTIVATIONS | 2 | 3 | 2 | normalisation |
| CONVOLUTIONS | 1 | 1 | 2 | and activations, squeeze-and-excitation's product |
| DEPTHWISE | 0 | 1 | 2 | and the expand convolution |
| BOTTLENECKS | 0 | 0 | 2 | and the depthwise convolution |

One of the two P is the block's own output, which the next block reads; without a shortcut it is computed again, too.
Without squeeze-and-excitation there is no product, which makes one D less where products are kept.

What the backward pass holds in addition is the largest sum within a block, so the peak of an unusual network can be
overestimated (by up to a quarter where one tiny block is everything). Not counted: torch itself, the scratch of a
convolution's kernel, and what the allocator cannot reuse.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from effnet.arch.blocks import OPS, Activation, BlockRun, BlockSpec, Layer, Shape, strided_size
from effnet.arch.cost import block_cost, total_cost
from effnet.arch.spec import NetworkSpec
from effnet.errors import ArgumentError, UnknownNameError
from effnet.fields import one_of, positive_int
from effnet.machine import Precision

FLOAT = 4  # bytes of a weight, a gradient or a state, in either precision
ACTIVATION = {"fp32": 4, "bf16": 2}  # bytes of an element of a feature map
COUNTER = 8  # bytes of a normalisation's counter of batches, and of a place that max pooling remembers
TENSOR_ENTRY = 144  # bytes, at most, of a tensor's name, type, shape and place in a safetensors file
# Numbers that an optimizer of torch remembers for every weight
OPTIMIZERS = {"sgd": 0, "momentum": 1, "rmsprop": 2, "adam": 2, "adamw": 2}


class Keep(IntEnum):
    """What a segment keeps for the backward pass: each level keeps what those below it do, and more."""

    BOTTLENECKS = 0  # its input and the output of its last convolution; stem and head: only the input
    DEPTHWISE = 1  # the output of the convolution before, in an MBConv the depthwise one
    CONVOLUTIONS = 2  # the outputs of all convolutions
    ACTIVATIONS = 3  # the outputs of activations and of squeeze-and-excitation

    @classmethod
    def parse(cls, name: Keep | str) -> Keep:
        """The level of that name, in lower case; raises UnknownNameError."""
        if isinstance(name, Keep):
            return name
        names = {level.name.lower(): level for level in cls}
        if name not in names:
            raise UnknownNameError("keep", name, names)
        return names[name]


@dataclass(frozen=True)
class TrainingMemory:
    """What a training step holds, in bytes. The gradients come as the activations go, so the peak is below the sum."""

    weights: int  # with bf16, its copies in that precision too
    gradients: int
    optimizer: int
    ema: int
    images: int
    activations: int  # kept when the backward pass begins
    peak: int  # of the sum


@dataclass(frozen=True)
class SegmentMemory:
    """Equal segments in a row, in elements per image."""

    count: int
    params: int
    kept: int  # by each of them
    working: int  # what its backward pass holds in addition
    recomputed: int  # what the next segment holds when it computes the last one's output again


def inference_memory(network: NetworkSpec | Shape) -> int:
    """Bytes of weights, one image and the feature maps alive at the worst moment, fp32.

    As eager torch runs it in eval mode without gradients: a block's input waits for the shortcut, the stage's input for
    its end, and batch normalisation reads one map while it writes the next.
    """
    shape = _shape(network)
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
        peaks.append((waiting + entered + _largest(steps)) * (run.count > 0))
    peaks.append(shape.final_size**2 * (shape.features + 2 * shape.head_channels * shape.head))
    return FLOAT * (total_cost(shape).params + shape.in_channels * shape.resolution**2 + _largest(peaks))


def file_bytes(network: NetworkSpec | Shape) -> int:
    """At most the bytes of the network's weights in a bundle: a safetensors file of fp32 tensors and their names."""
    shape = _shape(network)
    channels, layers, squeezes = shape.stem_channels + shape.head_channels * shape.head, 1 + shape.head, 0
    for run in shape.runs:
        channels = channels + run.count * sum(layer.outputs for layer in run.block.layers)
        layers = layers + run.count * len(run.block.layers)
        squeezes = squeezes + run.count * (run.block.squeeze_channels > 0)
    tensors = 6 * layers + 4 * squeezes + 2  # each layer: a weight, and normalisation's four vectors and counter
    return FLOAT * (total_cost(shape).params + 2 * channels) + COUNTER * layers + TENSOR_ENTRY * tensors


def training_memory(
    network: NetworkSpec | Shape,
    batch: int,
    *,
    optimizer: str = "rmsprop",
    ema: bool = True,
    precision: Precision = "fp32",
    plan: Mapping[str, Keep] | Keep | None = None,
) -> TrainingMemory:
    """What a training step of `batch` images holds.

    Args:
        network: one network, or the shape of many.
        batch: images per step.
        optimizer: "sgd" (without momentum), "momentum", "rmsprop" (with momentum, as the paper), "adam", "adamw".
        ema: whether a moving average of the weights is kept.
        precision: "bf16" halves the activations; weights, gradients and states stay fp32.
        plan: what each segment keeps (a RecomputePlan; for one network), or one level for all; None keeps everything.

    Raises:
        ArgumentError: a value is outside its range or unknown, or the network cannot follow the plan.
    """
    batch = positive_int("batch", batch)
    one_of("precision", precision, Precision)
    if optimizer not in OPTIMIZERS:
        raise UnknownNameError("optimizer", optimizer, OPTIMIZERS)
    shape = _shape(network)
    segments = segment_memories(network, plan)
    params, element = total_cost(shape).params, ACTIVATION[precision]
    copies = 0 if precision == "fp32" else element * params
    images = FLOAT * batch * shape.in_channels * shape.resolution**2
    states = OPTIMIZERS[optimizer], int(ema)
    cast = 0 if precision == "fp32" else images * element // FLOAT  # the stem's convolution keeps its own copy
    fixed = FLOAT * params * (1 + sum(states)) + copies + images
    return TrainingMemory(
        weights=FLOAT * params + copies,
        gradients=FLOAT * params,
        optimizer=FLOAT * params * states[0],
        ema=FLOAT * params * states[1],
        images=images,
        activations=element * batch * sum(each.count * each.kept for each in segments) + cast,
        peak=fixed + cast + _peak(segments, element * batch),
    )


def kept_per_image(network: NetworkSpec | Shape) -> int:
    """Bytes that one more image of the batch costs in training: itself and what is kept of it, fp32, without a plan."""
    shape = _shape(network)
    kept = sum(each.count * each.kept for each in segment_memories(shape, None))
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


def segment_memories(network: NetworkSpec | Shape, plan: Mapping[str, Keep] | Keep | None) -> list[SegmentMemory]:
    """Stem, blocks (with a plan each by itself) and head."""
    shape = _shape(network)
    if isinstance(plan, Mapping):
        if not isinstance(network, NetworkSpec):
            raise ArgumentError("plan", plan, "is for one network; many can only have the same level everywhere.")
        check_plan(network, plan)
        blocks = [_block(BlockRun(each, 1), plan[each.name], shape.activation) for each in network.blocks]
        return [_stem(shape, plan["stem"]), *blocks, _head(shape, plan["head"])]
    if plan is not None:
        _check_ops(shape)
    blocks = [_block(run, plan, shape.activation) for run in shape.runs]
    return [_stem(shape, plan), *blocks, _head(shape, plan)]


def check_plan(spec: NetworkSpec, plan: Mapping[str, Keep]) -> None:
    """Raise ArgumentError unless the plan has exactly the segments of this network, and all can be recomputed."""
    names = {"stem", "head", *(block.name for block in spec.blocks)}
    if wrong := sorted(names ^ plan.keys()):
        raise ArgumentError("plan", wrong[0], f"is in only one of the plan and the network {spec.name}.")
    _check_ops(spec.shape)


def keeps_output(block: BlockSpec, layer: Layer, keep: Keep) -> bool:
    """Whether the output of this convolution is kept: of the last always, the ones before from the next levels on."""
    names = [each.name for each in block.path]
    distance = 0 if layer.shortcut else len(names) - 1 - names.index(layer.name)
    return keep >= min(distance, Keep.CONVOLUTIONS)


def _stem(shape: Shape, keep: Keep | None) -> SegmentMemory:
    """The stem: convolution, normalisation, activation. Its input is the image, which is counted elsewhere."""
    elements = shape.stem_channels * shape.stem_size**2
    params = shape.stem_channels * (shape.stem_kernel**2 * shape.in_channels + 2)
    if keep is None or keep is Keep.ACTIVATIONS:
        kept, recomputed = (_maps_without_plan(shape.activation) if keep is None else 2), 0
    else:
        kept, recomputed = (0, 2) if keep is Keep.BOTTLENECKS else (1, 1)
    working = (2 if kept else 3) * elements
    if not shape.stem_pool:
        return SegmentMemory(1, params, kept * elements, working, recomputed * elements)
    # Pooling reads the activation itself, and remembers the place of each of its outputs
    pooled = shape.stem_channels * strided_size(shape.stem_size, 2) ** 2
    return SegmentMemory(1, params, (kept + (recomputed > 0)) * elements + pooled * (1 + COUNTER // FLOAT), working, 0)


def _head(shape: Shape, keep: Keep | None) -> SegmentMemory:
    """Head and classifier. Pooling reads no values, so nothing keeps the map before it."""
    elements = shape.head_channels * shape.final_size**2
    classifier = (shape.head_channels + 1) * shape.num_classes
    if not shape.head:
        kept = 2 * shape.head_channels - _kept_for_next(shape.runs[-1].block, keep, shape.activation)
        return SegmentMemory(1, classifier, kept, elements, 0)
    kept = _maps_without_plan(shape.activation) - 1 if keep is None else int(keep > Keep.BOTTLENECKS)
    params = shape.head_channels * (shape.features + 2) + classifier
    return SegmentMemory(1, params, kept * elements + 2 * shape.head_channels, (2 if kept else 3) * elements, 0)


def _block(run: BlockRun, keep: Keep | None, activation: Activation) -> SegmentMemory:
    """Equal blocks; the module's docstring has the table."""
    block = run.block
    full = keep is None or keep is Keep.ACTIVATIONS
    squeezes = block.squeeze_channels > 0
    scaled = block.scaled_channels * block.path[-1].input_size ** 2
    kept = (2 * (block.squeeze_channels + block.scaled_channels) + scaled * full) * squeezes
    for layer in block.layers:
        kept = kept + layer.elements * _kept_maps(block, layer, keep, activation)
    summed, read = OPS[block.op].activates_sum, _kept_for_next(block, keep, activation)
    if summed or not block.path[-1].activation:  # else the output is the last layer's, which is counted
        kept = kept + read + block.output_elements * summed
    recomputed = 0 if summed else block.output_elements - read
    return SegmentMemory(
        run.count, block_cost(block).params, kept, _working_elements(block, keep, activation), recomputed
    )


def _shape(network: NetworkSpec | Shape) -> Shape:
    return network.shape if isinstance(network, NetworkSpec) else network


def _check_ops(shape: Shape) -> None:
    for block in (run.block for run in shape.runs):
        if not OPS[block.op].recomputes:
            raise ArgumentError("plan", block.name, f"is a {block.op} block, which cannot be recomputed.")


def _maps_without_plan(activation: Activation) -> int:
    """Maps that a layer keeps without a plan: convolved, normalised, activated; relu writes over the second one."""
    return 2 if activation == "relu" else 3


def _kept_maps(block: BlockSpec, layer: Layer, keep: Keep | None, activation: Activation) -> int:
    """How many maps of a layer are kept, its output among them where it has an activation."""
    if keep is None:
        return _maps_without_plan(activation) if layer.activation else 1
    if keep is Keep.ACTIVATIONS:
        return 2 if layer.activation else 1
    return int(keeps_output(block, layer, keep))


def _kept_for_next(block: BlockSpec, keep: Keep | None, activation: Activation) -> int:
    """Elements of a block's output that are kept only because the next segment reads them."""
    full = keep is None or keep is Keep.ACTIVATIONS
    if OPS[block.op].activates_sum:
        return block.output_elements * (activation != "relu")
    if block.path[-1].activation:
        return block.output_elements * (full and not (keep is None and activation == "relu"))
    return block.output_elements * (full or 1 * block.has_shortcut)


def _working_elements(block: BlockSpec, keep: Keep | None, activation: Activation) -> int:
    """What the backward pass of a block holds in addition to what is kept, at its worst moment."""
    path = block.path
    if len(path) < 2 or not path[-2].depthwise or path[-1].activation:
        maps = [block.in_channels * block.input_size**2, *(layer.elements for layer in block.layers)]
        return block.output_elements + 2 * _largest(maps)  # at most, with a layer's two maps
    # Of an inverted bottleneck two moments can be the worst
    full = keep is None or keep is Keep.ACTIVATIONS
    wide, expanded = path[-2], path[0].elements if len(path) > 2 else 0
    product = wide.elements * (block.squeeze_channels > 0)
    kept = wide.elements * _kept_maps(block, wide, keep, activation) + product * full
    passed = 2 * wide.elements + product * (1 if full else 2)  # gradients on their way through squeeze-and-excitation
    if keep is Keep.BOTTLENECKS:
        passed = passed + wide.elements + 2 * expanded
    # the depthwise convolution's, when all that lies behind it is gone
    behind = wide.elements - kept - block.output_elements
    return _largest((passed, behind + (2 if keep is None or keep >= Keep.CONVOLUTIONS else 3) * expanded))


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
    return _largest(moments)


def _largest(values: Iterable[int]) -> int:
    """The largest value, for each network where there are many."""
    return functools.reduce(lambda a, b: np.maximum(a, b) if isinstance(a + b, np.ndarray) else max(a, b), values)
