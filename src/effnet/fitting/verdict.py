"""The last two steps of a fit: the model as it would be shipped, measured and evaluated, and what fit.json holds."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effnet.arch.cost import cost
from effnet.data.dataset import Dataset
from effnet.data.held_out import TrainVal
from effnet.errors import RefusedError
from effnet.exporting.int8 import export_int8
from effnet.files import write_folder
from effnet.fitting.candidates import FitCandidate, describe
from effnet.fitting.choice import Choice
from effnet.fitting.measurement import Measurement, measure, model_bytes
from effnet.fitting.settings import CANDIDATES, FINDINGS, LIMITS, MODEL, FitOptions, FitPlan
from effnet.machine import this_machine
from effnet.metrics.evaluate import Evaluation, evaluate, predict_logits
from effnet.progress import Progress
from effnet.runtime.load import load
from effnet.training.initial_network import short_side
from effnet.training.run_folder import BEST, versions
from effnet.version import __version__
from effnet.weights.bundle import open_bundle
from effnet.weights.registry import match_outputs

TIGHT = 0.9  # times a limit that was broken: what the next network may need of it


def check_model(
    plan: FitPlan, data: Dataset, candidate: FitCandidate, run: Path, progress: Progress
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Step 5: put the model in its place and measure it; the limits that it breaks, and all that was measured."""
    target, options = plan.folder / MODEL, plan.options
    if candidate.int8:
        bundle = open_bundle(run / BEST)
        images = TrainVal(data.subset("train"), data.subset("val"))
        try:
            export_int8(bundle, target, images, progress=progress)
        except RefusedError as error:
            progress.message(str(error))
            return [{"limit": "accuracy in 8 bits", "value": None, "allowed": None, "why": str(error)}], {}
    else:
        with write_folder(target, "bundle") as new:
            shutil.copytree(run / BEST, new, dirs_exist_ok=True)
    taken = measure(target, backend_of(options), latency=options.limits.get("latency"))
    price = cost(candidate.spec)
    measured = dataclasses.asdict(taken) | {
        "macs": price.macs,
        "params": price.params,
        "file_size": model_bytes(target),
    }
    return _broken(options, taken, measured), measured


def backend_of(options: FitOptions) -> dict[str, Any]:
    """What runs the model, where it was chosen; int8 follows from the artifact."""
    precision = None if options.precision == "int8" else options.precision
    pins = {"engine": options.pinned_engine, "precision": precision, "threads": options.threads}
    return {name: value for name, value in pins.items() if value is not None}


def _broken(options: FitOptions, taken: Measurement, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    values = {name: measured[name] for name in LIMITS} | {"latency": taken.slowest_tenth}
    return [
        {"limit": limit, "value": values[limit], "allowed": allowed}
        for limit, allowed in options.limits.items()
        if values[limit] > allowed
    ]


def evaluate_model(plan: FitPlan, data: Dataset, progress: Progress) -> tuple[Evaluation, str]:
    """How good the model is, as it would be shipped, on test, else on val."""
    split = "test" if "test" in data.splits else "val"
    with load(plan.folder / MODEL, **backend_of(plan.options)) as classifier:
        assert classifier.classes is not None
        images = match_outputs(data.subset(split), classifier.classes, "the model's")
        batch = classifier.group
        found = predict_logits(
            classifier.logits, classifier.input, images, batch=batch, progress=progress, task=f"{split} images"
        )
        known = classifier.calibration
        temperature, threshold = (known.temperature, known.threshold) if known else (1.0, None)
        names = classifier.classes
    return evaluate(found.logits, found.labels, names, temperature=temperature, threshold=threshold), split


def describe_fit(
    plan: FitPlan,
    data: Dataset,
    found: Sequence[FitCandidate],
    choice: Choice,
    candidate: FitCandidate,
    measured: Mapping[str, Any],
    broken: Sequence[Mapping[str, Any]],
    evaluation: Evaluation,
    split: str,
) -> dict[str, Any]:
    """What fit.json holds."""
    options = plan.options
    scored = {name: {kind: vars(score) for kind, score in kinds.items()} for name, kinds in choice.scores.items()}
    none = {"probe": None, "short": None}
    look = json.loads((plan.folder / FINDINGS).read_text("utf-8"))
    second = json.loads((plan.folder / CANDIDATES).read_text("utf-8"))
    figures = evaluation.to_dict()
    return {
        "effnet": __version__,
        "format": 1,
        "command": plan.command,
        "data": str(plan.data),
        "data_sha256": look["digest"],
        "seed": options.seed,
        "minutes": options.minutes,
        "machine": str(this_machine()),
        "versions": versions(),
        "backend": {"engine": measured.get("engine"), **backend_of(options)},
        "budget": options.budget,
        "findings": look["findings"],
        "sizes": {name: len(data.subset(name)) for name in data.splits} | {"side": short_side(data)},
        "classes": list(data.classes),
        "candidates": [each.to_dict() | none | scored.get(each.name, {}) for each in found],
        "chosen": candidate.name,
        "reason": choice.reason,
        "predicted": candidate.costs,
        "measured": dict(measured),
        "kept": not broken,
        "broken": [dict(each) for each in broken],
        "nearest": _nearest(found, broken),
        "test": {"split": split, "n": evaluation.n, "top1": figures["top1"], "macro_f1": figures["macro_f1"]},
        "bought": [],
        "seconds": {"look": look["seconds"], "candidates": second["seconds"], "choice": choice.seconds},
    }


def _nearest(found: Sequence[FitCandidate], broken: Sequence[Mapping[str, Any]]) -> str | None:
    """What would have kept the limits that were broken."""
    for each in broken:
        if each["allowed"] is None:
            return None
        name = "slowest_tenth" if each["limit"] == "latency" else each["limit"]
        needs = sorted((one.costs[name], one.name) for one in found if name in one.costs)
        value, least = next((need for need in reversed(needs) if need[0] <= TIGHT * each["allowed"]), needs[0])
        return f"{least} needs {describe(each['limit'], value)}"
    return None
