"""effnet val: a model's accuracy on labelled images with its uncertainty, and which of two models is better."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import Parameter
from numpy.typing import NDArray

from effnet import console
from effnet.arch.spec import Calibration
from effnet.console import FINDING, OK, Flag
from effnet.data.dataset import Dataset, read_data
from effnet.data.folders import list_names
from effnet.data.held_out import HeldOut, hold_out, trained_images
from effnet.errors import ArgumentError, DataError, missing
from effnet.fields import write_count
from effnet.machine import this_machine
from effnet.metrics.calibration import calibrate, confidence
from effnet.metrics.conformal import calibrate_sets
from effnet.metrics.evaluate import Evaluation, Predicted, evaluate, predict_logits, write_per_class
from effnet.metrics.intervals import Difference, compare_top1
from effnet.metrics.sureness import Sureness, measure_sureness
from effnet.plots.evaluation import draw_confusion, draw_mistakes, draw_reliability
from effnet.plots.fonts import explain_labels
from effnet.plots.overlay import draw_cams
from effnet.plots.style import drawable
from effnet.progress import Progress
from effnet.reporting.words import between, bounds, describe_confidence
from effnet.runtime.artifact import artifact_path
from effnet.runtime.classifier import Classifier
from effnet.runtime.load import load
from effnet.runtime.options import AUTO, EngineOptions
from effnet.runtime.session import Logits, Pixels
from effnet.weights.bundle import find_splits
from effnet.weights.registry import match_outputs
from effnet.weights.sureness import Familiarity, LabelSets

ERROR = 0.05  # default share of wrong answers that a threshold is chosen for
LISTED = 10  # unreadable files that are named, at most
ALL_CLASSES, WORST = 20, 10  # most classes that are all shown, and how many are shown of more
USED = ("train", "val", "all")  # splits with images that a run fits something to
FILES = "confusion_matrix.png", "per_class.csv", "reliability.png", "mistakes.jpg", "cams.jpg"
INTERVALS = (
    "Intervals at 95 %: Wilson's for shares, a bootstrap over all images for macro F1. They hold for images drawn like "
    "these."
)
TEST = (
    "p is from McNemar's exact test on the images that only one of the two models gets right; the interval of the "
    "difference is Bonett and Price's, at 95 %, for two models on the same images."
)


@dataclass(frozen=True)
class ValOptions:
    """What is evaluated, and how."""

    split: str | None = None
    """The split to evaluate: test (default; val if there is no test split), val, train, new (images that the
    model's split.csv does not list), or all."""
    error: float | None = None
    """Share of the answers that may be wrong; sets the confidence below which the model abstains. Default: what the
    bundle was calibrated for, else 0.05."""
    by_order: Flag = False
    """Take the outputs of a model without class names for the data's classes in alphabetical order."""

    def __post_init__(self) -> None:
        if self.error is not None and not 0 < self.error < 1:
            raise ArgumentError("error", self.error, "must be a share of the answers: above 0 and below 1.")


@dataclass(frozen=True)
class Outputs:
    """A model and its outputs for the images that can be read."""

    model: str
    classifier: Classifier
    data: Dataset  # those images, labelled in the order of the outputs
    predicted: Predicted
    familiarity: NDArray[np.float64] | None  # (N,); None if the model cannot tell

    @property
    def familiarity_scores(self) -> tuple[Familiarity, NDArray[np.float64]] | None:
        """The detector of unfamiliar images, and its scores."""
        known, scores = self.classifier.familiarity, self.familiarity
        return None if known is None or scores is None else (known, scores)


@dataclass(frozen=True)
class FittedOn:
    """What was fitted to images that are not evaluated."""

    calibration: Calibration | None = None
    sets: LabelSets | None = None
    on: str = ""  # description of these images


def val(
    *arguments: str,
    options: Annotated[ValOptions, Parameter(name="*")] = ValOptions(),
    engine: Annotated[EngineOptions, Parameter(name="*")] = AUTO,
    out: Path | None = None,
    report: Path | None = None,
    json: Flag = False,
) -> int:
    """Evaluate a model: accuracy with its interval, every class, calibration, and when it should abstain.

    With two models: which one is better, and whether the difference is significant. Classes are matched by name.

    Args:
        arguments: MODEL DATA, or MODEL OTHER-MODEL DATA. A model is a bundle, registered weights (lite0, b0 ...), an
            artifact of effnet export or another library's file; data is a folder with a sub-folder for each class,
            split or not, or a manifest.
        options: What is evaluated, and how.
        engine: What runs the models.
        out: Write confusion_matrix.png, per_class.csv, reliability.png, mistakes.jpg and cams.jpg into this folder.
        report: Write everything to this file as one HTML page with pictures: see docs/report.md.
        json: JSON instead of tables.
    """
    if len(arguments) not in (2, 3):
        raise ArgumentError("arguments", " ".join(arguments), "must be MODEL DATA, or MODEL OTHER-MODEL DATA.")
    *models, data = arguments
    _check(models, options, out, report)
    with console.Display(f"reading {data}") as progress:
        dataset = read_data(data)
        splits = {model: find_splits(model, dataset) for model in models}
        chosen = hold_out(dataset, splits, options.split)
        opened = [(model, _open(model, engine, progress)) for model in models]
        labelled = [(*each, _label(chosen.data, *each, options)) for each in opened]
    outputs = [_run(*each) for each in labelled]
    first, unreadable = outputs[0], outputs[0].predicted.unreadable
    split = f" --split {options.split}" if options.split else ""
    if len(models) == 2:
        difference = _compare_outputs(first, outputs[1], chosen.data)
        values = {"a": models[0], "b": models[1], "data": data, "split": chosen.split, **difference.to_dict()}
        if not json:
            _show_comparison(difference, models, data, chosen.split)
        following = f"effnet val {shlex.join((models[1], data))}{split}"
    else:
        fitted = _fit(first, chosen.val, options)
        evaluation = _evaluate(first, fitted.calibration)
        used = chosen.split in USED and splits[models[0]] is not None  # by the run that trained the model
        sureness = _measure(first, fitted, used)
        values = {"model": models[0], "data": data, "split": chosen.split, **evaluation.to_dict()}
        values |= {"calibrated_on": fitted.on or None, "seen_in_training": chosen.trained}
        values |= {"sureness": sureness.to_dict()}
        if out is not None:
            _write_files(first, evaluation, out)
        if report is not None:
            train = trained_images(dataset, splits[models[0]])
            train = _label(train, *opened[0], options) if len(train) else train
            _write_page(first, (evaluation, sureness), fitted, chosen, train, report)
        if not json:
            _show_evaluation(evaluation, models[0], data, chosen.split)
            _show_sureness(sureness, first, fitted, used)
            console.paragraphs((*describe_confidence(evaluation, fitted.calibration, fitted.on), INTERVALS))
        following = f"effnet predict PHOTO --model {shlex.quote(models[0])}"
        if out is None:
            following = f"effnet val {shlex.join(arguments)}{split} --out val"
    if json:
        sys.stdout.write(console.json_text(values | {"unreadable": unreadable}))
    for note in chosen.notes:
        console.remark(f"Note: {note}.")
    for path, reason in list(unreadable.items())[:LISTED]:
        console.remark(f"unreadable: {path}: {reason}")
    if unreadable:
        console.remark(f"{len(unreadable):,} of {len(chosen.data):,} images unreadable and not counted")
    if report is not None:
        console.remark(f"Report: {report}")
    if out is not None:
        console.remark(f"Written: {', '.join(str(out / name) for name in FILES)}")
    console.remark(f"Next: {following}")
    return FINDING if unreadable or chosen.trained else OK


def _check(models: list[str], options: ValOptions, out: Path | None, report: Path | None) -> None:
    """Refuse impossible requests before anything takes time."""
    if models[1:] == models[:1]:
        raise ArgumentError("arguments", models[0], "is given twice; name two models.")
    if len(models) == 2:
        for option, value in (("out", out), ("report", report), ("error", options.error)):
            if value is not None:
                raise ArgumentError(option, str(value), "is for one model; leave it or the second model out.")
    if out is not None:
        if out.exists() and not out.is_dir():
            raise ArgumentError("out", str(out), "is a file; name a folder.")
        drawable(out / FILES[0])
    if report is not None:
        if report.is_dir():
            raise ArgumentError("report", str(report), "is a folder; name a file, such as report.html.")
        if find_spec("jinja2") is None:
            raise missing("--report", "jinja2")


def _open(model: str, engine: EngineOptions, progress: Progress) -> Classifier:
    pins = vars(engine)
    if engine.precision is None and artifact_path(model) is None:
        pins = pins | {"precision": "fp32"}
    return load(model, progress=progress, **pins)


def _label(dataset: Dataset, model: str, classifier: Classifier, options: ValOptions) -> Dataset:
    """The data with its labels in the order of the model's outputs."""
    if classifier.classes is not None:
        if options.by_order:
            raise ArgumentError("by_order", True, f"is for models without class names; {model} has them.")
        return match_outputs(dataset, classifier.classes, f"{model}'s")
    count, found = classifier.spec.num_classes, len(dataset.classes)
    if not options.by_order or count != found:
        advice = "; if they are the data's in alphabetical order, add --by-order" if count == found else ""
        raise DataError(f"{model} does not name its {count} outputs, and the data has {found} classes{advice}")
    return dataset


def _run(model: str, classifier: Classifier, dataset: Dataset) -> Outputs:
    scores: list[NDArray[np.float64] | None] = []

    def network(pixels: Pixels) -> Logits:
        logits, familiarity = classifier.answer(pixels)
        scores.append(familiarity)
        return logits

    with console.Display() as progress:
        batch, input_spec = classifier.group, classifier.input
        predicted = predict_logits(network, input_spec, dataset, batch=batch, progress=progress, task=model)
    if not len(predicted.labels):
        path, reason = next(iter(predicted.unreadable.items()))
        raise DataError(f"none of the {len(dataset):,} images can be read; {path}: {reason}")
    known = [each for each in scores if each is not None]
    familiarity = np.concatenate(known) if known else None
    return Outputs(model, classifier, predicted.readable(dataset), predicted, familiarity)


def _fit(outputs: Outputs, rest: Dataset | None, options: ValOptions) -> FittedOn:
    """Temperature, threshold and label sets: the bundle's, else fitted to the val split if it is not evaluated."""
    own, error = outputs.classifier.calibration, options.error
    if own is not None and error in (None, own.error):
        on = f"the {own.n:,} {own.split} images of the run that trained {outputs.model}"
        return FittedOn(own, outputs.classifier.sets, on)
    if rest is not None:
        labelled = _label(rest, outputs.model, outputs.classifier, options)
        found = _run(outputs.model, outputs.classifier, labelled).predicted
        fitted = calibrate(found.logits, found.labels, error=error or ERROR)
        sets = calibrate_sets(found.logits, found.labels, fitted.temperature)
        return FittedOn(fitted, sets, f"the {fitted.n:,} images of the data's val split")
    if error is not None:
        raise ArgumentError("error", error, "needs a val split besides the evaluated one, to choose a threshold on.")
    return FittedOn()


def _measure(outputs: Outputs, fitted: FittedOn, used: bool) -> Sureness:
    """How well the model knows its limits, without anything that was fitted to these images."""
    logits, labels, _ = outputs.predicted
    temperature = fitted.calibration.temperature if fitted.calibration else 1.0
    if used:
        return measure_sureness(logits, labels, temperature)
    return measure_sureness(logits, labels, temperature, sets=fitted.sets, told=outputs.familiarity_scores)


def _evaluate(outputs: Outputs, calibration: Calibration | None) -> Evaluation:
    temperature, threshold = (calibration.temperature, calibration.threshold) if calibration else (1.0, None)
    logits, labels, _ = outputs.predicted
    return evaluate(logits, labels, outputs.data.classes, temperature=temperature, threshold=threshold)


def _write_files(outputs: Outputs, evaluation: Evaluation, out: Path) -> None:
    confusion, classes, reliability, mistakes, cams = (out / name for name in FILES)
    draw_confusion(evaluation.pairs, evaluation.classes, confusion)
    write_per_class(evaluation, classes)
    draw_reliability(evaluation.reliability_curves, reliability)
    logits = outputs.predicted.logits
    answers = outputs.data, logits.argmax(1), confidence(logits, evaluation.after.temperature)
    draw_mistakes(*answers, mistakes)
    draw_cams(outputs.classifier, *answers, cams)
    if numbered := explain_labels(evaluation.classes):
        console.remark(numbered)


def _write_page(
    outputs: Outputs, figures: tuple[Evaluation, Sureness], fitted: FittedOn, chosen: HeldOut, train: Dataset, out: Path
) -> None:
    from effnet.reporting.page import write_report
    from effnet.reporting.subject import Subject, find_neighbours

    data, classifier, split = outputs.data, outputs.classifier, chosen.split
    again = f"effnet val {shlex.join((outputs.model, str(data)))} --split {split} --report {shlex.quote(str(out))}"
    with console.Display() as progress:
        subject = Subject(
            name=classifier.spec.name,
            source=data.root.name,
            data=data,
            split=split,
            logits=outputs.predicted.logits,
            evaluation=figures[0],
            classifier=classifier,
            calibration=fitted.calibration,
            calibrated_on=fitted.on,
            sureness=figures[1],
            scores=None if figures[1].unfamiliar is None else outputs.familiarity,
            suspects=[] if chosen.trained else None,
            neighbours=find_neighbours(classifier, train, progress),
            notes=[f"{note[0].upper()}{note[1:]}." for note in chosen.notes],
            commands=(("This evaluation again:", again),),
            facts={"model": outputs.model, "data": str(data), "machine": str(this_machine())},
        )
        write_report(subject, out, progress)


def _compare_outputs(a: Outputs, b: Outputs, dataset: Dataset) -> Difference:
    """The difference on the images that both models could read, by the data's classes."""
    label_of = {sample.path: sample.label for sample in dataset.samples}
    shared = {sample.path for sample in a.data.samples} & {sample.path for sample in b.data.samples}
    known = sorted({label_of[path] for path in shared})
    logits = []
    for each in (a, b):
        rows = [number for number, sample in enumerate(each.data.samples) if sample.path in shared]
        output_of = {label_of[sample.path]: sample.label for sample in each.data.samples}
        first = [output_of[label] for label in known]  # the data's classes, in its order
        rest = np.setdiff1d(np.arange(len(each.data.classes)), first)
        logits.append(each.predicted.logits[rows][:, [*first, *rest]])
    labels = np.searchsorted(known, [sample.label for sample in dataset.samples if sample.path in shared])
    return compare_top1(logits[0], logits[1], labels)


def _show_evaluation(evaluation: Evaluation, model: str, data: str, split: str) -> None:
    """Print the figures and the classes."""
    figures = ("top-1", evaluation.top1), ("top-5", evaluation.top5), ("macro F1", evaluation.macro_f1)
    lines = [(name, f"{figure.value:.2%}", bounds(figure)) for name, figure in figures if figure is not None]
    console.paragraphs((f"{model} on {_name(split)} of {data}: {write_count(evaluation.n, 'image')}",))
    console.table(("<", "value", "95 % interval"), lines)
    scores, absent = [*evaluation.scores], [score.name for score in evaluation.scores if not score.n]
    heading = f"{len(scores)} classes"
    if len(scores) > ALL_CLASSES and absent:
        scores = [score for score in scores if score.n]
        heading = f"{len(scores)} classes with images, of {heading}"
    if len(scores) > ALL_CLASSES:
        scores = sorted(scores, key=lambda score: score.f1 or 0.0)[:WORST]
        heading = f"The {WORST} classes of lowest F1, of {heading}"
    taken_for: dict[str, str] = {}
    for mistake in evaluation.mistakes:
        taken_for.setdefault(mistake.true, f"{mistake.predicted} ({mistake.count})")
    rows = []
    for score in scores:
        precision = "-" if score.precision is None else f"{score.precision:.1%}"
        recall = (f"{score.recall.value:.1%}", bounds(score.recall, 1)) if score.recall else ("-", "-")
        f1 = "-" if score.f1 is None else f"{score.f1:.1%}"
        rows.append((score.name, score.n, precision, *recall, f1, taken_for.get(score.name, "")))
    columns = "<class", "images", "precision", "recall", "95 % interval", "F1", "<taken for"
    console.table(columns, rows, title=heading)
    if absent:
        console.paragraphs((f"Without images here, so not in these figures: {list_names(absent)}.",))


def _show_sureness(found: Sureness, outputs: Outputs, fitted: FittedOn, used: bool) -> None:
    """Print accuracy against coverage, and how good label sets and familiarity are."""
    rows = [
        (f"{each.share:.0%}", f"{each.least:.1%}", f"{each.accuracy.value:.2%}", bounds(each.accuracy))
        for each in found.curve
    ]
    title = "If only the most confident predictions are given"
    console.table(("answered", "confidence from", "top-1", "95 % interval"), rows, title=title)
    texts = [f"{each}. They were calibrated on {fitted.on}." for each in found.sets]
    known = outputs.classifier.familiarity
    if known is not None and found.unfamiliar is not None:
        texts.append(f"Unfamiliar: {between(found.unfamiliar)} of these images. {known}.")
    if used and (known is not None or outputs.classifier.sets is not None):
        texts.append("The run that trained the model used these images: label sets and familiarity are not measured.")
    console.paragraphs(texts)


def _show_comparison(found: Difference, models: Sequence[str], data: str, split: str) -> None:
    """Print the accuracy of both models, and their difference."""
    rows = [
        (name, model, f"{accuracy.value:.2%}", bounds(accuracy), only)
        for name, model, accuracy, only in zip(
            "AB", models, (found.accuracy_a, found.accuracy_b), (found.only_a, found.only_b), strict=True
        )
    ]
    console.paragraphs((f"Two models on {_name(split)} of {data}: {write_count(found.n, 'image')}",))
    console.table(("<", "<model", "top-1", "95 % interval", "only this right"), rows)
    gain, low, high = (100 * value for value in (found.accuracy.value, found.accuracy.low, found.accuracy.high))
    p = "p < 0.001" if found.p < 0.001 else f"p = {found.p:.2g}"
    if found.significant and gain < 0:
        verdict = f"A is better by {-gain:.1f} points ({-high:.1f} to {-low:.1f}), {p}."
    elif found.significant:
        verdict = f"B is better by {gain:.1f} points ({low:.1f} to {high:.1f}), {p}."
    else:
        verdict = f"The images show no difference: B minus A is {gain:+.1f} points ({low:+.1f} to {high:+.1f}), {p}."
    console.paragraphs((verdict, TEST))


def _name(split: str) -> str:
    return "all" if split == "all" else f"the {split} split"
