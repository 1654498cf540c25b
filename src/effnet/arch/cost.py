"""What a network costs, in closed form from its spec: no module is built and no tensor allocated.

- `macs` are multiply-adds, one each, of convolutions and fully connected layers: what the paper calls FLOPS.
- `flops` count the multiplication and the addition: twice the macs.
- `activations` are the elements that convolutions write, squeeze-and-excitation's included (Radosavovic et al. 2020).
- `params` are all learned numbers. Batch normalisation's running statistics are buffers and do not count.

All are per image at the network's resolution. Batch normalisation, activation functions, pooling and products have no
multiply-adds here, as in the paper; fvcore counts batch normalisation, which is why timm's tables show 3 % more for B0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effnet.arch.blocks import BlockSpec, Shape
from effnet.arch.spec import NetworkSpec
from effnet.errors import ArgumentError


@dataclass(frozen=True)
class Cost:
    """The cost of a part of a network for one image."""

    name: str
    params: int
    macs: int
    activations: int

    @property
    def flops(self) -> int:
        """Multiplications and additions: twice the macs."""
        return 2 * self.macs

    def to_dict(self) -> dict[str, Any]:
        """The numbers under the names of the attributes."""
        return {**vars(self), "flops": self.flops}


@dataclass(frozen=True)
class NetworkCost(Cost):
    """The cost of a network, in total and in its parts; either kind of part adds up to the total."""

    stages: tuple[Cost, ...]  # the paper's nine: stem, seven of blocks, head with classifier
    blocks: tuple[Cost, ...]  # stem, each block, head (of nothing, where there is none), classifier

    def to_dict(self) -> dict[str, Any]:
        """The numbers under the names of the attributes, parts included."""
        parts = {name: [part.to_dict() for part in getattr(self, name)] for name in ("stages", "blocks")}
        return super().to_dict() | parts


def cost(spec: NetworkSpec) -> NetworkCost:
    """The cost of `spec` at its resolution, per block, per stage and in total.

    Raises:
        ArgumentError: `spec` is not a NetworkSpec.
    """
    if not isinstance(spec, NetworkSpec):
        raise ArgumentError("spec", spec, "must be a NetworkSpec; effnet.spec('b0') makes one.")
    stem, head, classifier = _stem(spec.shape), _head(spec.shape), _classifier(spec.shape)
    blocks = [block_cost(block) for block in spec.blocks]

    rows = [[stem], *([] for _ in spec.stages), [head, classifier]]
    for block, price in zip(spec.blocks, blocks, strict=True):
        rows[block.stage - 1].append(price)
    stages = tuple(_sum(f"stage{number}", *row) for number, row in enumerate(rows, start=1))
    parts = (stem, *blocks, head, classifier)
    return NetworkCost(**vars(_sum(spec.name, *parts)), stages=stages, blocks=parts)


def total_cost(shape: Shape) -> Cost:
    """The cost in total, of one shape or of many at once."""
    runs = (_times(run.count, block_cost(run.block)) for run in shape.runs)
    return _sum("", _stem(shape), *runs, _head(shape), _classifier(shape))


def block_cost(block: BlockSpec) -> Cost:
    """A block: its convolutions, and squeeze-and-excitation."""
    layers = [
        _convolution(1 if layer.depthwise else layer.inputs, layer.outputs, layer.kernel_size, layer.output_size)
        for layer in block.layers
    ]
    scaled, squeezed = block.scaled_channels, block.squeeze_channels
    weights = scaled * squeezed  # two layers on a 1 x 1 map, with biases
    outputs = squeezed + scaled * (squeezed > 0)
    return _sum(block.name, *layers, Cost("", 2 * weights + outputs, 2 * weights, outputs))


def _stem(shape: Shape) -> Cost:
    return _sum("stem", _convolution(shape.in_channels, shape.stem_channels, shape.stem_kernel, shape.stem_size))


def _head(shape: Shape) -> Cost:
    if not shape.head:
        return Cost("head", 0, 0, 0)
    return _sum("head", _convolution(shape.features, shape.head_channels, 1, shape.final_size))


def _classifier(shape: Shape) -> Cost:
    weights = shape.head_channels * shape.num_classes
    return Cost("classifier", weights + shape.num_classes, weights, 0)


def _convolution(inputs: int, outputs: int, kernel: int, size: int) -> Cost:
    """A convolution and its normalisation: `inputs` channels per output (1: depthwise), size x size outputs."""
    weights = inputs * outputs * kernel**2
    return Cost("", weights + 2 * outputs, weights * size**2, outputs * size**2)


def _times(count: int, part: Cost) -> Cost:
    return Cost(part.name, count * part.params, count * part.macs, count * part.activations)


def _sum(name: str, *parts: Cost) -> Cost:
    numbers = ((part.params, part.macs, part.activations) for part in parts)
    return Cost(name, *map(sum, zip(*numbers, strict=True)))
