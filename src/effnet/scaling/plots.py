"""The picture of a budget. Needs the extra `plots`."""

from __future__ import annotations

from pathlib import Path

from effnet.arch.cost import cost
from effnet.arch.variants import PAPER, VARIANTS
from effnet.errors import ArgumentError
from effnet.plots.style import BLUE, INK, PALE, RED, RIGHT, decades, name_point, picture
from effnet.scaling.budget import count_resources
from effnet.scaling.fitting import FittedSpec


def draw_candidates(fit: FittedSpec, out: Path) -> None:
    """Draw what a budget was chosen from: the binding resource over multiply-adds, with the limits as lines.

    Raises:
        ArgumentError: `out` has another suffix than .png, .svg or .pdf, or the fit has no candidates.
        MissingExtraError: matplotlib is not installed.
    """
    if fit.candidates is None:
        raise ArgumentError("fit", fit.spec.name, "was chosen among published networks and has no candidates to draw.")
    drawn = fit.binding if fit.binding in fit.candidates and fit.binding != "macs" else "params"
    scales = {"params": (1e6, "parameters, millions")}
    factor, label = scales.get(drawn, (1e6, f"{drawn.replace('_', ' ')}, MB"))
    chosen = {use.resource: use.value for use in fit.uses}
    with picture(out, 10, 6.4, f"{fit.spec.name}: the budget and its candidates") as figure:
        axes = figure.subplots()
        macs, prices = fit.candidates["macs"] / 1e9, fit.candidates[drawn] / factor
        axes.scatter(macs, prices, 4, PALE, label=f"{fit.considered:,} candidates", rasterized=True)
        family = [(row.spec, cost(row.spec)) for row in VARIANTS.values() if row.source == PAPER]
        points = [(price.macs / 1e9, count_resources(spec, fit.budget)[drawn] / factor) for spec, price in family]
        axes.plot(*zip(*points, strict=True), "D-", color=RED, markerfacecolor="white", label="published")
        here = chosen["macs"] / 1e9, chosen[drawn] / factor
        axes.plot(*here, "o", color=BLUE, markersize=11, zorder=4, label="chosen")
        for (spec, _), point in zip(family, points, strict=True):
            if here[0] / 8 < point[0] < here[0] * 8:
                name_point(axes, spec.name.upper(), point, (RIGHT, -8), color=RED, fontsize=11)
        low, high = (here[0] / 8, here[0] * 8)
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(here[1] / 6, here[1] * 6))
        axes.set(xlabel="multiply-adds per image, billions", ylabel=label)
        for name, limit in fit.budget.limits.items():
            if name == "macs":
                axes.axvline(limit / 1e9, color=INK, linestyle="--", linewidth=1.5, label="limits")
            elif name == drawn:
                axes.axhline(limit / factor, color=INK, linestyle="--", linewidth=1.5, label="limits")
        decades(axes)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(handles.values(), handles.keys(), frameon=False, loc="upper left")
