"""What a network holds in memory, in inference and in training, in closed form: nothing is built.

Inference: weights, the image, and the feature maps that are alive together at the worst moment, in eager torch.
Training: weights, gradients, the optimizer's state, the moving average, the images, and what autograd keeps of each
image until the backward pass has read it. That last part is nearly all of it, and it is what a plan saves.

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

What the backward pass holds beside what is kept is the largest sum within a block, so an odd network's peak can be
overestimated (by up to a quarter where one tiny block is everything). Not counted: torch itself, the scratch of a
convolution's kernel, and what the allocator cannot reuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

from effnet.arch.cost import block_cost, total_cost
from effnet.arch.ops import OPS, Layer
from effnet.arch.shape import Activation, BlockSpec, Run, Shape, largest, strided
from effnet.arch.spec import NetworkSpec
from effnet.errors import ArgumentError, UnknownNameError
from effnet.fields import one_of, positive_int

Precision = Literal["fp32", "bf16"]

FLOAT = 4  # bytes of a weight, a gradient or a state, in either precision
ACTIVATION = {"fp32": 4, "bf16": 2}  # bytes of an element of a feature map
COUNTER = 8  # bytes of a normalisation's counter of batches
TENSOR_ENTRY = 144  # bytes, at most, of a tensor's name, type, shape and place in a safetensors file
# Numbers that an optimizer of torch remembers for every weight
OPTIMIZERS = {"sgd": 0, "momentum": 1, "rmsprop": 2, "adam": 2, "adamw": 2}


class Keep(IntEnum):
    """What a part keeps of its forward pass for the backward pass: each level what the ones below it keep, and more."""

    BOTTLENECKS = 0  # its input and the output of its project convolution; stem and head: only the input
    DEPTHWISE = 1  # the output of the depthwise convolution
    CONVOLUTIONS = 2  # the output of the expand convolution; stem and head: of their only one
    ACTIVATIONS = 3  # the outputs of activations and of squeeze-and-excitation


@dataclass(frozen=True)
class Plan:
    """How much each part of a network keeps: the stem, each block by its name, and the head."""

    keeps: Mapping[str, Keep]

    @classmethod
    def uniform(cls, spec: NetworkSpec, keep: Keep | str) -> Plan:
        """The same level everywhere.

        Raises:
            UnknownNameError: no level has that name.
        """
        names = ("stem", *(block.name for block in spec.blocks), "head")
        return cls(dict.fromkeys(names, level(keep)))

    def to_dict(self) -> dict[str, str]:
        """The parts and the names of their levels."""
        return {name: keep.name.lower() for name, keep in self.keeps.items()}

    def __str__(self) -> str:
        """How many parts have which level, in words."""
        levels = list(self.keeps.values())
        counts = [(keep.name.lower(), levels.count(keep)) for keep in reversed(Keep) if keep in levels]
        return ", ".join(f"{name} {count}" if len(counts) > 1 else name for name, count in counts)


@dataclass(frozen=True)
class TrainingMemory:
    """What a training step holds, in bytes. The gradients come as the activations go, so the peak is below the sum."""

    weights: int  # with bf16, its copies in that precision too
    gradients: int
    optimizer: int
    ema: int
    images: int
    activations: int  # kept when the backward pass begins
    peak: int  # of all together


@dataclass(frozen=True)
class Part:
    """Equal parts in a row, in elements per image."""

    count: int
    params: int
    kept: int  # by each of them
    working: int  # what its backward pass holds beside what is kept
    again: int  # what it takes to compute the last one's output again, for the part behind


def level(keep: Keep | str) -> Keep:
    """The level of that name.

    Raises:
        UnknownNameError: there is none.
    """
    if isinstance(keep, Keep):
        return keep
    names = {each.name.lower(): each for each in Keep}
    if keep not in names:
        raise UnknownNameError("keep", keep, names)
    return names[keep]


def inference_memory(network: NetworkSpec | Shape) -> int:
    """Bytes of weights, one image and the feature maps beside them at the worst moment, fp32.

    As eager torch runs it in eval mode without gradients: a block's input waits for the shortcut, the stage's input for
    its end, and batch normalisation reads one map while it writes the next.
    """
    shape = network.shape if isinstance(network, NetworkSpec) else network
    image = shape.in_channels * shape.resolution**2
    peaks = [2 * shape.stem_channels * shape.stem_size**2]
    waiting = 0
    for run in shape.runs:
        block = run.block
        entered = block.input_size**2 * block.in_channels
        if block.index == 0:
            stage, waiting = entered, 0
        else:
            waiting = stage
        steps, map_ = [], 0
        for layer in block.layers:
            steps.append(map_ + 2 * layer.map)
            map_ = layer.map
        peaks.append((waiting + entered + largest(steps)) * (run.count > 0))
    peaks.append(shape.final_size**2 * (shape.features + 2 * shape.head_channels * shape.head))
    return FLOAT * (total_cost(shape).params + image + largest(peaks))


def file_bytes(network: NetworkSpec | Shape) -> int:
    """At most the bytes of the network's weights in a bundle: a safetensors file of fp32 tensors and their names."""
    shape = network.shape if isinstance(network, NetworkSpec) else network
    channels, layers, squeezes = shape.stem_channels + shape.head_channels * shape.head, 1 + shape.head, 0
    for run in shape.runs:
        channels = channels + run.count * sum(layer.outputs for layer in run.block.layers)
        layers = layers + run.count * len(run.block.layers)
        squeezes = squeezes + run.count * (run.block.squeeze_channels > 0)
    tensors = 6 * layers + 4 * squeezes + 2  # each layer: a filter, and normalisation's four vectors and counter
    return FLOAT * (total_cost(shape).params + 2 * channels) + COUNTER * layers + TENSOR_ENTRY * tensors


def training_memory(
    network: NetworkSpec | Shape,
    batch: int,
    *,
    optimizer: str = "rmsprop",
    ema: bool = True,
    precision: Precision = "fp32",
    plan: Plan | Keep | None = None,
) -> TrainingMemory:
    """What a training step of `batch` images holds.

    Args:
        network: one network, or the shape of many.
        batch: images per step.
        optimizer: "sgd" (without momentum), "momentum", "rmsprop" (with momentum, as the paper), "adam", "adamw".
        ema: whether a moving average of the weights is kept.
        precision: "bf16" halves the activations; weights, gradients and states stay fp32.
        plan: what is kept of each part (one network), or the same level everywhere; None keeps everything.

    Raises:
        ArgumentError: a value is outside its range or unknown, or the plan is another network's.
    """
    batch = positive_int("batch", batch)
    one_of("precision", precision, Precision)
    if optimizer not in OPTIMIZERS:
        raise UnknownNameError("optimizer", optimizer, OPTIMIZERS)
    shape = network.shape if isinstance(network, NetworkSpec) else network
    parts = _planned(network, plan) if isinstance(plan, Plan) else _alike(shape, plan)
    params, element = total_cost(shape).params, ACTIVATION[precision]
    copies = 0 if precision == "fp32" else element * params
    images = FLOAT * batch * shape.in_channels * shape.resolution**2
    states = OPTIMIZERS[optimizer], int(ema)
    cast = 0 if precision == "fp32" else images * element // FLOAT  # the stem's convolution keeps its own copy
    activations = element * batch * sum(part.count * part.kept for part in parts) + cast
    fixed = FLOAT * params * (1 + sum(states)) + copies + images
    return TrainingMemory(
        weights=FLOAT * params + copies,
        gradients=FLOAT * params,
        optimizer=FLOAT * params * states[0],
        ema=FLOAT * params * states[1],
        images=images,
        activations=activations,
        peak=fixed + cast + _peak(parts, element * batch),
    )


def kept_per_image(network: NetworkSpec | Shape) -> int:
    """Bytes that one more image of the batch costs in training: itself and what is kept of it, fp32, without a plan."""
    shape = network.shape if isinstance(network, NetworkSpec) else network
    elements = shape.in_channels * shape.resolution**2 + sum(part.count * part.kept for part in _alike(shape, None))
    return FLOAT * elements


def largest_batch(spec: NetworkSpec, limit: int, **how: Any) -> int:
    """The most images per step whose training memory stays within `limit` bytes; 0 if not even one fits.

    `how` are the keyword arguments of training_memory.
    """

    def fits(batch: int) -> bool:
        return training_memory(spec, batch, **how).peak <= limit

    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def stem_part(shape: Shape, keep: Keep | None) -> Part:
    """The stem: convolution, normalisation, activation. Its input is the image, which is counted elsewhere."""
    map_ = shape.stem_channels * shape.stem_size**2
    kept = {None: _copies(shape.activation), Keep.ACTIVATIONS: 2, Keep.CONVOLUTIONS: 1, Keep.DEPTHWISE: 1}.get(keep, 0)
    params = shape.stem_channels * (shape.stem_kernel**2 * shape.in_channels + 2)
    again = {None: 0, Keep.ACTIVATIONS: 0, Keep.CONVOLUTIONS: 1, Keep.DEPTHWISE: 1}.get(keep, 2)
    working = (2 if kept else 3) * map_
    if not shape.stem_pool:
        return Part(1, params, kept * map_, working, again * map_)
    # Pooling reads the activation itself, and remembers a place of eight bytes for each of its outputs
    pooled = shape.stem_channels * strided(shape.stem_size, 2) ** 2
    return Part(1, params, (kept + (again > 0)) * map_ + pooled * (1 + COUNTER // FLOAT), working, 0)


def head_part(shape: Shape, keep: Keep | None) -> Part:
    """Head and classifier. Pooling reads no values, so the map before it is not kept by anybody."""
    map_ = shape.head_channels * shape.final_size**2
    classifier = (shape.head_channels + 1) * shape.num_classes
    if not shape.head:
        last = shape.runs[-1].block
        return Part(1, classifier, 2 * shape.head_channels - _read(last, keep, shape.activation), map_, 0)
    kept = {None: _copies(shape.activation) - 1, Keep.BOTTLENECKS: 0}.get(keep, 1)
    params = shape.head_channels * (shape.features + 2) + classifier
    return Part(1, params, kept * map_ + 2 * shape.head_channels, (2 if kept else 3) * map_, 0)


def block_part(run: Run, keep: Keep | None, activation: Activation) -> Part:
    """Equal blocks; the module's docstring has the table."""
    block = run.block
    wide = block.expanded_channels * block.output_size**2
    squeezes = block.squeeze_channels > 0
    product = wide * squeezes
    kept = 2 * (block.squeeze_channels + block.expanded_channels) * squeezes
    if keep is None or keep is Keep.ACTIVATIONS:
        kept = kept + product
    for layer in block.layers:
        kept = kept + layer.map * _kept(layer, keep, activation)
    narrow, ending = block.out_channels * block.output_size**2, OPS[block.op].ending
    if ending != "activated":  # whose output is its last layer's, which is counted
        kept = kept + _read(block, keep, activation) + narrow * (ending == "sum")
    again = 0 if ending == "sum" else narrow - _read(block, keep, activation)
    working = WORKING.get(block.op, _one_by_one)(block, keep, activation)
    return Part(run.count, block_cost(block).params, kept, largest(working), again)


def _copies(activation: Activation) -> int:
    """Maps that a layer keeps without a plan: convolved, normalised, activated; relu writes over the second one."""
    return 2 if activation == "relu" else 3


def _kept(layer: Layer, keep: Keep | None, activation: Activation) -> int:
    """How many maps of a layer are kept, its output among them where it has an activation."""
    if keep is None:
        return _copies(activation) if layer.activation else 1
    if keep is Keep.ACTIVATIONS:
        return 2 if layer.activation else 1
    return int(keep >= layer.level)


def _read(block: BlockSpec, keep: Keep | None, activation: Activation) -> int:
    """Elements of a block's output that are kept only because the next part reads them."""
    narrow, full = block.out_channels * block.output_size**2, keep is None or keep is Keep.ACTIVATIONS
    return {
        "linear": narrow * (full or 1 * block.has_shortcut),
        "activated": narrow * (full and not (keep is None and activation == "relu")),
        "sum": narrow * (activation != "relu"),
    }[OPS[block.op].ending]


def _one_by_one(block: BlockSpec, keep: Keep | None, activation: Activation) -> tuple[int, ...]:
    """What the backward pass of a block holds beside what is kept, at its worst moment: at most a layer's two maps."""
    del keep, activation
    maps = [block.in_channels * block.input_size**2, *(layer.map for layer in block.layers)]
    return (block.out_channels * block.output_size**2 + 2 * largest(maps),)


def _inverted(block: BlockSpec, keep: Keep | None, activation: Activation) -> tuple[int, ...]:
    """The same of an MBConv, at its two worst moments."""
    narrow = block.out_channels * block.output_size**2
    wide = block.expanded_channels * block.output_size**2
    expand, depthwise = block.layers[0], block.layers[-2]
    expanded = expand.map * (block.expand_ratio != 1)
    product = wide * (block.squeeze_channels > 0)
    kept_wide = depthwise.map * _kept(depthwise, keep, activation)
    if keep is None or keep is Keep.ACTIVATIONS:
        kept_wide = kept_wide + product
    passed = 2 * wide + product  # gradients on their way through squeeze-and-excitation
    behind = wide - kept_wide - narrow  # the depthwise convolution's, when all that lies behind it is gone
    return {
        None: (passed, behind + 2 * expanded),
        Keep.ACTIVATIONS: (passed, behind + 2 * expanded),
        Keep.CONVOLUTIONS: (passed + product, behind + 2 * expanded),
        Keep.DEPTHWISE: (passed + product, behind + 3 * expanded),
        Keep.BOTTLENECKS: (passed + product + wide + 2 * expanded, behind + 3 * expanded),
    }[keep]


WORKING = {"mbconv": _inverted}  # for the kinds of blocks whose worst moments are known better than _one_by_one's


def _alike(shape: Shape, keep: Keep | None) -> list[Part]:
    return [
        stem_part(shape, keep),
        *(block_part(run, keep, shape.activation) for run in shape.runs),
        head_part(shape, keep),
    ]


def _planned(network: NetworkSpec | Shape, plan: Plan) -> list[Part]:
    if not isinstance(network, NetworkSpec):
        raise ArgumentError("plan", plan, "is for one network; many can only have the same level everywhere.")
    check_plan(network, plan)
    blocks = [block_part(Run(block, 1), plan.keeps[block.name], network.activation) for block in network.blocks]
    ends = stem_part(network.shape, plan.keeps["stem"]), head_part(network.shape, plan.keeps["head"])
    return [ends[0], *blocks, ends[1]]


def check_plan(spec: NetworkSpec, plan: Plan) -> None:
    """Raise ArgumentError unless the plan has exactly the parts of this network."""
    names = {"stem", "head", *(block.name for block in spec.blocks)}
    if wrong := sorted(names ^ plan.keeps.keys()):
        raise ArgumentError("plan", wrong[0], f"is a part of only one of the plan and the network {spec.name}.")


def _peak(parts: list[Part], scale: int) -> int:
    """The most bytes of activations and gradients together, as the backward pass goes from the last part to the first.

    `scale`: bytes of one element of each image of the batch.
    """
    moments = []
    kept, again, gradients = 0, 0, sum(part.count * part.params for part in parts)
    for part in parts:
        # Within equal parts the sum changes evenly, so its largest value is at one of their ends.
        first = scale * (kept + part.kept + part.working + again) + FLOAT * gradients
        kept = kept + part.count * part.kept
        gradients = gradients - part.count * part.params
        last = scale * (kept + part.working + again * (part.count == 1)) + FLOAT * (gradients + part.params)
        moments += [first * (part.count > 0), last * (part.count > 0)]
        again = part.again * (part.count > 0) + again * (part.count == 0)
    return largest(moments)
