"""Step 1 of the paper on one's own baseline and images: which alpha, beta and gamma, and how sure that is.

Beside what every contest writes (contest.py), the folder of a finished search has

baseline.yaml          the baseline as it was searched, at its resolution
rule.yaml              alpha, beta and gamma of the best candidate, and how they were found, for effnet scale --rule
verdict.json           who is level with the best, and how often the ranking changed
search.png             the scores of all candidates
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from effnet.arch.spec import NetworkSpec
from effnet.arch.specfile import spec_text
from effnet.errors import ArgumentError
from effnet.machine import this_machine
from effnet.metrics.latency import time_network
from effnet.progress import SILENT, Progress
from effnet.scaling.budget import Budget
from effnet.scaling.compound import Rule
from effnet.searching.candidates import PRODUCT, Candidate, candidates, grid
from effnet.searching.experiment import Contest, Terms, described
from effnet.searching.halving import Job, Rung, Verdict, jobs_in_all, ladder, open_jobs, verdict
from effnet.training.run import write_text

RULE, VERDICT, PICTURE, BASELINE = "rule.yaml", "verdict.json", "search.png", "baseline.yaml"
LARGEST_PHI = 16  # 65,536 times the multiply-adds


@dataclass(frozen=True)
class Question:
    """What a search looks among, and how thoroughly."""

    step: float = 0.05  # of the grid
    tolerance: float = 0.1  # of alpha beta^2 gamma^2 around 2
    phi: float = 1.0
    triples: tuple[Rule, ...] = ()  # in place of the grid
    budget: Budget | None = None  # what every candidate has to meet
    rungs: int = 3
    seeds: int = 5  # of each candidate at the last rung
    finalists: int = 4

    def __post_init__(self) -> None:
        """Check what the triples have to obey.

        Raises:
            ArgumentError: phi is outside its range, or a triple's product is too far from 2.
        """
        if not 0 < self.phi <= LARGEST_PHI:
            raise ArgumentError("phi", self.phi, f"must be more than 0 and at most {LARGEST_PHI}.")
        for rule in self.triples:
            if abs(rule.product - PRODUCT) > self.tolerance + 1e-9:
                words = (
                    f"has alpha beta^2 gamma^2 = {rule.product:.3g}, more than {self.tolerance:g} from 2: --tolerance."
                )
                raise ArgumentError("triple", rule.growths, words)


@dataclass(frozen=True)
class Found:
    """What a search has found."""

    folder: Path
    baseline: NetworkSpec
    candidates: tuple[Candidate, ...]
    rungs: tuple[Rung, ...]
    scores: dict[Job, float]
    verdict: Verdict | None  # None: it is not over

    @property
    def rule(self) -> Rule:
        """The best candidate's triple.

        Raises:
            ArgumentError: the search is not over.
        """
        if self.verdict is None:
            raise ArgumentError("verdict", None, "is not there yet: the same command goes on with the search.")
        return dataclasses.replace(self.candidates[self.verdict.best].rule, name="found")


def search(
    data: str | Path,
    baseline: str | NetworkSpec = "b0",
    *,
    question: Question | None = None,
    progress: Progress = SILENT,
    **terms: Any,
) -> Found:
    """Search alpha, beta and gamma for a baseline; called again with the same arguments, it goes on where it was.

    Args:
        data: a folder of class folders or a manifest.
        baseline: a variant, another baseline's name, a spec.yaml or a NetworkSpec.
        question: the candidates and the rungs.
        progress: who is told how it goes.
        terms: fields of contest.Terms, such as minutes=60 or out="folder".

    Raises:
        ArgumentError, DataError: the data or a value cannot be used, or the folder holds another search.
        MissingExtraError: Optuna or SciPy is not installed.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what is finished is kept.
    """
    asked = question or Question()
    contest = Contest(Terms(str(data), baseline, **terms), "search", progress)
    if contest.moved:
        contest.progress.message(contest.moved)
    rules = asked.triples or grid(asked.step, asked.tolerance)
    found = candidates(
        contest.baseline, _counted(rules, contest), phi=asked.phi, largest=contest.native, budget=asked.budget
    )
    if asked.budget is not None and asked.budget.latency is not None:
        found = _fast_enough(found, float(asked.budget.latency), contest)
    used = sum(len(each.triples) for each in found)
    others = "" if used == len(rules) else f"; {len(rules) - used} more build none of that cost, or exceed the budget"
    contest.progress.message(
        f"{used} triples are {len(found)} networks of {2**asked.phi:.3g} times the baseline's multiply-adds{others}"
    )
    rungs = ladder(len(found), rungs=asked.rungs, seeds=asked.seeds, finalists=asked.finalists)
    networks = [each.network for each in found]
    rows = [_row(place, each) for place, each in enumerate(found)]
    shares, as_rows = [rung.share for rung in rungs], [dataclasses.asdict(rung) for rung in rungs]
    plan = functools.partial(open_jobs, rungs)
    scores = contest.compete(networks, rows, plan, shares, jobs_in_all(rungs), rungs=as_rows)
    if scores is None:
        return Found(contest.out, contest.baseline, found, rungs, contest.study.scores(), None)
    result = Found(contest.out, contest.baseline, found, rungs, scores, verdict(rungs, scores))
    _write(result, contest)
    return result


def _counted(rules: Sequence[Rule], contest: Contest) -> Iterator[Rule]:
    """The triples, while the progress counts them."""
    for place, rule in enumerate(rules, start=1):
        yield rule
        contest.progress.update("triples built", place, len(rules))


def _fast_enough(found: tuple[Candidate, ...], latency: float, contest: Contest) -> tuple[Candidate, ...]:
    """Those that take at most so many seconds for one image; a search that goes on keeps those that it began with."""
    known = contest.known
    if known is not None:
        return tuple(each for each in found if json.loads(json.dumps(each.network.to_dict())) in known["networks"])
    times = []
    for place, each in enumerate(found):
        contest.progress.update("timing candidates", place, len(found))
        times.append(time_network(each.network).median_ms / 1e3)
    contest.progress.update("timing candidates", len(found), len(found))
    kept = tuple(each for each, seconds in zip(found, times, strict=True) if seconds <= latency)
    if not kept:
        raise ArgumentError("latency", latency, f"is met by no candidate: the fastest takes {1e3 * min(times):.3g} ms.")
    return kept


def _row(place: int, candidate: Candidate) -> dict[str, Any]:
    """A line of candidates.csv."""
    alpha, beta, gamma = candidate.rule.growths
    others = "; ".join(" ".join(f"{growth:g}" for growth in rule.growths) for rule in candidate.triples[1:])
    nominal = {"alpha": alpha, "beta": beta, "gamma": gamma, "others": others}  # that build the same network
    return described(place, candidate.network, candidate.effective) | nominal | {"ratio": round(candidate.ratio, 4)}


def _write(found: Found, contest: Contest) -> None:
    """Write the rule, the verdict and the picture."""
    from effnet.searching.plots import draw_search

    judged, rule = found.verdict, found.rule
    assert judged is not None
    means = {found.candidates[place].network.name: mean for place, mean in judged.means.items()}
    level = [found.candidates[place].rule.growths for place in judged.level]
    values = {
        "name": "found",
        **dict(zip(("alpha", "beta", "gamma"), rule.growths, strict=True)),
        "found": {
            "baseline": found.baseline.name,
            "data": contest.terms.data,
            "data_sha256": contest.data.digest,
            "effective": [round(growth, 4) for growth in found.candidates[judged.best].effective],
            "score": round(judged.means[judged.best], 6),
            "level_with_it": [list(growths) for growths in level[1:]],
            "candidates": len(found.candidates),
            "trainings": len(found.scores),
            "epochs": (contest.study.about or {})["epochs"],
            "recipe": contest.recipe.name,
            "seed": contest.terms.seed,
            "machine": str(this_machine()),
        },
    }
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    write_text(found.folder / RULE, text)
    write_text(found.folder / BASELINE, spec_text(found.baseline))
    report = {
        "best": found.candidates[judged.best].network.name,
        "means": means,
        "differences": [
            {
                "network": found.candidates[each.candidate].network.name,
                "value": each.value,
                "low": _finite(each.low),
                "high": _finite(each.high),
                "level": each.level,
            }
            for each in judged.differences
        ],
        "kendall_tau_between_rungs": [_finite(tau) for tau in judged.between_rungs],
        "kendall_tau_between_seeds": [_finite(tau) for tau in judged.between_seeds],
        "noise": _finite(judged.noise),
        "close_calls": judged.close_calls,
    }
    write_text(found.folder / VERDICT, json.dumps(report, indent=2) + "\n")
    draw_search(found.candidates, found.rungs, found.scores, judged, found.folder / PICTURE)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
