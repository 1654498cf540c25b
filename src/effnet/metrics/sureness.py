"""How well a model knows its limits, measured on labelled images: abstaining, label sets, familiarity.

    coverage against accuracy   accuracy of the most confident answers, for every threshold
    label sets                  share with the true label; see conformal.py
    unfamiliar                  share of images judged unlike the training images; 5 % of images like those

All with Wilson's intervals. Measure label sets and the threshold of familiar images only on images other than those
that they were calibrated on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effnet.metrics.calibration import confidence
from effnet.metrics.conformal import Covered, measure_sets
from effnet.metrics.intervals import Interval, Labels, check_arrays, wilson
from effnet.runtime.session import Logits
from effnet.weights.sureness import Familiarity, LabelSets, least_images

SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)  # of the images, the most confident ones
COVERAGES = (0.9, 0.95)  # of label sets, if calibrated for them


@dataclass(frozen=True)
class Answered:
    """The most confident answers."""

    share: float  # of the images
    least: float  # confidence of the least confident of them
    accuracy: Interval


@dataclass(frozen=True)
class Sureness:
    """A model's figures; empty or None if not available."""

    curve: tuple[Answered, ...]  # from all images down
    sets: tuple[Covered, ...] = ()
    unfamiliar: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values."""
        return asdict(self)


def measure_sureness(
    logits: Logits,
    labels: Sequence[int] | Labels,
    temperature: float = 1.0,
    *,
    sets: LabelSets | None = None,
    told: tuple[Familiarity, NDArray[np.float64]] | None = None,
) -> Sureness:
    """The figures of a model on n images.

    Args:
        logits: (N, K), raw.
        labels: (N,).
        temperature: the logits are divided by it.
        sets: label sets, which are measured at COVERAGES.
        told: the detector of unfamiliar images, and its scores (N,).

    Raises:
        ArgumentError: the arrays do not match.
    """
    outputs, truth = check_arrays(logits, labels)
    sure, right = confidence(outputs, temperature), outputs.argmax(1) == truth
    order, curve = np.argsort(-sure, kind="stable"), []
    for share in SHARES:
        answered = order[: math.ceil(share * len(order) - 1e-9)]
        found = wilson(int(right[answered].sum()), len(answered))
        curve.append(Answered(len(answered) / len(order), float(sure[answered[-1]]), found))
    coverages = [each for each in COVERAGES if sets is not None and sets.n >= least_images(round(100 * each))]
    covered = tuple(measure_sets(outputs, truth, temperature, sets, each) for each in coverages if sets is not None)
    unfamiliar = None
    if told is not None:
        known, scores = told
        unfamiliar = wilson(int((scores < known.threshold).sum()), len(scores))
    return Sureness(tuple(curve), covered, unfamiliar)
