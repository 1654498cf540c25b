"""What a bench found: a row for every engine and precision, and what all of it was measured on."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from effnet.benchmarking.cold_start import Start
from effnet.benchmarking.subjects import Kept
from effnet.machine import Machine
from effnet.metrics.intervals import Difference, Interval
from effnet.metrics.timing import Timing
from effnet.runtime.agreement import AGREE
from effnet.runtime.select import Selection
from effnet.runtime.session import Backend


@dataclass(frozen=True)
class Scene:
    """What times depend on beside the network."""

    machine: Machine
    threads: int
    load: float | None  # the system's average over the minute before; None on Windows
    versions: tuple[str, ...]  # torch 2.14.1

    @property
    def crowded(self) -> bool:
        """Whether others kept the cores busy when this began."""
        return self.machine.crowded(self.threads, self.load)

    def to_dict(self) -> dict[str, Any]:
        """The facts under the names of the attributes."""
        facts = {"threads": self.threads, "load": self.load, "crowded": self.crowded, "versions": list(self.versions)}
        return {"machine": self.machine.to_dict(), **facts}

    def __str__(self) -> str:
        words = [f"{self.threads} thread{'' if self.threads == 1 else 's'}", *self.versions]
        words += [] if self.load is None else [f"load {self.load:.1f} before"]
        return f"{self.machine}\n{', '.join(words)}"


@dataclass(frozen=True)
class Lap:
    """How long a way took for a batch."""

    batch: int
    way: Backend  # in which it was fastest
    time: Timing

    @property
    def images_per_second(self) -> float:
        """By the median."""
        return 1e3 * self.batch / self.time.median_ms

    def to_dict(self) -> dict[str, Any]:
        """The figures by name."""
        way = {"streams": self.way.streams, "part": self.way.part or self.batch}
        return {"batch": self.batch, **way, "images_per_second": self.images_per_second, **self.time.to_dict()}


@dataclass(frozen=True)
class Answers:
    """What a way says of the views, beside the reference."""

    difference: float  # largest of a logit
    share: float  # the same, of the reference's largest logit
    same: Interval  # share of the views of which both name the same class


@dataclass(frozen=True)
class Row:
    """All that was measured of a way."""

    way: Backend  # of whole batches
    laps: tuple[Lap, ...] = ()  # one for each batch
    answers: Answers | None = None
    accuracy: Difference | None = None  # a is the reference, b this way; None where there was no data
    kept: Kept | None = None
    starts: tuple[Start, ...] = ()
    problem: str = ""  # why something is missing

    @property
    def start_seconds(self) -> float | None:
        """The median of its starts."""
        return statistics.median(start.seconds for start in self.starts) if self.starts else None

    @property
    def peak_bytes(self) -> int | None:
        """The median of its starts."""
        held = [start.bytes for start in self.starts if start.bytes]
        return round(statistics.median(held)) if held else None

    def lap(self, batch: int) -> Lap | None:
        """How long it took for a batch."""
        return next((lap for lap in self.laps if lap.batch == batch), None)

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values; what is missing is null."""
        answers, accuracy = self.answers, self.accuracy
        return {
            "engine": self.way.engine,
            "precision": self.way.precision,
            "batches": [lap.to_dict() for lap in self.laps],
            "logit_difference": answers and answers.difference,
            "logit_difference_share": answers and answers.share,
            "same_class": answers and answers.same.to_dict(),
            "top1": accuracy and accuracy.accuracy_b.to_dict(),
            "difference": accuracy and accuracy.to_dict(),
            "file_bytes": self.kept and self.kept.bytes,
            "peak_memory_bytes": self.peak_bytes,
            "cold_start_seconds": self.start_seconds,
            "starts": len(self.starts),
            "problem": self.problem or None,
        }


@dataclass(frozen=True)
class Standings:
    """The ways of running a model, side by side."""

    model: str
    resolution: int
    scene: Scene
    batches: tuple[int, ...]  # smallest first
    rows: tuple[Row, ...]
    reference: Backend | None  # whose answers the others' are compared with; None where nothing answered
    views: int  # parts of photos on which they are
    chosen: Mapping[int, Selection]  # what effnet.load takes by itself, by batch
    notes: tuple[str, ...]  # what could not be measured here, and why
    images: int = 0  # with known classes that were read
    unreadable: Mapping[str, str] = field(default_factory=dict)  # reason by path

    def takes(self, row: Row, batch: int) -> bool:
        """Whether effnet.load takes this way for a batch, in whatever parts."""
        way = self.chosen[batch].backend if batch in self.chosen else None
        return way is not None and (way.engine, way.precision) == (row.way.engine, row.way.precision)

    def fastest(self, batch: int) -> Row | None:
        """The fastest for a batch among those that name the views as the reference does."""
        laps = [(lap.time.median_ms, row) for row in self.rows if (lap := row.lap(batch)) and _agrees(row)]
        return min(laps, key=lambda each: each[0])[1] if laps else None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        chosen = [{"batch": batch, **dataclasses.asdict(found.backend)} for batch, found in self.chosen.items()]
        return {
            "model": self.model,
            "resolution": self.resolution,
            **self.scene.to_dict(),
            "batches": list(self.batches),
            "views": self.views,
            "images": self.images,
            "unreadable": dict(self.unreadable),
            "reference": self.reference and dataclasses.asdict(self.reference),
            "chosen": chosen,
            "notes": list(self.notes),
            "rows": [row.to_dict() for row in self.rows],
        }


def _agrees(row: Row) -> bool:
    return row.answers is not None and row.answers.same.value >= AGREE
