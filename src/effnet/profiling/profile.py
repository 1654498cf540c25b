"""Time and multiply-adds of each block of a network, in torch, OpenVINO or ONNX Runtime.

Multiply-adds count arithmetic; a profile shows where the time goes. Weights are random if MODEL has none, since time
does not depend on their values.

torch runs the blocks eagerly in float32, one after the other, and is timed between them. The engines report the time
of each node of their graph. Nodes are named after the layers that they compute (runtime/graph.py); nodes that an engine
adds, such as a change of memory layout, count for the block before them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effnet.arch.cost import StageRow, block_rows
from effnet.arch.spec import NetworkSpec
from effnet.errors import ArgumentError
from effnet.fields import positive_int
from effnet.machine import this_machine
from effnet.metrics.timing import Conditions, Timing, random_bundle, random_images, seconds, time_rounds
from effnet.plots.style import BLUE, ORANGE, footnote, picture
from effnet.progress import SILENT, Progress
from effnet.runtime.artifact import Artifact, Model
from effnet.runtime.options import EngineName, EnginePrecision
from effnet.runtime.select import compiler, select, version_of
from effnet.runtime.session import TITLES, Backend

WARMUP = 2  # rounds that allocate memory and choose kernels


@dataclass(frozen=True)
class TimingOptions:
    """How to time a network."""

    batch: int | None = None
    """Batch size. Default: 1, or the batch that an artifact was exported for."""
    threads: int | None = None
    """Threads that the engine may use. Default: the engine's own."""
    runs: int | None = None
    """Timed rounds, after a warm-up. Default: as many as fit into 20 seconds, from 7 to 30."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ArgumentError: a value is not a positive whole number.
        """
        for name in ("batch", "threads", "runs"):
            if (value := getattr(self, name)) is not None:
                positive_int(name, value)


DEFAULTS = TimingOptions()


@dataclass(frozen=True)
class BlockTime:
    """A block, its work for the whole batch, and its time."""

    row: StageRow
    macs: int
    bytes: int  # minimum traffic in float32: each weight read once, each activation written once and read once
    time: Timing

    @property
    def gmacs_per_second(self) -> float:
        """Billions of multiply-adds per second: how well the block uses the processor."""
        return self.macs / self.time.median_ms / 1e6


@dataclass(frozen=True)
class Profile:
    """A network's time block by block, and the time of the whole network without timing between blocks."""

    name: str
    resolution: int
    conditions: Conditions
    blocks: tuple[BlockTime, ...]  # stem, each block, head, classifier
    whole: Timing

    @property
    def sum_ms(self) -> float:
        """Sum of the blocks' medians."""
        return sum(block.time.median_ms for block in self.blocks)

    @property
    def macs(self) -> int:
        """Multiply-adds of the batch."""
        return sum(block.macs for block in self.blocks)

    def time_share(self, block: BlockTime) -> float:
        """The block's share of `sum_ms`."""
        return block.time.median_ms / self.sum_ms

    def macs_share(self, block: BlockTime) -> float:
        """The block's share of `macs`."""
        return block.macs / self.macs

    def to_dict(self) -> dict[str, Any]:
        """Every figure, and the conditions of measuring."""
        blocks = [
            {"name": block.row.name, "operator": block.row.operator, "macs": block.macs, "bytes": block.bytes}
            | {**block.time.to_dict(), "gmacs_per_second": block.gmacs_per_second}
            | {"time_share": self.time_share(block), "macs_share": self.macs_share(block)}
            for block in self.blocks
        ]
        head = {"name": self.name, "resolution": self.resolution, "macs": self.macs} | self.conditions.to_dict()
        return head | {"whole": self.whole.to_dict(), "blocks_sum_ms": self.sum_ms, "blocks": blocks}

    def draw(self, out: Path) -> None:
        """Draw each block's share of the time and its share of the multiply-adds. See `picture` for errors."""
        blocks = self.blocks
        title = f"{self.name}, {self.resolution} px: where {self.sum_ms:.1f} ms and {self.macs / 1e9:.3g} GMACs go"
        with picture(out, 9, 2 + 0.32 * len(blocks), title) as figure:
            axes = figure.subplots()
            for side, colour, label, share in (
                (-0.2, ORANGE, "time", self.time_share),
                (0.2, BLUE, "multiply-adds", self.macs_share),
            ):
                places = [place + side for place in range(len(blocks))]
                axes.barh(places, [100 * share(block) for block in blocks], 0.4, color=colour, label=label)
            axes.set_yticks(
                range(len(blocks)), [f"{block.row.name}   {block.row.operator}" for block in blocks], fontsize=10
            )
            axes.set(xlabel="share, %", ylim=(len(blocks) - 0.4, -0.6))
            axes.grid(visible=False, axis="y")
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
            footnote(figure, str(self.conditions))


def profile(
    model: NetworkSpec | Artifact,
    options: TimingOptions = DEFAULTS,
    *,
    engine: EngineName | None = None,
    precision: EnginePrecision | None = None,
    progress: Progress = SILENT,
) -> Profile:
    """Time every block of a network, and the network as a whole, on the processor.

    Args:
        model: a network, which gets random weights, or an artifact.
        options: batch, threads and rounds.
        engine: by default torch, or an artifact's own engine.
        precision: by default fp32, or an artifact's own precision.
        progress: reports the rounds.

    Raises:
        ArgumentError: the engine does not have this precision, the artifact was exported for another batch, or it is a
            torch.export program.
        MissingExtraError: the engine is not installed.
    """
    if not isinstance(model, Artifact):
        backend = Backend(engine or "torch", precision or "fp32", options.threads)
        if backend.engine == "torch":
            return _profile_torch(model, options, progress)
        return _profile_session(random_bundle(model), backend, options.batch or 1, options, progress)
    selection = select(model.config.spec, engine=engine, precision=precision, threads=options.threads, artifact=model)
    if selection.backend.engine == "torch":
        rule = "is a torch.export program, which does not report the time of its blocks; use its bundle."
        raise ArgumentError("model", str(model.path), rule)
    exported = model.form.batch
    if exported is not None and options.batch not in (None, exported):
        raise ArgumentError("batch", options.batch, f"cannot be chosen: {model.path} was exported for {exported}.")
    return _profile_session(model, selection.backend, exported or options.batch or 1, options, progress)


def _profile_torch(spec: NetworkSpec, options: TimingOptions, progress: Progress) -> Profile:
    """Run the blocks one after the other, then the whole network, in each round."""
    import torch

    from effnet.models.efficientnet import EfficientNet
    from effnet.runtime.torch import torch_threads

    batch = options.batch or 1
    with torch.random.fork_rng(()):  # the program's random numbers stay its own
        network = EfficientNet(spec).eval().to(memory_format=torch.channels_last)
        images = random_images(batch, spec.resolution, spec.in_channels)
    blocks = _blocks(network)

    def run_round() -> list[float]:
        times, x = [], images
        for block in blocks:
            started = time.perf_counter()
            x = block(x)
            times.append(time.perf_counter() - started)
        return [*times, seconds(lambda: network(images))]

    with torch_threads(options.threads):
        conditions = Conditions.now(batch, "channels_last")
        *times, whole = time_rounds(run_round, runs=options.runs, warmup=WARMUP, progress=progress)
    return Profile(spec.name, spec.resolution, conditions, _block_times(spec, batch, times), whole)


def _blocks(network: Any) -> list[Any]:
    """The modules of `block_rows`, in the same order."""
    from torch import nn

    blocks = (network.get_submodule(block.name) for block in network.spec.blocks)
    classify = nn.Sequential(network.pool, nn.Flatten(1), network.dropout, network.classifier).eval()
    return [nn.Sequential(network.stem, network.stem_pool), *blocks, network.head, classify]


def _profile_session(model: Model, backend: Backend, batch: int, options: TimingOptions, progress: Progress) -> Profile:
    """Run a graph that records its nodes, then one that does not, whose time counts as the whole, in each round."""
    spec = model.config.spec
    plain, recording = (compiler(model, backend, recording=each).logits(batch, 1) for each in (False, True))
    shape = batch, spec.resolution, spec.resolution, spec.in_channels
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def run_round() -> list[float]:
        recording(pixels)
        return [seconds(lambda: plain(pixels))]

    (whole,) = time_rounds(run_round, runs=options.runs, warmup=WARMUP, progress=progress)
    names = [row.name for row in block_rows(spec)]
    recorded: Any = recording
    rounds = [_sum_by_block(nodes, names) for nodes in recorded.recorded()[WARMUP:]]
    times = [Timing(tuple(taken[name] for taken in rounds)) for name in names]
    versions = (f"{TITLES[backend.engine]} {version_of(backend.engine)}",)
    threads = options.threads or this_machine().cores
    conditions = Conditions(threads, versions, batch=batch, layout="uint8", dtype=backend.precision)
    return Profile(spec.name, spec.resolution, conditions, _block_times(spec, batch, times), whole)


def _block_times(spec: NetworkSpec, batch: int, times: Sequence[Timing]) -> tuple[BlockTime, ...]:
    return tuple(
        BlockTime(row, row.cost.macs * batch, 4 * (row.cost.params + 2 * row.cost.activations * batch), time)
        for row, time in zip(block_rows(spec), times, strict=True)
    )


def _sum_by_block(nodes: Iterable[tuple[str, float]], blocks: Iterable[str]) -> Mapping[str, float]:
    """Seconds per block; nodes that convert pixels come first and count for the first block."""
    found = dict.fromkeys(blocks, 0.0)
    current = next(iter(found))
    for name, taken in nodes:
        pieces = name.split(".")
        prefixes = (".".join(pieces[:size]) for size in (3, 1))
        current = next((prefix for prefix in prefixes if prefix in found), current)
        found[current] += taken
    return found
