"""What a report is about: a model, what it made of images with known classes, and where all of that came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from effnet.arch.cost import cost
from effnet.arch.spec import Calibration
from effnet.data.dataset import Dataset
from effnet.errors import ArgumentError
from effnet.metrics.calibration import confidence
from effnet.metrics.evaluate import Evaluation, predict_logits
from effnet.metrics.familiarity import spread_classes
from effnet.metrics.intervals import Labels, row_blocks
from effnet.metrics.sureness import Sureness
from effnet.plots.evaluation import worst_mistakes
from effnet.progress import SILENT, Progress
from effnet.runtime.classifier import Classifier
from effnet.runtime.prediction import probabilities
from effnet.runtime.session import Logits, Pixels

SURE = 0.9  # confidence in another label from which the given one is suspected
# What the features of training images may cost where they have to be computed: images, and multiply-adds of all.
MOST_IMAGES, MOST_MACS = 2000, 100e9


class Suspect(NamedTuple):
    """An image whose label may be wrong; a plain tuple of the four will do."""

    path: str  # from the data's root, or absolute
    given: str
    likely: str
    self_confidence: float  # the probability of the given label


class Neighbours(NamedTuple):
    """Training images among which those nearest to a mistake are looked for."""

    images: Dataset  # M
    features: NDArray[np.floating[Any]]  # (M, C), pooled


@dataclass(frozen=True, eq=False)
class Subject:
    """All that a page tells; what is empty or None is left out of it."""

    name: str  # of the model, for people
    source: str  # the name of the data, for people
    data: Dataset  # the N evaluated images, labelled in the order of the outputs
    split: str  # train, val, test, new or all
    logits: Logits  # (N, K), raw
    evaluation: Evaluation
    classifier: Classifier  # the model, for maps of where it looked
    calibration: Calibration | None = None
    calibrated_on: str = ""  # these images, in words
    sureness: Sureness | None = None
    scores: NDArray[np.float64] | None = None  # (N,), how familiar; the classifier knows the threshold
    neighbours: Neighbours | None = None
    suspects: Sequence[tuple[str, str, str, float]] | None = None  # None: of the evaluated images; see suspect_labels
    judge: str = "the model itself, which was not trained on these images"  # who suspects the labels
    history: Sequence[Mapping[str, Any]] = ()  # rows of a run's results.csv
    splits: Mapping[str, int] = field(default_factory=dict)  # images of each split
    notes: Sequence[str] = ()  # sentences about the data
    commands: Sequence[tuple[str, str]] = ()  # what each does, and the command
    facts: Mapping[str, str] = field(default_factory=dict)  # seed, versions, machine, seconds, in words
    fit: Mapping[str, Any] | None = None  # what fit.json holds

    def __post_init__(self) -> None:
        if len(self.logits) != len(self.data):
            raise ArgumentError("logits", f"{len(self.logits)} images", f"must be of the data's {len(self.data)}.")

    @property
    def title(self) -> str:
        """The heading."""
        return f"{self.name} on {self.source}"

    @property
    def temperature(self) -> float:
        """By which the logits are divided."""
        return self.evaluation.after.temperature

    @cached_property
    def labels(self) -> Labels:
        """The true class of each image, (N,)."""
        return np.array([sample.label for sample in self.data.samples], np.int64)

    @cached_property
    def predicted(self) -> Labels:
        """The most probable class of each image, (N,)."""
        return np.asarray(self.logits.argmax(1), np.int64)

    @cached_property
    def confidence(self) -> NDArray[np.float64]:
        """The calibrated probability of that class, (N,)."""
        return confidence(self.logits, self.temperature)

    @cached_property
    def mistakes(self) -> list[int]:
        """The images that were predicted wrong, the most confident first."""
        return worst_mistakes(self.data, self.predicted, self.confidence)


def suspect_labels(data: Dataset, logits: Logits, temperature: float) -> list[Suspect]:
    """Images that a model takes for another class with a confidence of SURE, the least probable labels first.

    Args:
        data: N images that the model was not trained on.
        logits: (N, K), raw.
        temperature: by which they are divided.
    """
    labels, found = np.array([sample.label for sample in data.samples], np.int64), list[Suspect]()
    for rows in row_blocks(logits):
        chances, given = probabilities(logits[rows], temperature), labels[rows]
        own, best = np.take_along_axis(chances, given[:, None], 1)[:, 0], chances.argmax(1)
        for i in np.flatnonzero((best != given) & (chances.max(1) >= SURE)):
            path = data.samples[rows.start + int(i)].path
            found.append(Suspect(path, data.classes[given[i]], data.classes[best[i]], float(own[i])))
    return sorted(found, key=lambda each: each.self_confidence)


def find_neighbours(classifier: Classifier, train: Dataset, progress: Progress = SILENT) -> Neighbours | None:
    """The features of training images, spread over the classes; None where MOST_MACS are not one of each class.

    Args:
        classifier: the model.
        train: the images that it was trained on, labelled in the order of its outputs.
        progress: counts images.
    """
    count = min(MOST_IMAGES, int(MOST_MACS / cost(classifier.spec).macs))
    if count < len(train.classes) or not len(train):
        return None
    chosen = spread_classes(np.array([sample.label for sample in train.samples]), count)
    some = dataclasses.replace(train, samples=tuple(train.samples[row] for row in chosen))
    features: list[NDArray[np.floating[Any]]] = []

    def keep(pixels: Pixels) -> Logits:
        logits, maps = classifier.maps(pixels)
        features.append(maps.mean((2, 3)))
        return logits

    task = "features of training images"
    found = predict_logits(keep, classifier.input, some, batch=classifier.group, progress=progress, task=task)
    return Neighbours(found.readable(some), np.concatenate(features)) if features else None
