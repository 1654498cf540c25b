"""Width, depth, resolution and compound scaling of one baseline on one's own images, at equal cost.

Beside what every contest writes (contest.py), the folder of a finished comparison has

verdict.json           compound scaling against each single dimension, at each cost
compare.png            the accuracies over the multiply-adds, and the width swept at several depths and resolutions
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effnet.arch.spec import NetworkSpec
from effnet.fields import positive_int
from effnet.progress import SILENT, Progress
from effnet.scaling.compound import Rule, read_rule
from effnet.searching.claim import Contestant, Standing, contestants, jobs, standings
from effnet.searching.experiment import Contest, Terms, described
from effnet.searching.halving import Job
from effnet.training.run import write_text

VERDICT, PICTURE = "verdict.json", "compare.png"


@dataclass(frozen=True)
class Compared:
    """What a comparison has found."""

    folder: Path
    baseline: NetworkSpec
    contestants: tuple[Contestant, ...]
    seeds: int
    scores: dict[Job, float]
    standings: tuple[Standing, ...] | None  # None: it is not over

    def scores_of(self, place: int) -> list[float]:
        """A network's scores, by seed."""
        return [score for job, score in sorted(self.scores.items()) if job.candidate == place]


def compare(
    data: str | Path,
    baseline: str | NetworkSpec = "b0",
    *,
    factor: float = 4.0,
    rule: str | Path | Rule = "paper",
    seeds: int = 5,
    progress: Progress = SILENT,
    **terms: Any,
) -> Compared:
    """Compare ways to scale a baseline; called again with the same arguments, it goes on where it was.

    Args:
        data: a folder of class folders or a manifest.
        baseline: a variant, another baseline's name, a spec.yaml or a NetworkSpec.
        factor: what the multiply-adds grow by; its square root is the step between.
        rule: of compound scaling, such as the rule.yaml of a search.
        seeds: trainings of each network.
        progress: who is told how it goes.
        terms: fields of contest.Terms, such as minutes=60 or out="folder".

    Raises:
        ArgumentError, DataError: the data or a value cannot be used, or the folder holds another comparison.
        MissingExtraError: Optuna or SciPy is not installed.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what is finished is kept.
    """
    growth, seeds = read_rule(rule), positive_int("seeds", seeds)
    contest = Contest(Terms(str(data), baseline, **terms), "compare", progress)
    if contest.moved:
        contest.progress.message(contest.moved)
    told = functools.partial(contest.progress.update, "networks built")
    found = contestants(contest.baseline, growth, factor, largest=contest.native, progress=told)
    rows = [
        {"line": each.line, "ratio": round(each.ratio, 4)} | described(place, each.network, each.effective)
        for place, each in enumerate(found)
    ]
    plan = functools.partial(jobs, tuple(found), seeds)
    networks = [each.network for each in found]
    scores = contest.compete(networks, rows, plan, [1.0], plan({}), seeds=seeds)
    if scores is None:
        return Compared(contest.out, contest.baseline, tuple(found), seeds, contest.study.scores(), None)
    stand = tuple(standings(found, seeds, scores))
    result = Compared(contest.out, contest.baseline, tuple(found), seeds, scores, stand)
    _write(result)
    return result


def _write(compared: Compared) -> None:
    """Write the verdict and the picture."""
    from effnet.searching.plots import draw_comparison

    rows = []
    for each in compared.standings or ():
        gap = dataclasses.asdict(each.difference)
        gap = {name: value if math.isfinite(value) else None for name, value in gap.items() if name != "candidate"}
        rows.append({"against": each.line, "macs": each.factor, **gap, "words": each.words})
    write_text(compared.folder / VERDICT, json.dumps({"compound": rows}, indent=2) + "\n")
    places = range(len(compared.contestants))
    scores = {place: compared.scores_of(place) for place in places}
    draw_comparison(compared.contestants, scores, compared.folder / PICTURE)
