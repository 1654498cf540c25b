"""The subject of a report: a model, its predictions for labelled images, and the origin of both."""

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

SURE = 0.9  # from this confidence in another class, a label is suspected
# Limits for computing the features of training images: number of images, and multiply-adds of all.
MOST_IMAGES, MOST_MACS = 2000, 100e9


class Suspect(NamedTuple):
    """An image whose label may be wrong; a plain tuple of the four works as well."""

    path: str  # from the data's root, or absolute
    given: str
    likely: str
    self_confidence: float  # the probability of the given label


class Neighbours(NamedTuple):
    """Training images to search for those nearest to a mistake."""

    images: Dataset  # M
    features: NDArray[np.floating[Any]]  # (M, C), pooled


@dataclass(frozen=True, eq=False)
class Subject:
    """Everything that a page shows; parts that are empty or None are left out."""

    name: str  # display name of the model
    source: str  # display name of the data
    data: Dataset  # the N evaluated images, labelled in the order of the outputs
    split: str  # train, val, test, new or all
    logits: Logits  # (N, K), raw
    evaluation: Evaluation
    classifier: Classifier  # for activation maps
    calibration: Calibration | None = None
    calibrated_on: str = ""  # description of these images
    sureness: Sureness | None = None
    scores: NDArray[np.float64] | None = None  # (N,), familiarity; the classifier has the threshold
    neighbours: Neighbours | None = None
    suspects: Sequence[tuple[str, str, str, float]] | None = None  # None: by suspect_labels, of the evaluated images
    judge: str = "the model itself, which was not trained on these images"  # who suspects the labels
    history: Sequence[Mapping[str, Any]] = ()  # rows of a run's results.csv
    splits: Mapping[str, int] = field(default_factory=dict)  # number of images per split
    notes: Sequence[str] = ()  # sentences about the data
    commands: Sequence[tuple[str, str]] = ()  # title and command
    facts: Mapping[str, str] = field(default_factory=dict)  # seed, versions, machine, seconds, as text
    fit: Mapping[str, Any] | None = None  # the contents of fit.json

    def __post_init__(self) -> None:
        if len(self.logits) != len(self.data):
            raise ArgumentError("logits", f"{len(self.logits)} images", f"must be of the data's {len(self.data)}.")

    @property
    def title(self) -> str:
        """The heading."""
        return f"{self.name} on {self.source}"

    @property
    def temperature(self) -> float:
        """The divisor of the logits."""
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
        """Indices of the wrong predictions, the most confident first."""
        return worst_mistakes(self.data, self.predicted, self.confidence)


def suspect_labels(data: Dataset, logits: Logits, temperature: float) -> list[Suspect]:
    """Images for which a model predicts another class with a confidence of SURE, the least probable labels first.

    Args:
        data: N images that the model was not trained on.
        logits: (N, K), raw.
        temperature: the divisor of the logits.
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
    """Features of training images, spread over the classes; None if MOST_MACS does not allow one per class.

    Args:
        classifier: the model.
        train: its training images, labelled in the order of its outputs.
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
