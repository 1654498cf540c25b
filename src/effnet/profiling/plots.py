"""The pictures of profiling: each block's share of the time, and time beside counted work. Needs the extra `plots`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from effnet.plots.style import BLUE, GREY, ORANGE, RED, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from effnet.profiling.compare import Comparison
    from effnet.profiling.profile import Profile

Box = tuple[float, float, float, float]  # left, bottom, right, top in points of type

NAME_PLACES = (  # alignment, points of type to the right and above; the first that is free is taken
    ("left", 8, 0),
    ("right", -8, 0),
    ("center", 0, 13),
    ("center", 0, -13),
    ("left", 7, 11),
    ("left", 7, -11),
    ("right", -7, 11),
    ("right", -7, -11),
)


def draw_profile(profile: Profile, out: Path) -> None:
    """Draw each block's share of the time beside its share of the multiply-adds, from the stem down to the classifier.

    Raises:
        ArgumentError: `out` has another suffix than .png, .svg or .pdf.
        MissingExtraError: matplotlib is not installed.
    """
    blocks = profile.blocks
    places = range(len(blocks))
    title = (
        f"{profile.name}, {profile.resolution} px: where {profile.sum_ms:.1f} ms and {profile.macs / 1e9:.3g} GMACs go"
    )
    with picture(out, 9, 2 + 0.32 * len(blocks), title) as figure:
        axes = figure.subplots()
        for side, colour, label, share in (
            (-1, ORANGE, "time", profile.time_share),
            (1, BLUE, "multiply-adds", profile.macs_share),
        ):
            shares = [100 * share(block) for block in blocks]
            axes.barh([place + side * 0.2 for place in places], shares, 0.4, color=colour, label=label)
        axes.set_yticks(places, [f"{block.row.name}   {block.row.operator}" for block in blocks], fontsize=10)
        axes.set(xlabel="share, %", ylim=(len(blocks) - 0.4, -0.6))
        axes.grid(visible=False, axis="y")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
        figure.supxlabel(str(profile.conditions), x=0.012, ha="left", fontsize=10, color=GREY)


def draw_comparison(comparison: Comparison, out: Path) -> None:
    """Draw measured time against multiply-adds, and beside it against activations, each network named.

    Raises:
        ArgumentError: `out` has another suffix than .png, .svg or .pdf.
        MissingExtraError: matplotlib is not installed.
    """
    rows, correlations = comparison.rows, comparison.correlations
    names = [row.cost.name for row in rows]
    title = f"Measured time beside counted work: {len(rows)} networks, batch {comparison.conditions.batch}"
    with picture(out, 13, 6.6, title) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        drawn = []
        for axes, key, work in zip(panels, ("macs", "activations"), ("multiply-adds", "activations"), strict=True):
            points = [(getattr(row.cost, key) / 1e6, row.time.median_ms) for row in rows]
            axes.set(xscale="log", yscale="log", xlabel=f"{work} per image, millions")
            axes.set_title(f"log time with log {work}: r = {correlations[key]:.3f}", loc="left", fontsize=12)
            for ours, face, edge, mark, label in (
                (True, BLUE, BLUE, "o", "EfficientNet"),
                (False, "white", RED, "D", "other networks"),
            ):
                if chosen := [point for row, point in zip(rows, points, strict=True) if row.ours == ours]:
                    axes.scatter(*zip(*chosen, strict=True), 45, face, marker=mark, edgecolors=edge, label=label)
            _set_decades(axes, points)
            drawn.append((axes, points))
        panels[0].set_ylabel("median time, ms")
        panels[1].legend(loc="lower right", frameon=False)
        figure.supxlabel(str(comparison.conditions), x=0.012, ha="left", fontsize=10, color=GREY)
        figure.draw_without_rendering()  # settles where the points are
        for axes, points in drawn:
            _name_points(axes, names, points)


def _set_decades(axes: Axes, points: list[tuple[float, float]]) -> None:
    """Limits with room for names, and ticks 1, 2, 5, 10 ... as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    xs, ys = zip(*points, strict=True)
    axes.set(xlim=(min(xs) / 1.7, max(xs) * 1.9), ylim=(min(ys) / 1.4, max(ys) * 1.4))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())


def _name_points(axes: Axes, names: list[str], points: list[tuple[float, float]]) -> None:
    """Write each name where it covers the least of the other points and names: beside, above or below its point."""
    dots = [tuple(axes.transData.transform(point) * 72 / axes.figure.dpi) for point in points]
    left, bottom, right, top = axes.get_window_extent().get_points().flatten() * 72 / axes.figure.dpi
    panel = (left, bottom, right, top)
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    for name, point, (x, y) in zip(names, points, dots, strict=True):
        width, best = 6.2 * len(name), (math.inf, 0, 0, "", taken[0])
        for align, across, above in NAME_PLACES:
            start = x + across - {"left": 0.0, "right": width, "center": width / 2}[align]
            box = (start, y + above - 6, start + width, y + above + 6)
            outside = (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, panel)
            covered = outside + sum(_overlap(box, other) for other in taken)
            if covered < best[0]:
                best = (covered, across, above, align, box)
        _, across, above, align, box = best
        taken.append(box)
        axes.annotate(name, point, (across, above), textcoords="offset points", ha=align, va="center", fontsize=11)


def _overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)
