"""Every picture that effnet draws, each a file: png, svg or pdf by its suffix.

Needs the extra `plots`. No window is opened and no state of matplotlib's is left changed; a picture appears under its
name when it is complete. No date or version goes in, so the same numbers give the same bytes; text in svg stays text.

Colours are from the palette of Okabe and Ito, which colour-blind readers tell apart; shapes and labels differ as well.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effnet.arch.cost import cost
from effnet.arch.variants import VARIANTS
from effnet.describing.rivals import RIVALS
from effnet.errors import ArgumentError, MissingExtraError
from effnet.scaling.budget import tell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from effnet.profiling.compare import Comparison
    from effnet.profiling.profile import Profile
    from effnet.scaling.fitting import Fit

INK, GREY, PALE = "#222222", "#666666", "#DDDDDD"
BLUE, ORANGE, GREEN, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00"

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "xtick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.color": GREY,
    "ytick.labelcolor": INK,
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    "svg.hashsalt": "effnet",
}
UNDATED: dict[str, dict[str, Any]] = {  # what matplotlib writes of itself and of the time, switched off
    ".png": {"Software": None},
    ".svg": {"Creator": None, "Date": None},
    ".pdf": {"Creator": None, "Producer": None, "CreationDate": None},
}

PAPER_FAMILY = tuple(f"b{i}" for i in range(8))
LEFT, RIGHT = -1, 1
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
# Where a rival's name stands: the side of its point, and how many points of type above its middle.
NAMES_STAND = {
    "DenseNet-169": (LEFT, 0),
    "DenseNet-264": (LEFT, 0),
    "Inception-v3": (LEFT, -2),
    "Xception": (RIGHT, 2),
    "Inception-v4": (LEFT, -3),
    "Inception-resnet-v2": (RIGHT, 4),
    "ResNeXt-101": (RIGHT, -3),
    "PolyNet": (RIGHT, 3),
    "PNASNet": (LEFT, 4),
    "AmoebaNet-A": (LEFT, -10),
    "NASNet-A": (RIGHT, -12),
}


def drawable(out: Path) -> str:
    """The suffix of `out`, small; asked before a long measurement, so that its picture is not refused afterwards.

    Raises:
        ArgumentError: `out` has another suffix than .png, .svg or .pdf.
        MissingExtraError: matplotlib is not installed.
    """
    suffix = out.suffix.lower()
    if suffix not in UNDATED:
        raise ArgumentError("out", str(out), f"must end in {', '.join(UNDATED)}.")
    if find_spec("matplotlib") is None:
        raise MissingExtraError("drawing", "plots")
    return suffix


@contextmanager
def picture(out: Path, width: float, height: float, title: str) -> Iterator[Figure]:
    """A figure of that size in inches with a title; when the block ends without an error it is written to `out`.

    Raises:
        ArgumentError: `out` has another suffix than .png, .svg or .pdf.
        MissingExtraError: matplotlib is not installed.
    """
    suffix = drawable(out)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.suptitle(title, x=0.012, ha="left", fontsize=15, fontweight="bold")
        yield figure
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = out.with_name(f".{out.name}.{os.getpid()}")
        try:
            figure.savefig(unfinished, format=suffix[1:], metadata=UNDATED[suffix])
            unfinished.replace(out)
        finally:
            unfinished.unlink(missing_ok=True)


def compare_rivals(out: Path) -> None:
    """Draw Figure 1 of the paper: accuracy against parameters, and beside it against multiply-adds.

    Accuracies and the rivals' sizes are published ones (Table 2, v5); the family's sizes are counted from its specs.

    Raises:
        ArgumentError: `out` has another suffix than .png, .svg or .pdf.
        MissingExtraError: matplotlib is not installed.
    """
    family = [VARIANTS[name] for name in PAPER_FAMILY]
    costs = [cost(variant.spec) for variant in family]
    top1 = [variant.top1 for variant in family]
    rivals = [(rival.params_millions, rival.macs_billions, rival.top1, rival.name) for rival in RIVALS]
    with picture(out, 13, 6.6, "ImageNet top-1: published figures, not measured here") as figure:
        size, work = figure.subplots(1, 2, sharey=True)
        _scatter(size, [price.params / 1e6 for price in costs], top1, [(x, y, name) for x, _, y, name in rivals])
        _scatter(work, [price.macs / 1e9 for price in costs], top1, [(x, y, name) for _, x, y, name in rivals if x])
        size.set(xlabel="parameters, millions", ylabel="top-1 accuracy, %", xlim=(3.4, 1300), ylim=(75.6, 84.9))
        work.set(xlabel="multiply-adds per image, billions", xlim=(0.23, 150))
        work.legend(loc="lower right", frameon=False)
        figure.supxlabel(
            "Accuracies, and the sizes of the other networks: Table 2 of the paper (v5), single crop, single model. "
            "Sizes of B0-B7: counted. GPipe's multiply-adds were not published.",
            x=0.012,
            ha="left",
            fontsize=10,
            color=GREY,
        )


def profile_blocks(profile: Profile, out: Path) -> None:
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
        _conditions(figure, str(profile.conditions))


def compare_times(comparison: Comparison, out: Path) -> None:
    """Draw measured time against multiply-adds, and beside it against activations, each network named.

    Raises:
        ArgumentError: `out` has another suffix than .png, .svg or .pdf.
        MissingExtraError: matplotlib is not installed.
    """
    rows, correlations = comparison.rows, comparison.correlations
    title = f"Measured time beside counted work: {len(rows)} networks, batch {comparison.conditions.batch}"
    with picture(out, 13, 6.6, title) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, key, words in zip(panels, ("macs", "activations"), ("multiply-adds", "activations"), strict=True):
            points = [(getattr(row.cost, key) / 1e6, row.time.median_ms) for row in rows]
            axes.set(xscale="log", yscale="log", xlabel=f"{words} per image, millions")
            axes.set_title(f"log time with log {words}: r = {correlations[key]:.3f}", loc="left", fontsize=12)
            for ours, colour, mark, label in ((True, BLUE, "o", "EfficientNet"), (False, RED, "D", "other networks")):
                chosen = [point for row, point in zip(rows, points, strict=True) if row.ours == ours]
                if chosen:
                    axes.scatter(
                        *zip(*chosen, strict=True),
                        45,
                        colour if ours else "white",
                        marker=mark,
                        edgecolors=colour,
                        label=label,
                    )
            _plain_decades(axes, [x for x, _ in points], [y for _, y in points])
        panels[0].set_ylabel("median time, ms")
        panels[1].legend(loc="lower right", frameon=False)
        _conditions(figure, str(comparison.conditions))
        figure.draw_without_rendering()  # settles where the points are
        for axes, key in zip(panels, ("macs", "activations"), strict=True):
            names = [row.cost.name for row in rows]
            _name_points(axes, names, [(getattr(row.cost, key) / 1e6, row.time.median_ms) for row in rows])


def _conditions(figure: Figure, words: str) -> None:
    """What was measured on what, below everything."""
    figure.supxlabel(words, x=0.012, ha="left", fontsize=10, color=GREY)


def _plain_decades(axes: Axes, xs: list[float], ys: list[float]) -> None:
    """Limits with room for names, and ticks 1, 2, 5, 10 ... as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

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
        wide, best = 6.2 * len(name), (math.inf, 0, 0, "", taken[0])
        for align, across, above in NAME_PLACES:
            start = x + across - {"left": 0.0, "right": wide, "center": wide / 2}[align]
            box = (start, y + above - 6, start + wide, y + above + 6)
            outside = (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, panel)
            covered = outside + sum(_overlap(box, other) for other in taken)
            if covered < best[0]:
                best = (covered, across, above, align, box)
        _, across, above, align, box = best
        taken.append(box)
        axes.annotate(name, point, (across, above), textcoords="offset points", ha=align, va="center", fontsize=11)


def _overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(wide, 0) * max(high, 0)


def budget_candidates(fit: Fit, out: Path) -> None:
    """Draw what a budget was chosen from: the binding resource over multiply-adds, with the limits as lines.

    Raises:
        ArgumentError: `out` has another suffix than .png, .svg or .pdf, or the fit has no candidates.
        MissingExtraError: matplotlib is not installed.
    """
    if fit.candidates is None:
        raise ArgumentError("fit", fit.spec.name, "was chosen among published networks and has no candidates to draw.")
    drawn = fit.binding if fit.binding in fit.candidates.prices and fit.binding != "macs" else "params"
    scales = {"params": (1e6, "parameters, millions")}
    factor, label = scales.get(drawn, (1e6, f"{drawn.replace('_', ' ')}, MB"))
    chosen = {use.resource: use.value for use in fit.uses}
    with picture(out, 10, 6.4, f"{fit.spec.name}: the budget and its candidates") as figure:
        axes = figure.subplots()
        macs, prices = fit.candidates.prices["macs"] / 1e9, fit.candidates.prices[drawn] / factor
        axes.scatter(macs, prices, 4, PALE, label=f"{len(fit.candidates):,} candidates", rasterized=True)
        family = [(row.spec, cost(row.spec)) for row in VARIANTS.values() if row.name in PAPER_FAMILY]
        points = [(price.macs / 1e9, tell(spec, fit.budget)[drawn] / factor) for spec, price in family]
        axes.plot(*zip(*points, strict=True), "D-", color=RED, markerfacecolor="white", label="published")
        here = chosen["macs"] / 1e9, chosen[drawn] / factor
        axes.plot(*here, "o", color=BLUE, markersize=11, zorder=4, label="chosen")
        for (spec, _), point in zip(family, points, strict=True):
            if here[0] / 8 < point[0] < here[0] * 8:
                _name(axes, spec.name.upper(), point, (RIGHT, -8), color=RED, fontsize=11)
        low, high = (here[0] / 8, here[0] * 8)
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(here[1] / 6, here[1] * 6))
        axes.set(xlabel="multiply-adds per image, billions", ylabel=label)
        for name, limit in fit.budget.limits.items():
            if name == "macs":
                axes.axvline(limit / 1e9, color=INK, linestyle="--", linewidth=1.5, label="limits")
            elif name == drawn:
                axes.axhline(limit / factor, color=INK, linestyle="--", linewidth=1.5, label="limits")
        _decades(axes)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(handles.values(), handles.keys(), frameon=False, loc="upper left")


def _decades(axes: Axes) -> None:
    """Plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _scatter(axes: Axes, xs: list[float], top1: list[float], rivals: list[tuple[float, float, str]]) -> None:
    """One panel: the family as a line, its rivals as points, everything named."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.plot(xs, top1, "o-", color=BLUE, linewidth=2.5, markersize=7, zorder=3, label="EfficientNet")
    for name, x, y in zip(PAPER_FAMILY, xs, top1, strict=True):
        _name(axes, name.upper(), (x, y), (LEFT, 5), color=BLUE, fontweight="bold")
    across, up, _ = zip(*rivals, strict=True)
    axes.scatter(across, up, 36, "white", marker="D", edgecolors=RED, linewidths=1.5, label="other networks")
    for x, y, name in rivals:
        _name(axes, name, (x, y), NAMES_STAND.get(name, (RIGHT, 0)), color=INK, fontsize=11)


def _name(axes: Axes, text: str, point: tuple[float, float], stand: tuple[int, float], **font: Any) -> None:
    side, above = stand
    offset, align = (side * 7, above), "left" if side == RIGHT else "right"
    axes.annotate(text, point, offset, textcoords="offset points", ha=align, va="center", **font)
