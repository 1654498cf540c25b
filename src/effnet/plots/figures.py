"""Every picture that effnet draws, each a file: png, svg or pdf by its suffix.

Needs the extra `plots`. No window is opened and no state of matplotlib's is left changed; a picture appears under its
name when it is complete. No date or version goes in, so the same numbers give the same bytes; text in svg stays text.

Colours are from the palette of Okabe and Ito, which colour-blind readers tell apart; shapes and labels differ as well.
"""

from __future__ import annotations

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
