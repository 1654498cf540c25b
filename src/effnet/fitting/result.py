"""Step 6 of a fit: accuracy on the test images; fit.json, the report and the model card."""

from __future__ import annotations

import csv
import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from effnet import console
from effnet.checking.labels import find_label_errors
from effnet.data.dataset import Dataset
from effnet.errors import EffnetError
from effnet.fields import write_count
from effnet.files import write_text
from effnet.fitting.candidates import FitCandidate
from effnet.fitting.choice import Choice
from effnet.fitting.settings import CANDIDATES, FINDINGS, MODEL, REPORT, RESULT, FitPlan
from effnet.fitting.verdict import TIGHT, backend_of
from effnet.machine import this_machine
from effnet.metrics.evaluate import Evaluation
from effnet.metrics.familiarity import spread_classes
from effnet.progress import Progress
from effnet.reporting.card import write_card
from effnet.reporting.examine import examine
from effnet.reporting.page import write_report
from effnet.runtime.load import load
from effnet.training.initial_network import short_side
from effnet.training.run_folder import RESULTS, versions
from effnet.version import __version__
from effnet.weights.bundle import is_bundle
from effnet.weights.registry import match_outputs

JUDGED, JUDGED_MINUTES = 2000, 5  # most images whose labels are judged; least minutes of a fit that judges labels
GAIN = 0.002  # val accuracy gained in the second half of a training above which more time may help


class FitOutcome(NamedTuple):
    """The results of steps 3 to 5."""

    found: Sequence[FitCandidate]
    choice: Choice
    candidate: FitCandidate  # trained last
    run: str  # the name of its folder
    measured: Mapping[str, Any]
    broken: Sequence[Mapping[str, Any]]
    notes: Sequence[str]  # one for each network that broke a limit and was replaced
    seconds: float  # of all trainings


def write_result(plan: FitPlan, data: Dataset, outcome: FitOutcome, progress: Progress) -> None:
    """Evaluate the shipped model on test, else on val; write the report, the model card, and fit.json last."""
    split = "test" if "test" in data.splits else "val"
    model = plan.folder / MODEL
    with load(model, **backend_of(plan.options)) as classifier:
        assert classifier.classes is not None
        images = match_outputs(data.subset(split), classifier.classes, "the model's")
        train = match_outputs(data.subset("train"), classifier.classes, "the model's")
        name = outcome.candidate.name
        seen = examine(classifier, images, split, name=name, train=train, progress=progress)
        result = describe_fit(plan, data, outcome, seen.evaluation, split)
        found = [f"{text[0].upper()}{text[1:].rstrip('.')}." for text in result["findings"]]
        subject = dataclasses.replace(
            seen,
            **_judge_labels(plan, data, progress),
            source=plan.data.name,
            history=_history(plan, outcome.run),
            splits={name: len(data.subset(name)) for name in data.splits},
            notes=[*found, *seen.notes],
            commands=_commands(plan),
            facts=_facts(result),
            fit=result,
        )
        write_card(subject, model)
        write_report(subject, plan.folder / REPORT, progress)
    write_text(plan.folder / RESULT, json.dumps(result, indent=1) + "\n")


def _judge_labels(plan: FitPlan, data: Dataset, progress: Progress) -> dict[str, Any]:
    """Labels of train and val that are probably wrong, as in `effnet check --labels`; nothing in a short fit."""
    if plan.options.minutes < JUDGED_MINUTES:
        return {}
    seen = dataclasses.replace(data, samples=tuple(sample for sample in data.samples if sample.split != "test"))
    rows = spread_classes(np.array([sample.label for sample in seen.samples]), JUDGED, plan.options.seed)
    some = dataclasses.replace(seen, samples=tuple(seen.samples[row] for row in rows))
    try:
        found = find_label_errors(some, seed=plan.options.seed, progress=progress)
    except EffnetError as error:
        progress.message(f"labels are not judged: {error}")
        return {}
    suspects = [(each.path, each.given, each.likely, each.self_confidence) for each in found.suspects]
    judge = f"linear classifiers on Lite0's features, out of fold, of {len(some):,} images of train and val"
    return {"suspects": suspects, "judge": judge}


def _history(plan: FitPlan, run: str) -> list[dict[str, Any]]:
    """The epochs of the training."""
    text = (plan.folder / run / RESULTS).read_text("utf-8")
    return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(text.splitlines())]


def _commands(plan: FitPlan) -> list[tuple[str, str]]:
    """The commands to run next."""
    model = shlex.quote(str(plan.folder / MODEL))
    pins = "".join(f" --{name} {value}" for name, value in backend_of(plan.options).items())
    commands = [
        ("Classify photos:", f"effnet predict PHOTO --model {model}{pins}"),
        ("Try it in a browser:", f"effnet serve {model}"),
        ("See where it looks:", f"effnet explain PHOTO --model {model}"),
        ("Look at the data:", f"effnet check {shlex.quote(plan.source)}"),
        ("Do all of this again:", plan.command),
    ]
    if is_bundle(plan.folder / MODEL):
        commands.insert(3, ("Write it for another engine:", f"effnet export {model} --format onnx"))
    return commands


def _facts(result: Mapping[str, Any]) -> dict[str, str]:
    """Where the result came from, for the report."""
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())
    names = {"data": "data", "data_sha256": "sha256 of the data", "seed": "seed", "machine": "machine"}
    facts = {title: str(result[name]) for name, title in names.items()}
    facts |= {"runs in": str(result["backend"]["engine"]), "time": seconds}
    return facts | {f"version of {name}": result["versions"][name] for name in ("effnet", "torch")}


def _describe_time(plan: FitPlan, outcome: FitOutcome) -> list[str]:
    """How the time was spent, and whether more may help."""
    rows, chosen = _history(plan, outcome.run), outcome.candidate
    compared = len(outcome.choice.scores)
    texts = [f"{outcome.choice.seconds:.0f} seconds compared {compared} networks."] if compared else []
    if len(rows) < 3:
        return texts
    best = max(row["val_top1"] for row in rows)
    half = max(row["val_top1"] for row in rows if row["epoch"] <= rows[-1]["epoch"] / 2)
    more = "more minutes may help" if best - half > GAIN else "more minutes will hardly help"
    gained = f"in the second half of the training it gained {100 * (best - half):.2f} points on val"
    return [
        *texts,
        f"{write_count(len(rows), 'epoch')} of {chosen.name} took {outcome.seconds:.0f} seconds; {gained}, so {more}.",
    ]


def describe_fit(
    plan: FitPlan,
    data: Dataset,
    outcome: FitOutcome,
    evaluation: Evaluation,
    split: str,
) -> dict[str, Any]:
    """The content of fit.json."""
    options, choice, broken = plan.options, outcome.choice, outcome.broken
    scored = {name: {kind: vars(score) for kind, score in kinds.items()} for name, kinds in choice.scores.items()}
    none = {"probe": None, "short": None}
    look = json.loads((plan.folder / FINDINGS).read_text("utf-8"))
    second = json.loads((plan.folder / CANDIDATES).read_text("utf-8"))
    seconds = {"look": look["seconds"], "candidates": second["seconds"]}
    seconds |= {"choice": choice.seconds, "training": outcome.seconds}
    figures = evaluation.to_dict()
    return {
        "effnet": __version__,
        "format": 1,
        "command": plan.command,
        "data": plan.source,
        "data_sha256": look["digest"],
        "seed": options.seed,
        "minutes": options.minutes,
        "machine": str(this_machine()),
        "versions": versions(),
        "backend": {"engine": outcome.measured.get("engine"), **backend_of(options)},
        "budget": options.budget,
        "findings": look["findings"],
        "sizes": {name: len(data.subset(name)) for name in data.splits} | {"side": short_side(data)},
        "classes": list(data.classes),
        "candidates": [each.to_dict() | none | scored.get(each.name, {}) for each in outcome.found],
        "chosen": outcome.candidate.name,
        "reason": " ".join([choice.reason, *outcome.notes]),
        "predicted": outcome.candidate.costs,
        "measured": dict(outcome.measured),
        "kept": not broken,
        "broken": [dict(each) for each in broken],
        "nearest": _nearest(outcome.found, broken),
        "test": {"split": split, "n": evaluation.n, "top1": figures["top1"], "macro_f1": figures["macro_f1"]},
        "bought": _describe_time(plan, outcome),
        "seconds": {**seconds, "total": sum(seconds.values())},
    }


def _nearest(found: Sequence[FitCandidate], broken: Sequence[Mapping[str, Any]]) -> str | None:
    """The network that needs least of a broken limit, and how much it needs."""
    for each in broken:
        name = "slowest_tenth" if each["limit"] == "latency" else each["limit"]
        needs = sorted((one.costs[name], one.name) for one in found if name in one.costs)
        if needs:
            value, least = next((need for need in reversed(needs) if need[0] <= TIGHT * each["allowed"]), needs[0])
            return f"{least} needs {console.amount(each['limit'], value)}"
    return None
