"""The picture of a bench: contestants below each other, their figures in panels.

Needs the extra `plots`; see plots.style for what all pictures have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from effnet.errors import ArgumentError
from effnet.plots.style import BLUE, GREY, INK, SKY, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Bounds = tuple[float, float]

ACROSS = 3  # panels beside each other, at most
NAMES, PANEL = 1.6, 3.4  # inches of the names, and of a panel
ROW = 0.4  # inches of a contestant


@dataclass(frozen=True)
class Panel:
    """One figure of all contestants; None where it is missing."""

    title: str
    values: Sequence[float | None]
    bounds: Sequence[Bounds | None] = ()  # whiskers; none at all where it is empty
    marked: Sequence[bool] = ()  # those that stand out
    share: bool = False  # per cent, all of which may be near each other: points with whiskers, not bars from 0


def draw_panels(names: Sequence[str], panels: Sequence[Panel], out: Path, *, title: str, note: str) -> None:
    """Draw every panel's bars beside the names, first one on top.

    Args:
        names: of the contestants.
        panels: at least one, each with a value for each name.
        out: the picture.
        title: above all of it.
        note: below all of it.

    Raises:
        ArgumentError: a panel has another number of values, or `out` has another suffix than .png, .svg or .pdf.
        MissingExtraError: matplotlib is not installed.
    """
    for panel in panels:
        if len(panel.values) != len(names):
            raise ArgumentError("panels", panel.title, f"has {len(panel.values)} values for {len(names)} names.")
    across = min(len(panels), ACROSS)
    down = -(-len(panels) // across)
    size = NAMES + across * PANEL, 1.4 + down * (0.9 + ROW * len(names))
    with picture(out, *size, title) as figure:
        sides = figure.subplots(down, across, squeeze=False).flatten()
        for place, (axes, panel) in enumerate(zip(sides, panels, strict=False)):
            _draw(axes, panel)
            axes.set_yticks(range(len(names)), names if place % across == 0 else [""] * len(names))
            axes.set_ylim(len(names) - 0.4, -0.6)
        for axes in sides[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel(note, x=0.012, ha="left", fontsize=10, color=GREY)


def _draw(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title, loc="left", fontsize=11)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    known = [place for place, value in enumerate(panel.values) if value is not None]
    for place in known:
        value, (low, high) = panel.values[place] or 0.0, _whisker(panel, place)
        colour = BLUE if panel.marked and panel.marked[place] else SKY
        if panel.share:
            axes.plot(value, place, "o", color=BLUE, markersize=7)
        else:
            axes.barh(place, value, 0.62, color=colour)
        axes.plot((low, high), (place, place), color=INK, linewidth=1.2)
        axes.annotate(
            f"{value:.1f}" if panel.share else f"{value:.3g}" if value < 1000 else f"{value:,.0f}",
            (value, place) if panel.share else (high, place),
            (0, 7) if panel.share else (5, 0),
            textcoords="offset points",
            ha="center" if panel.share else "left",
            va="bottom" if panel.share else "center",
            fontsize=10,
        )
    ends = [end for place in known for end in _whisker(panel, place)]
    if ends and panel.share:
        room = max(0.5, 0.1 * (max(ends) - min(ends)))
        axes.set_xlim(min(ends) - room, min(100.0, max(ends)) + room)
    elif ends:
        axes.set_xlim(0, 1.25 * max(ends) or 1.0)  # room for the number behind the longest bar


def _whisker(panel: Panel, place: int) -> Bounds:
    """The bounds of a value; itself twice where it has none."""
    value = panel.values[place] or 0.0
    return (panel.bounds[place] if panel.bounds else None) or (value, value)
