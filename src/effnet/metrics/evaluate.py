"""A model's figures on labelled images, with intervals. numpy only, for the logits of any engine.

    top-1, top-5   share of the images whose class is the most probable one, or among the top five; Wilson's interval
    macro F1       mean of 2 right / (images + predictions) over the classes that have images; a bootstrap interval
    recall         share of a class's images that are predicted as it; Wilson's interval
    precision      share of the predictions of a class that are right; undefined if it is never predicted
    calibration    see calibration.py

A class without images in the evaluated split has neither recall nor F1 and is left out of the mean; predicting it
lowers the recall of the true class. Accuracy and precision hold for the class frequencies of that split, which may
differ in deployment.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from effnet.arch.spec import InputSpec
from effnet.data.dataset import Dataset, Sample
from effnet.data.image import load_pixels
from effnet.data.paths import read_ahead
from effnet.errors import ArgumentError, CheckpointError, ImageError
from effnet.fields import positive_int
from effnet.files import write_file
from effnet.metrics.calibration import Abstention, Reliability, apply_threshold, reliability
from effnet.metrics.intervals import CONFIDENCE, Interval, Labels, check_arrays, row_blocks, wilson
from effnet.progress import SILENT, Progress
from effnet.runtime.session import Logits

TOP = 5
RESAMPLES, DRAWN = 1000, 100  # bootstrap samples, and how many are drawn at a time


class Predicted(NamedTuple):
    """Logits and labels of the readable images, in order, and the errors of the others."""

    logits: NDArray[np.float32]  # (N, K), raw
    labels: Labels  # (N,)
    unreadable: dict[str, str]  # reason by path

    def readable(self, dataset: Dataset) -> Dataset:
        """Those images of `dataset`."""
        samples = tuple(sample for sample in dataset.samples if sample.path not in self.unreadable)
        return dataclasses.replace(dataset, samples=samples)


@dataclass(frozen=True)
class Mistake:
    """How often images of class `true` were predicted as `predicted`."""

    true: str
    predicted: str
    count: int


@dataclass(frozen=True)
class ClassScore:
    """The predictions of one class."""

    name: str
    n: int  # its images
    predicted: int  # images predicted as it
    right: int

    @property
    def precision(self) -> float | None:
        """Share of its predictions that are right; None without any."""
        return self.right / self.predicted if self.predicted else None

    @property
    def recall(self) -> Interval | None:
        """Share of its images that were predicted as it; None without any."""
        return wilson(self.right, self.n) if self.n else None

    @property
    def f1(self) -> float | None:
        """Harmonic mean of the two, 0 if nothing is right; None without images."""
        return 2 * self.right / (self.n + self.predicted) if self.n else None

    def to_dict(self) -> dict[str, Any]:
        """The class as plain values."""
        recall = self.recall and asdict(self.recall)
        return {"class": self.name, "n": self.n, "precision": self.precision, "recall": recall, "f1": self.f1}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A model's figures on n images."""

    classes: tuple[str, ...]
    pairs: NDArray[np.int64]  # (D, 3): a true class, a predicted one, and the images; only pairs that occur, in order
    top1: Interval
    top5: Interval | None  # None for five or fewer classes, for which it is 1 by definition
    macro_f1: Interval
    before: Reliability  # at temperature 1
    after: Reliability  # at the given temperature
    abstention: Abstention | None = None  # None without a threshold

    @property
    def n(self) -> int:
        """Number of images."""
        return int(self.pairs[:, 2].sum())

    @property
    def confusion(self) -> NDArray[np.int64]:
        """The confusion matrix (K, K): images of class i predicted as j; 3.5 GB for 21,000 classes."""
        matrix = np.zeros((len(self.classes), len(self.classes)), np.int64)
        matrix[self.pairs[:, 0], self.pairs[:, 1]] = self.pairs[:, 2]
        return matrix

    @property
    def reliability_curves(self) -> dict[str, tuple[Sequence[int], Sequence[float], Sequence[float]]]:
        """For `draw_reliability`: counts, confidence and accuracy of the bins before and after the temperature."""
        titles = {f"uncalibrated: ECE {self.before.ece:.1%}": self.before}
        if self.after.temperature != self.before.temperature:
            titles[f"divided by T = {self.after.temperature:.3g}: ECE {self.after.ece:.1%}"] = self.after
        return {title: (bins.counts, bins.confidence, bins.accuracy) for title, bins in titles.items()}

    @cached_property
    def scores(self) -> tuple[ClassScore, ...]:
        """Every class, in order."""
        true, predicted, counts = self.pairs.T
        columns = np.zeros((3, len(self.classes)), np.int64)  # images, predictions, and those that are right
        for column, classes, some in zip(columns, (true, predicted, true), (..., ..., true == predicted), strict=True):
            np.add.at(column, classes[some], counts[some])
        return tuple(ClassScore(*row) for row in zip(self.classes, *columns.tolist(), strict=True))

    @cached_property
    def mistakes(self) -> tuple[Mistake, ...]:
        """Confused pairs of classes, the most frequent first."""
        wrong = self.pairs[self.pairs[:, 0] != self.pairs[:, 1]]
        order = np.argsort(-wrong[:, 2], kind="stable")
        return tuple(Mistake(self.classes[i], self.classes[j], count) for i, j, count in wrong[order].tolist())

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values; `mistakes` and the classes' `n` are the whole confusion matrix."""
        return {
            "n": self.n,
            "top1": asdict(self.top1),
            "top5": asdict(self.top5 or Interval(1.0, 1.0, 1.0)),
            "macro_f1": asdict(self.macro_f1),
            "loss": self.before.loss,
            "loss_calibrated": self.after.loss,
            "brier": self.before.brier,
            "brier_calibrated": self.after.brier,
            "ece": self.before.ece,
            "ece_calibrated": self.after.ece,
            "temperature": self.after.temperature,
            "threshold": self.abstention and self.abstention.threshold,
            "abstention": self.abstention and asdict(self.abstention),
            "classes": [score.to_dict() for score in self.scores],
            "mistakes": [asdict(mistake) for mistake in self.mistakes],
        }


def evaluate(
    logits: Logits,
    labels: Sequence[int] | Labels,
    classes: Sequence[str],
    *,
    temperature: float = 1.0,
    threshold: float | None = None,
    seed: int = 0,
) -> Evaluation:
    """Evaluate a model's outputs for images whose classes are known.

    Args:
        logits: (N, K) raw outputs.
        labels: (N,) whole numbers from 0 to K - 1.
        classes: the names of the K outputs.
        temperature: from `fit_temperature`, fitted on other images; 1 for none.
        threshold: from `abstain`, the confidence at that temperature below which the model abstains.
        seed: for the bootstrap of macro F1.

    Raises:
        ArgumentError: see `check_arrays`.
    """
    outputs, truth = check_arrays(logits, labels)
    n, k = outputs.shape
    if len(classes) != k:
        raise ArgumentError("classes", f"{len(classes)} names", f"must name the {k} outputs.")
    predicted = outputs.argmax(1)
    keys, counts = np.unique(truth * k + predicted, return_counts=True)
    pairs = np.stack((*np.divmod(keys, k), counts), axis=1)
    before = reliability(outputs, truth)
    top1 = wilson(int((predicted == truth).sum()), n)
    return Evaluation(
        tuple(classes),
        pairs,
        top1,
        wilson(int((_ranks(outputs, truth) < TOP).sum()), n) if k > TOP else None,
        _macro_f1(pairs, k, top1, seed),
        before,
        before if temperature == 1 else reliability(outputs, truth, temperature),
        None if threshold is None else apply_threshold(outputs, truth, temperature, threshold),
    )


def predict_logits(
    network: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    input_spec: InputSpec,
    dataset: Dataset,
    *,
    batch: int = 16,
    progress: Progress = SILENT,
    task: str = "evaluating",
) -> Predicted:
    """Compute the logits of every readable image; threads decode photos ahead of the network.

    Args:
        network: from pixels (N, size, size, C) to raw outputs (N, K): a session, or the `logits` of a Classifier.
        input_spec: how images are prepared.
        dataset: the images, with their labels in the order of the outputs (`match_classes`).
        batch: batch size.
        progress, task: counts images, under that name.

    Raises:
        CheckpointError: the outputs are not finite.
        ArgumentError: the network's number of channels is neither 1 nor 3.
    """

    def read(sample: Sample) -> NDArray[np.uint8]:
        return load_pixels(dataset.file(sample), input_spec)

    batch = positive_int("batch", batch)
    reading = read_ahead(dataset.samples, read, window=2 * batch)
    logits = np.empty((0, len(dataset.classes)), np.float32)
    labels: list[int] = []
    unreadable: dict[str, str] = {}
    while group := list(itertools.islice(reading, batch)):
        unreadable |= {sample.path: str(found) for sample, found in group if isinstance(found, ImageError)}
        labels += [sample.label for sample, found in group if not isinstance(found, ImageError)]
        if pixels := [found for _, found in group if not isinstance(found, ImageError)]:
            outputs = network(np.stack(pixels))
            if not np.isfinite(outputs).all():
                raise CheckpointError("the network's outputs are not finite numbers: its weights are damaged")
            if not len(logits):
                logits = np.empty((len(dataset), outputs.shape[1]), np.float32)
            logits[len(labels) - len(pixels) : len(labels)] = outputs
        progress.update(task, len(labels) + len(unreadable), len(dataset))
    return Predicted(logits[: len(labels)], np.array(labels, np.int64), unreadable)


def write_per_class(evaluation: Evaluation, out: Path) -> None:
    """Write a CSV line per class; undefined figures are empty."""
    rows: list[tuple[object, ...]] = [
        ("class", "images", "predicted", "precision", "recall", "recall_low", "recall_high", "f1")
    ]
    for score in evaluation.scores:
        recall = astuple(score.recall) if score.recall else ("", "", "")
        rows.append((score.name, score.n, score.predicted, score.precision, *recall, score.f1))
    with write_file(out) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _ranks(logits: Logits, truth: Labels) -> NDArray[np.int64]:
    """The number of classes that rank above the true one; ties go to the first, as in argmax."""
    ranks, outputs = np.empty(len(logits), np.int64), np.arange(logits.shape[1])
    for rows in row_blocks(logits):
        some, label = logits[rows], truth[rows, None]
        true = np.take_along_axis(some, label, 1)
        ranks[rows] = ((some > true) | ((some == true) & (outputs < label))).sum(1)
    return ranks


def _macro_f1(pairs: NDArray[np.int64], k: int, top1: Interval, seed: int) -> Interval:
    """Macro F1 with a bootstrap interval.

    Each of RESAMPLES samples draws n of the n images with replacement, whatever their class; a class that was not drawn
    is left out of that sample's mean. The interval is symmetric, and reaches to the farther of the 2.5 % and 97.5 %
    percentiles, since both are too low with few images of a class. If all images are right, or all wrong, every sample
    is the same, and the interval of top-1 is used instead.
    """
    true, predicted, counts = pairs.T
    value = float(_mean_f1(counts[None], true, predicted, k)[0])
    if top1.value in (0, 1):
        return top1
    random, chances = np.random.default_rng(seed), counts / counts.sum()
    drawn = (random.multinomial(counts.sum(), chances, DRAWN) for _ in range(RESAMPLES // DRAWN))
    means = np.concatenate([_mean_f1(some, true, predicted, k) for some in drawn])
    low, high = np.quantile(means, (0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2)).tolist()
    reach = max(value - low, high - value)
    return Interval(value, max(0.0, value - reach), min(1.0, value + reach))


def _mean_f1(
    counts: NDArray[np.int64], true: NDArray[np.int64], predicted: NDArray[np.int64], k: int
) -> NDArray[np.float64]:
    """Macro F1 of each row of counts (B, D); column d counts images of class true[d] predicted as predicted[d]."""
    images, answers, right = _sums(counts, true, k), _sums(counts, predicted, k), np.zeros((len(counts), k))
    right[:, true[true == predicted]] = counts[:, true == predicted]
    f1 = np.divide(2 * right, images + answers, out=np.zeros_like(right), where=images > 0)
    means: NDArray[np.float64] = f1.sum(1) / (images > 0).sum(1)
    return means


def _sums(counts: NDArray[np.int64], groups: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """The columns of counts (B, D) summed by group, of k groups: (B, k)."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    sums = np.zeros((len(counts), k), np.int64)
    sums[:, groups[order][starts]] = np.add.reduceat(counts[:, order], starts, axis=1)
    return sums
