"""What a bench found: a row for every engine and precision, and what they were measured on."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effnet.benchmarking.cold_start import ColdStart
from effnet.metrics.intervals import Difference, Interval
from effnet.metrics.timing import Conditions, Timing
from effnet.runtime.agreement import AGREE, VIEWS
from effnet.runtime.select import Selection
from effnet.runtime.session import Backend


@dataclass(frozen=True)
class BatchTime:
    """How long a backend took for a batch."""

    batch: int
    backend: Backend  # with the part and streams that were fastest
    time: Timing

    @property
    def images_per_second(self) -> float:
        """By the median."""
        return 1e3 * self.batch / self.time.median_ms

    def to_dict(self) -> dict[str, Any]:
        """The figures by name."""
        parts = {"streams": self.backend.streams, "part": self.backend.part or self.batch}
        return {"batch": self.batch, **parts, "images_per_second": self.images_per_second, **self.time.to_dict()}


@dataclass(frozen=True)
class Answers:
    """A backend's answers to views of photos, beside the reference's."""

    difference: float  # largest difference of a logit
    share: float  # the same, of the reference's largest logit
    agreement: Interval  # share of the views for which both name the same class


@dataclass(frozen=True)
class BenchRow:
    """What was measured of one engine and precision."""

    backend: Backend  # of whole batches
    times: tuple[BatchTime, ...] = ()  # one for each batch
    answers: Answers | None = None
    accuracy: Difference | None = None  # a is the reference, b this backend; None without images of known classes
    file: str = ""  # what a fresh process opens; empty where it could not be written
    file_bytes: int = 0
    cold_starts: tuple[ColdStart, ...] = ()
    problem: str = ""  # why something is missing

    @property
    def start_seconds(self) -> float | None:
        """The median of its cold starts."""
        return statistics.median(start.seconds for start in self.cold_starts) if self.cold_starts else None

    @property
    def peak_bytes(self) -> int | None:
        """The median of its cold starts."""
        held = [start.bytes for start in self.cold_starts if start.bytes]
        return round(statistics.median(held)) if held else None

    @property
    def agrees(self) -> bool:
        """Whether it names nearly all views as the reference does."""
        return self.answers is not None and self.answers.agreement.value >= AGREE

    def time(self, batch: int) -> BatchTime | None:
        """How long it took for a batch."""
        return next((time for time in self.times if time.batch == batch), None)

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values; what is missing is null."""
        answers, accuracy = self.answers, self.accuracy
        return {
            "engine": self.backend.engine,
            "precision": self.backend.precision,
            "batches": [time.to_dict() for time in self.times],
            "logit_difference": answers and answers.difference,
            "logit_difference_share": answers and answers.share,
            "same_class": answers and answers.agreement.to_dict(),
            "top1": accuracy and accuracy.accuracy_b.to_dict(),
            "difference": accuracy and accuracy.to_dict(),
            "file_bytes": self.file_bytes or None,
            "peak_memory_bytes": self.peak_bytes,
            "cold_start_seconds": self.start_seconds,
            "starts": len(self.cold_starts),
            "problem": self.problem or None,
        }


@dataclass(frozen=True)
class BenchReport:
    """The backends of a model, side by side."""

    model: str
    resolution: int
    conditions: Conditions
    batches: tuple[int, ...]  # smallest first
    rows: tuple[BenchRow, ...]
    reference: Backend | None  # whose answers the others' are compared with; None where nothing answered
    selected: Mapping[int, Selection]  # what effnet.load uses when nothing is pinned, by batch
    notes: tuple[str, ...]  # what could not be measured here, and why
    images: int = 0  # with known classes that were read
    unreadable: Mapping[str, str] = field(default_factory=dict)  # reason by path
    kept: Path | None = None  # the file that effnet.load follows from now on

    def uses(self, row: BenchRow, batch: int) -> bool:
        """Whether effnet.load uses this engine and precision for a batch, in whatever parts."""
        if batch not in self.selected:
            return False
        backend = self.selected[batch].backend
        return (backend.engine, backend.precision) == (row.backend.engine, row.backend.precision)

    def fastest(self, batch: int) -> BenchRow | None:
        """The fastest for a batch among those that agree with the reference."""
        found = [(time.time.median_ms, row) for row in self.rows if row.agrees and (time := row.time(batch))]
        return min(found, key=lambda each: each[0])[1] if found else None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        selected = [{"batch": batch, **dataclasses.asdict(each.backend)} for batch, each in self.selected.items()]
        return {
            "model": self.model,
            "resolution": self.resolution,
            **self.conditions.to_dict(),
            "batches": list(self.batches),
            "views": VIEWS,
            "images": self.images,
            "unreadable": dict(self.unreadable),
            "reference": self.reference and dataclasses.asdict(self.reference),
            "selected": selected,
            "kept": self.kept and str(self.kept),
            "notes": list(self.notes),
            "rows": [row.to_dict() for row in self.rows],
        }
