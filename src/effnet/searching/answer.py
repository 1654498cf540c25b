"""The result of a search: its rule, its verdict, and their picture, which needs the extra `plots`."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from effnet.console import json_text
from effnet.data.shards import text_of
from effnet.files import write_text
from effnet.machine import this_machine
from effnet.metrics.intervals import wilson
from effnet.plots.style import BLUE, GREY, INK, PALE, SKY, picture
from effnet.scaling.compound import Rule
from effnet.searching.candidates import Candidate
from effnet.searching.halving import Job, Rung, Scores, Verdict
from effnet.searching.plan import SearchPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RULE, VERDICT, PICTURE = "rule.yaml", "verdict.json", "search.png"
CLOSE = 0.2, 0.06  # share of the triangle's side, across and up, within which candidates share a label
RUNG_COLOURS = (PALE, SKY, BLUE)  # of the last three rungs


@dataclass(frozen=True)
class SearchResult:
    """What a search has found so far."""

    plan: SearchPlan
    scores: dict[Job, float]
    verdict: Verdict
    missing: tuple[int, ...]  # trainings, by rung
    minutes: float  # estimate for the missing trainings

    @property
    def guessing(self) -> float:
        """The accuracy of always guessing the val split's most common class."""
        counts = self.plan.data.subset("val").counts
        return max(counts) / sum(counts)

    @property
    def learned(self) -> bool:
        """Whether the best candidate is significantly better than guessing."""
        n = len(self.plan.data.subset("val"))
        return wilson(round(self.verdict.means[self.verdict.best] * n), n).low > self.guessing

    @property
    def rule(self) -> Rule:
        """The best candidate's triple."""
        return dataclasses.replace(self.plan.candidates[self.verdict.best].triples[0], name="found")


def write_answer(found: SearchResult) -> None:
    """Write the rule, the verdict and the picture."""
    plan, verdict, folder, names = found.plan, found.verdict, found.plan.folder, found.plan.names
    rule = {
        "name": "found",
        **dict(zip(("alpha", "beta", "gamma"), found.rule.growths, strict=True)),
        "found": {
            "complete": verdict.complete,
            "baseline": plan.baseline.name,
            "data": text_of(plan.data.root),
            "data_sha256": plan.data.digest,
            "score": round(verdict.means[verdict.best], 6),
            "level_with_it": [list(plan.candidates[place].triples[0].growths) for place in verdict.level[1:]],
            "epochs": plan.epochs,
            "recipe": plan.recipe.name,
            "seed": plan.options.seed,
            "machine": str(this_machine()),
        },
    }
    text = yaml.safe_dump(rule, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    write_text(folder / RULE, text)
    compared = ("value", "low", "high", "level")
    report = {
        "complete": verdict.complete,
        "rung": verdict.rung + 1,
        "seeds": verdict.seeds,
        "best": names[verdict.best],
        "means": {names[place]: mean for place, mean in verdict.means.items()},
        "differences": [
            {"network": names[each.candidate]} | {name: getattr(each, name) for name in compared}
            for each in verdict.differences
        ],
        "kendall_tau_between_rungs": verdict.between_rungs,
        "kendall_tau_between_seeds": verdict.between_seeds,
        "noise": verdict.noise,
        "close_calls": verdict.close_calls,
        "missing_trainings": found.missing,
        "missing_minutes": found.minutes,
        "guessing": found.guessing,
        "better_than_guessing": found.learned,
    }
    finite = json.loads(json.dumps(report), parse_constant=lambda _: None)  # JSON has no nan or infinity
    write_text(folder / VERDICT, json_text(finite))
    draw_search(plan.candidates, plan.rungs, found.scores, verdict, folder / PICTURE)


def draw_search(
    candidates: Sequence[Candidate], rungs: Sequence[Rung], scores: Scores, verdict: Verdict, out: Path
) -> None:
    """Draw every candidate's scores, best candidate first, and a triangle that shows which dimensions each grows."""
    reached: dict[int, tuple[int, float]] = {}
    for place in sorted({job.candidate for job in scores}):
        last = max(job.rung for job in scores if job.candidate == place)
        values = [score for job, score in scores.items() if job.candidate == place and job.rung == last]
        reached[place] = last, statistics.fmean(values)
    order = sorted(reached, key=lambda place: reached[place], reverse=True)
    compared = "finalists" if verdict.complete else "candidates compared so far"
    title = f"{len(candidates)} networks of equal cost: {len(verdict.level)} of the {len(verdict.means)} {compared} "
    title += "may be the best"
    with picture(out, 14, max(5.0, 2.2 + 0.36 * len(candidates)), title) as figure:
        dots, triangle = figure.subplots(1, 2, width_ratios=(3, 2))
        for number, rung in enumerate(rungs):
            jobs = sorted(job for job in scores if job.rung == number)
            xs, ys = [100 * scores[job] for job in jobs], [order.index(job.candidate) for job in jobs]
            label = f"{rung.share:.2g} of the longest training"
            colour = RUNG_COLOURS[max(0, number - len(rungs) + len(RUNG_COLOURS))]
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
        dots.set(xlabel="accuracy on the val split, %", ylim=(len(order) - 0.4, -0.6))
        dots.set_ylabel("growth of depth, width, resolution, in effect; bold: may be the best")
        dots.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(rungs), frameon=False, fontsize=10)
        _triangle(triangle, [candidates[place].effective for place in order])


def _triangle(axes: Axes, growths: Sequence[tuple[float, float, float]]) -> None:
    """Draw each candidate's share of growth in each dimension, numbered and coloured by rank."""
    corners = {"depth": (0.5, math.sqrt(3) / 2), "width": (0.0, 0.0), "resolution": (1.0, 0.0)}
    outline = [*corners.values(), corners["depth"]]
    axes.plot(*zip(*outline, strict=True), color=GREY, linewidth=1)
    for name, (x, y) in corners.items():
        offset = (0, 24) if name == "depth" else (0, -22)
        axes.annotate(f"all in {name}", (x, y), offset, textcoords="offset points", ha="center", fontsize=11)
    labels: list[tuple[float, float, list[int]]] = []  # position and numbers of each label
    for number, (alpha, beta, gamma) in enumerate(growths):
        shares = [max(0.0, math.log(value)) for value in (alpha, beta**2, gamma**2)]
        depth, _, resolution = (share / (sum(shares) or 1.0) for share in shares)
        x, y = depth / 2 + resolution, depth * math.sqrt(3) / 2
        near = [each for each in labels if abs(each[0] - x) < CLOSE[0] and abs(each[1] - y) < CLOSE[1]]
        if not near:
            labels.append(label := (x, y, list[int]()))
            near = [label]
        near[0][2].append(number + 1)
        colour = number / max(1, len(growths) - 1)
        axes.scatter(x, y, s=120, c=[colour], cmap="viridis_r", vmin=0, vmax=1, edgecolors=INK, zorder=3)
    for x, y, numbers in labels:
        axes.annotate(", ".join(map(str, numbers)), (x, y), (9, 7), textcoords="offset points", fontsize=10)
    axes.set(xlim=(-0.15, 1.15), ylim=(-0.15, 1.0), aspect="equal")
    axes.axis("off")
    axes.set_title("share of each dimension in the growth; yellow: best", loc="left", fontsize=12)
