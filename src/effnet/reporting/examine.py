"""Evaluates a model on labelled images, with every figure that a report shows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from effnet.data.dataset import Dataset
from effnet.errors import DataError
from effnet.metrics.evaluate import evaluate, predict_logits
from effnet.metrics.sureness import measure_sureness
from effnet.progress import SILENT, Progress
from effnet.reporting.subject import Subject, find_neighbours
from effnet.runtime.classifier import Classifier
from effnet.runtime.session import Logits, Pixels


def examine(
    classifier: Classifier,
    images: Dataset,
    split: str,
    *,
    name: str,
    train: Dataset | None = None,
    progress: Progress = SILENT,
) -> Subject:
    """Run a model on labelled images, and measure everything that a report shows.

    Args:
        classifier: the model, with its own calibration.
        images: labelled in the order of its outputs.
        split: the split of these images: test, val ... Label sets and familiarity are fitted on val, so they are
            measured only on other splits.
        name: display name of the model.
        train: its training images, labelled likewise; the report shows those nearest to mistakes.
        progress: counts images.

    Raises:
        DataError: none of the images can be read.
    """
    scores: list[NDArray[np.float64] | None] = []

    def keep(pixels: Pixels) -> Logits:
        logits, familiarity = classifier.answer(pixels)
        scores.append(familiarity)
        return logits

    batch, task = classifier.group, f"{split} images"
    found = predict_logits(keep, classifier.input, images, batch=batch, progress=progress, task=task)
    if not len(found.labels):
        raise DataError(f"none of the {len(images):,} images of {images} can be read")
    own, known = classifier.calibration, classifier.familiarity
    temperature, threshold = (own.temperature, own.threshold) if own else (1.0, None)
    logits, labels, unreadable = found
    familiarity = (
        np.concatenate([each for each in scores if each is not None]) if known and scores[0] is not None else None
    )
    sureness = measure_sureness(logits, labels, temperature)
    if split not in ("train", "val"):
        told = None if known is None or familiarity is None else (known, familiarity)
        sureness = measure_sureness(logits, labels, temperature, sets=classifier.sets, told=told)
    notes = [f"{len(unreadable):,} of these images cannot be read and do not count."] if unreadable else []
    return Subject(
        name=name,
        source=images.root.name,
        data=found.readable(images),
        split=split,
        logits=logits,
        evaluation=evaluate(logits, labels, images.classes, temperature=temperature, threshold=threshold),
        classifier=classifier,
        calibration=own,
        calibrated_on=f"the {own.n:,} {own.split} images of the run that trained it" if own else "",
        sureness=sureness,
        scores=familiarity,
        neighbours=None if train is None else find_neighbours(classifier, train, progress),
        notes=notes,
    )
