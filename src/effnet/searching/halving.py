"""Successive halving: which trainings a search needs next, and the verdict on finished ones.

The paper gives alpha, beta and gamma for B0 but no procedure (section 3.3). Here every candidate is trained briefly,
the best third is trained three times as long, and the finalists are trained with several seeds (Jamieson and Talwalkar
2016). What to train next depends only on the scores, so any number of workers may share the work.

The verdict compares the candidates of the highest rung with scores to the best of them, seed by seed. A candidate is
level with the best if the interval of their difference contains 0. The intervals are Tukey's, which hold for all pairs
at once, because the best of many is partly lucky. The noise is estimated from all candidates together, as a randomised
block design, in which the effects of candidate and seed add up and the rest is noise.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
SPREAD = 1.96  # standard deviations for this confidence in a normal distribution
FAILED = 0.0  # score of a network that could not be trained
FACTOR = 3  # from rung to rung, trainings become this many times longer and fewer


@dataclass(frozen=True)
class Rung:
    """A stage of the search."""

    share: float  # length of its trainings, relative to the longest
    candidates: int
    seeds: int  # trainings of each candidate

    @property
    def trainings(self) -> int:
        """The number of trainings, over all candidates."""
        return self.candidates * self.seeds


@dataclass(frozen=True, order=True)
class Job:
    """A training to score; all three numbers start at 0."""

    rung: int
    seed: int
    candidate: int


@dataclass(frozen=True)
class Trial:
    """The result of a training."""

    job: Job
    score: float | None  # None: its workers died; when the search is resumed, it is trained again
    seconds: float
    error: str = ""


Scores = Mapping[Job, float]


@dataclass(frozen=True)
class PairedDifference:
    """The difference between two candidates' scores, compared seed by seed."""

    candidate: int
    value: float  # mean over the seeds
    low: float
    high: float

    @property
    def level(self) -> bool:
        """Whether the candidate may be as good as the other."""
        return self.high >= 0


@dataclass(frozen=True)
class Verdict:
    """The verdict on finished trainings."""

    rung: int  # whose candidates are compared
    seeds: int  # trainings of each of them
    complete: bool  # no training is missing
    best: int
    means: dict[int, float]  # score of each compared candidate, best first
    differences: tuple[PairedDifference, ...]  # the others minus the best
    between_rungs: tuple[float, ...]  # Kendall's tau of the candidates that two rungs share; nan for fewer than two
    between_seeds: tuple[float, ...]  # Kendall's tau of the compared candidates, between one seed and the next
    noise: float  # standard deviation of a score over seeds; nan for one seed
    close_calls: tuple[int, ...]  # at each lower rung: candidates dropped within this noise of one that was kept

    @property
    def level(self) -> tuple[int, ...]:
        """The best candidate, and those that may be as good."""
        return (self.best, *(each.candidate for each in self.differences if each.level))


def make_rungs(candidates: int, *, rungs: int = 3, seeds: int = 5, finalists: int = 4) -> tuple[Rung, ...]:
    """The rungs of a search; the last one has at least `finalists` candidates with `seeds` trainings each."""
    counts = [max(min(finalists, candidates), math.ceil(candidates / FACTOR**number)) for number in range(rungs)]
    last = rungs - 1
    return tuple(
        Rung(FACTOR ** (number - last), count, seeds if number == last else 1) for number, count in enumerate(counts)
    )


def survivors(rungs: Sequence[Rung], rung: int, scores: Scores) -> tuple[int, ...] | None:
    """The candidates of a rung, by score on the rung below; None while that is not complete."""
    if rung == 0:
        return tuple(range(rungs[0].candidates))
    before = survivors(rungs, rung - 1, scores)
    if before is None or any(job not in scores for job in _jobs(rungs, rung - 1, before)):
        return None
    means = _means(rungs, rung - 1, before, scores)
    return tuple(sorted(before, key=lambda candidate: (-means[candidate], candidate))[: rungs[rung].candidates])


def open_jobs(rungs: Sequence[Rung], scores: Scores) -> tuple[Job, ...]:
    """The trainings that can start now, in order; none when the search is over."""
    for rung in range(len(rungs)):
        present = survivors(rungs, rung, scores)
        if present is None:
            break
        if missing := tuple(job for job in _jobs(rungs, rung, present) if job not in scores):
            return missing
    return ()


def missing_trainings(rungs: Sequence[Rung], scores: Scores) -> tuple[int, ...]:
    """The number of trainings that each rung still needs."""
    done = Counter(job.rung for job in scores)
    return tuple(rung.trainings - done[number] for number, rung in enumerate(rungs))


def judge(rungs: Sequence[Rung], scores: Scores) -> Verdict | None:
    """The verdict on the finished trainings; None if there are none. Needs SciPy.

    It compares the candidates of the highest rung at which all were trained with at least one seed, on all such seeds;
    before that, the candidates of the first rung that were trained.
    """
    rung, present, seeds = _reached(rungs, scores)
    if not present:
        return None
    table = {candidate: [scores[Job(rung, seed, candidate)] for seed in seeds] for candidate in present}
    means = {candidate: statistics.fmean(values) for candidate, values in table.items()}
    order = sorted(present, key=lambda candidate: (-means[candidate], candidate))
    noise = seed_noise(_sound(table))
    taus, close = [], []
    for upper in range(1, rung + 1):
        before, here = (survivors(rungs, each, scores) or () for each in (upper - 1, upper))
        below = _means(rungs, upper - 1, before, scores)
        above = means if upper == rung else _means(rungs, upper, here, scores)
        taus.append(_tau([below[c] for c in here], [above[c] for c in here]))
        if not math.isnan(noise):
            bar = min(below[c] for c in here) - SPREAD * math.sqrt(2) * noise
            close.append(sum(below[c] >= bar for c in before if c not in here))
    columns = zip(*(table[candidate] for candidate in present), strict=True)  # by seed
    return Verdict(
        rung=rung,
        seeds=len(seeds),
        complete=not open_jobs(rungs, scores),
        best=order[0],
        means={candidate: means[candidate] for candidate in order},
        differences=differences_from(order[0], {candidate: table[candidate] for candidate in order}),
        between_rungs=tuple(taus),
        between_seeds=tuple(itertools.starmap(_tau, itertools.pairwise(columns))),
        noise=noise,
        close_calls=tuple(close),
    )


def differences_from(best: int, scores: Mapping[int, Sequence[float]]) -> tuple[PairedDifference, ...]:
    """Each other candidate's scores by seed minus those of the best, with Tukey's intervals.

    A candidate with a failed training has no interval and is ignored for the noise. If the best has one, all intervals
    are infinite.
    """
    means = {candidate: statistics.fmean(values) for candidate, values in scores.items()}
    sound, seeds = _sound(scores), len(scores[best])
    noise, reach = seed_noise(sound), math.inf
    if best in sound and not math.isnan(noise):
        reach = _tukey(len(sound), (len(sound) - 1) * (seeds - 1)) * noise / math.sqrt(seeds)
    gaps = {candidate: mean - means[best] for candidate, mean in means.items() if candidate != best}
    reaches = {candidate: reach if candidate in sound or best not in sound else 0.0 for candidate in gaps}
    return tuple(PairedDifference(c, gap, gap - reaches[c], gap + reaches[c]) for c, gap in gaps.items())


def seed_noise(scores: Mapping[int, Sequence[float]]) -> float:
    """Standard deviation of scores over seeds, without a seed's effect on all candidates; nan for one of either."""
    table = np.array(list(scores.values()))
    if min(table.shape, default=0) < 2:
        return math.nan
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    return math.sqrt((rest**2).sum() / ((len(table) - 1) * (table.shape[1] - 1)))


def _reached(rungs: Sequence[Rung], scores: Scores) -> tuple[int, tuple[int, ...], list[int]]:
    """The rung to compare, its candidates, and the seeds that all of them were trained with."""
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


def _means(rungs: Sequence[Rung], rung: int, present: Sequence[int], scores: Scores) -> dict[int, float]:
    return {c: statistics.fmean(scores[Job(rung, seed, c)] for seed in range(rungs[rung].seeds)) for c in present}


@functools.cache
def _tukey(candidates: int, freedom: int) -> float:
    from scipy import stats

    return float(stats.studentized_range.ppf(CONFIDENCE, candidates, freedom))


def _tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau-b: 1 for equal rankings, -1 for reversed ones."""
    from scipy import stats

    return float(stats.kendalltau(first, second).statistic) if len(first) > 1 else math.nan
