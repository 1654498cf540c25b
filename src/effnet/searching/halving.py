"""Step 1 of the paper: which alpha, beta and gamma are best on a baseline. How a network is scored is passed in.

The paper gives the answer for B0 and no procedure (section 3.3). Here every candidate is trained briefly, the better
third goes on to a training three times as long, and those that are left are trained with several seeds (successive
halving, Jamieson and Talwalkar 2016). What to train next follows from the scores alone, so any number of workers may
share the work, and a search that was interrupted goes on with what is missing.

The verdict compares the last rung's candidates seed by seed with the best one. A difference whose interval holds 0 is
none: the two are level. The intervals are Tukey's, which hold for all pairs at once, because the best of many is partly
lucky. How far a seed moves a score is taken from all candidates together (a randomised block design: a candidate's
effect and a seed's add up, and the rest is noise, equally large for networks of equal cost).
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from effnet.errors import ArgumentError, MissingExtraError
from effnet.fields import positive_int

CONFIDENCE = 0.95
SPREAD = 1.96  # standard deviations within which a normal value lies with that confidence
FAILED = 0.0  # the score of a training that came to nothing
FACTOR = 3  # a rung's trainings are so many times longer than the rung's below, and so many times fewer go on


@dataclass(frozen=True)
class Rung:
    """A stage of the search."""

    share: float  # of the longest training
    candidates: int  # that take part
    seeds: int  # trainings of each


@dataclass(frozen=True, order=True)
class Job:
    """One training."""

    rung: int
    seed: int
    candidate: int


@dataclass(frozen=True)
class Difference:
    """How much worse than the best, or than another network, a candidate is."""

    candidate: int
    value: float  # the mean over the seeds of its score less the other's
    low: float
    high: float

    @property
    def level(self) -> bool:
        """Whether the two may be equally good."""
        return self.high >= 0


@dataclass(frozen=True)
class Verdict:
    """What a search found."""

    best: int
    means: dict[int, float]  # scores of the last rung's candidates, the best first
    differences: tuple[Difference, ...]  # of the others from the best
    between_rungs: tuple[float, ...]  # Kendall's tau of the candidates that two rungs share; nan for fewer than two
    between_seeds: tuple[float, ...]  # of the last rung's candidates by one seed and by the next
    noise: float  # standard deviation of the last rung's scores by seed; nan where there is one seed
    close_calls: tuple[int, ...]  # at each rung but the last, those that left within that noise of one that went on

    @property
    def level(self) -> tuple[int, ...]:
        """The best, and those that may be as good."""
        return (self.best, *(each.candidate for each in self.differences if each.level))


Scores = Mapping[Job, float]
Plan = Callable[[Scores], Sequence[Job]]  # the trainings that can be done now, in order; none when all are done


def ladder(candidates: int, *, rungs: int = 3, seeds: int = 5, finalists: int = 4) -> tuple[Rung, ...]:
    """The rungs of a search.

    Args:
        candidates: at the first rung.
        rungs: how many there are.
        seeds: trainings of each candidate at the last rung; at the others there is one.
        finalists: candidates at the last rung, or all if they are fewer.

    Raises:
        ArgumentError: a number is no positive whole number.
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
    means = _means(rungs, rung - 1, before, scores)
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


def jobs_in_all(rungs: Sequence[Rung]) -> tuple[Job, ...]:
    """The trainings of a whole search, had the first candidates been the best at every rung."""
    return tuple(job for number, rung in enumerate(rungs) for job in _jobs(rungs, number, range(rung.candidates)))


def verdict(rungs: Sequence[Rung], scores: Scores) -> Verdict:
    """What the scores say when all trainings are done.

    Raises:
        ArgumentError: trainings are missing.
        MissingExtraError: SciPy is not installed.
    """
    last = len(rungs) - 1
    finalists = survivors(rungs, last, scores)
    if finalists is None or open_jobs(rungs, scores):
        raise ArgumentError(
            "scores", f"{len(scores)} trainings", f"must be all {len(jobs_in_all(rungs))} of the search."
        )
    means = _means(rungs, last, finalists, scores)
    order = sorted(finalists, key=lambda candidate: (-means[candidate], candidate))
    best, seeds = order[0], range(rungs[last].seeds)

    def at(candidate: int, seed: int) -> float:
        return scores[Job(last, seed, candidate)]

    table = {candidate: [at(candidate, seed) for seed in seeds] for candidate in order}
    differences = differences_from(best, table)
    deviation = noise(_sound(table))
    taus, close = [], []
    for rung in range(1, len(rungs)):
        before, present = (survivors(rungs, each, scores) or () for each in (rung - 1, rung))
        below, here = _means(rungs, rung - 1, before, scores), _means(rungs, rung, present, scores)
        taus.append(_tau([below[c] for c in present], [here[c] for c in present]))
        if not math.isnan(deviation):
            bar = min(below[c] for c in present) - SPREAD * math.sqrt(2) * deviation
            close.append(sum(below[c] >= bar for c in before if c not in present))
    by_seed = [_tau([at(c, seed) for c in finalists], [at(c, seed + 1) for c in finalists]) for seed in seeds[:-1]]
    ranked = {candidate: means[candidate] for candidate in order}
    return Verdict(best, ranked, differences, tuple(taus), tuple(by_seed), deviation, tuple(close))


def differences_from(reference: int, scores: Mapping[int, Sequence[float]]) -> tuple[Difference, ...]:
    """How much better than the reference, which these scores chose, each other candidate is; Tukey's intervals.

    A candidate with a training that came to nothing has no interval and no part in the noise; if it is the reference,
    nothing is known.

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
    return tuple(Difference(c, gap, gap - reaches[c], gap + reaches[c]) for c, gap in gaps.items())


def paired_difference(candidate: int, gaps: Sequence[float], comparisons: int) -> Difference:
    """The mean of a candidate's gaps, seed by seed, with Student's interval as one of so many comparisons.

    It asks nothing of how noisy the two are; of a single seed nothing is known.

    Raises:
        MissingExtraError: SciPy is not installed.
    """
    mean = statistics.fmean(gaps)
    if len(gaps) < 2:
        return Difference(candidate, mean, -math.inf, math.inf)
    tail = (1 - CONFIDENCE) / 2 / comparisons
    reach = float(_stats().t.ppf(1 - tail, len(gaps) - 1)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return Difference(candidate, mean, mean - reach, mean + reach)


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


def _sound(scores: Mapping[int, Sequence[float]]) -> dict[int, Sequence[float]]:
    return {candidate: values for candidate, values in scores.items() if FAILED not in values}


@functools.cache
def _tukey(candidates: int, freedom: int) -> float:
    return float(_stats().studentized_range.ppf(CONFIDENCE, candidates, freedom))


def _jobs(rungs: Sequence[Rung], rung: int, present: Sequence[int]) -> tuple[Job, ...]:
    return tuple(Job(rung, seed, candidate) for seed in range(rungs[rung].seeds) for candidate in sorted(present))


def _means(rungs: Sequence[Rung], rung: int, present: Sequence[int], scores: Scores) -> dict[int, float]:
    seeds = range(rungs[rung].seeds)
    return {c: statistics.fmean(scores[Job(rung, seed, c)] for seed in seeds) for c in present}


def _tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau-b: 1 where two rankings agree, -1 where one is the other's reverse."""
    return float(_stats().kendalltau(first, second).statistic) if len(first) > 1 else math.nan


def _stats() -> Any:
    try:
        return import_module("scipy.stats")
    except ImportError as error:
        raise MissingExtraError("the verdict of a search", "search") from error
