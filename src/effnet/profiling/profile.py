"""Measured time of one network, block by block, beside its multiply-adds.

Multiply-adds say how much arithmetic there is, not how long a processor takes for it: this shows where the time goes.
Everything runs eagerly in float32 on the processor, in eval mode. Weights may be random: time does not depend on them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effnet.arch.spec import NetworkSpec
from effnet.arch.table import Row, block_rows
from effnet.fields import positive_int
from effnet.metrics.conditions import Conditions, random_images, torch_threads
from effnet.metrics.timing import Progress, Timing, measure, seconds, time_rounds
from effnet.models.efficientnet import EfficientNet


@dataclass(frozen=True)
class BlockTime:
    """A block, what it has to do for the whole batch, and how long that took."""

    row: Row
    batch: int
    time: Timing

    @property
    def macs(self) -> int:
        """Multiply-adds of the batch."""
        return self.row.cost.macs * self.batch

    @property
    def bytes(self) -> int:
        """The least that moves: each weight is read once, each activation written once and read once, in float32."""
        return 4 * (self.row.cost.params + 2 * self.row.cost.activations * self.batch)

    @property
    def gmacs_per_second(self) -> float:
        """Billions of multiply-adds in a second: how well the block uses the processor."""
        return self.macs / self.time.median_ms / 1e6


@dataclass(frozen=True)
class Profile:
    """A network's time, block by block, beside its own time when nobody looks inside."""

    name: str
    resolution: int
    conditions: Conditions
    blocks: tuple[BlockTime, ...]  # stem, each block, head, classifier
    whole: Timing

    @property
    def sum_ms(self) -> float:
        """The blocks' medians, added up."""
        return sum(block.time.median_ms for block in self.blocks)

    @property
    def macs(self) -> int:
        """Multiply-adds of the batch."""
        return sum(block.macs for block in self.blocks)

    def time_share(self, block: BlockTime) -> float:
        """The block's part of `sum_ms`."""
        return block.time.median_ms / self.sum_ms

    def macs_share(self, block: BlockTime) -> float:
        """The block's part of `macs`."""
        return block.macs / self.macs

    def to_dict(self) -> dict[str, Any]:
        """Every figure, and what it was measured on."""
        blocks = [
            {"name": block.row.name, "operator": block.row.operator, "macs": block.macs, "bytes": block.bytes}
            | block.time.to_dict()
            | {"time_share": self.time_share(block), "macs_share": self.macs_share(block)}
            | {"gmacs_per_second": block.gmacs_per_second}
            for block in self.blocks
        ]
        head = {"name": self.name, "resolution": self.resolution, "macs": self.macs} | self.conditions.to_dict()
        return head | {"whole": self.whole.to_dict(), "blocks_sum_ms": self.sum_ms, "blocks": blocks}


def profile(
    network: EfficientNet,
    *,
    batch: int = 1,
    threads: int | None = None,
    runs: int | None = None,
    warmup: int = 2,
    progress: Progress | None = None,
) -> Profile:
    """Time every block of `network`, and the network as a whole, on the processor.

    Each round runs the parts one after the other with a look at the clock between them, then the whole without. The
    network stays as it is: a copy in float32 and channels_last is timed.

    Args:
        network: what to time, at its spec's resolution.
        batch: images that go through together.
        threads: of torch; its present number by default. The present number is back in place afterwards.
        runs: rounds that count; by default as many as fit into 20 seconds, at least 7 and at most 30.
        warmup: rounds before them, which allocate memory and choose kernels.
        progress: called with the number of rounds done and of all, after each round.

    Raises:
        ArgumentError: a number is no positive whole number.
    """
    batch = positive_int("batch", batch)
    network = copy.deepcopy(network).to("cpu", torch.float32).to(memory_format=torch.channels_last).eval()
    images = random_images(batch, network.spec.resolution, network.spec.in_channels)
    parts = _parts(network)

    def turn() -> list[float]:
        laps, x = [], images
        for part in parts:
            started = time.perf_counter()
            x = part(x)
            laps.append(time.perf_counter() - started)
        return [*laps, seconds(lambda: network(images))]

    with torch_threads(threads):
        conditions = Conditions.now(batch, "channels_last")
        *laps, whole = time_rounds(turn, runs=runs, warmup=warmup, progress=progress)
    rows = block_rows(network.spec)
    blocks = tuple(BlockTime(row, batch, lap) for row, lap in zip(rows, laps, strict=True))
    return Profile(network.spec.name, network.spec.resolution, conditions, blocks, whole)


def time_image(spec: NetworkSpec, *, threads: int | None = None, runs: int = 15) -> Timing:
    """How long a network of random weights takes for one image: eval mode, channels_last, float32.

    Raises:
        ArgumentError: `threads` or `runs` is no positive whole number.
    """
    network = EfficientNet(spec).eval().to(memory_format=torch.channels_last)
    image = random_images(1, spec.resolution, spec.in_channels)
    with torch_threads(threads):
        return measure(lambda: network(image), runs=runs, warmup=3)


def _parts(network: EfficientNet) -> list[Callable[[Tensor], Tensor]]:
    """The parts of `block_rows`, in their order."""
    blocks = (network.get_submodule(block.name) for block in network.spec.blocks)
    classify = nn.Sequential(network.pool, nn.Flatten(1), network.dropout, network.classifier).eval()
    return [nn.Sequential(network.stem, network.stem_pool), *blocks, network.head, classify]
