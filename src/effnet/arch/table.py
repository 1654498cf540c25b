"""Table 1 of the paper for any network: its stages or blocks as rows, with what each costs.

Departure from the paper: the stride of each stage's first block is shown, too; the paper leaves it to the resolutions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effnet.arch.blocks import OPS, BlockSpec
from effnet.arch.cost import Cost, cost
from effnet.arch.spec import NetworkSpec


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


def _stem_row(name: str, spec: NetworkSpec, price: Cost) -> StageRow:
    operator = f"Conv{spec.stem_kernel}x{spec.stem_kernel}" + (" & MaxPool" if spec.stem_pool else "")
    return StageRow(name, operator, spec.resolution, spec.stem_channels, 1, spec.stem_stride, price)


def _block_row(name: str, block: BlockSpec, layers: int, price: Cost) -> StageRow:
    return StageRow(name, OPS[block.op].title(block), block.input_size, block.out_channels, layers, block.stride, price)
