"""The picture of a budget. Needs the extra `plots`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from effnet.arch.variants import PAPER, VARIANTS
from effnet.errors import ArgumentError
from effnet.plots.style import BLUE, INK, PALE, RED, RIGHT, decades, name_point, picture
from effnet.scaling.budget import count_resources
from effnet.scaling.fitting import FittedSpec

PAPER_FAMILY = [row.spec for row in VARIANTS.values() if row.source == PAPER]


def draw_candidates(fit: FittedSpec, out: Path) -> None:
    """Draw what a budget was chosen from: the binding resource over multiply-adds, with the limits as lines.

    Raises:
        ArgumentError: `out` has another suffix than .png, .svg or .pdf, or the fit has no candidates.
        MissingExtraError: matplotlib is not installed.
    """
    if fit.candidates is None:
        raise ArgumentError("fit", fit.spec.name, "was chosen among published networks and has no candidates to draw.")
    drawn = fit.binding if fit.binding in fit.candidates and fit.binding != "macs" else "params"
    label = "parameters, millions" if drawn == "params" else f"{drawn.replace('_', ' ')}, MB"
    here, *published = (
        (counts["macs"] / 1e9, counts[drawn] / 1e6)
        for counts in (count_resources(spec, fit.budget) for spec in (fit.spec, *PAPER_FAMILY))
    )
    with picture(out, 10, 6.4, f"{fit.spec.name}: the budget and its candidates") as figure:
        axes = figure.subplots()
        points = fit.candidates["macs"] / 1e9, fit.candidates[drawn] / 1e6
        axes.scatter(*points, 4, PALE, label=f"{fit.considered:,} candidates", rasterized=True)
        axes.plot(*zip(*published, strict=True), "D-", color=RED, markerfacecolor="white", label="published")
        axes.plot(*here, "o", color=BLUE, markersize=11, zorder=4, label="chosen")
        left, right = here[0] / 8, here[0] * 8
        for spec, point in zip(PAPER_FAMILY, published, strict=True):
            if left < point[0] < right:
                name_point(axes, spec.name.upper(), point, (RIGHT, -8), color=RED, fontsize=11)
        axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(here[1] / 6, here[1] * 6))
        axes.set(xlabel="multiply-adds per image, billions", ylabel=label)
        limits = fit.budget.limits
        line: dict[str, Any] = {"color": INK, "linestyle": "--", "linewidth": 1.5, "label": "limits"}
        if "macs" in limits:
            axes.axvline(limits["macs"] / 1e9, **line)
        if drawn in limits:
            axes.axhline(limits[drawn] / 1e6, **line)
        decades(axes)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(handles.values(), handles.keys(), frameon=False, loc="upper left")
