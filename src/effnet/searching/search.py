"""Step 1 of the paper on one's own baseline and images: which alpha, beta and gamma, and how sure that is.

A search's folder:

args.yaml              how the search was begun: all that going on with it takes, beside the files below
split.csv              which image is in which part
baseline.yaml          the baseline as it was searched, at its resolution
candidates.csv         the networks: what they grow by, as asked and in effect, and what they cost
trials.csv             a line for each training that ended
rule.yaml              alpha, beta and gamma of the best candidate, and how they were found, for effnet scale --rule
verdict.json           which candidates are level with the best, and how often the ranking changed
search.png             the scores of all candidates
pixels/                decoded images, until the search is over
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from effnet.arch.cost import cost
from effnet.arch.spec import NetworkSpec
from effnet.arch.variants import spec as make_spec
from effnet.errors import ArgumentError
from effnet.machine import this_machine
from effnet.progress import SILENT, Progress
from effnet.scaling.compound import Rule
from effnet.searching.candidates import Candidate, candidates, suited
from effnet.searching.halving import Job, Rung, Verdict, all_jobs, missing_trainings, open_jobs, verdict
from effnet.searching.jobs import Executor, LocalExecutor, RayExecutor, TrialRecord, interruptible, run_jobs
from effnet.searching.plan import (
    CACHE,
    PICTURE,
    RULE,
    TRIALS,
    VERDICT,
    SearchOptions,
    SearchPlan,
    WorkOptions,
    check_device,
    free_folder,
    split_images,
)
from effnet.training.recipe import read_recipe
from effnet.training.run import write_text

MINUTES = 60.0  # for which the trainings are made to last, where nothing else is said
USED = 0.8  # of the minutes: workers share the memory's bandwidth, and images have to be decoded
TIMED = 8  # steps
LEAST_STEPS = 50  # of the shortest training
EVALUATION = 1 / 3  # of the time of a training step, for as many images


@dataclass(frozen=True)
class SearchResult:
    """What a search has found so far."""

    plan: SearchPlan
    scores: dict[Job, float]
    verdict: Verdict | None  # None: no training is finished
    missing: tuple[int, ...]  # trainings, by rung
    minutes: float | None  # that they take, by what was measured, with as many workers; None where nothing was

    @property
    def rule(self) -> Rule:
        """The best candidate's triple.

        Raises:
            ArgumentError: no training is finished.
        """
        if self.verdict is None:
            raise ArgumentError("verdict", None, "is not there yet: no training is finished.")
        return dataclasses.replace(self.plan.candidates[self.verdict.best].rule, name="found")


def search(
    data: str | Path,
    baseline: str | NetworkSpec = "b0",
    options: SearchOptions = SearchOptions(),  # noqa: B008  # frozen
    work: WorkOptions = WorkOptions(),  # noqa: B008
    *,
    out: str | Path | None = None,
    progress: Progress = SILENT,
) -> SearchResult:
    """Search alpha, beta and gamma for a baseline: step 1 of the paper.

    Args:
        data: a folder of class folders or a manifest.
        baseline: a variant, another baseline's name, a spec.yaml or a NetworkSpec.
        options: what is compared, and how it is trained.
        work: who trains, and for how long.
        out: the search's folder; by default in runs/search.
        progress: follows the work.

    Raises:
        ArgumentError, DataError: the data or a value cannot be used.
        TrainingError: workers die, and no training has ended.
        MissingExtraError: torch, SciPy or Ray is not installed.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what is finished is kept.
    """
    from effnet.training.start import short_side

    data, named = Path(data), make_spec(baseline)
    folder = free_folder(out, f"{data.resolve().stem}-{named.name}")
    recipe = read_recipe(options.recipe)
    if not recipe.fresh:
        words = "is for networks with weights: take scratch, paper, or a YAML file with base: scratch."
        raise ArgumentError("recipe", recipe.name, words)
    check_device(options.device)
    images = split_images(data, options)
    native = short_side(images)
    searched = suited(make_spec(named, num_classes=len(images.classes)), native, options.resolution)
    if searched.resolution != named.resolution:
        progress.message(
            f"the images have {native} px, so {named.name} starts at {searched.resolution} px, its last map at "
            f"{searched.final_size} px: {cost(searched).macs / 1e6:.4g} M multiply-adds"
        )
    rules, budget = options.rules, options.budget
    found = candidates(searched, rules, phi=options.phi, largest=native, budget=budget, progress=progress)
    if budget is not None and budget.latency is not None:
        found = _fast_enough(found, float(budget.latency), progress)
    used = sum(len(each.triples) for each in found)
    others = f"; {len(rules) - used} more build none of that cost, or exceed the budget" if used < len(rules) else ""
    progress.message(
        f"{used} triples are {len(found)} networks of {2**options.phi:.3g} times the baseline's multiply-adds{others}"
    )
    plan = SearchPlan(folder, options, images, recipe, searched, found, options.epochs or 1.0)
    if options.epochs is None:
        plan = dataclasses.replace(plan, epochs=_measure_epochs(plan, work, progress))
        progress.message(f"a step was timed; --epochs {plan.epochs:g} repeats this search exactly")
    folder.mkdir(parents=True, exist_ok=True)
    plan.write(data)
    return _go_on(plan, work, progress)


def resume(
    folder: str | Path,
    work: WorkOptions = WorkOptions(),  # noqa: B008
    *,
    data: str | Path | None = None,
    progress: Progress = SILENT,
) -> SearchResult:
    """Go on with a search; what is finished is not repeated.

    Args:
        folder: the search's.
        work: who trains, and for how long.
        data: where the images are, if they were moved.
        progress: follows the work.

    Raises:
        As `search`.
    """
    plan = SearchPlan.read(Path(folder), None if data is None else Path(data))
    check_device(plan.options.device)
    return _go_on(plan, work, progress)


def _go_on(plan: SearchPlan, work: WorkOptions, progress: Progress) -> SearchResult:
    """Train what is missing and judge what is finished."""
    rungs, folder = plan.rungs, plan.folder
    workers = work.count_workers(plan.options.device)
    with TrialRecord(folder / TRIALS, [each.network.name for each in plan.candidates]) as record:
        total = len(all_jobs(rungs))
        progress.message(
            f"{total} trainings of {len(plan.candidates)} networks, the longest {plan.epochs:.3g} epochs of "
            f"{len(plan.data.part('train')):,} images; {len(record.trials)} are done. All in {folder}"
        )
        if open_jobs(rungs, record.scores):
            executor: Executor
            if work.ray is None:
                executor = LocalExecutor(plan, workers)
            else:
                executor = RayExecutor(plan, work.ray, work.workers)
                workers = executor.slots
            ready = functools.partial(open_jobs, rungs)
            limits: dict[str, Any] = {"minutes": work.minutes, "trials": work.trials}
            try:
                with interruptible(), closing(executor):
                    run_jobs(ready, record, executor, progress, total=total, **limits)
            except KeyboardInterrupt:
                words = f"Stopped; {len(record.trials)} trainings are kept. Go on: effnet search --resume {folder}"
                raise KeyboardInterrupt(words) from None
        if not open_jobs(rungs, record.scores):
            shutil.rmtree(folder / CACHE, ignore_errors=True)
        scores = record.scores
        missing = missing_trainings(rungs, scores)
        minutes = _estimate_minutes(missing, rungs, record, workers)
    result = SearchResult(plan, scores, verdict(rungs, scores), missing, minutes)
    if result.verdict is not None:
        _write_answer(result, result.verdict)
    return result


def _estimate_minutes(missing: Sequence[int], rungs: Sequence[Rung], record: TrialRecord, workers: int) -> float | None:
    """How long the missing trainings take: as long as those of their rung did, or in proportion to those of another."""
    taken: dict[int, list[float]] = defaultdict(list)
    for job, trial in record.trials.items():
        if trial.score is not None:
            taken[job.rung].append(trial.seconds)
    if not taken:
        return None
    seconds = 0.0
    for number, count in enumerate(missing):
        known = number if number in taken else max(taken)
        seconds += count * statistics.fmean(taken[known]) * rungs[number].share / rungs[known].share
    return seconds / 60 / workers


def _fast_enough(found: tuple[Candidate, ...], latency: float, progress: Progress) -> tuple[Candidate, ...]:
    """Those that take at most so many seconds for one image."""
    from effnet.metrics.latency import time_network

    times = []
    for place, each in enumerate(found, start=1):
        times.append(time_network(each.network).median_ms / 1e3)
        progress.update("timing candidates", place, len(found))
    kept = tuple(each for each, seconds in zip(found, times, strict=True) if seconds <= latency)
    if not kept:
        raise ArgumentError("latency", latency, f"is met by no candidate: the fastest takes {1e3 * min(times):.3g} ms.")
    return kept


def _measure_epochs(plan: SearchPlan, work: WorkOptions, progress: Progress) -> float:
    """The length of the longest training with which all trainings take USED of the minutes.

    Raises:
        ArgumentError: the shortest would have fewer than LEAST_STEPS steps.
    """
    macs = [cost(each.network).macs for each in plan.candidates]
    timed = sorted(range(len(macs)), key=macs.__getitem__)[len(macs) // 2]
    per_image = _seconds_per_image(plan, plan.candidates[timed].network, progress) / macs[timed]  # and multiply-add
    rungs, minutes = plan.rungs, work.minutes or MINUTES
    train, jobs = len(plan.data.part("train")), all_jobs(rungs)
    scored = sum(macs[job.candidate] for job in jobs) * per_image * EVALUATION * len(plan.data.part("val"))
    epoch = sum(rungs[job.rung].share * macs[job.candidate] for job in jobs) * per_image * train  # seconds, of all
    a_minute = USED * 60 * work.count_workers(plan.options.device)
    epochs = (a_minute * minutes - scored) / epoch
    least = plan.recipe.batch * LEAST_STEPS / (rungs[0].share * train)
    if epochs < least:
        needed = math.ceil((least * epoch + scored) / a_minute)
        words = f"leaves trainings of fewer than {LEAST_STEPS} steps: give about {needed}, fewer candidates or seeds, "
        raise ArgumentError("minutes", minutes, f"{words}or a smaller baseline.")
    return float(f"{epochs:.3g}")


def _seconds_per_image(plan: SearchPlan, network: NetworkSpec, progress: Progress) -> float:
    """How long a training step takes, on one thread, over its images."""
    import torch

    from effnet.searching.score import Scorer

    marks, threads = list[float](), torch.get_num_threads()
    few = tuple(sample for part in ("train", "val") for sample in plan.data.part(part).samples[: plan.recipe.batch])
    data, device = dataclasses.replace(plan.data, samples=few), plan.options.device

    def mark(share: float) -> None:
        marks.append(time.perf_counter())
        progress.update("timing a step", share, 1)

    torch.set_num_threads(1 if device == "cpu" else threads)
    try:
        with tempfile.TemporaryDirectory() as cache:
            scorer = Scorer(data, plan.recipe, plan.input_spec, Path(cache), device)
            scorer(network, TIMED, 0, mark)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(b - a for a, b in itertools.pairwise(marks)) / scorer.batch


def _write_answer(found: SearchResult, judged: Verdict) -> None:
    """Write the rule, the verdict and the picture, as far as trainings are finished."""
    from effnet.searching.plots import draw_search

    plan, folder = found.plan, found.plan.folder
    names = [each.network.name for each in plan.candidates]
    values = {
        "name": "found",
        **dict(zip(("alpha", "beta", "gamma"), found.rule.growths, strict=True)),
        "found": {
            "complete": judged.complete,
            "baseline": plan.baseline.name,
            "data": str(plan.data.root),
            "data_sha256": plan.data.digest,
            "effective": [round(growth, 4) for growth in plan.candidates[judged.best].effective],
            "score": round(judged.means[judged.best], 6),
            "level_with_it": [list(plan.candidates[place].rule.growths) for place in judged.level[1:]],
            "candidates": len(plan.candidates),
            "trainings": len(found.scores),
            "epochs": plan.epochs,
            "recipe": plan.recipe.name,
            "seed": plan.options.seed,
            "machine": str(this_machine()),
        },
    }
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    write_text(folder / RULE, text)

    def finite(number: float) -> float | None:
        return number if math.isfinite(number) else None  # JSON has no infinity

    report = {
        "complete": judged.complete,
        "rung": judged.rung + 1,
        "seeds": judged.seeds,
        "best": names[judged.best],
        "means": {names[place]: mean for place, mean in judged.means.items()},
        "differences": [
            {"network": names[each.candidate]}
            | {name: finite(getattr(each, name)) for name in ("value", "low", "high", "level")}
            for each in judged.differences
        ],
        "kendall_tau_between_rungs": [finite(tau) for tau in judged.between_rungs],
        "kendall_tau_between_seeds": [finite(tau) for tau in judged.between_seeds],
        "noise": finite(judged.noise),
        "close_calls": judged.close_calls,
        "missing_trainings": found.missing,
        "missing_minutes": found.minutes,
    }
    write_text(folder / VERDICT, json.dumps(report, indent=2) + "\n")
    draw_search(plan.candidates, plan.rungs, found.scores, judged, folder / PICTURE)
