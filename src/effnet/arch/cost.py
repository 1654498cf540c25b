"""A network's costs in closed form from its spec, and the paper's Table 1 for any network with the cost of each row.

- `macs` are multiply-adds, one each, of convolutions and fully connected layers: what the paper calls FLOPS.
- `flops` count the multiplication and the addition: twice the macs.
- `activations` are the elements that convolutions write, squeeze-and-excitation's included (Radosavovic et al. 2020).
- `params` are all learned parameters. Batch normalisation's running statistics are buffers and do not count.

All are per image at the network's resolution. Batch normalisation, activation functions, pooling and products have no
multiply-adds here, as in the paper; fvcore counts batch normalisation, which is why timm's tables show 3 % more for B0.
The table shows the stride of each stage's first block, which the paper leaves to the resolutions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effnet.arch.blocks import OPS, BlockSpec, Shape
from effnet.arch.spec import NetworkSpec
from effnet.errors import ArgumentError


@dataclass(frozen=True)
class Cost:
    """The cost of a network, or of a stage, block or layer of it, for one image."""

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
    """The cost of a network, in total, by stage and by block; stages and blocks each add up to the total."""

    stages: tuple[Cost, ...]  # the paper's nine: stem, seven of blocks, head with classifier
    blocks: tuple[Cost, ...]  # stem, each block, head (zero if there is none), classifier

    def to_dict(self) -> dict[str, Any]:
        """The numbers under the names of the attributes, stages and blocks included."""
        rows = {name: [row.to_dict() for row in getattr(self, name)] for name in ("stages", "blocks")}
        return super().to_dict() | rows


@dataclass(frozen=True)
class StageRow:
    """A stage or a block."""

    name: str  # the stage's number, or the block's path in the module
    operator: str  # as the paper writes it: MBConv6, k5x5
    input_size: int  # height and width of the input in pixels
    channels: int  # of the output
    layers: int
    stride: int  # of the first layer
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        """The columns under the names of the attributes, costs among them."""
        columns = {name: value for name, value in vars(self).items() if name != "cost"}
        return self.cost.to_dict() | columns


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
    all_blocks = (stem, *blocks, head, classifier)
    return NetworkCost(**vars(_sum(spec.name, *all_blocks)), stages=stages, blocks=all_blocks)


def total_cost(shape: Shape) -> Cost:
    """The total cost of one shape, or of many at once."""
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


def stage_rows(spec: NetworkSpec) -> tuple[StageRow, ...]:
    """The stages of `spec`, 1 to 9 for the family."""
    firsts = [block for block in spec.blocks if block.index == 0]
    stages = cost(spec).stages
    rows = [_stem_row("1", spec, stages[0])]
    for block, layers, price in zip(firsts, spec.layers, stages[1:-1], strict=True):
        rows.append(_block_row(str(block.stage), block, layers, price))
    head = "Conv1x1 & Pooling & FC" if spec.head else "Pooling & FC"
    rows.append(StageRow(str(len(stages)), head, spec.final_size, spec.head_channels, 1, 1, stages[-1]))
    return tuple(rows)


def block_rows(spec: NetworkSpec) -> tuple[StageRow, ...]:
    """The stem, every block, the head and the classifier of `spec`."""
    stem, *blocks, head, classifier = cost(spec).blocks
    rows = [_stem_row("stem", spec, stem)]
    rows += [_block_row(block.name, block, 1, price) for block, price in zip(spec.blocks, blocks, strict=True)]
    rows.append(StageRow("head", "Conv1x1" if spec.head else "none", spec.final_size, spec.head_channels, 1, 1, head))
    rows.append(StageRow("classifier", "Pooling & FC", spec.final_size, spec.num_classes, 1, 1, classifier))
    return tuple(rows)


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


def _times(count: int, each: Cost) -> Cost:
    return Cost(each.name, count * each.params, count * each.macs, count * each.activations)


def _sum(name: str, *costs: Cost) -> Cost:
    numbers = ((each.params, each.macs, each.activations) for each in costs)
    return Cost(name, *map(sum, zip(*numbers, strict=True)))


def _stem_row(name: str, spec: NetworkSpec, price: Cost) -> StageRow:
    operator = f"Conv{spec.stem_kernel}x{spec.stem_kernel}" + (" & MaxPool" if spec.stem_pool else "")
    return StageRow(name, operator, spec.resolution, spec.stem_channels, 1, spec.stem_stride, price)


def _block_row(name: str, block: BlockSpec, layers: int, price: Cost) -> StageRow:
    return StageRow(name, OPS[block.op].title(block), block.input_size, block.out_channels, layers, block.stride, price)
