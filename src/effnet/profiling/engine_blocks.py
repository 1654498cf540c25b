"""The time of each block inside an engine: OpenVINO and ONNX Runtime say how long every node of a graph took.

The nodes are named after the layers that they compute (graph.py); what an engine adds, such as a change of memory
layout, belongs to the block before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from effnet.arch.spec import NetworkSpec
from effnet.arch.table import block_rows
from effnet.errors import ArgumentError
from effnet.machine import this_machine
from effnet.metrics.conditions import Conditions
from effnet.metrics.timing import Progress, Timing, seconds, time_rounds
from effnet.profiling.profile import BlockTime, Profile
from effnet.runtime.artifact import open_artifact
from effnet.runtime.choice import version_of
from effnet.runtime.engines import NAMES, EngineName, Precision, Way, compiler, network_of
from effnet.runtime.latency import fresh

WARMUP = 2


def of_network(
    spec: NetworkSpec,
    *,
    engine: EngineName,
    precision: Precision = "fp32",
    batch: int = 1,
    threads: int | None = None,
    **how: Any,
) -> Profile:
    """The time of each block of a network of random weights in OpenVINO or ONNX Runtime.

    Args:
        spec: the network.
        engine: openvino or onnxruntime.
        precision: fp32, or bf16, which is OpenVINO's alone.
        batch: images that go through together.
        threads: that the engine may use; None: one for each core.
        how: `runs` that count, and `progress`; see analysis.profile.

    Raises:
        ArgumentError: a value is outside its range.
        MissingExtraError: the engine is not installed.
    """
    way, network = Way(engine, precision), network_of(fresh(spec))
    plain, recording = (compiler(network, way, threads=threads, recording=each)(batch) for each in (False, True))
    return _measure(spec, way, plain, recording, batch, threads, **how)


def of_artifact(
    model: str | Path,
    *,
    engine: EngineName | None = None,
    precision: Precision | None = None,
    batch: int | None = None,
    threads: int | None = None,
    **how: Any,
) -> Profile:
    """The same of an artifact, by its own engine or another one that knows its format.

    Raises:
        ArgumentError: a value is outside its range, or torch runs it, which says nothing of its nodes.
        ArtifactError: it is damaged, or effnet did not write it.
        MissingExtraError: the engine is not installed.
    """
    artifact = open_artifact(model, threads=threads)
    way, own = artifact.way(engine, precision), artifact.form.batch
    if way.engine == "torch":
        raise ArgumentError(
            "model", str(model), "is torch's program, which says nothing of its blocks; name its bundle."
        )
    if batch not in (None, own) and own is not None:
        raise ArgumentError("batch", batch, f"cannot be chosen: {model} was exported for {own}.")
    plain, recording = (artifact.session(way, recording=each) for each in (False, True))
    return _measure(artifact.config.spec, way, plain, recording, own or batch or 1, threads, **how)


def _measure(
    spec: NetworkSpec,
    way: Way,
    plain: Any,
    recording: Any,
    batch: int,
    threads: int | None,
    *,
    runs: int | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Rounds of a session that records its nodes and one that does not, which is what counts as the whole."""
    shape = batch, spec.resolution, spec.resolution, spec.in_channels
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def turn() -> list[float]:
        recording(pixels)
        return [seconds(lambda: plain(pixels))]

    (whole,) = time_rounds(turn, runs=runs, warmup=WARMUP, progress=progress)
    rows = block_rows(spec)
    laps = [_by_block(nodes, [row.name for row in rows]) for nodes in recording.recorded()[WARMUP:]]
    blocks = tuple(BlockTime(row, batch, Timing(tuple(lap[row.name] for lap in laps))) for row in rows)
    versions = (f"{NAMES[way.engine]} {version_of(way.engine)}",)
    used = threads or this_machine().cores
    return Profile(
        spec.name, spec.resolution, Conditions.of(used, batch, "uint8", versions, way.precision), blocks, whole
    )


def _by_block(nodes: Iterable[tuple[str, float]], blocks: Iterable[str]) -> Mapping[str, float]:
    """The seconds of each block; the first one's are also those of the pixels."""
    found = dict.fromkeys(blocks, 0.0)
    here = next(iter(found))
    for name, taken in nodes:
        pieces = name.split(".")
        owner = next((".".join(pieces[:size]) for size in (3, 1) if ".".join(pieces[:size]) in found), here)
        here = owner
        found[owner] += taken
    return found
