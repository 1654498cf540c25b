"""Draws docs/pictures and fills the numbers of docs/*.md, both from the code.

    python docs/draw.py            write what is out of date
    python docs/draw.py --check    write nothing; exit with 1 if something is out of date

A block of a page is what stands between `begin: NAME` and `end: NAME` in markdown comments; counted.py, options.py,
studied.py and tree.py make it. Pictures of boxes and arrows are in diagrams.py.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import counted
import diagrams
import options
import studied
import tree
from counted import FAMILY, ratio, stage_rows

from effnet.arch.cost import cost
from effnet.arch.variants import B0, VARIANTS
from effnet.describing import RIVALS
from effnet.plots.style import BLUE, GREEN, GREY, INK, LEFT, ORANGE, RED, RIGHT, name_point, picture
from effnet.scaling.compound import nominal_ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOCS = Path(__file__).resolve().parent
BLOCKS = counted.BLOCKS | options.BLOCKS | studied.BLOCKS | tree.BLOCKS
# Where the name of another network stands: the side of its point, and how many points of type above its middle.
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
MARKED = re.compile(r"(<!-- begin: ([\w-]+) -->)(.*?)(<!-- end: \2 -->)", re.DOTALL)


def main(arguments: list[str]) -> int:
    """Write what is out of date, or with --check only name it; the exit code."""
    if arguments not in ([], ["--check"]):
        print(__doc__)
        return 2
    stale = 0
    for path, content in (fresh_pages() | fresh_pictures()).items():
        if path.exists() and path.read_bytes() == content:
            continue
        stale += 1
        if arguments:
            print(f"{path.relative_to(DOCS)} is out of date; run python docs/draw.py")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            print(f"wrote {path.relative_to(DOCS)}")
    return 1 if arguments and stale else 0


def fresh_pages() -> dict[Path, bytes]:
    """Every page of docs as it should be."""
    return {path: fill(path.read_text("utf-8")).encode() for path in sorted(DOCS.glob("*.md"))}


def fresh_pictures() -> dict[Path, bytes]:
    """Every picture of docs as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        contents = {}
        for name, draw in PICTURES.items():
            out = Path(folder, f"{name}.svg")
            draw(out)
            contents[DOCS / "pictures" / out.name] = out.read_bytes()
    return contents


def fill(page: str) -> str:
    """The page with every marked block made anew."""
    return MARKED.sub(lambda match: match[1] + BLOCKS[match[2]]() + match[4], page)


def promised(out: Path) -> None:
    """What d w^2 r^2 promises, beside the multiply-adds that are counted."""
    names = [network.name.upper() for network in FAMILY]
    rule, built = [nominal_ratio(B0, network) for network in FAMILY], [ratio(network) for network in FAMILY]
    with picture(out, 13, 4.8, "Multiply-adds: what d·w²·r² promises and what is built") as figure:
        both, excess = figure.subplots(1, 2)
        both.plot(names, built, "o-", color=BLUE, linewidth=2.5, markersize=8, label="counted")
        both.plot(names, rule, "s--", color=RED, linewidth=2, markersize=7, markerfacecolor="white", label="d·w²·r²")
        both.set(yscale="log", ylabel="multiply-adds, B0 = 1")
        both.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
        both.legend(frameon=False)
        over = [counted / wanted - 1 for counted, wanted in zip(built[1:], rule[1:], strict=True)]
        bars = excess.bar(names[1:], over, 0.6, color=BLUE)
        excess.bar_label(bars, [f"{value:+.0%}" for value in over], padding=3)
        excess.set(ylabel="counted above promised", ylim=(0, 0.48))
        excess.set_yticks([0, 0.1, 0.2, 0.3, 0.4], ["0", "10%", "20%", "30%", "40%"])
        excess.grid(visible=False, axis="x")


def stages(out: Path) -> None:
    """B0's nine stages: resolution against channels, and where the cost is."""
    price, rows = cost(B0), stage_rows()
    places = range(len(rows))
    kinds = (
        ("activations", "activations", ORANGE, ""),
        ("multiply-adds", "macs", GREEN, "//"),
        ("parameters", "params", BLUE, ""),
    )
    with picture(out, 13, 8.2, "B0, stage by stage") as figure:
        high, wide, share = figure.subplots(3, 1, sharex=True, height_ratios=[1, 1.5, 1.5])
        high.bar_label(high.bar(places, [row.size for row in rows], 0.62, color=ORANGE), padding=2)
        high.set(ylabel="input side, px", ylim=(0, 270))
        wide.bar_label(wide.bar(places, [row.channels for row in rows], 0.62, color=BLUE), padding=2)
        wide.set(ylabel="output channels", ylim=(0, 1450))
        for offset, (label, kind, colour, hatch) in zip((-0.27, 0, 0.27), kinds, strict=True):
            parts = [getattr(part, kind) / getattr(price, kind) for part in price.stages]
            spots = [place + offset for place in places]
            bars = share.bar(spots, parts, 0.25, color=colour, hatch=hatch, edgecolor="white", label=label)
            share.bar_label(bars, [f"{100 * part:.0f}" for part in parts], padding=2, fontsize=10)
        share.set(ylabel="share of the network, %", ylim=(0, 0.53), xlabel="stage, operator, layers")
        share.set_yticks([0, 0.1, 0.2, 0.3, 0.4], ["0", "10", "20", "30", "40"])
        share.legend(frameon=False, loc="upper center", ncols=3)
        words = [row.operator.replace(" ", "\n", 1) for row in rows]
        share.set_xticks(places, [f"{place + 1}\n{words[place]}\n×{rows[place].layers}" for place in places])
        for axes in (high, wide, share):
            axes.grid(visible=False, axis="x")


def rivals(out: Path) -> None:
    """Figure 1 of the paper: accuracy against parameters, and beside it against multiply-adds.

    Accuracies and the rivals' sizes are published ones (Table 2, v5); the family's sizes are counted from its specs.
    """
    costs = [cost(network) for network in FAMILY]
    top1 = [VARIANTS[network.name].top1 for network in FAMILY]
    others = [(rival.params_millions, rival.macs_billions, rival.top1, rival.name) for rival in RIVALS]
    with picture(out, 13, 6.6, "ImageNet top-1: published figures, not measured here") as figure:
        size, work = figure.subplots(1, 2, sharey=True)
        _scatter(size, [price.params / 1e6 for price in costs], top1, [(x, y, name) for x, _, y, name in others])
        _scatter(work, [price.macs / 1e9 for price in costs], top1, [(x, y, name) for _, x, y, name in others if x])
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


PICTURES: dict[str, Callable[[Path], None]] = diagrams.DIAGRAMS | {
    "promised": promised,
    "stages": stages,
    "rivals": rivals,
}


def _scatter(axes: Axes, xs: list[float], top1: list[float], others: list[tuple[float, float, str]]) -> None:
    """One panel: the family as a line, its rivals as points, everything named."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.plot(xs, top1, "o-", color=BLUE, linewidth=2.5, markersize=7, zorder=3, label="EfficientNet")
    for network, x, y in zip(FAMILY, xs, top1, strict=True):
        name_point(axes, network.name.upper(), (x, y), (LEFT, 5), color=BLUE, fontweight="bold")
    across, up, _ = zip(*others, strict=True)
    axes.scatter(across, up, 36, "white", marker="D", edgecolors=RED, linewidths=1.5, label="other networks")
    for x, y, name in others:
        name_point(axes, name, (x, y), NAMES_STAND.get(name, (RIGHT, 0)), color=INK, fontsize=11)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
