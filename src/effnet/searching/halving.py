"""Successive halving: which trainings a search needs next, and what the finished ones say.

The paper gives alpha, beta and gamma for B0 and no procedure (section 3.3). Here every candidate is trained briefly,
the better third goes on to a training three times as long, and those that are left are trained with several seeds
(successive halving, Jamieson and Talwalkar 2016). What to train next follows from the scores only, so any number of
workers may share the work, and an interrupted search goes on with what is missing.

The verdict compares the candidates of the highest rung that has scores with the best of them, seed by seed. A
difference whose interval holds 0 is none: the two are level. The intervals are Tukey's, which hold for all pairs at
once, because the best of many is partly lucky. How far a seed moves a score is estimated from all candidates together
(a randomised block design: a candidate's effect and a seed's add up, and the rest is noise, equally large for networks
of equal cost).
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from effnet.fields import positive_int

CONFIDENCE = 0.95
SPREAD = 1.96  # standard deviations within which a normal value lies with that confidence
FAILED = 0.0  # the score of a network that could not be trained
FACTOR = 3  # a rung's trainings are so many times longer than those of the rung below, and so many times fewer go on


@dataclass(frozen=True)
class Rung:
    """A stage of the search."""

    share: float  # of the longest training
    candidates: int  # that take part
    seeds: int  # trainings of each


@dataclass(frozen=True, order=True)
class Job:
    """A training to score; all three count from 0."""

    rung: int
    seed: int
    candidate: int


@dataclass(frozen=True)
class Trial:
    """How a training ended."""

    job: Job
    score: float | None  # None: its workers died, and another run of the search trains it again
    seconds: float
    error: str = ""


Scores = Mapping[Job, float]


@dataclass(frozen=True)
class PairedDifference:
    """How much better or worse one network is than another, compared seed by seed."""

    candidate: int
    value: float  # the mean over the seeds of its score less the other's
    low: float
    high: float

    @property
    def level(self) -> bool:
        """Whether it may be as good as the other."""
        return self.high >= 0


@dataclass(frozen=True)
class Verdict:
    """What the finished trainings say."""

    rung: int  # whose candidates are compared
    seeds: int  # trainings of each of them
    complete: bool  # no training is missing
    best: int
    means: dict[int, float]  # scores of the compared candidates, the best first
    differences: tuple[PairedDifference, ...]  # of the others from the best
    between_rungs: tuple[float, ...]  # Kendall's tau of the candidates that two rungs share; nan for fewer than two
    between_seeds: tuple[float, ...]  # of the compared candidates by one seed and by the next
    noise: float  # standard deviation of their scores by seed; nan where there is one seed
    close_calls: tuple[int, ...]  # at each rung below, those that left within that noise of one that went on

    @property
    def level(self) -> tuple[int, ...]:
        """The best, and those that may be as good."""
        return (self.best, *(each.candidate for each in self.differences if each.level))


def ladder(candidates: int, *, rungs: int = 3, seeds: int = 5, finalists: int = 4) -> tuple[Rung, ...]:
    """The rungs of a search.

    Args:
        candidates: at the first rung.
        rungs: how many there are.
        seeds: trainings of each candidate at the last rung; at the others there is one.
        finalists: candidates at the last rung, or all if they are fewer.

    Raises:
        ArgumentError: a number is not a positive whole number.
    """
    candidates, rungs = positive_int("candidates", candidates), positive_int("rungs", rungs)
    seeds, finalists = positive_int("seeds", seeds), positive_int("finalists", finalists)
    rows = []
    for number in range(rungs):
        last = number == rungs - 1
        left = max(min(finalists, candidates), math.ceil(candidates / FACTOR**number))
        rows.append(Rung(FACTOR ** (number + 1 - rungs), left, seeds if last else 1))
    return tuple(rows)


def survivors(rungs: Sequence[Rung], rung: int, scores: Scores) -> tuple[int, ...] | None:
    """The candidates of a rung, the best of the rung below first; None while that one is not complete."""
    if rung == 0:
        return tuple(range(rungs[0].candidates))
    before = survivors(rungs, rung - 1, scores)
    if before is None or any(job not in scores for job in _jobs(rungs, rung - 1, before)):
        return None
    means = _means(rung - 1, range(rungs[rung - 1].seeds), before, scores)
    return tuple(sorted(before, key=lambda candidate: (-means[candidate], candidate))[: rungs[rung].candidates])


def open_jobs(rungs: Sequence[Rung], scores: Scores) -> tuple[Job, ...]:
    """The trainings that can be done now, in order; none when the search is over."""
    for rung in range(len(rungs)):
        present = survivors(rungs, rung, scores)
        if present is None:
            break
        if missing := tuple(job for job in _jobs(rungs, rung, present) if job not in scores):
            return missing
    return ()


def all_jobs(rungs: Sequence[Rung]) -> tuple[Job, ...]:
    """The trainings of a whole search, had the first candidates been the best at every rung."""
    return tuple(job for number, rung in enumerate(rungs) for job in _jobs(rungs, number, range(rung.candidates)))


def missing_trainings(rungs: Sequence[Rung], scores: Scores) -> tuple[int, ...]:
    """How many trainings each rung still needs."""
    left = []
    for number, rung in enumerate(rungs):
        present = survivors(rungs, number, scores)
        jobs = _jobs(rungs, number, range(rung.candidates) if present is None else present)
        left.append(sum(present is None or job not in scores for job in jobs))
    return tuple(left)


def verdict(rungs: Sequence[Rung], scores: Scores) -> Verdict | None:
    """What the finished trainings say; None where none is finished.

    It stands on the highest rung with a seed that all its candidates were trained with, and on all such seeds; or on
    the candidates of the first rung that were trained so far.

    Raises:
        MissingExtraError: SciPy is not installed.
    """
    rung, present, seeds = _reached(rungs, scores)
    if not present:
        return None
    table = {candidate: [scores[Job(rung, seed, candidate)] for seed in seeds] for candidate in present}
    means = {candidate: statistics.fmean(values) for candidate, values in table.items()}
    order = sorted(present, key=lambda candidate: (-means[candidate], candidate))
    ranked = {candidate: table[candidate] for candidate in order}
    deviation = noise(_sound(ranked))
    taus, close = [], []
    for upper in range(1, rung + 1):
        before, here = (survivors(rungs, each, scores) or () for each in (upper - 1, upper))
        below = _means(upper - 1, range(rungs[upper - 1].seeds), before, scores)
        above = means if upper == rung else _means(upper, range(rungs[upper].seeds), here, scores)
        taus.append(_tau([below[c] for c in here], [above[c] for c in here]))
        if not math.isnan(deviation):
            bar = min(below[c] for c in here) - SPREAD * math.sqrt(2) * deviation
            close.append(sum(below[c] >= bar for c in before if c not in here))
    columns = [[table[c][place] for c in present] for place in range(len(seeds))]
    return Verdict(
        rung=rung,
        seeds=len(seeds),
        complete=not open_jobs(rungs, scores),
        best=order[0],
        means={candidate: means[candidate] for candidate in order},
        differences=differences_from(order[0], ranked),
        between_rungs=tuple(taus),
        between_seeds=tuple(_tau(one, next_one) for one, next_one in itertools.pairwise(columns)),
        noise=deviation,
        close_calls=tuple(close),
    )


def differences_from(reference: int, scores: Mapping[int, Sequence[float]]) -> tuple[PairedDifference, ...]:
    """How much better each other candidate is than the reference, which these scores chose; Tukey's intervals.

    A candidate with a training that failed has no interval and no part in the noise; if it is the reference, nothing
    is known.

    Args:
        reference: the candidate that the others are compared with.
        scores: of each candidate, by seed.

    Raises:
        MissingExtraError: SciPy is not installed.
    """
    means = {candidate: statistics.fmean(values) for candidate, values in scores.items()}
    sound, seeds = _sound(scores), len(scores[reference])
    spread, reach = noise(sound), math.inf
    if reference in sound and not math.isnan(spread):
        reach = _tukey(len(sound), (len(sound) - 1) * (seeds - 1)) * spread / math.sqrt(seeds)
    gaps = {candidate: mean - means[reference] for candidate, mean in means.items() if candidate != reference}
    reaches = {candidate: reach if candidate in sound or reference not in sound else 0.0 for candidate in gaps}
    return tuple(PairedDifference(c, gap, gap - reaches[c], gap + reaches[c]) for c, gap in gaps.items())


def noise(scores: Mapping[int, Sequence[float]]) -> float:
    """The standard deviation of scores by seed, beside what all candidates owe to the same seed.

    nan where nothing is known of it: of a single candidate or seed.
    """
    of_seeds = [statistics.fmean(column) for column in zip(*scores.values(), strict=True)]
    freedom = (len(scores) - 1) * (len(of_seeds) - 1)
    if not scores or not freedom:
        return math.nan
    overall = statistics.fmean(of_seeds)
    rest = (
        (value - statistics.fmean(values) - of_seed + overall) ** 2
        for values in scores.values()
        for value, of_seed in zip(values, of_seeds, strict=True)
    )
    return math.sqrt(sum(rest) / freedom)


def _reached(rungs: Sequence[Rung], scores: Scores) -> tuple[int, tuple[int, ...], list[int]]:
    """The rung that a verdict stands on, its candidates, and the seeds with which all of them were trained."""
    for rung in reversed(range(len(rungs))):
        present = survivors(rungs, rung, scores) or ()
        seeds = [s for s in range(rungs[rung].seeds) if all(Job(rung, s, c) in scores for c in present)]
        if present and seeds:
            return rung, present, seeds
    return 0, tuple(c for c in range(rungs[0].candidates) if Job(0, 0, c) in scores), [0]


def _sound(scores: Mapping[int, Sequence[float]]) -> dict[int, Sequence[float]]:
    return {candidate: values for candidate, values in scores.items() if FAILED not in values}


def _jobs(rungs: Sequence[Rung], rung: int, present: Sequence[int]) -> tuple[Job, ...]:
    return tuple(Job(rung, seed, candidate) for seed in range(rungs[rung].seeds) for candidate in sorted(present))


def _means(rung: int, seeds: Sequence[int], present: Sequence[int], scores: Scores) -> dict[int, float]:
    return {c: statistics.fmean(scores[Job(rung, seed, c)] for seed in seeds) for c in present}


@functools.cache
def _tukey(candidates: int, freedom: int) -> float:
    from scipy import stats

    return float(stats.studentized_range.ppf(CONFIDENCE, candidates, freedom))


def _tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau-b: 1 where two rankings agree, -1 where one is the other's reverse."""
    from scipy import stats

    return float(stats.kendalltau(first, second).statistic) if len(first) > 1 else math.nan
