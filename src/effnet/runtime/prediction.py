"""Predictions for an image: the most probable classes, and whether the model is sure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effnet.runtime.session import Logits


@dataclass(frozen=True)
class Score:
    """One class of a prediction."""

    index: int
    label: str  # the class's name, or its index if there are no names
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first; its own index, label and probability are the best one's.

    Attributes that the model does not support are None.

    Attributes:
        scores: the classes.
        unsure: whether the probability is below the threshold of the model's calibration, so better to abstain.
        unfamiliar: whether the image is less like the training images than 95 % of the val images.
        familiarity: the score for that, higher if more familiar; `Classifier.familiarity` has its threshold.
        labels: the label set with the requested coverage, best first.
    """

    scores: tuple[Score, ...]
    unsure: bool | None = None
    unfamiliar: bool | None = None
    familiarity: float | None = None
    labels: tuple[str, ...] | None = None

    def __iter__(self) -> Iterator[Score]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rank: int) -> Score:
        return self.scores[rank]

    @property
    def index(self) -> int:
        """Index of the best class."""
        return self[0].index

    @property
    def label(self) -> str:
        """Name of the best class."""
        return self[0].label

    @property
    def probability(self) -> float:
        """Probability of the best class."""
        return self[0].probability

    def to_dict(self) -> dict[str, Any]:
        """The prediction as plain values: `predictions`, and of the rest what the model can tell."""
        known = {name: value for name, value in vars(self).items() if name != "scores" and value is not None}
        return {"predictions": [vars(score) for score in self.scores], **known}


def probabilities(logits: Logits, temperature: float = 1.0) -> NDArray[np.float64]:
    """The softmax (N, K) of logits divided by a temperature."""
    shifted = np.exp((logits.astype(np.float64) - logits.max(1, keepdims=True)) / temperature)
    chances: NDArray[np.float64] = shifted / shifted.sum(1, keepdims=True)
    return chances


def best_classes(probabilities: NDArray[np.float64], topk: int) -> Iterator[NDArray[np.intp]]:
    """The `topk` most probable classes of each row, or all, best first; of equal ones the first.

    Only those that may be among them are sorted, which takes a seventh of the time of sorting a thousand.
    """
    topk = min(topk, probabilities.shape[1])
    least = np.partition(probabilities, -topk, axis=1)[:, -topk]
    for row, smallest in zip(probabilities, least, strict=True):
        found = np.flatnonzero(row >= smallest)
        yield found[np.argsort(-row[found], kind="stable")[:topk]]
