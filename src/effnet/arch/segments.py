"""The memory of each segment of a network in a training step, in closed form.

A RecomputePlan divides a network into segments, a term from gradient checkpointing: the stem, each block, and the head.

An MBConv block keeps these feature maps, which the gradients of its steps read: E of the size of its expand
convolution's output, D of the depthwise one's, P of the projected one's.

| level | E | D | P | recomputed in the backward pass |
|---|---|---|---|---|
| no plan | 3 | 4 | 2 | nothing |
| ACTIVATIONS | 2 | 3 | 2 | normalisation |
| CONVOLUTIONS | 1 | 1 | 2 | and activations, squeeze-and-excitation's product |
| DEPTHWISE | 0 | 1 | 2 | and the expand convolution |
| BOTTLENECKS | 0 | 0 | 2 | and the depthwise convolution |

One of the two P is the block's own output, which the next block reads; without a shortcut it is recomputed as well.
Without squeeze-and-excitation nothing is scaled, so the levels that keep its product keep one D less.

That holds for torch's modules. The compiled kernels (native/training.h) compute a segment in one step, which keeps its
input and, without a plan or from the level CONVOLUTIONS on, the outputs of its convolutions: E, D and 2 P. The levels
below keep only the input, and the backward pass recomputes the forward pass. For the stem they always keep only the
image.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from effnet import native
from effnet.arch.blocks import OPS, Activation, BlockRun, BlockSpec, Layer, Shape, strided_size
from effnet.arch.cost import block_cost
from effnet.arch.spec import NetworkSpec
from effnet.errors import ArgumentError, UnknownNameError

STATISTICS = 4  # numbers that the kernels keep per channel of a normalisation: see native/training.h
FLOAT = 4  # bytes of a weight, a gradient or a state, in either precision
COUNTER = 8  # bytes of a normalisation's batch counter, and of an index of max pooling


class Keep(IntEnum):
    """What a segment keeps for the backward pass; each level keeps more than those below it."""

    BOTTLENECKS = 0  # its input and the output of its last convolution; stem and head: only the input
    DEPTHWISE = 1  # and the output of the convolution before, in an MBConv the depthwise one
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
class SegmentMemory:
    """Equal consecutive segments, in elements per image."""

    count: int
    params: int
    kept: int  # per segment
    working: int  # held by its backward pass in addition
    recomputed: int  # held by the next segment when it recomputes this one's output
    statistics: int = 0  # fp32 numbers per segment, independent of the number of images


def uses_kernels(network: NetworkSpec | Shape, kernels: bool | None = None) -> bool:
    """Whether the compiled kernels train the network: they support all its blocks, and `kernels` says to use them.

    None: use them if they were compiled and EFFNET_NATIVE does not disable them.
    """
    blocks = [run.block for run in shape_of(network).runs]
    known = all(
        OPS[each.op].trains and each.kernel_size in native.KERNEL_SIZES and each.stride in native.STRIDES
        for each in blocks
    )
    return known and (native.trains() if kernels is None else kernels)


def segment_memories(
    network: NetworkSpec | Shape, plan: Mapping[str, Keep] | Keep | None, kernels: bool, element: int = FLOAT
) -> list[SegmentMemory]:
    """Stem, blocks (one by one if there is a plan) and head; `element`: bytes of a map's element."""
    shape = shape_of(network)
    native_block = functools.partial(_native_block, element=element)
    stem, block, head = (_native_stem, native_block, _native_head) if kernels else (_stem, _block, _head)
    if isinstance(plan, Mapping):
        if not isinstance(network, NetworkSpec):
            raise ArgumentError("plan", plan, "is for one network; many can only have the same level everywhere.")
        check_plan(network, plan)
        blocks = [block(BlockRun(each, 1), plan[each.name], shape.activation) for each in network.blocks]
        return [stem(shape, plan["stem"]), *blocks, head(shape, plan["head"])]
    if plan is not None:
        _check_ops(shape)
    blocks = [block(run, plan, shape.activation) for run in shape.runs]
    return [stem(shape, plan), *blocks, head(shape, plan)]


def check_plan(spec: NetworkSpec, plan: Mapping[str, Keep]) -> None:
    """Raise ArgumentError unless the plan has exactly the segments of this network, and all can be recomputed."""
    names = {"stem", "head", *(block.name for block in spec.blocks)}
    if wrong := sorted(names ^ plan.keys()):
        raise ArgumentError("plan", wrong[0], f"is in only one of the plan and the network {spec.name}.")
    _check_ops(spec.shape)


def keeps_output(block: BlockSpec, layer: Layer, keep: Keep) -> bool:
    """Whether a convolution's output is kept: the last one's always, earlier ones at higher levels."""
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
    # Pooling keeps the activation, and the index of each of its outputs
    pooled = shape.stem_channels * strided_size(shape.stem_size, 2) ** 2
    return SegmentMemory(1, params, (kept + (recomputed > 0)) * elements + pooled * (1 + COUNTER // FLOAT), working, 0)


def _head(shape: Shape, keep: Keep | None) -> SegmentMemory:
    """Head and classifier. The gradient of pooling reads no values, so the map before it is not kept."""
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


def _native_stem(shape: Shape, keep: Keep | None) -> SegmentMemory:
    """The stem in the kernels, which always recompute its convolution."""
    elements = shape.stem_channels * shape.stem_size**2
    kept = elements
    if shape.stem_pool:
        kept = kept + shape.stem_channels * strided_size(shape.stem_size, 2) ** 2 * (1 + COUNTER // FLOAT)
    return SegmentMemory(1, _stem(shape, keep).params, kept, elements, 0)


def _native_block(run: BlockRun, keep: Keep | None, activation: Activation, *, element: int) -> SegmentMemory:
    """Equal blocks in the kernels. The backward pass holds a gradient of each map and of the input."""
    block = run.block
    maps = [layer.elements for layer in block.layers]
    means = (block.squeeze_channels + 2 * block.scaled_channels) * (block.squeeze_channels > 0)
    inside = sum(maps) + means * FLOAT // element
    again = keep is not None and keep < Keep.CONVOLUTIONS
    working = sum(maps[:-1]) + block.in_channels * block.input_size**2 + inside * again
    kept = block.output_elements + inside * (not again)  # the next segment keeps its input
    statistics = STATISTICS * sum(layer.outputs for layer in block.layers) * (not again)
    return SegmentMemory(run.count, block_cost(block).params, kept, working, 0, statistics)


def _native_head(shape: Shape, keep: Keep | None) -> SegmentMemory:
    """Head in the kernels, and classifier."""
    if not shape.head:  # nothing reads the last block's output
        return dataclasses.replace(
            _head(shape, keep), kept=2 * shape.head_channels - shape.runs[-1].block.output_elements
        )
    again = keep is not None and keep < Keep.CONVOLUTIONS
    elements = shape.head_channels * shape.final_size**2
    working = elements * (1 + again) + shape.features * shape.final_size**2
    kept, statistics = elements * (not again) + 2 * shape.head_channels, STATISTICS * shape.head_channels * (not again)
    return SegmentMemory(1, _head(shape, keep).params, kept, working, 0, statistics)


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
    """The peak of what a block's backward pass holds in addition to what is kept."""
    path = block.path
    if len(path) < 2 or not path[-2].depthwise or path[-1].activation:
        maps = [block.in_channels * block.input_size**2, *(layer.elements for layer in block.layers)]
        return block.output_elements + 2 * largest(maps)  # at most, with a layer's two maps
    # An inverted bottleneck can peak at two moments
    full = keep is None or keep is Keep.ACTIVATIONS
    wide, expanded = path[-2], path[0].elements if len(path) > 2 else 0
    product = wide.elements * (block.squeeze_channels > 0)
    kept = wide.elements * _kept_maps(block, wide, keep, activation) + product * full
    passed = 2 * wide.elements + product * (1 if full else 2)  # gradients on their way through squeeze-and-excitation
    if keep is Keep.BOTTLENECKS:
        passed = passed + wide.elements + 2 * expanded
    # the depthwise convolution's, when all that lies behind it is gone
    behind = wide.elements - kept - block.output_elements
    return largest((passed, behind + (2 if keep is None or keep >= Keep.CONVOLUTIONS else 3) * expanded))


def shape_of(network: NetworkSpec | Shape) -> Shape:
    """A network's shape, or the shape itself."""
    return network.shape if isinstance(network, NetworkSpec) else network


def largest(values: Iterable[int]) -> int:
    """The largest value, per network if there are many."""
    return functools.reduce(lambda a, b: np.maximum(a, b) if isinstance(a + b, np.ndarray) else max(a, b), values)
