"""effnet val: how good a model is on images with known classes, how sure that is, and which of two is better."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import Parameter

from effnet import console
from effnet.arch.spec import Calibration
from effnet.console import FINDING, OK, Flag, Whole
from effnet.data.dataset import Dataset, match_classes, read_data
from effnet.data.held_out import HeldOut, hold_out
from effnet.errors import ArgumentError, DataError
from effnet.metrics.calibration import calibrate, confidence
from effnet.metrics.evaluate import Evaluation, Predicted, evaluate, predict_logits, write_per_class
from effnet.metrics.intervals import Difference, Interval, compare_top1
from effnet.plots.run import draw_confusion, draw_mistakes, draw_reliability
from effnet.plots.style import drawable
from effnet.runtime.artifact import artifact_path
from effnet.runtime.classifier import AnyEngine, AnyPrecision, Classifier, load
from effnet.weights.bundle import read_parts

ERROR = 0.05  # share of wrong answers for which a threshold is chosen where none is given
LISTED, WORST = 20, 10  # classes up to which all are shown, and how many where there are more
FILES = "confusion_matrix.png", "per_class.csv", "reliability.png", "mistakes.jpg"
INTERVALS = (
    "Intervals at 95 %: Wilson's for shares, a bootstrap over all images for macro F1. They hold for images drawn like "
    "these."
)


@dataclass(frozen=True)
class Judged:
    """A model and its answers to the images."""

    model: str
    classifier: Classifier
    data: Dataset  # the readable images, in the order of the model's classes
    predicted: Predicted


@dataclass(frozen=True)
class ValOptions:
    """What is evaluated, and how."""

    split: str | None = None
    """The part to evaluate: test (default), val (where there is no test), train, new (images that the model's split.csv
    does not list), or all."""
    error: float | None = None
    """Share of wrong answers that may be given; below the confidence that keeps it the model abstains. Default: what
    the bundle was calibrated for, else 0.05."""
    by_order: Flag = False
    """For a model without class names: its outputs are the data's classes in alphabetical order."""
    source: str | None = None
    """The library that wrote a file of weights, where its keys cannot tell: timm or timm-tf."""
    engine: AnyEngine = "auto"
    """What runs the models: torch, openvino or onnxruntime. By default chosen by rule from what is installed."""
    precision: AnyPrecision | None = None
    """What they compute with: fp32 (the default), bf16 or auto; an artifact's own."""
    batch: Whole | None = None
    """Images that go through the network together; by default what the engine takes best."""
    threads: Whole | None = None
    """Threads that the engine may use; by default one for each core."""

    def open(self, model: str) -> Classifier:
        """The classifier of a MODEL."""

        precision = self.precision or ("fp32" if artifact_path(model) is None else "auto")
        return load(
            model,
            source=self.source,
            engine=self.engine,
            precision=precision,
            batch=self.batch,
            threads=self.threads,
        )


DEFAULTS = ValOptions()


def val(
    *arguments: str,
    options: Annotated[ValOptions, Parameter(name="*")] = DEFAULTS,
    out: Path | None = None,
    json: Flag = False,
) -> int:
    """How good a model is: accuracy with its interval, every class, calibration, and when it had better abstain.

    With two models: which one is better, and whether the images show it. Classes are matched by name.

    Args:
        arguments: MODEL DATA, or MODEL OTHER-MODEL DATA. A model is a bundle, registered weights (lite0, b0 ...), an
            artifact of effnet export or another library's file; data is a folder with a sub-folder for each class,
            split or not, or a manifest.
        options: What is evaluated, and how.
        out: Write confusion_matrix.png, per_class.csv, reliability.png and mistakes.jpg into this folder.
        json: JSON instead of tables.
    """
    if len(arguments) not in (2, 3):
        raise ArgumentError("arguments", " ".join(arguments), "must be MODEL DATA, or MODEL OTHER-MODEL DATA.")
    *models, data = arguments
    if models[1:] == models[:1]:
        raise ArgumentError("arguments", models[0], "is given twice; name two models.")
    _check(out, options.error, two=len(models) > 1)

    with console.Display(f"reading {data}"):
        dataset = read_data(data)
        chosen = hold_out(dataset, {model: read_parts(model, dataset) for model in models}, options.split)
        classifiers = {model: options.open(model) for model in models}
        named = {
            model: _named(chosen.data, model, classifier, by_order=options.by_order)
            for model, classifier in classifiers.items()
        }
    judged = [_judge(model, classifiers[model], named[model], options.batch) for model in models]
    unreadable = judged[0].predicted.unreadable
    command = f"effnet val {shlex.join(arguments)}" + (f" --split {options.split}" if options.split else "")
    if len(judged) > 1:
        found = _compare(judged, chosen.data)
        if json:
            about = {"a": models[0], "b": models[1], "data": data, "split": chosen.split}
            sys.stdout.write(console.json_text(about | found.to_dict() | {"unreadable": unreadable}))
        else:
            _show_difference(found, models, data, chosen.split)
        following = command.replace(shlex.join(arguments), shlex.join((models[1], data)))
    else:
        rest = chosen.val and _named(chosen.val, models[0], judged[0].classifier, by_order=options.by_order)
        calibration, fitted = _calibration(judged[0], rest, options.error, options.batch)
        evaluation = _evaluate(judged[0], calibration)
        if out is not None:
            _draw(judged[0], evaluation, out)
        if json:
            values = {"model": models[0], "data": data, "split": chosen.split, **evaluation.to_dict()}
            values |= {"calibrated_on": fitted or None, "seen_in_training": chosen.trained, "unreadable": unreadable}
            sys.stdout.write(console.json_text(values))
        else:
            _show(judged[0], data, chosen, evaluation)
            console.paragraphs((*_confidence(evaluation, calibration, fitted), INTERVALS))
        following = f"{command} --out val" if out is None else f"effnet predict PHOTO --model {shlex.quote(models[0])}"
    for note in chosen.notes:
        console.remark(f"Note: {note}.")
    for path, reason in list(unreadable.items())[:WORST]:
        console.remark(f"unreadable: {path}: {reason}")
    if unreadable:
        console.remark(f"{len(unreadable):,} of {len(chosen.data):,} images unreadable and not counted")
    if out is not None:
        console.remark(f"Written: {', '.join(str(out / name) for name in FILES)}")
    console.remark(f"Next: {following}")
    return FINDING if unreadable or chosen.trained else OK


def _check(out: Path | None, error: float | None, *, two: bool) -> None:
    """Refuse what cannot be done before anything takes time."""
    if error is not None and not 0 < error < 1:
        raise ArgumentError("error", error, "must be a share of the answers: above 0 and below 1.")
    if two and (out is not None or error is not None):
        option, value = ("error", error) if out is None else ("out", str(out))
        raise ArgumentError(option, value, "is for one model; leave it or the second model out.")
    if out is not None:
        if out.exists() and not out.is_dir():
            raise ArgumentError("out", str(out), "is a file; name a folder.")
        drawable(out / FILES[0])


def _named(dataset: Dataset, model: str, classifier: Classifier, *, by_order: bool) -> Dataset:
    """The data with its labels in the order of the model's outputs."""

    if classifier.classes is not None:
        if by_order:
            raise ArgumentError("by_order", by_order, f"is for models without class names; {model} has them.")
        return match_classes(dataset, classifier.classes, f"{model}'s")
    outputs, found = classifier.spec.num_classes, len(dataset.classes)
    if not by_order or outputs != found:
        advice = "; if they are the data's in alphabetical order, say --by-order" if outputs == found else ""
        raise DataError(f"{model} does not name its {outputs} outputs, and the data has {found} classes{advice}")
    return dataset


def _judge(model: str, classifier: Classifier, dataset: Dataset, batch: int | None) -> Judged:

    with console.Display() as progress:
        together = classifier.group if batch is None else batch
        predicted = predict_logits(classifier, dataset, batch=together, progress=progress, task=model)
    if not len(predicted.labels):
        path, reason = next(iter(predicted.unreadable.items()))
        raise DataError(f"none of the {len(dataset):,} images can be read; {path}: {reason}")
    return Judged(model, classifier, predicted.readable(dataset), predicted)


def _calibration(
    judged: Judged, rest: Dataset | None, error: float | None, batch: int | None
) -> tuple[Calibration | None, str]:
    """Temperature and threshold: the bundle's, or fitted on the val part where that is not evaluated; from where."""

    own = judged.classifier.calibration
    if own is not None and error in (None, own.error):
        return own, f"the {own.n:,} images of the {own.split} part that {judged.model} was trained beside"
    if rest is not None:
        found = _judge(judged.model, judged.classifier, rest, batch).predicted
        fitted = calibrate(found.logits, found.labels, error=ERROR if error is None else error)
        return fitted, f"the {fitted.n:,} images of the data's val part"
    if error is not None:
        raise ArgumentError("error", error, "needs a val part beside the evaluated one, to choose a threshold on.")
    return None, ""


def _evaluate(judged: Judged, calibration: Calibration | None) -> Evaluation:

    logits, labels, _ = judged.predicted
    if calibration is None:
        return evaluate(logits, labels, judged.data.classes)
    temperature, threshold = calibration.temperature, calibration.threshold
    return evaluate(logits, labels, judged.data.classes, temperature=temperature, threshold=threshold)


def _draw(judged: Judged, evaluation: Evaluation, out: Path) -> None:

    confusion, classes, reliable, mistakes = (out / name for name in FILES)
    draw_confusion(evaluation.confusion, evaluation.classes, confusion)
    write_per_class(evaluation, classes)
    draw_reliability(evaluation.reliability_curves, reliable)
    logits = judged.predicted.logits
    draw_mistakes(judged.data, logits.argmax(1), confidence(logits, evaluation.after.temperature), mistakes)


def _show(judged: Judged, data: str, chosen: HeldOut, evaluation: Evaluation) -> None:
    """The figures, then the classes."""
    lines = [
        (name, f"{figure.value:.2%}", _bounds(figure))
        for name, figure in (("top-1", evaluation.top1), ("top-5", evaluation.top5), ("macro F1", evaluation.macro_f1))
        if figure is not None
    ]
    console.paragraphs((f"{judged.model} on {_part(chosen.split)} of {data}: {evaluation.n:,} images",))
    console.table(("<", "value", "95 % interval"), lines)
    scores = [score for score in evaluation.scores if score.n]
    title = f"{len(scores)} classes"
    if len(scores) > LISTED:
        scores = sorted(scores, key=lambda score: score.f1 or 0.0)[:WORST]
        title = f"The {WORST} classes of lowest F1, of {title}"
    taken: dict[str, str] = {}
    for mistake in evaluation.mistakes:
        taken.setdefault(mistake.true, f"{mistake.named} ({mistake.count})")
    rows = [
        (
            score.name,
            score.n,
            "-" if score.precision is None else f"{score.precision:.1%}",
            f"{score.recall.value:.1%}",
            _bounds(score.recall, 1),
            f"{score.f1:.1%}",
            taken.get(score.name, ""),
        )
        for score in scores
        if score.recall is not None
    ]
    columns = "<class", "images", "precision", "recall", "95 % interval", "F1", "<taken for"
    console.table(columns, rows, title=title)


def _confidence(evaluation: Evaluation, calibration: Calibration | None, fitted: str) -> Iterator[str]:
    """What the confidence is worth, in sentences."""
    before, after, given = evaluation.before, evaluation.after, evaluation.abstention
    worth = f"ECE {before.ece:.1%}, Brier {before.brier:.3f}, loss {before.loss:.4f}"
    if calibration is None:
        yield (
            f"Confidence as it is: {worth}. No temperature and no threshold: they are fitted on a val part, never on "
            "what is evaluated."
        )
        return
    yield (
        f"Confidence as it is: {worth}; at a temperature of {after.temperature:.3g}: ECE {after.ece:.1%}, "
        f"Brier {after.brier:.3f}, loss {after.loss:.4f}."
    )
    yield f"Temperature and threshold are fitted on {fitted}."
    if given is None:
        yield (
            f"Abstaining: no confidence there surely has at most {calibration.error:.3g} of its answers wrong; that "
            "takes fewer mistakes or more images."
        )
        return
    wrong = (
        f"{given.error.value:.1%} ({_bounds(given.error, 1)}) of the answers are wrong" if given.error else "nothing"
    )
    rule = f"Abstaining below {given.threshold:.1%} confidence" if given.threshold else "Abstaining is not needed"
    yield (
        f"{rule} to have at most {calibration.error:.3g} of the answers wrong, with 95 % confidence for images like "
        f"those. Here {given.coverage.value:.1%} of the images are answered, and {wrong}."
    )


def _compare(judged: Sequence[Judged], dataset: Dataset) -> Difference:
    """Two models on the images that both could read, by the data's classes."""

    paths = [[sample.path for sample in each.data.samples] for each in judged]
    shared = set(paths[0]) & set(paths[1])
    rows = [[place for place, path in enumerate(listed) if path in shared] for listed in paths]
    columns = []
    for each in judged:  # the data's classes first, then those that only the model knows
        place = {name: number for number, name in enumerate(each.data.classes)}
        columns.append([place.pop(name) for name in dataset.classes] + list(place.values()))
    logits = [each.predicted.logits[rows[i]][:, columns[i]] for i, each in enumerate(judged)]
    return compare_top1(logits[0], logits[1], np.argsort(columns[0])[judged[0].predicted.labels[rows[0]]])


def _show_difference(found: Difference, models: Sequence[str], data: str, split: str) -> None:
    """Both figures, and what their difference says."""
    rows = [
        (name, model, f"{figure.value:.2%}", _bounds(figure), alone)
        for name, model, figure, alone in (
            ("A", models[0], found.accuracy_a, found.only_a),
            ("B", models[1], found.accuracy_b, found.only_b),
        )
    ]
    console.paragraphs((f"Two models on {_part(split)} of {data}: {found.n:,} images",))
    console.table(("<", "<model", "top-1", "95 % interval", "only this right"), rows)
    gain, low, high = (100 * value for value in (found.accuracy.value, found.accuracy.low, found.accuracy.high))
    p = "p < 0.001" if found.p < 0.001 else f"p = {found.p:.2g}"
    if found.significant and gain < 0:
        words = f"A is better by {-gain:.1f} points ({-high:.1f} to {-low:.1f}), {p}."
    elif found.significant:
        words = f"B is better by {gain:.1f} points ({low:.1f} to {high:.1f}), {p}."
    else:
        words = f"The images show no difference: B minus A is {gain:+.1f} points ({low:+.1f} to {high:+.1f}), {p}."
    test = (
        "p is of McNemar's exact test on the images that only one of them names correctly; the interval of the "
        "difference is Bonett and Price's, at 95 %, for models on the same images."
    )
    console.paragraphs((words, test))


def _part(split: str) -> str:
    return "all" if split == "all" else f"the {split} part"


def _bounds(figure: Interval, digits: int = 2) -> str:
    return f"{figure.low:.{digits}%} to {figure.high:.{digits}%}"
