"""Labels that are probably wrong, because linear classifiers on a network's features find them improbable. No torch.

    1  a network with weights, which is not trained, computes the features of every image once
    2  five classifiers, each fitted to four fifths of the images, judge the rest (metrics/linear_probe.py); copies and
       groups stay in one fold, because a copy in another fold would give the label away
    3  estimate how many labels are wrong, and the probability for each of them (metrics/label_noise.py)

A label is a suspect if its probability of being wrong is at least LISTED; the least probable labels come first.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from effnet.arch.variants import spec as make_spec
from effnet.data.dataset import COLUMNS, Dataset, path_from
from effnet.data.duplicates import Duplicates, connect, find_duplicates
from effnet.data.fingerprint import Fingerprint
from effnet.data.image import natural_resolution
from effnet.errors import ArgumentError, RefusedError
from effnet.fields import positive_int
from effnet.files import csv_text, write_text
from effnet.metrics.evaluate import Predicted, predict_logits
from effnet.metrics.intervals import Interval, Labels, wilson
from effnet.metrics.label_noise import LabelNoise, fit_label_noise
from effnet.metrics.linear_probe import Features, assign_folds, choose_penalty, out_of_fold
from effnet.progress import SILENT, Progress
from effnet.runtime.artifact import Artifact, Model
from effnet.runtime.load import read_model
from effnet.runtime.select import open_session
from effnet.runtime.session import Logits, Pixels

LISTED = 0.05  # one in twenty of the last suspects is wrong, and nearly all of the first
LEFT_OUT = 0.5  # labels that are more likely wrong than right are left out
BATCH = 16  # images read and run together, or the engine's own batch if it is larger
ENLARGED = 4  # most times that small images are enlarged if the network's own resolution would need more
REVIEWED = ("likely", "self_confidence", "wrong")  # columns of a review besides those of a manifest


@dataclass(frozen=True)
class SuspectLabel:
    """An image whose label is probably wrong."""

    path: str  # as in the data set
    given: str
    likely: str  # the most probable other class
    self_confidence: float  # the given label's probability, from a classifier that was not trained on it
    wrong: float  # the probability that it is wrong


@dataclass(frozen=True)
class LabelErrors:
    """The labels of a data set, judged by classifiers that were not trained on them."""

    model: str
    resolution: int  # at which the network saw the images
    judged: int  # images
    not_judged: int  # unreadable, or no other fold has an image of their class
    accuracy: Interval  # share of the labels that the classifiers would have given
    penalty: float  # of the classifiers
    noise: LabelNoise
    suspects: tuple[SuspectLabel, ...]  # lowest self-confidence first

    @property
    def expected(self) -> float:
        """How many of the suspects are wrong: the sum of their probabilities."""
        return sum(suspect.wrong for suspect in self.suspects)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return dataclasses.asdict(self) | {"expected": self.expected}


class JudgedLabels(NamedTuple):
    """N labels, each judged by a classifier that was not trained on it."""

    rows: NDArray[np.bool_]  # (N,): which ones could be judged; other values are meaningless
    self_confidence: NDArray[np.float64]  # (N,)
    wrong: NDArray[np.float64]  # (N,): the probability
    likely: Labels  # (N,): the most probable other class
    agrees: NDArray[np.bool_]  # (N,): whether the label is the most probable class
    noise: LabelNoise
    penalty: float


def find_label_errors(
    dataset: Dataset,
    model: str | Path | Model = "lite0",
    *,
    resolution: int | None = None,
    duplicates: Duplicates | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> LabelErrors:
    """Judge the label of every image, all splits together.

    It takes as long as predicting every image once, and 5 KB of memory per image with Lite0.

    Args:
        dataset: the images.
        model: the model that computes the features, as for effnet.load.
        resolution: in pixels; None: the model's own, or ENLARGED times the images' shorter side if that is less.
        duplicates: the data set's, if they are known.
        seed: of the folds.
        progress: follows the images and the folds.

    Raises:
        RefusedError: fewer than two classes have images in two folds.
        ArgumentError: `resolution` is not the artifact's, or `duplicates` are for another data set.
        The errors of effnet.load.
    """
    opened = read_model(model, progress=progress) if isinstance(model, (str, Path)) else model
    found = duplicates or find_duplicates([dataset.file(sample) for sample in dataset.samples], progress=progress)
    if found.files != tuple(dataset.file(sample) for sample in dataset.samples):
        raise ArgumentError("duplicates", f"of {len(found.files)} files", "are for another data set; find this one's.")
    opened = _resize(opened, resolution, found)
    seen = _see(dataset, opened, progress)
    group_of = dict(zip((sample.path for sample in dataset.samples), _groups(dataset, found), strict=True))
    images, classes = seen.readable(dataset).samples, dataset.classes
    groups = [group_of[image.path] for image in images]
    judged = judge_labels(seen.logits, seen.labels, len(classes), groups, seed=seed, progress=progress)
    rows, own = np.flatnonzero(judged.rows & (judged.wrong >= LISTED)), judged.self_confidence
    suspects = (
        SuspectLabel(
            images[row].path, classes[images[row].label], classes[likely], float(own[row]), float(judged.wrong[row])
        )
        for row, likely in ((row, judged.likely[row]) for row in rows[np.argsort(own[rows], kind="stable")])
    )
    count = int(judged.rows.sum())
    accuracy = wilson(int(judged.agrees[judged.rows].sum()), count)
    name = str(model) if isinstance(model, (str, Path)) else model.config.spec.name
    size, rest = opened.config.input.size, len(dataset) - count
    return LabelErrors(name, size, count, rest, accuracy, judged.penalty, judged.noise, tuple(suspects))


def judge_labels(
    features: Features,
    labels: Labels,
    classes: int,
    groups: Sequence[object],
    *,
    seed: int = 0,
    progress: Progress = SILENT,
) -> JudgedLabels:
    """Judge labels (N,) by features (N, C); images of a group stay in one fold. Errors: see `find_label_errors`."""
    folds = assign_folds(labels, groups, seed=seed)
    counts = np.zeros((classes, int(folds.max(initial=0)) + 1), np.int64)
    np.add.at(counts, (labels, folds), 1)
    rows = counts[labels].sum(1) > counts[labels, folds]
    present = np.unique(labels[rows])
    if len(present) < 2:
        raise RefusedError("labels can be judged only if at least two classes have images that are not all copies")
    penalty = choose_penalty(features, labels, classes, folds)
    logits = out_of_fold(features, labels, classes, folds, penalty, progress=progress)
    noise = fit_label_noise(logits[rows], labels[rows], len(present))
    own = noise.self_confidence(logits, labels)
    agrees = logits.argmax(1) == labels
    logits[np.arange(len(labels)), labels] = -np.inf
    return JudgedLabels(rows, own, noise.wrong(own, len(present)), logits.argmax(1), agrees, noise, penalty)


def without_suspects(dataset: Dataset, errors: LabelErrors) -> Dataset:
    """The data set without images whose label is more likely wrong than right (LEFT_OUT)."""
    left_out = {suspect.path for suspect in errors.suspects if suspect.wrong >= LEFT_OUT}
    return dataclasses.replace(dataset, samples=tuple(s for s in dataset.samples if s.path not in left_out))


def write_review(dataset: Dataset, errors: LabelErrors, path: Path) -> None:
    """Write a manifest of all images, the suspects first, with the likely label beside the given one."""
    samples = {sample.path: sample for sample in dataset.samples}
    found = {each.path: (each.likely, f"{each.self_confidence:.2g}", f"{each.wrong:.2f}") for each in errors.suspects}
    rows: list[tuple[object, ...]] = [(*COLUMNS, *REVIEWED)]
    for name in (*found, *sorted(samples.keys() - found.keys())):
        sample = samples[name]
        place = path_from(path.parent, dataset.file(sample))
        rows.append((place, dataset.classes[sample.label], sample.split, sample.group, *found.get(name, ("", "", ""))))
    write_text(path, csv_text(rows))


def _resize(model: Model, resolution: int | None, found: Duplicates) -> Model:
    """The model at the resolution for these images."""
    config = model.config
    own = config.input.size
    if isinstance(model, Artifact):
        if resolution not in (None, own):
            raise ArgumentError("resolution", resolution, f"cannot be chosen: {model.path} was exported for {own}.")
        return model
    sides = [min(each.width, each.height) for each in found.fingerprints if isinstance(each, Fingerprint)]
    side = round(statistics.median(sides)) if sides else own
    size = (
        min(own, natural_resolution(ENLARGED * side)) if resolution is None else positive_int("resolution", resolution)
    )
    if size == own:
        return model
    config = dataclasses.replace(
        config, spec=make_spec(config.spec, resolution=size), input=config.input.at(size, side)
    )
    return dataclasses.replace(model, config=config)


def _see(dataset: Dataset, model: Model, progress: Progress) -> Predicted:
    """The input of the model's classifier for every image: features (N, C) in place of logits."""
    with open_session(model) as session:

        def run(pixels: Pixels) -> Logits:
            features: Logits = session.maps(pixels)[1].mean((2, 3))
            return features

        batch, task = session.batch * max(1, BATCH // session.batch), "features of images"
        return predict_logits(run, model.config.input, dataset, batch=batch, progress=progress, task=task)


def _groups(dataset: Dataset, found: Duplicates) -> list[int]:
    """For each image, the first one that must be in the same fold: a copy, or one of its group."""
    first: dict[object, int] = {}
    links = []
    for index, (sample, group) in enumerate(zip(dataset.samples, found.groups, strict=True)):
        links += [(index, first.setdefault(name, index)) for name in (group, sample.group) if name != ""]
    return connect(len(dataset), links)
