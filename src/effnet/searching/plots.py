"""The pictures of a search for alpha, beta and gamma, and of the comparison of compound scaling with its rivals.

Needs the extra `plots`; see plots.style for what all pictures have in common.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from effnet.plots.style import BLUE, GREEN, GREY, INK, ORANGE, PALE, RED, SKY, picture
from effnet.searching.candidates import Candidate
from effnet.searching.claim import BASELINE, COMPOUND, SINGLE, Contestant
from effnet.searching.halving import CONFIDENCE, Rung, Scores, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLOSE = 0.2, 0.06  # of the triangle's side, across and up: candidates that are so close are numbered together
RUNG_COLOURS = (PALE, SKY, BLUE, INK)  # the last rung's is the darkest that is used
LINES = {  # colour and mark of each way to scale
    "width": (ORANGE, "s"),
    "depth": (GREEN, "^"),
    "resolution": (SKY, "D"),
    COMPOUND: (RED, "o"),
}
SWEEPS = ((GREY, "o"), (GREEN, "^"), (SKY, "D"), (RED, "s"))


def draw_search(
    candidates: Sequence[Candidate], rungs: Sequence[Rung], scores: Scores, verdict: Verdict, out: Path
) -> None:
    """Draw the score of every candidate at every rung that it reached, the best first, beside what it grows by.

    Raises:
        ArgumentError: `out` has another suffix than .png, .svg or .pdf.
        MissingExtraError: matplotlib is not installed.
    """
    reached: dict[int, tuple[int, float]] = {}
    for place in range(len(candidates)):
        last = max((job.rung for job in scores if job.candidate == place), default=0)
        values = [score for job, score in scores.items() if job.candidate == place and job.rung == last]
        reached[place] = last, statistics.fmean(values)
    order = sorted(reached, key=lambda place: reached[place], reverse=True)
    found = f"{len(verdict.level)} of the {len(verdict.means)} finalists may be the best of them"
    title = f"{len(candidates)} networks of equal cost: {found}"
    with picture(out, 14, max(5.0, 2.2 + 0.36 * len(candidates)), title) as figure:
        dots, triangle = figure.subplots(1, 2, width_ratios=(3, 2))
        colours = RUNG_COLOURS[-1 - len(rungs) : -1] if len(rungs) < len(RUNG_COLOURS) else RUNG_COLOURS
        for number, rung in enumerate(rungs):
            jobs = sorted(job for job in scores if job.rung == number)
            xs, ys = [100 * scores[job] for job in jobs], [order.index(job.candidate) for job in jobs]
            label = f"{rung.share:.2g} of the longest training"
            colour = colours[min(number, len(colours) - 1)]
            dots.scatter(xs, ys, s=34, c=colour, edgecolors=GREY, linewidths=0.6, label=label, zorder=3)
        for place, mean in verdict.means.items():
            dots.plot(100 * mean, order.index(place), "|", color=INK, markersize=18, markeredgewidth=2, zorder=4)
        names = [
            f"{rank}:  {', '.join(f'{growth:.2f}' for growth in candidates[place].effective)}"
            for rank, place in enumerate(order, start=1)
        ]
        dots.set_yticks(range(len(order)), names, fontsize=10)
        for tick, place in zip(dots.get_yticklabels(), order, strict=True):
            tick.set_fontweight("bold" if place in verdict.level else "normal")
        dots.set(xlabel="accuracy on the val part, %", ylim=(len(order) - 0.4, -0.6))
        dots.set_ylabel("growth of depth, width, resolution, in effect; bold: may be the best")
        dots.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(rungs), frameon=False, fontsize=10)
        _triangle(triangle, [candidates[place].effective for place in order])


def _triangle(axes: Axes, growths: Sequence[tuple[float, float, float]]) -> None:
    """Where each candidate spends its multiply-adds, numbered and coloured by its place."""
    corners = {"depth": (0.5, math.sqrt(3) / 2), "width": (0.0, 0.0), "resolution": (1.0, 0.0)}
    outline = [*corners.values(), corners["depth"]]
    axes.plot(*zip(*outline, strict=True), color=GREY, linewidth=1)
    for name, (x, y) in corners.items():
        offset = (0, 24) if name == "depth" else (0, -22)
        axes.annotate(f"all in {name}", (x, y), offset, textcoords="offset points", ha="center", fontsize=11)
    crowds: list[tuple[float, float, list[int]]] = []  # where the numbers stand of those that are close
    for number, (alpha, beta, gamma) in enumerate(growths):
        shares = [max(0.0, math.log(value)) for value in (alpha, beta**2, gamma**2)]
        depth, _, resolution = (share / (sum(shares) or 1.0) for share in shares)
        x, y = depth / 2 + resolution, depth * math.sqrt(3) / 2
        near = [each for each in crowds if abs(each[0] - x) < CLOSE[0] and abs(each[1] - y) < CLOSE[1]]
        if not near:
            crowds.append(fresh := (x, y, list[int]()))
            near = [fresh]
        near[0][2].append(number + 1)
        colour = number / max(1, len(growths) - 1)
        axes.scatter(x, y, s=120, c=[colour], cmap="viridis_r", vmin=0, vmax=1, edgecolors=INK, zorder=3)
    for x, y, numbers in crowds:
        axes.annotate(", ".join(map(str, numbers)), (x, y), (9, 7), textcoords="offset points", fontsize=10)
    axes.set(xlim=(-0.15, 1.15), ylim=(-0.15, 1.0), aspect="equal")
    axes.axis("off")
    axes.set_title("where the multiply-adds went; yellow: best", loc="left", fontsize=12)


def draw_comparison(found: Sequence[Contestant], scores: Mapping[int, Sequence[float]], out: Path) -> None:
    """Draw accuracy over multiply-adds: the four ways to scale with their intervals, and the sweeps of the width.

    Args:
        found: the networks.
        scores: of each network, by its place, one for each seed.
        out: the picture.

    Raises:
        ArgumentError: `out` has another suffix than .png, .svg or .pdf.
        MissingExtraError: matplotlib or SciPy is not installed.
    """
    base = next(place for place, each in enumerate(found) if each.line == BASELINE)
    title = f"{found[base].network.name}: ways to scale, at equal multiply-adds"
    with picture(out, 13, 6, title) as figure:
        lines, sweeps = figure.subplots(1, 2, sharey=True)
        for name in (*SINGLE, COMPOUND):
            colour, mark = LINES[name]
            places = [base, *(place for place, each in enumerate(found) if each.line == name)]
            means, reach = zip(*(_interval(scores[place]) for place in places), strict=True)
            macs = [found[place].ratio for place in places]
            label = name if name == COMPOUND else f"{name} alone"
            width = 2.5 if name == COMPOUND else 1.5
            lines.errorbar(macs, means, reach, marker=mark, color=colour, capsize=4, linewidth=width, label=label)
        swept: dict[str, list[int]] = defaultdict(list)
        for place, each in enumerate(found):
            if each.line not in (*SINGLE, COMPOUND, BASELINE):
                swept[each.line].append(place)
        for (name, places), (colour, mark) in zip(swept.items(), SWEEPS, strict=False):
            places = [base, *places] if name == "d=1, r=1" else places
            macs = [found[place].ratio for place in places]
            levels = [100 * statistics.fmean(scores[place]) for place in places]
            sweeps.plot(macs, levels, marker=mark, color=colour, label=name)
        lines.set_title("one dimension alone, and all together", loc="left", fontsize=12)
        sweeps.set_title("the width swept at several depths and resolutions", loc="left", fontsize=12)
        for axes in (lines, sweeps):
            axes.set_xlabel("multiply-adds, the baseline's being 1")
            axes.legend(frameon=False)  # where there is most room
        lines.set_ylabel("accuracy on the val part, %")
        count = min(len(scores[place]) for place, each in enumerate(found) if each.line == COMPOUND)
        figure.supxlabel(
            f"Means of {count} trainings with {CONFIDENCE:.0%} intervals (left), of {min(count, 2)} (right).",
            x=0.012,
            ha="left",
            fontsize=10,
            color=GREY,
        )


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean in percent and how far its interval reaches; of one value nothing is known."""
    mean = 100 * statistics.fmean(values)
    if len(values) < 2:
        return mean, 0.0
    t = float(import_module("scipy.stats").t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return mean, 100 * t * statistics.stdev(values) / math.sqrt(len(values))
