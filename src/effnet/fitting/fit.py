"""From images and a budget to a trained model that keeps the budget, in six steps; an interrupted fit can go on.

1 look        what is wrong with the data, and its split; test images are not used before the last step
2 candidates  which networks keep the budget
3 choice      which of them learns these images best
4 training    train that network for the time that is left
5 check       measure the model as it would be shipped, in a fresh process; if it breaks a limit, back to 4 once
6 result      the test images, fit.json, report.html
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effnet.checking.findings import KINDS, Findings, check
from effnet.cluster import check_cluster
from effnet.data.dataset import Dataset, Sample, explain_one_class, read_data, root_of, split_data, write_manifest
from effnet.data.shards import absolute, text_of, url
from effnet.errors import ArgumentError, DataError
from effnet.fields import check_path
from effnet.files import hold_lock, new_run, sweep, write_text
from effnet.fitting.candidates import Facts, FitCandidate, find_candidates, require_any
from effnet.fitting.choice import Choice, choose
from effnet.fitting.result import FitOutcome, write_result
from effnet.fitting.settings import (
    AMOUNTS,
    CANDIDATES,
    DATA,
    FINDINGS,
    MODEL,
    PLAN,
    REPORT,
    RESULT,
    FitOptions,
    FitPlan,
    options_of,
)
from effnet.fitting.verdict import ACCURACY, TIGHT, check_model
from effnet.progress import SILENT, Progress
from effnet.scaling.budget import Budget
from effnet.searching.jobs import interruptible
from effnet.training import train as training
from effnet.training.device import callers_torch
from effnet.training.initial_network import short_side
from effnet.training.run_folder import LAST, METRICS, PREVIOUS, describe_gaps
from effnet.training.run_folder import REPORT as RUN_REPORT

RUNS = Path("runs") / "fit"
STEPS = ("look", "candidates", "choice", "training", "check", "result")
FATAL = ("unreadable", "one_class")  # findings that make training impossible
RESERVE, RESERVE_INT8 = 45.0, 90.0  # seconds for what follows the training, at most a sixth of the time
MARGIN = 1.5  # a training with less time to spare gets a time limit too, since other programs may slow its steps
LEAST, LEAST_AGAIN = 0.5, 0.2  # least share of the minutes for the training, and for a second one after the check


@dataclass(frozen=True)
class Fitted:
    """The result of a fit."""

    folder: Path
    result: Mapping[str, Any]  # fit.json

    @property
    def model(self) -> Path:
        """The bundle or artifact, for effnet.load."""
        return self.folder / MODEL

    @property
    def report(self) -> Path:
        """The page that explains the result."""
        return self.folder / REPORT

    @property
    def metrics(self) -> Mapping[str, Any]:
        """How good the model is on the test images: top1 and macro_f1, with intervals."""
        found: Mapping[str, Any] = self.result["test"]
        return found

    @property
    def kept(self) -> bool:
        """Whether the model keeps the budget."""
        return bool(self.result["kept"])


def fit(
    data: str | Path,
    budget: Budget | FitOptions | None = None,
    *,
    out: str | Path | None = None,
    ray: str | None = None,
    progress: Progress = SILENT,
    **options: Any,
) -> Fitted:
    """Find, train and check the EfficientNet that learns these images best within a budget.

    Args:
        data: a folder with a sub-folder for each class, split into train, val and test or not, or a manifest.
        budget: the limits; or give them by name: latency="20ms", macs="100M".
        out: the folder of the result; by default runs/fit/DATA.
        ray: the address of a Ray cluster for the short trainings; None uses this machine.
        progress: receives the progress of the six steps.
        options: fields of FitOptions: minutes (30), engine, precision, threads, resolution, seed ...

    Returns:
        The model, the report, and the model's accuracy and costs. It may break the budget: see `kept`.

    Raises:
        ArgumentError: no network keeps the budget, a value is outside its range, or nothing answers at `ray`.
        DataError: the data cannot be trained on.
        KeyboardInterrupt: interrupted; `resume` goes on with the fit.
    """
    chosen = options_of(budget, **options)
    if not chosen.budget:
        raise ArgumentError("budget", "nothing", f"must limit something: {', '.join(AMOUNTS)}.")
    check_cluster(ray)
    check_path("data", data)
    path = Path(data)
    with new_run(out, RUNS, path.resolve().stem, (PLAN,)) as folder:
        plan = FitPlan(folder, absolute(path), chosen)
        plan.write()
        consider(plan, progress)
    return _go_on(plan, ray, progress)


def resume(folder: str | Path, *, ray: str | None = None, progress: Progress = SILENT) -> Fitted:
    """Go on with an interrupted fit; finished steps are not repeated.

    Raises:
        ArgumentError: the folder is not a fit's, another process works on it, or nothing answers at `ray`.
    """
    plan = FitPlan.read(Path(folder))
    check_cluster(ray)
    return _go_on(plan, ray, progress)


@callers_torch()
def _go_on(plan: FitPlan, ray: str | None, progress: Progress) -> Fitted:
    try:
        with hold_lock(plan.folder / PLAN), interruptible():
            sweep(plan.folder)
            if not (plan.folder / RESULT).is_file():
                _finish(plan, progress, ray)
            return Fitted(plan.folder, json.loads((plan.folder / RESULT).read_text("utf-8")))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Stopped. Go on: effnet fit --resume {shlex.quote(str(plan.folder))}") from None


def consider(plan: FitPlan, progress: Progress = SILENT) -> tuple[Dataset, list[FitCandidate]]:
    """Steps 1 and 2: the data with its splits, and all candidates with the limits that they exceed.

    Raises:
        DataError: the data cannot be trained on.
        ArgumentError: no network keeps the budget.
    """
    data = _look(plan, progress)
    if not (plan.folder / CANDIDATES).is_file():
        _step(progress, plan, 2, "which networks keep the budget")
    facts = Facts(len(data.classes), len(data.subset("train")), short_side(data))
    found = find_candidates(plan, facts, progress)
    require_any(found, plan.options)
    return data, found


def _step(progress: Progress, plan: FitPlan, number: int, what: str, spent: float = 0.0) -> None:
    left = 60 * plan.options.minutes - _spent(plan) - spent
    time_left = f"about {left / 60:.0f} minutes left" if left >= 120 else f"about {max(1.0, left):.0f} seconds left"
    time_left = time_left if left > 0 else "over time"
    progress.message(f"Step {number} of {len(STEPS)}, {STEPS[number - 1]}: {what} ({time_left})")


def _look(plan: FitPlan, progress: Progress) -> Dataset:
    """Step 1; findings are saved in findings.json, the splits in data.csv."""
    if (plan.folder / FINDINGS).is_file():
        data = _read_split(plan)
        if data.digest != json.loads((plan.folder / FINDINGS).read_text("utf-8"))["digest"]:
            raise DataError(f"{plan.source} has changed since the fit began: begin a new one")
        return data
    _step(progress, plan, 1, f"reading {plan.source}")
    began, options = time.monotonic(), plan.options
    whole = read_data(plan.data)
    found = check(whole, progress=progress)
    for kind in FATAL:
        if faults := found.of(kind):
            first = f"{faults[0].files[0] if faults[0].files else plan.source}: {faults[0].message}"
            raise DataError(
                f"{len(faults):,} {KINDS[kind][1]}, such as {first} See: effnet check {shlex.quote(plan.source)}"
            )
    data = split_data(whole, val=options.val, test=options.test, seed=options.seed, groups=found.duplicates.groups)
    if len(data.classes) < 2:
        raise DataError(f"{plan.source} has one class, at least two are needed: {explain_one_class(data)}")
    if "val" not in data.splits:
        raise DataError(f"{plan.source} leaves no image for validation at --val {options.val:g}: take a larger share")
    sentences = [*_sentences(found, plan.source), *describe_gaps(data, plan.source)]
    for sentence in sentences:
        progress.message(sentence)
    write_manifest(data, plan.folder / DATA)
    data = _read_split(plan)
    values = {"seconds": time.monotonic() - began, "findings": sentences, "digest": data.digest}
    write_text(plan.folder / FINDINGS, json.dumps(values, indent=1) + "\n")
    return data


def _read_split(plan: FitPlan) -> Dataset:
    """The images of data.csv, with their paths in the data."""
    written = read_data(plan.folder / DATA)
    root = root_of(plan.data) if url(plan.data) else root_of(plan.data).resolve()

    def named(sample: Sample) -> Sample:
        file = written.file(sample)
        if not url(file):
            file = Path(os.path.normpath(written.root.resolve() / sample.path))
        path = file.relative_to(root) if file.is_relative_to(root) else file
        return dataclasses.replace(sample, path=text_of(path.as_posix()))

    return dataclasses.replace(written, root=root, samples=tuple(map(named, written.samples)), source=plan.source)


def _sentences(found: Findings, data: str) -> list[str]:
    """One sentence for each kind of finding; a fit uses the images as they are."""
    sentences = []
    for kind, (severity, name, advice) in KINDS.items():
        if count := len(found.of(kind)):
            advice = advice.replace("--fix", f"effnet check {shlex.quote(str(data))} --fix")
            sentences.append(f"{severity}: {count:,} {name}. {advice}")
    return sentences


def _spent(plan: FitPlan) -> float:
    """Seconds spent on finished steps."""
    files = (FINDINGS, CANDIDATES, "choice.json")
    found = [plan.folder / name for name in files if (plan.folder / name).is_file()]
    return sum(float(json.loads(file.read_text("utf-8"))["seconds"]) for file in found)


def _finish(plan: FitPlan, progress: Progress, ray: str | None) -> None:
    """Steps 3 to 6."""
    data, found = consider(plan, progress)
    kept = require_any(found, plan.options)
    _step(progress, plan, 3, f"{len(kept)} of {len(found)} networks keep the budget")
    choice = choose(plan, data, kept, progress, ray)
    progress.message(choice.reason)
    named = {each.name: each for each in found}
    candidate, notes, spent = named[choice.chosen], [], 0.0
    tried: list[str] = []
    while True:
        tried.append(candidate.name)
        folder = plan.folder / ("training" if len(tried) == 1 else f"training-{len(tried)}")
        seconds = _train(plan, data, candidate, folder, spent, progress)
        spent += seconds
        _step(progress, plan, 5, "the model as it would be shipped", spent)
        broken, measured = check_model(plan, data, candidate, folder, progress)
        following = _next_cheaper(plan, choice, named, tried, broken) if broken else None
        if following is None or len(tried) == 2:
            break
        names = " and ".join(str(each["limit"]) for each in broken)
        notes.append(f"{candidate.name} was trained and broke {names}, so {following.name} was trained instead.")
        progress.message(notes[-1])
        candidate = following
    notes += [str(each["why"]) for each in broken if each["limit"] == ACCURACY]
    _step(progress, plan, 6, "the test images", spent)
    outcome = FitOutcome(found, choice, candidate, folder.name, measured, broken, notes, spent)
    write_result(plan, data, outcome, progress)


def _train(
    plan: FitPlan, data: Dataset, candidate: FitCandidate, folder: Path, spent: float, progress: Progress
) -> float:
    """Step 4: start, resume or reuse the run in a folder; the seconds that it took."""
    if not (folder / RUN_REPORT).is_file():  # written last by a training
        if (folder / LAST).is_file() or (folder / PREVIOUS).is_file():
            _step(progress, plan, 4, f"going on with {candidate.name}", spent)
            training.resume(folder, progress=progress)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            limits = _time_limit(plan, data, candidate, spent)
            lasts = f"{limits['minutes']:.1f} minutes" if limits else "as many epochs as its recipe has"
            _step(progress, plan, 4, f"{candidate.name}, {lasts}", spent)
            settings = candidate.settings(plan.folder, plan.options, **limits)
            named = {name: getattr(settings, name) for name in settings.given}
            recipe = candidate.recipe(len(data.subset("train")))
            training.train(plan.folder / DATA, recipe=recipe, out=folder, progress=progress, **named)
    return float(json.loads((folder / METRICS).read_text("utf-8"))["cost"]["seconds"])


def _time_limit(plan: FitPlan, data: Dataset, candidate: FitCandidate, spent: float) -> dict[str, float]:
    """The minutes that are left for a training, if its recipe would take longer."""
    options, images = plan.options, len(data.subset("train"))
    whole = 60 * options.minutes
    reserve = min(RESERVE_INT8 if candidate.int8 else RESERVE, whole / 6)
    left = max(whole - _spent(plan) - spent - reserve, (LEAST_AGAIN if spent else LEAST) * whole)
    recipe, step = candidate.pace(images)
    steps = max(recipe.least_steps, recipe.epochs * (images // recipe.batch))
    return {"minutes": left / 60} if MARGIN * steps * step > left else {}


def _next_cheaper(
    plan: FitPlan,
    choice: Choice,
    named: Mapping[str, FitCandidate],
    tried: Sequence[str],
    broken: Sequence[Mapping[str, Any]],
) -> FitCandidate | None:
    """The next network in the order that should keep the broken limits."""
    costly = any(one["limit"] == ACCURACY for one in broken)  # the model stayed in fp32
    for name in choice.order:
        each = named[name]
        if name in tried or (costly and each.int8):
            continue
        costs = each.costs | {"latency": each.costs.get("slowest_tenth", 0.0)}
        if costly or all(costs.get(one["limit"], 0.0) <= TIGHT * one["allowed"] for one in broken):
            return each
    return None
