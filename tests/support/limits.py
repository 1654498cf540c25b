"""Made-up calibration, label sets and familiarity for a network of any size, to store in bundles and artifacts."""

from __future__ import annotations

import numpy as np

from effnet.metrics.familiarity import Seen, fit_scores, pack
from effnet.runtime.session import Linear
from effnet.weights.sureness import Familiarity, LabelSets, ScoreName

SETS = LabelSets(30, "val", tuple(0.5 - 0.01 * index for index in range(47)))


def familiarity(channels: int, classes: int, score: ScoreName = "mahalanobis", threshold: float = -50.0) -> Familiarity:
    """Fitted to random features of that many channels."""
    random = np.random.default_rng(0)
    labels = np.arange(120) % classes
    features = random.normal(size=(120, channels)).astype(np.float32)
    layer = Linear(random.normal(size=(classes, channels)).astype(np.float32), np.zeros(classes, np.float32))
    arrays = fit_scores(Seen(features @ layer.weight.T, features, labels), layer)[score]
    return Familiarity(score, threshold, 60, "val", 120, classes, {score: (0.9, 0.8, 0.97)}, pack(arrays))
