"""What a bench found: a row for every engine and precision, and what they were measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effnet.metrics.intervals import Difference, Interval
from effnet.metrics.timing import Conditions, Timing
from effnet.runtime.select import Selection
from effnet.runtime.session import Backend

VIEWS = 64  # of the packaged photos, on which backends are compared
AGREE = 0.95  # share of them for which a backend has to name the reference's class


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


@dataclass(frozen=True)
class BenchRow:
    """What was measured of one engine and precision; None where it is missing."""

    backend: Backend  # without parts and streams
    times: tuple[BatchTime, ...] = ()  # one for each batch
    logit_difference: float | None = None  # the largest, as a share of the reference's largest logit
    same_class: Interval | None = None  # share of the views for which the reference names the same class
    accuracy: Difference | None = None  # a is the reference, b this backend; only with images of known classes
    file_bytes: int | None = None  # of what is shipped
    cold_start_seconds: float | None = None  # median of a new process, until its first answer
    peak_memory_bytes: int | None = None  # median of that process
    problem: str = ""  # why something is missing

    def time(self, batch: int) -> BatchTime | None:
        """How long it took for a batch."""
        return next((time for time in self.times if time.batch == batch), None)

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values."""
        times = [
            {"batch": each.batch, "streams": each.backend.streams, "part": each.backend.part or each.batch}
            | {"images_per_second": each.images_per_second, **each.time.to_dict()}
            for each in self.times
        ]
        name = {"engine": self.backend.engine, "precision": self.backend.precision}
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in ("backend", "times")}
        return name | values | {"batches": times}


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
        """Whether effnet.load uses this engine and precision for a batch."""
        return engine_and_precision(self.selected[batch].backend) == row.backend

    def fastest(self, batch: int) -> BenchRow | None:
        """The fastest for a batch among those that agree with the reference."""
        found = {
            time.time.median_ms: row
            for row in self.rows
            if row.same_class and row.same_class.value >= AGREE and (time := row.time(batch))
        }
        return found[min(found)] if found else None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        selected = [{"batch": batch, **dataclasses.asdict(each.backend)} for batch, each in self.selected.items()]
        kept = self.kept and str(self.kept)
        rows = [row.to_dict() for row in self.rows]
        values = {key: value for key, value in dataclasses.asdict(self).items() if key != "conditions"}
        return self.conditions.to_dict() | values | {"views": VIEWS, "selected": selected, "kept": kept, "rows": rows}


def engine_and_precision(backend: Backend) -> Backend:
    """The backend without its parts, streams and threads."""
    return Backend(backend.engine, backend.precision)
