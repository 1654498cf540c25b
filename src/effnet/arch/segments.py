"""What each segment of a network keeps and holds in a training step, in closed form.

A RecomputePlan divides a network into segments, as the literature of checkpointing calls them: the stem, each block,
and the head.

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
Without squeeze-and-excitation nothing is scaled, so the levels that keep its product keep one D fewer.

That is so where torch's modules compute. The compiled kernels (native/training.h) compute a segment in one step, which
keeps its input and, from the level CONVOLUTIONS on and without a plan, the outputs of its convolutions: E, D and 2 P.
The levels below keep the input only, and the backward pass computes the forward pass again. Of the stem they always
keep the image only.
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

STATISTICS = 4  # numbers that the kernels keep of a normalisation's channel: see native/training.h
FLOAT = 4  # bytes of a weight, a gradient or a state, in either precision
COUNTER = 8  # bytes of a normalisation's counter of batches, and of a place that max pooling remembers


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
class SegmentMemory:
    """Equal segments in a row, in elements per image."""

    count: int
    params: int
    kept: int  # by each of them
    working: int  # what its backward pass holds in addition
    recomputed: int  # what the next segment holds when it computes the last one's output again
    statistics: int = 0  # fp32 numbers that each of them keeps once for all images


def uses_kernels(network: NetworkSpec | Shape, kernels: bool | None = None) -> bool:
    """Whether the compiled kernels train the network's blocks: they know all of them, and compute (`kernels`) on a CPU.

    None: they do if they were compiled and EFFNET_NATIVE does not say otherwise.
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
    """Stem, blocks (with a plan each by itself) and head; `element`: bytes of a map's element."""
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


def _native_stem(shape: Shape, keep: Keep | None) -> SegmentMemory:
    """The stem by the kernels: its convolution is always computed again."""
    elements = shape.stem_channels * shape.stem_size**2
    kept = elements
    if shape.stem_pool:
        kept = kept + shape.stem_channels * strided_size(shape.stem_size, 2) ** 2 * (1 + COUNTER // FLOAT)
    return SegmentMemory(1, _stem(shape, keep).params, kept, elements, 0)


def _native_block(run: BlockRun, keep: Keep | None, activation: Activation, *, element: int) -> SegmentMemory:
    """Equal blocks by the kernels. The backward pass holds a gradient of each map and of the input."""
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
    """Head by the kernels, and classifier."""
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
    """What the backward pass of a block holds in addition to what is kept, at its worst moment."""
    path = block.path
    if len(path) < 2 or not path[-2].depthwise or path[-1].activation:
        maps = [block.in_channels * block.input_size**2, *(layer.elements for layer in block.layers)]
        return block.output_elements + 2 * largest(maps)  # at most, with a layer's two maps
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
    return largest((passed, behind + (2 if keep is None or keep >= Keep.CONVOLUTIONS else 3) * expanded))


def shape_of(network: NetworkSpec | Shape) -> Shape:
    """A network's shape, or the shape itself."""
    return network.shape if isinstance(network, NetworkSpec) else network


def largest(values: Iterable[int]) -> int:
    """The largest value, for each network where there are many."""
    return functools.reduce(lambda a, b: np.maximum(a, b) if isinstance(a + b, np.ndarray) else max(a, b), values)
