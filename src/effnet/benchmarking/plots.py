"""The picture of a bench: a bar for each backend, a panel for each figure. Needs the extra `plots`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from effnet.benchmarking.report import BenchReport
from effnet.metrics.intervals import Interval
from effnet.plots.style import BLUE, INK, SKY, footnote, picture
from effnet.runtime.session import TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACROSS = 3  # panels in a row


def draw_bench(report: BenchReport, out: Path) -> None:
    """Draw speed, cold start, memory and answers of every backend, the reference on top. See `picture` for errors."""
    names = [f"{TITLES[row.backend.engine]} {row.backend.precision}" for row in report.rows]
    panels = _panels(report)
    down = -(-len(panels) // ACROSS)
    title = f"{report.model}, {report.resolution} px: every engine and precision in turn"
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
        footnote(figure, f"{report.conditions}\nWhiskers: 10 to 90 % of the rounds; of shares the 95 % interval.")


def _panels(report: BenchReport) -> dict[str, list[Interval | None]]:
    """The bars of each panel by its title, with the ends of their whiskers; None where a figure is missing."""
    panels: dict[str, list[Interval | None]] = {}
    for batch in report.batches:
        times = [row.time(batch) for row in report.rows]
        panels[f"ms for {batch} image{'' if batch == 1 else 's'}"] = [
            Interval(each.time.median_ms, *each.time.spread_ms) if each else None for each in times
        ]
    starts = [row.cold_start_seconds for row in report.rows]
    peaks = [(row.peak_memory_bytes or 0) / 1e6 for row in report.rows]
    panels["seconds until a new process answers"] = [Interval(each, each, each) if each else None for each in starts]
    panels["peak memory of that process, MB"] = [Interval(each, each, each) if each else None for each in peaks]
    if report.images:
        title = f"top-1 of {report.images:,} images, %"
        shares = [row.accuracy.accuracy_b if row.accuracy else None for row in report.rows]
    else:
        title, shares = f"same class as {report.reference}, %", [row.same_class for row in report.rows]
    panels[title] = [Interval(100 * each.value, 100 * each.low, 100 * each.high) if each else None for each in shares]
    return panels


def _draw(axes: Axes, bars: list[Interval | None], *, points: bool) -> None:
    """Bars from 0, or points where figures may be close to each other."""
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
