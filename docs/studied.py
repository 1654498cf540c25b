"""The tables of searching.md, from what the studies left in benchmarks/results/search.

Verdicts are computed anew from the trainings' scores, by the code that the command uses.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from counted import table
from scipy.stats import kendalltau

from effnet.searching.halving import FACTOR, Job, Rung, Verdict, judge, survivors

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "search"
SEARCHES = ("separable", "mbconv")
DIMENSIONS = ("depth", "width", "resolution")
Growths = tuple[float, float, float]


@dataclass(frozen=True)
class Studied:
    """A search as its files tell it."""

    rows: list[dict[str, str]]  # of candidates.csv
    scores: dict[Job, float]
    minutes: float  # of one core

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """Its rungs, as they were."""
        last = max(job.rung for job in self.scores)
        jobs = [[job for job in self.scores if job.rung == rung] for rung in range(last + 1)]
        counts = [(len({job.candidate for job in some}), len({job.seed for job in some})) for some in jobs]
        return tuple(Rung(FACTOR ** (rung - last), *count) for rung, count in enumerate(counts))

    @property
    def verdict(self) -> Verdict:
        """What it found."""
        return judge(self.rungs, self.scores)

    def effective(self, place: int) -> Growths:
        """What a candidate grows by in effect."""
        depth, width, resolution = (float(self.rows[place][f"effective_{name}"]) for name in DIMENSIONS)
        return depth, width, resolution

    def triples(self, places: Iterable[int]) -> set[Growths]:
        """The triples that build these candidates."""
        found = set()
        for place in places:
            row = self.rows[place]
            texts = [f"{row['alpha']} {row['beta']} {row['gamma']}", *filter(None, row["others"].split("; "))]
            for text in texts:
                alpha, beta, gamma = map(float, text.split())
                found.add((alpha, beta, gamma))
        return found


@cache
def studied(name: str) -> Studied:
    """A study's files."""
    with (RESULTS / name / "candidates.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (RESULTS / name / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    scores = {Job(int(row["rung"]), int(row["seed"]), int(row["candidate"])): float(row["score"]) for row in trials}
    return Studied(rows, scores, sum(float(row["seconds"]) for row in trials) / 60)


def finalists(name: str) -> str:
    """The last rung of a search."""
    study, judged = studied(name), studied(name).verdict
    gaps = {each.candidate: each for each in judged.differences}
    rows = []
    for place, mean in judged.means.items():
        row, gap = study.rows[place], gaps.get(place)
        nominal = f"{float(row['alpha']):g}, {float(row['beta']):g}, {float(row['gamma']):g}"
        effect = ", ".join(f"{growth:.2f}" for growth in study.effective(place))
        shown = "" if gap is None else f"{_points(gap.value)} ({_points(gap.low)} to {_points(gap.high)})"
        words = "best" if gap is None else "level" if gap.level else "worse"
        built = f"{row['layers'].replace(' ', ' + ')}", row["resolution"], f"{int(row['params']):,}"
        rows.append((nominal, effect, *built, f"{mean:.2%}", shown, words))
    header = "alpha, beta, gamma | in effect | layers | px | params | accuracy | minus the best | "
    return table(header, rows, left=(1, 2))


def steadiness() -> str:
    """How far rankings of the searches can be trusted."""
    rows = []
    for name in SEARCHES:
        study, judged = studied(name), studied(name).verdict
        rungs = " → ".join(f"{rung.candidates} x {rung.seeds}" for rung in study.rungs)
        taus = (", ".join(f"{tau:+.2f}" for tau in each) for each in (judged.between_rungs, judged.between_seeds))
        close = " and ".join(map(str, judged.close_calls))
        rows.append((name, rungs, *taus, f"{100 * judged.noise:.2f}", close, f"{study.minutes / 2:.0f}"))
    header = (
        "baseline | networks x seeds | tau between rungs | tau between seeds | seed noise, points"
        " | eliminated within the noise | minutes on two cores"
    )
    return table(header, rows, left=(1, 2, 3))


def shares() -> str:
    """How scores go with what is grown, at each rung that all candidates were trained at."""
    rows = []
    for name, words in (("separable", "66 steps"), ("separable-whole", "597 steps"), ("mbconv", "66 steps")):
        study = studied(name)
        first = {job.candidate: score for job, score in study.scores.items() if job.rung == 0}
        taus = [kendalltau([study.effective(c)[d] for c in first], list(first.values())) for d in range(3)]
        best, least = max(first.values()), min(first.values())
        cells = (f"{tau.statistic:+.2f} (p = {tau.pvalue:.2g})" for tau in taus)
        rows.append((name.removesuffix("-whole"), words, len(first), *cells, f"{least:.1%} to {best:.1%}"))
    return table("baseline | trained for | networks | depth | width | resolution | accuracies", rows, left=(1,))


def halving() -> str:
    """Whether those that halving let through are those that a whole training prefers."""
    short, whole = studied("separable"), studied("separable-whole")
    early, full = ({j.candidate: s for j, s in study.scores.items() if j.rung == 0} for study in (short, whole))
    tau = kendalltau([early[c] for c in full], list(full.values()))
    last = set(survivors(short.rungs, len(short.rungs) - 1, short.scores) or ())
    order = sorted(full, key=full.__getitem__, reverse=True)
    kept = sorted(order.index(c) + 1 for c in last)
    places = ", ".join(map(str, kept[:-1])) + f" and {kept[-1]}"
    return (
        f"Kendall's tau between the two rankings of all {len(full)} networks is {tau.statistic:+.2f} "
        f"(p = {tau.pvalue:.2g}), and the {len(last)} finalists are numbers {places} in the full trainings"
    )


def levels() -> str:
    """The triples that may be the best on each baseline."""
    rows, sets = [], []
    for name in SEARCHES:
        study, judged = studied(name), studied(name).verdict
        level, beaten = (study.triples(places) for places in (judged.level, judged.means.keys() - set(judged.level)))
        everything = study.triples(range(len(study.rows)))
        sets.append(level)
        rows.append((name, len(everything), len(study.rows), len(judged.level), len(level), len(beaten)))
    both = len(sets[0] & sets[1])
    header = "baseline | triples | networks | networks that may be the best | their triples | triples found worse"
    return table(header, rows) + f"\n{both} triples may be the best on both.\n"


def compared() -> str:
    """The comparison's networks and scores."""
    study = studied("compare")
    rows = []
    for place, row in enumerate(study.rows):
        scores = [100 * score for job, score in sorted(study.scores.items()) if job.candidate == place]
        effect = ", ".join(f"{growth:.2f}" for growth in study.effective(place))
        built = row["layers"].replace(" ", " + "), row["resolution"], f"{int(row['params']):,}"
        spread = f"{statistics.stdev(scores):.2f}"
        cells = f"{statistics.fmean(scores):.2f}", spread, len(scores)
        rows.append((row["line"], f"{float(row['ratio']):.2f}", effect, *built, *cells))
    header = (
        "grown | multiply-adds, x | depth, width, resolution in effect | layers | px | params | accuracy, %"
        " | std | seeds"
    )
    return table(header, rows, left=(2, 3))


def standing() -> str:
    """What the comparison says about compound scaling."""
    found = json.loads((RESULTS / "compare" / "verdict.json").read_text())["compound"]
    rows = []
    for row in found:
        value, low, high = (_points(row[name]) for name in ("value", "low", "high"))
        rows.append((f"{row['macs']:.3g}", row["words"], f"{value} ({low} to {high})"))
    return table("multiply-adds, x | verdict | compound minus the other, points", rows, left=(1,))


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


BLOCKS: dict[str, Callable[[], str]] = {
    **{f"finalists-{name}": partial(finalists, name) for name in (*SEARCHES, "mbconv-long")},
    "steadiness": steadiness,
    "shares": shares,
    "halving": halving,
    "levels": levels,
    "compared": compared,
    "standing": standing,
}
