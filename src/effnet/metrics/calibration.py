"""Calibration: the gap between confidence and accuracy, the temperature that corrects it, the abstention threshold.

The confidence is the largest probability. Temperature scaling (Guo et al. 2017) divides the logits by one number,
which changes the confidence but not the predictions. Temperature and threshold are fitted on a validation split, never
on the images of the final figures.

The threshold's guarantee: with 95 % confidence over the draw of the validation images, at most `error` of the
predictions at or above it are wrong on images of the same population. The most confident images are tested, from a
third of them up to all, each share by its exact binomial tail, until the first share fails. The sequence is fixed in
advance, so no correction for multiple tests is needed. Choosing the best of all thresholds would break the guarantee;
starting with fewer images would let a single wrong label among the most confident stop the sequence.

Logits are raw, (N, K), and labels (N,) whole numbers; mismatched arrays raise an ArgumentError.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from effnet.arch.spec import Calibration
from effnet.errors import ArgumentError
from effnet.metrics.intervals import CONFIDENCE, Interval, Labels, binomial_tail, check_arrays, row_blocks, wilson
from effnet.runtime.session import Logits

BINS = 15  # of equal width, as in Guo et al. and torchmetrics
SHARES = 20  # of the images, which `abstain` tests in turn
FIRST, ENOUGH = 1 / 3, 10  # `abstain` starts with this share, or with 10 times the fewest images that can pass if less
FARTHEST = 10.0  # temperatures are between exp(-10) and exp(10)
CLOSE = 1e-6  # precision of the logarithm of the temperature
ROUNDS = 100  # most iterations of Newton's method


@dataclass(frozen=True)
class Reliability:
    """The gap between confidence and accuracy at one temperature."""

    temperature: float
    loss: float  # mean cross-entropy, in nats
    brier: float  # mean squared error of the probabilities, summed over the classes: 0 to 2
    ece: float  # mean distance of confidence from accuracy over the bins; with few images, chance alone puts it above 0
    counts: tuple[int, ...]  # images in each bin of the confidence
    confidence: tuple[float, ...]  # mean of each bin; 0 in an empty one
    accuracy: tuple[float, ...]  # of each bin; 0 in an empty one


@dataclass(frozen=True)
class Abstention:
    """The effect of abstaining below a confidence threshold."""

    threshold: float | None  # None: always abstain
    coverage: Interval  # share of the images that are answered
    error: Interval | None  # share of the answers that are wrong; None without answers


def reliability(logits: Logits, labels: Sequence[int] | Labels, temperature: float = 1.0) -> Reliability:
    """The reliability of logits divided by a temperature, which must be above 0."""
    outputs, truth = check_arrays(logits, labels)
    confidence, loss, brier = (np.empty(len(outputs)) for _ in range(3))
    for rows, scaled in _scale(outputs, temperature):
        powers, true = np.exp(scaled), np.take_along_axis(scaled, truth[rows, None], 1)[:, 0]
        total = powers.sum(1)
        confidence[rows], loss[rows] = 1 / total, np.log(total) - true
        brier[rows] = (powers**2).sum(1) / total**2 - 2 * np.exp(true) / total + 1
    right = outputs.argmax(1) == truth
    bins_of = np.minimum(np.searchsorted(np.linspace(0, 1, BINS + 1), confidence, side="right") - 1, BINS - 1)
    counts = np.bincount(bins_of, minlength=BINS)
    sums = (np.bincount(bins_of, values, BINS) for values in (confidence, right))
    mean, accuracy = (total / np.maximum(counts, 1) for total in sums)
    ece = float((np.abs(mean - accuracy) * counts).sum() / len(outputs))
    bins = tuple(counts.tolist()), tuple(mean.tolist()), tuple(accuracy.tolist())
    return Reliability(float(temperature), float(loss.mean()), float(brier.mean()), ece, *bins)


def confidence(logits: Logits, temperature: float = 1.0) -> NDArray[np.float64]:
    """The largest probability of each image, (N,)."""
    found = np.empty(len(logits))
    for rows, scaled in _scale(logits, temperature):
        found[rows] = 1 / np.exp(scaled).sum(1)
    return found


def fit_temperature(logits: Logits, labels: Sequence[int] | Labels) -> float:
    """The temperature at which the labels of a validation split are most probable.

    Minimises the sum of the cross-entropy and (ln T)^2 / 2. The second term weighs less than one image; without it,
    the temperature would go to 0 if no image is wrong.
    """
    outputs, truth = check_arrays(logits, labels)
    low, high, log_scale = -FARTHEST, FARTHEST, 0.0  # bounds of -ln T; bisect if Newton's method would leave them
    for _ in range(ROUNDS):
        slope, curve = _slope(outputs, truth, log_scale)
        low, high = (low, log_scale) if slope > 0 else (log_scale, high)
        step = log_scale - slope / curve if curve > 0 else math.inf
        last, log_scale = log_scale, step if low <= step <= high else (low + high) / 2
        if abs(log_scale - last) < CLOSE:
            break
    return math.exp(-log_scale)


def abstain(
    logits: Logits, labels: Sequence[int] | Labels, temperature: float = 1.0, error: float = 0.05
) -> Abstention:
    """Choose the confidence below which to abstain; see the module's docstring for the guarantee.

    Returns:
        The threshold and its effect on these images: 0 if abstaining is not needed, None if no threshold gives the
        guarantee (at 5 % it takes at least 59 images).

    Raises:
        ArgumentError: `error` is not between 0 and 1.
    """
    outputs, truth = check_arrays(logits, labels)
    if not 0 < error < 1:
        raise ArgumentError("error", error, "must be a share of the answers: above 0 and below 1.")
    sure = confidence(outputs, temperature)
    order = np.argsort(-sure, kind="stable")
    wrong = np.cumsum(outputs.argmax(1)[order] != truth[order])
    fewest = math.ceil(math.log(1 - CONFIDENCE) / math.log(1 - error))  # images that pass if none of them is wrong
    threshold: float | None = None
    for step in range(1, SHARES + 1):
        value = float(sure[order[math.ceil(len(sure) * step / SHARES) - 1]])
        answered = int((sure >= value).sum())  # ties are answered together
        if answered < max(fewest, min(FIRST * len(sure), ENOUGH * fewest)):
            continue
        if binomial_tail(int(wrong[answered - 1]), answered, error) > 1 - CONFIDENCE:
            break
        threshold = value if answered < len(sure) else 0.0
    return apply_threshold(outputs, truth, temperature, threshold)


def apply_threshold(
    logits: Logits, labels: Sequence[int] | Labels, temperature: float, threshold: float | None
) -> Abstention:
    """The effect of a threshold on these images."""
    outputs, truth = check_arrays(logits, labels)
    given = np.zeros(len(truth), bool) if threshold is None else confidence(outputs, temperature) >= threshold
    answers, wrong = int(given.sum()), int((outputs.argmax(1) != truth)[given].sum())
    return Abstention(threshold, wilson(answers, len(truth)), wilson(wrong, answers) if answers else None)


def calibrate(
    logits: Logits, labels: Sequence[int] | Labels, *, split: str = "val", error: float = 0.05
) -> Calibration:
    """Fit temperature and threshold for a bundle on this split; `error` is the share of wrong answers to allow."""
    temperature = fit_temperature(logits, labels)
    threshold = abstain(logits, labels, temperature, error).threshold
    return Calibration(temperature, threshold, error, len(labels), split)


def _scale(logits: Logits, temperature: float) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Yield blocks of float64 logits divided by the temperature, shifted so that each image's largest is 0."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ArgumentError("temperature", temperature, "must be a positive finite number.")
    for rows in row_blocks(logits):
        some = logits[rows].astype(np.float64)
        some -= some.max(1, keepdims=True)
        some /= temperature
        yield rows, some


def _slope(logits: Logits, truth: Labels, log_scale: float) -> tuple[float, float]:
    """First and second derivative of what `fit_temperature` minimises, at `log_scale`, which is -ln T."""
    slope, curve = log_scale, 1.0
    for rows, scaled in _scale(logits, math.exp(-log_scale)):
        chances = np.exp(scaled)
        chances /= chances.sum(1, keepdims=True)
        mean = (chances * scaled).sum(1)
        above = float((mean - np.take_along_axis(scaled, truth[rows, None], 1)[:, 0]).sum())
        spread = float(((chances * scaled**2).sum(1) - mean**2).sum())
        slope, curve = slope + above, curve + above + spread
    return slope, curve
