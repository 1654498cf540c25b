"""Step 1 of the paper for any baseline and images: the best alpha, beta and gamma, and how certain they are."""

from __future__ import annotations

import dataclasses
import functools
import shlex
import shutil
import time
from contextlib import closing
from pathlib import Path

from effnet.arch.cost import cost
from effnet.arch.spec import NetworkSpec
from effnet.arch.variants import spec as make_spec
from effnet.cluster import check_cluster
from effnet.errors import ArgumentError, TrainingError
from effnet.fields import write_count
from effnet.files import new_run, sweep
from effnet.machine import check_device
from effnet.process import any_start_method
from effnet.progress import SILENT, Progress
from effnet.searching.answer import SearchResult, write_answer
from effnet.searching.candidates import Candidate, adapt_baseline, build_candidates
from effnet.searching.halving import judge, missing_trainings, open_jobs
from effnet.searching.jobs import LocalExecutor, RayExecutor, interruptible, open_record, run_jobs
from effnet.searching.plan import CACHE, TRIALS, SearchOptions, SearchPlan, WorkOptions, is_unborn, split_images
from effnet.training.execution import LIBRARIES, check_batch, check_main_guard, check_workers
from effnet.training.recipe import read_recipe

RUNS = Path("runs") / "search"
DEVICES = ("cpu", "cuda")  # others are untested
STEPS = 600  # default of the longest training; docs/searching.md shows which differences it can detect
LEAST_STEPS = 50  # default of the shortest training


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
        work: where networks are trained, and for how long.
        out: the search's folder; by default a new one in runs/search.
        progress: receives the progress of the search.

    Raises:
        ArgumentError, DataError: the data or a value cannot be used.
        TrainingError: workers die or the time is over, and no training has finished.
        KeyboardInterrupt: Ctrl-C or SIGTERM; finished trainings are kept.
    """
    _check_workers(options, work)
    check_cluster(work.ray)
    data, original = Path(data), make_spec(baseline)
    name = f"{data.resolve().stem}-{original.name}"
    with new_run(out, RUNS, name, (TRIALS,), is_unborn) as folder:
        plan = _make_plan(folder, data, original, options, progress)
        plan.write(data)
    return _continue(plan, work, time.monotonic(), progress)


def resume(
    folder: str | Path,
    work: WorkOptions = WorkOptions(),  # noqa: B008
    *,
    data: str | Path | None = None,
    progress: Progress = SILENT,
) -> SearchResult:
    """Go on with the search in a folder; `data` is where the images are now, if they were moved. Raises as `search`."""
    start = time.monotonic()
    plan = SearchPlan.read(Path(folder), None if data is None else Path(data))
    check_device(plan.options.device, DEVICES)
    check_cluster(work.ray)
    return _continue(plan, work, start, progress)


def _check_workers(options: SearchOptions, work: WorkOptions) -> None:
    """Raise ArgumentError if processes are needed but cannot be started."""
    workers = 0 if work.ray else work.count_workers(options.device)
    check_workers(workers, LIBRARIES)
    check_main_guard(workers)


def _make_plan(
    folder: Path, data: Path, original: NetworkSpec, options: SearchOptions, progress: Progress
) -> SearchPlan:
    """Split the images, build the candidates and choose the length of their trainings."""
    from effnet.training.initial_network import short_side
    from effnet.training.run_folder import describe_gaps

    recipe = read_recipe(options.recipe)
    if not recipe.fresh:
        why = "is for pretrained networks: take scratch, paper, or a YAML file with base: scratch."
        raise ArgumentError("recipe", recipe.name, why)
    check_device(options.device, DEVICES)
    images = split_images(data, options)
    for gap in describe_gaps(images, str(data)):
        progress.message(gap)
    native = short_side(images)
    baseline = adapt_baseline(make_spec(original, num_classes=len(images.classes)), native, options.resolution)
    if baseline.resolution != original.resolution:
        progress.message(
            f"the images have {native} px, so {original.name} starts at {baseline.resolution} px, its last map at "
            f"{baseline.final_size} px: {cost(baseline).macs / 1e6:.4g} M multiply-adds"
        )
    rules, budget = options.rules, options.budget
    found = build_candidates(baseline, rules, phi=options.phi, largest=native, budget=budget, progress=progress)
    count = len(images.subset("train"))
    for each in found:
        check_batch(each.network, recipe, 0, min(recipe.batch, count))
    if budget is not None and budget.latency is not None:
        found = _fast_enough(found, float(budget.latency), progress)
    progress.message(
        f"{sum(len(each.triples) for each in found)} of {len(rules)} triples build {len(found)} networks of "
        f"{2**options.phi:.3g} times the baseline's multiply-adds; the others miss this cost or exceed a limit"
    )
    plan = SearchPlan(folder, options, images, recipe, baseline, found, options.epochs or 1.0)
    if options.epochs is None:
        per_epoch = max(1, count // recipe.batch)
        steps = max(STEPS, LEAST_STEPS / plan.rungs[0].share)
        plan = dataclasses.replace(plan, epochs=float(f"{steps / per_epoch:.3g}"))
    return plan


def _fast_enough(found: tuple[Candidate, ...], latency: float, progress: Progress) -> tuple[Candidate, ...]:
    """The candidates that take at most `latency` seconds for one image."""
    from effnet.metrics.timing import time_network

    times = []
    for place, each in enumerate(found, start=1):
        times.append(time_network(each.network).median_ms / 1e3)
        progress.update("timing candidates", place, len(found))
    kept = tuple(each for each, seconds in zip(found, times, strict=True) if seconds <= latency)
    if not kept:
        raise ArgumentError(
            "latency", latency, f"excludes all candidates: the fastest takes {1e3 * min(times):.3g} ms."
        )
    return kept


def _continue(plan: SearchPlan, work: WorkOptions, start: float, progress: Progress) -> SearchResult:
    """Run missing trainings within the minutes from `start` (time.monotonic), and judge the finished ones."""
    rungs, folder = plan.rungs, plan.folder
    workers, total = work.count_workers(plan.options.device), sum(rung.trainings for rung in rungs)
    with open_record(folder / TRIALS, plan.names) as record:
        sweep(folder)
        progress.message(
            f"{total} trainings of {len(plan.candidates)} networks, the longest {plan.epochs:.3g} epochs of "
            f"{len(plan.data.subset('train')):,} images; {len(record.trials)} are done. All in {folder}"
        )
        minutes = None if work.minutes is None else work.minutes - (time.monotonic() - start) / 60
        if work.trials != 0 and (minutes is None or minutes > 0) and open_jobs(rungs, record.scores):
            _check_workers(plan.options, work)
            executor = RayExecutor(plan, work.ray, work.workers) if work.ray else LocalExecutor(plan, workers)
            workers = executor.slots
            find_open = functools.partial(open_jobs, rungs)
            try:
                with interruptible(), any_start_method(), closing(executor):
                    run_jobs(find_open, record, executor, progress, total=total, minutes=minutes, trials=work.trials)
            except KeyboardInterrupt:
                again = f"effnet search --resume {shlex.quote(str(folder))}"
                kept = f"Stopped; {write_count(len(record.trials), 'training', 'are')} kept. Go on: {again}"
                kept += f"; their verdict: {again} --trials 0" if record.trials else ""
                raise KeyboardInterrupt(kept) from None
        trials, scores = record.trials.values(), record.scores
    if not open_jobs(rungs, scores):
        shutil.rmtree(folder / CACHE, ignore_errors=True)
    verdict, missing = judge(rungs, scores), missing_trainings(rungs, scores)
    if verdict is None:
        raise TrainingError(f"no training is finished; go on: effnet search --resume {shlex.quote(str(folder))}")
    lasted = sum(trial.seconds for trial in trials) / sum(rungs[trial.job.rung].share for trial in trials)
    minutes = lasted * sum(rung.share * count for rung, count in zip(rungs, missing, strict=True)) / 60 / workers
    result = SearchResult(plan, scores, verdict, missing, minutes)
    write_answer(result)
    return result
