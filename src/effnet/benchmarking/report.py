"""The results of a bench: a row per engine and precision, the conditions, and their plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effnet.fields import write_count
from effnet.metrics.intervals import Difference, Interval
from effnet.metrics.timing import Conditions, Timing
from effnet.plots.style import BLUE, INK, SKY, footnote, picture
from effnet.runtime.select import Selection
from effnet.runtime.session import TITLES, Backend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VIEWS = 64  # of the packaged photos, on which predictions are compared
ACROSS = 3  # panels in a row of the plot
AGREE = 0.95  # share of the views on which a backend must predict the reference's class


@dataclass(frozen=True)
class BatchTime:
    """Time of a backend for a batch."""

    batch: int
    backend: Backend  # with the fastest part and streams
    time: Timing

    @property
    def images_per_second(self) -> float:
        """Images per second, by the median time."""
        return 1e3 * self.batch / self.time.median_ms


@dataclass(frozen=True)
class BenchRow:
    """The measurements of one engine and precision; None if missing."""

    backend: Backend  # without parts and streams
    times: tuple[BatchTime, ...] = ()  # one per batch
    logit_difference: float | None = None  # the largest, as a share of the reference's largest logit
    same_class: Interval | None = None  # share of the views on which both predict the same class
    accuracy: Difference | None = None  # a is the reference, b this backend; only with labelled images
    file_bytes: int | None = None  # of what is shipped
    cold_start_seconds: float | None = None  # median, from starting a process to its first prediction
    peak_memory_bytes: int | None = None  # median of that process
    problem: str = ""  # why something is missing

    def time(self, batch: int) -> BatchTime | None:
        """Its time for a batch."""
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
    """The comparison of a model's backends."""

    model: str
    resolution: int
    conditions: Conditions
    batches: tuple[int, ...]  # smallest first
    rows: tuple[BenchRow, ...]
    reference: Backend | None  # the others are compared with it; None if all failed
    selected: Mapping[int, Selection]  # the defaults of effnet.load, by batch
    notes: tuple[str, ...]  # what could not be measured, and why
    data: str | None = None  # the labelled images
    split: str | None = None  # of them
    images: int = 0  # of the split that were read
    seen_in_training: int = 0  # of the split
    caveats: tuple[str, ...] = ()  # about the split
    unreadable: Mapping[str, str] = field(default_factory=dict)  # reason by path
    kept: Path | None = None  # the file that effnet.load follows

    def uses(self, row: BenchRow, batch: int) -> bool:
        """Whether effnet.load uses this engine and precision for a batch."""
        return engine_and_precision(self.selected[batch].backend) == row.backend

    def fastest(self, batch: int) -> BenchRow | None:
        """The fastest backend for a batch that agrees with the reference."""
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

    def draw(self, out: Path) -> None:
        """Draw speed, cold start, memory and agreement of every backend, the reference on top; errors as `picture`."""
        names = [f"{TITLES[row.backend.engine]} {row.backend.precision}" for row in self.rows]
        panels = self._panels()
        down = -(-len(panels) // ACROSS)
        title = f"{self.model}, {self.resolution} px: every engine and precision in turn"
        with picture(out, 12, 1.4 + down * (0.9 + 0.4 * len(names)), title) as figure:
            grid = figure.subplots(down, ACROSS, squeeze=False, sharey=True).flatten()
            grid[0].set_yticks(range(len(names)), names)
            grid[0].set_ylim(len(names) - 0.4, -0.6)
            for axes, (heading, bars) in zip(grid, panels.items(), strict=False):
                axes.set_title(heading, loc="left", fontsize=11)
                axes.grid(visible=False, axis="y")
                _draw(axes, bars, points=heading.endswith("%"))
            for axes in grid[len(panels) :]:
                axes.set_visible(False)
            footnote(figure, f"{self.conditions}\nWhiskers: 10 to 90 % of the rounds; of shares the 95 % interval.")

    def _panels(self) -> dict[str, list[Interval | None]]:
        """The bars with whiskers of each panel by its title; None if a figure is missing."""
        panels: dict[str, list[Interval | None]] = {}
        for batch in self.batches:
            times = [row.time(batch) for row in self.rows]
            panels[f"ms for {write_count(batch, 'image')}"] = [
                Interval(each.time.median_ms, *each.time.spread_ms) if each else None for each in times
            ]
        starts = [row.cold_start_seconds for row in self.rows]
        peaks = [(row.peak_memory_bytes or 0) / 1e6 for row in self.rows]
        panels["cold start, seconds"] = [Interval(each, each, each) if each else None for each in starts]
        panels["peak memory of a process, MB"] = [Interval(each, each, each) if each else None for each in peaks]
        if self.images:
            title = f"top-1 of {self.images:,} images, %"
            shares = [row.accuracy.accuracy_b if row.accuracy else None for row in self.rows]
        else:
            title, shares = f"same class as {self.reference}, %", [row.same_class for row in self.rows]
        panels[title] = [
            Interval(100 * each.value, 100 * each.low, 100 * each.high) if each else None for each in shares
        ]
        return panels


def engine_and_precision(backend: Backend) -> Backend:
    """The backend without its parts, streams and threads."""
    return Backend(backend.engine, backend.precision)


def _draw(axes: Axes, bars: list[Interval | None], *, points: bool) -> None:
    """Draw bars from 0, or points if the values may be close to each other."""
    for place, bar in enumerate(bars):
        if bar is None:
            continue
        if not points:
            axes.barh(place, bar.value, 0.62, color=SKY)
        whisker = [[bar.value - bar.low], [bar.high - bar.value]]
        axes.errorbar(bar.value, place, xerr=whisker, fmt="o" if points else "none", color=BLUE, ecolor=INK)
        axes.annotate(f"{bar.value:,.4g}", (bar.high, place), (5, 0), textcoords="offset points", va="center")
    axes.margins(x=0.3)  # room for the numbers
    if not points:
        axes.set_xlim(left=0)
