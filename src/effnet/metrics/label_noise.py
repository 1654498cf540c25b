"""How many labels are wrong, and which: judged by a classifier that was not fitted to them. numpy only.

A label that the classifier finds improbable is either right, of an image that is hard to tell, or wrong. The two leave
different traces: of hard images there are the fewer, the farther the logits are from the label, while a label that
was mixed up is as likely to be far from them as the image is easy. So the labels are taken to have come about as

    chance of the given label = (1 - rate) q + rate (1 - q) / (K - 1)

where q, the self-confidence, is the softmax of the logits over a temperature at that label, and a share `rate` of the
labels was replaced by any of the other K - 1 classes (Copas 1988, "Binary regression models for contaminated data").
Rate and temperature are those at which the given labels are most probable. The second term's share of the sum is the
probability that a label is wrong; it falls as q rises, so images are ranked by their self-confidence, as in confident
learning (Northcutt et al. 2021).

Departure from confident learning: its thresholds count every label that the classifier contradicts, so a classifier
that is often wrong makes a long list. This model is careful: labels mixed up only between classes that look alike
leave hardly a trace that hard images do not, so there are more of them than it says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from effnet.metrics.intervals import Labels
from effnet.runtime.prediction import probabilities
from effnet.runtime.session import Logits

HIGHEST = 0.5  # rate: above it, labels carry no information
FARTHEST, STEPS, HALVINGS = 2.0, 40, 40  # of ln temperature; of the grid over it; of the intervals around both


@dataclass(frozen=True)
class LabelNoise:
    """The model of label noise; see the module."""

    rate: float  # share of the labels that were replaced
    temperature: float

    def self_confidence(self, logits: Logits, labels: Labels) -> NDArray[np.float64]:
        """The probability (N,) of the given label, by logits (N, K)."""
        return probabilities(logits, self.temperature)[np.arange(len(labels)), labels]

    def wrong(self, confidence: NDArray[np.float64], classes: int) -> NDArray[np.float64]:
        """The probability (N,) that a label of that self-confidence is wrong, among K classes."""
        other = self.rate * (1 - confidence) / (classes - 1)
        chance: NDArray[np.float64] = other / np.maximum(
            (1 - self.rate) * confidence + other, np.finfo(np.float64).tiny
        )
        return chance


def fit_label_noise(logits: Logits, labels: Labels, classes: int) -> LabelNoise:
    """Fit rate and temperature to labels (N,) and the logits (N, K) of a classifier that did not see them.

    Args:
        logits: from a classifier fitted to other images with the same noise, such as `out_of_fold`.
        labels: the given labels.
        classes: number of possible classes, at least 2; K, unless some have no images.
    """

    def fit(log_temperature: float) -> tuple[float, float]:
        """The log-likelihood, less (ln T)^2 / 2 as in `fit_temperature`, and the rate that makes it the highest."""
        own = LabelNoise(0.0, math.exp(log_temperature)).self_confidence(logits, labels)
        gain = (1 - own) / (classes - 1) - own  # the term that is linear in the rate
        own = np.maximum(own, np.finfo(np.float64).tiny)
        low, high = 0.0, HIGHEST if (gain / own).sum() > 0 else 0.0  # the likelihood is concave in the rate
        for _ in range(HALVINGS if high else 0):
            middle = (low + high) / 2
            rises = (gain / (own + middle * gain)).sum() > 0
            low, high = (middle, high) if rises else (low, middle)
        return float(np.log(own + low * gain).sum()) - log_temperature**2 / 2, low

    step = 2 * FARTHEST / STEPS
    best = max(np.linspace(-FARTHEST, FARTHEST, STEPS + 1).tolist(), key=lambda place: fit(place)[0])
    while step > 1e-4:
        step /= 2
        best = max((best, best - step, best + step), key=lambda place: fit(place)[0])
    return LabelNoise(fit(best)[1], math.exp(best))
