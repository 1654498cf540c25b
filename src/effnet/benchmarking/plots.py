"""The picture of a bench: the backends below each other, their figures in panels. Needs the extra `plots`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from effnet.benchmarking.report import BenchReport
from effnet.plots.style import BLUE, GREY, INK, SKY, picture
from effnet.runtime.session import TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACROSS = 3  # panels beside each other, at most
NAMES_WIDTH, PANEL_WIDTH, ROW_HEIGHT = 1.6, 3.4, 0.4  # inches


class Bar(NamedTuple):
    """A figure of one backend, its spread, and whether it stands out."""

    value: float
    low: float
    high: float
    dark: bool = False


def draw_bench(report: BenchReport, out: Path) -> None:
    """Draw speed, cold start, memory and answers of every backend, the reference on top.

    Raises:
        ArgumentError: `out` has another suffix than .png, .svg or .pdf.
        MissingExtraError: matplotlib is not installed.
    """
    names = [f"{TITLES[row.backend.engine]} {row.backend.precision}" for row in report.rows]
    panels = _panels(report)
    across = min(len(panels), ACROSS)
    down = -(-len(panels) // across)
    size = NAMES_WIDTH + across * PANEL_WIDTH, 1.4 + down * (0.9 + ROW_HEIGHT * len(names))
    with picture(out, *size, f"{report.model}, {report.resolution} px: every engine and precision in turn") as figure:
        sides = figure.subplots(down, across, squeeze=False).flatten()
        for place, (axes, (title, bars)) in enumerate(zip(sides, panels.items(), strict=False)):
            _draw(axes, title, bars)
            axes.set_yticks(range(len(names)), names if place % across == 0 else [""] * len(names))
            axes.set_ylim(len(names) - 0.4, -0.6)
        for axes in sides[len(panels) :]:
            axes.set_visible(False)
        note = "Dark: what effnet.load uses. Whiskers: 10 to 90 % of the rounds; of shares the 95 % interval."
        figure.supxlabel(f"{report.conditions}\n{note}", x=0.012, ha="left", fontsize=10, color=GREY)


def _panels(report: BenchReport) -> dict[str, list[Bar | None]]:
    """The bars of each panel by its title; None where a figure is missing."""
    panels: dict[str, list[Bar | None]] = {}
    for batch in report.batches:
        bars: list[Bar | None] = []
        for row in report.rows:
            time = row.time(batch)
            low, high = time.time.spread_ms if time else (0.0, 0.0)
            rates = (time.images_per_second, 1e3 * batch / high, 1e3 * batch / low) if time else None
            bars.append(Bar(*rates, report.uses(row, batch)) if rates else None)
        panels[f"images per second, {batch} at a time"] = bars
    starts, peaks = ([row.start_seconds for row in report.rows], [row.peak_bytes for row in report.rows])
    panels["seconds until a new process answers"] = [Bar(value, value, value) if value else None for value in starts]
    panels["peak memory of that process, MB"] = [
        Bar(peak / 1e6, peak / 1e6, peak / 1e6) if peak else None for peak in peaks
    ]
    if report.images:
        title = f"top-1 of {report.images:,} images, %"
        shares = [row.accuracy.accuracy_b if row.accuracy else None for row in report.rows]
    else:
        title = f"same class as {report.reference}, %"
        shares = [row.answers.agreement if row.answers else None for row in report.rows]
    panels[title] = [Bar(100 * each.value, 100 * each.low, 100 * each.high) if each else None for each in shares]
    return panels


def _draw(axes: Axes, title: str, bars: list[Bar | None]) -> None:
    """Bars from 0; shares, which may be close to each other, as points with whiskers."""
    share = title.endswith("%")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    known = {place: bar for place, bar in enumerate(bars) if bar}
    for place, bar in known.items():
        text = f"{bar.value:.1f}" if share else f"{bar.value:.3g}" if bar.value < 1000 else f"{bar.value:,.0f}"
        if share:
            axes.plot(bar.value, place, "o", color=BLUE, markersize=7)
            axes.annotate(text, (bar.value, place), (0, 7), textcoords="offset points", ha="center", fontsize=10)
        else:
            axes.barh(place, bar.value, 0.62, color=BLUE if bar.dark else SKY)
            axes.annotate(text, (bar.high, place), (5, 0), textcoords="offset points", va="center", fontsize=10)
        axes.plot((bar.low, bar.high), (place, place), color=INK, linewidth=1.2)
    low, high = (
        min((bar.low for bar in known.values()), default=0),
        max((bar.high for bar in known.values()), default=1),
    )
    room = max(0.5, 0.1 * (high - low))
    axes.set_xlim(*(low - room, min(100.0, high) + room) if share else (0, 1.25 * high))  # room for the last number
