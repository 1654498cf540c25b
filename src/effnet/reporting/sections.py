"""The parts of a page as plain values, with the text and numbers that the reader sees; the template arranges them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effnet import console
from effnet.arch.cost import cost
from effnet.data.dataset import place
from effnet.fields import write_count
from effnet.metrics.intervals import Interval
from effnet.plots.fonts import on_one_line
from effnet.plots.overlay import describe_scale, shade, strength
from effnet.reporting import charts
from effnet.reporting.pictures import LARGE, Pictures
from effnet.reporting.subject import Subject, suspect_labels
from effnet.reporting.words import between, describe_confidence
from effnet.runtime.cam import Explanation

NAMED = 20  # most classes of the confusion matrix
PAIRS, OF_PAIR, OF_CLASS = 60, 8, 5  # cells with pictures, pictures of a confused pair, and of a class predicted right
MISTAKES, NEAREST = 12, 3  # mistakes with maps, and training images beside each
SUSPECTS, STRANGE = 24, 12  # pictures of suspected labels, and of unfamiliar images
CLASSES = 300  # most rows of the table of classes
STEPS = 200  # thresholds of the slider
LETTERS = 60  # longest name of a class or file
SHADES = 9  # of the matrix's cells


def clean(name: object) -> str:
    """A name from the user's data on one line, without its middle if it is long."""
    text = on_one_line(str(name))
    return text if len(text) <= LETTERS else f"{text[: LETTERS // 2]}…{text[-LETTERS // 2 + 1 :]}"


def percent(value: float, digits: int = 1) -> str:
    """A share in percent."""
    return f"{value:.{digits}%}"


def tell_verdict(subject: Subject) -> dict[str, Any]:
    """The result in a sentence, and what to do next."""
    found = subject.evaluation
    right = f"{between(found.top1)} of {found.n:,} images {whose(subject.split)} are classified correctly"
    cautions, next_steps, kept = [], [], None
    if subject.fit is not None:
        kept = bool(subject.fit.get("kept"))
        right = f"{'Keeps' if kept else 'Does not keep'} the budget; {right}"
        if not kept and subject.fit.get("nearest"):
            next_steps.append(f"{subject.fit['nearest']}.")
    if subject.split == "val":
        cautions.append("The weights were chosen on these images, so on new ones it may be lower: keep a test split.")
    elif subject.split in ("train", "all"):
        cautions.append("The model may have been trained on these images: the figures do not hold for new ones.")
    if found.mistakes:
        worst = found.mistakes[0]
        next_steps.append(
            f"Next, look at the mistakes below, most often {clean(worst.true)} taken for {clean(worst.predicted)} "
            f"({write_count(worst.count, 'image')}): a label may be wrong as well."
        )
    return {"sentence": f"{right}.", "kept": kept, "cautions": cautions, "next": next_steps}


def whose(split: str) -> str:
    """The images of a split, as a phrase."""
    return {"all": "of the data", "new": "that are new", "": "of the data"}.get(split, f"of the {split} split")


def tabulate_coverage(subject: Subject) -> dict[str, Any]:
    """Accuracy against coverage: the chart, thresholds for the slider, and a few of them as a table."""
    sure, right = np.sort(subject.confidence)[::-1], subject.predicted == subject.labels
    order = np.argsort(-subject.confidence, kind="stable")
    rights, n = np.cumsum(right[order]), len(sure)
    curve: list[tuple[float, int, int]] = []
    for step in range(STEPS, 0, -1):
        least = float(sure[math.ceil(n * step / STEPS) - 1])
        answered = int(np.searchsorted(-sure, -least, side="right"))  # ties are answered together
        if not curve or answered < curve[-1][1]:
            curve.append((least, answered, int(rights[answered - 1])))
    curve.reverse()  # from the fewest answers to all, like the slider and the chart
    abstention, mark = subject.evaluation.abstention, len(curve) - 1
    threshold = None if abstention is None else abstention.threshold
    if threshold:
        mark = min(range(len(curve)), key=lambda place: abs(curve[place][0] - threshold))
    rows = [
        (percent(each.share, 0), percent(each.least), between(each.accuracy))
        for each in (subject.sureness.curve if subject.sureness else ())
    ]
    return {
        "svg": charts.draw_coverage(curve, n, mark),
        "points": [[round(least, 5), answered, right] for least, answered, right in curve],
        "mark": mark,
        "n": n,
        "rows": rows,
        "words": list(describe_confidence(subject.evaluation, subject.calibration, subject.calibrated_on))[1:],
    }


def tabulate_confusion(subject: Subject, pictures: Pictures) -> dict[str, Any]:
    """The confusion matrix of the classes that are mixed up most, and pictures of its cells."""
    found, data = subject.evaluation, subject.data
    shown = _confused_classes(subject)
    places = {label: place for place, label in enumerate(shown)}
    counts = np.zeros((len(shown), len(shown)), np.int64)
    for true, predicted, count in found.pairs.tolist():
        if true in places and predicted in places:
            counts[places[true], places[predicted]] = count
    images = [score.n for score in found.scores]
    order = np.argsort(-subject.confidence, kind="stable")
    wrong = [(int(-counts[i, j]), i, j) for i, j in np.argwhere(counts) if i != j]
    same = [(0, i, i) for i in range(len(shown)) if counts[i, i]]
    opened, pairs = set[tuple[int, int]](), []
    for _, i, j in (*sorted(wrong)[:PAIRS], *same):
        true, predicted = shown[i], shown[j]
        members = order[(subject.labels[order] == true) & (subject.predicted[order] == predicted)]
        rows = members[:OF_PAIR] if i != j else members[::-1][:OF_CLASS]  # of correct ones the least confident
        photos = [_photo(subject, row, pictures) for row in rows.tolist()]
        if photos := [photo for photo in photos if photo["picture"]]:
            opened.add((i, j))
            both = {"true": clean(data.classes[true]), "predicted": clean(data.classes[predicted])}
            pair = {"id": f"cell-{true}-{predicted}", "right": i == j, "count": len(members), "photos": photos}
            pairs.append(both | pair)
    rows_of_cells = []
    for i, true in enumerate(shown):
        cells = []
        for j, predicted in enumerate(shown):
            count = int(counts[i, j])
            tint = math.ceil(SHADES * math.sqrt(count / images[true])) if count else 0
            name = f"cell-{true}-{predicted}" if (i, j) in opened else ""
            cells.append({"count": count, "shade": tint, "id": name})
        rows_of_cells.append({"name": clean(data.classes[true]), "cells": cells, "n": images[true]})
    names = [clean(data.classes[label]) for label in shown]
    return {"names": names, "rows": rows_of_cells, "pairs": pairs, "of": sum(map(bool, images))}


def _confused_classes(subject: Subject) -> list[int]:
    """The classes with images or predictions, or if there are many the most confused ones, in order."""
    pairs = subject.evaluation.pairs
    used: list[int] = np.unique(pairs[:, :2]).tolist()
    if len(used) <= NAMED:
        return used
    wrong = pairs[pairs[:, 0] != pairs[:, 1]]
    chosen = dict[int, None]()
    for true, predicted, _ in wrong[np.argsort(-wrong[:, 2], kind="stable")].tolist():
        if len({*chosen, true, predicted}) <= NAMED:
            chosen |= {true: None, predicted: None}
    return sorted(chosen or used[:NAMED])


def explain_mistakes(subject: Subject, pictures: Pictures) -> Iterator[dict[str, Any]]:
    """The most confident mistakes, with maps of where the model looked and the training images nearest to them."""
    near, names = subject.neighbours, [clean(name) for name in subject.data.classes]
    for row in subject.mistakes[:MISTAKES]:
        sample = subject.data.samples[row]
        pixels = subject.classifier.read(subject.data.file(sample))
        answer, own = found = subject.classifier.explain_pixels(pixels, (int(subject.predicted[row]), sample.label))
        largest = strength(found)
        yield _photo(subject, row, pictures, LARGE) | {
            "maps": [_map(each, largest, names, pictures) for each in (answer, own)],
            "scale": describe_scale(found),
            "nearest": [] if near is None else list(_nearest(subject, pixels, pictures)),
        }


def _map(found: Explanation, largest: float, names: Sequence[str], pictures: Pictures) -> dict[str, Any]:
    picture = pictures.image(shade(found, largest, LARGE), LARGE)
    return {"name": names[found.index], "logit": f"{found.logit:+.2f}", "picture": picture}


def _nearest(subject: Subject, pixels: NDArray[np.uint8], pictures: Pictures) -> Iterator[dict[str, Any]]:
    """The training images whose features have the largest cosine similarity to an image's."""
    assert subject.neighbours is not None
    images, features = subject.neighbours
    _, maps = subject.classifier.maps(pixels[None])
    own = maps.mean((2, 3))[0].astype(np.float64)
    lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(own)
    similarity = features @ own / np.maximum(lengths, 1e-12)
    for row in np.argsort(-similarity, kind="stable")[:NEAREST].tolist():
        sample = images.samples[row]
        picture = pictures.file(images.file(sample))
        if picture:
            name = clean(images.classes[sample.label])
            yield {"name": name, "similarity": f"{similarity[row]:.2f}", "picture": picture}


def list_suspects(subject: Subject, pictures: Pictures) -> dict[str, Any]:
    """Images whose label may be wrong, the least probable labels first."""
    found = subject.suspects
    if found is None:  # these images were trained on, and a model memorises their labels
        by_heart = subject.split in ("train", "all")
        found = [] if by_heart else suspect_labels(subject.data, subject.logits, subject.temperature)
    rows = []
    for path, given, likely, own in itertools.islice(found, SUSPECTS):
        names = {"path": clean(path), "given": clean(given), "likely": clean(likely), "own": percent(own, 2)}
        rows.append({"picture": pictures.file(place(subject.data.root, path)), **names})
    return {"rows": rows, "count": len(found), "judge": subject.judge}


def list_strange(subject: Subject, pictures: Pictures) -> dict[str, Any]:
    """The least familiar of the images."""
    known, scores = subject.classifier.familiarity, subject.scores
    if known is None or scores is None:
        return {}
    found = subject.sureness.unfamiliar if subject.sureness else None
    order = np.argsort(scores, kind="stable")
    strange = order[scores[order] < known.threshold]
    photos = [_photo(subject, row, pictures) for row in strange[:STRANGE].tolist()]
    share = f"{between(found)} of the images" if found else write_count(len(strange), "image")
    return {"words": f"{share} are unfamiliar. {known}.", "photos": [photo for photo in photos if photo["picture"]]}


def tabulate_classes(subject: Subject) -> dict[str, Any]:
    """Every class, or if there are many those with the lowest F1."""
    taken_for: dict[str, str] = {}
    for mistake in subject.evaluation.mistakes:
        taken_for.setdefault(mistake.true, f"{clean(mistake.predicted)} ({mistake.count:,})")
    scores = [score for score in subject.evaluation.scores if score.n or score.predicted]
    rows = [
        {
            "name": clean(score.name),
            "n": score.n,
            "recall": score.recall and between(score.recall),
            "share": score.recall.value if score.recall else -1,
            "bar": score.recall and charts.draw_interval(score.recall),
            "precision": score.precision,
            "f1": score.f1,
            "taken_for": taken_for.get(score.name, ""),
        }
        for score in sorted(scores, key=lambda score: -1.0 if score.f1 is None else score.f1)[:CLASSES]
    ]
    return {"rows": rows, "of": len(scores), "absent": len(subject.evaluation.scores) - len(scores)}


def tell_calibration(subject: Subject) -> dict[str, Any]:
    """The reliability of the confidence, and label sets."""
    before, after = subject.evaluation.before, subject.evaluation.after
    bins = len(after.counts)
    rows = [
        (f"{place / bins:.0%} to {(place + 1) / bins:.0%}", f"{count:,}", percent(sure), percent(accuracy))
        for place, (count, sure, accuracy) in enumerate(
            zip(after.counts, after.confidence, after.accuracy, strict=True)
        )
        if count
    ]
    fitted = before.temperature != after.temperature
    words = next(describe_confidence(subject.evaluation, subject.calibration, subject.calibrated_on))
    sets = [f"{each}." for each in (subject.sureness.sets if subject.sureness else ())]
    return {
        "svg": charts.draw_reliability(before, after),
        "rows": rows,
        "words": words,
        "fitted": fitted,
        "sets": sets,
    }


def count_network(subject: Subject) -> list[tuple[str, str]]:
    """The network's sizes, and its backend."""
    spec, price = subject.classifier.spec, cost(subject.classifier.spec)
    rows = [
        ("network", f"{clean(spec.name)} at {subject.classifier.input.size} px"),
        ("multiply-adds per image", console.millions(price.macs)),
        ("parameters", console.millions(price.params)),
        ("weights in fp32", console.size(4 * price.params)),
    ]
    if subject.classifier.selection is not None:
        rows.append(("run here by", str(subject.classifier.selection)))
    return rows


def split_rows(subject: Subject) -> list[tuple[str, str]]:
    """Number and share of the images of each split."""
    total = sum(subject.splits.values())
    return [(name, f"{count:,} ({percent(count / total)})") for name, count in subject.splits.items() if count]


def accuracy_of(figure: Any) -> Interval | None:
    """An interval from fit.json."""
    return None if figure is None else Interval(*(float(figure[name]) for name in ("value", "low", "high")))


def _photo(subject: Subject, row: int, pictures: Pictures, side: int = 0) -> dict[str, Any]:
    sample = subject.data.samples[row]
    classes, file = subject.data.classes, subject.data.file(sample)
    return {
        "true": clean(classes[sample.label]),
        "predicted": clean(classes[int(subject.predicted[row])]),
        "confidence": percent(float(subject.confidence[row])),
        "path": clean(sample.path),
        "picture": pictures.file(file, side) if side else pictures.file(file),
    }
