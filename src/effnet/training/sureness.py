"""Fits the detector of images unlike the training's, once a run's best weights are known."""

from __future__ import annotations

import dataclasses
import time
from typing import NamedTuple

import numpy as np

from effnet.data.dataset import Dataset
from effnet.errors import RefusedError
from effnet.metrics.evaluate import Predicted, predict_logits
from effnet.metrics.familiarity import Seen, fit_familiarity, spread_classes
from effnet.models.efficientnet import EfficientNet
from effnet.runtime.session import Linear, Logits, Pixels
from effnet.runtime.torch import compile_maps
from effnet.training.loop import Loop
from effnet.weights.sureness import Familiarity

# Training images whose features are computed: this many, or this many per class up to a limit. They take as long as
# evaluating the same number.
IMAGES, EACH, MOST = 2000, 10, 10_000


class Evaluated(NamedTuple):
    """The best weights' outputs for a split."""

    predicted: Predicted
    seen: Seen  # the same images, with their features


def evaluate_split(loop: Loop, network: EfficientNet, images: Dataset, task: str) -> Evaluated:
    """Logits, labels and pooled features of the images that can be read; `task` is the name for progress."""
    run, features = compile_maps(network, loop.plan.input), [np.empty((0, network.spec.head_channels), np.float32)]

    def keep(pixels: Pixels) -> Logits:
        logits, maps = run(pixels)
        features.append(maps.mean((2, 3)))
        return logits

    batch = loop.plan.execution.part
    found = predict_logits(keep, loop.plan.input, images, batch=batch, progress=loop.progress, task=task)
    return Evaluated(found, Seen(found.logits, np.concatenate(features), found.labels))


def see_training_images(loop: Loop, network: EfficientNet) -> tuple[Dataset, Seen]:
    """Some training images, spread over the classes, and the best weights' outputs for them."""
    data = loop.data.subset("train")
    labels = np.array([sample.label for sample in data.samples])
    rows = spread_classes(labels, max(IMAGES, min(MOST, EACH * len(data.classes))), loop.plan.settings.seed)
    some = dataclasses.replace(data, samples=tuple(data.samples[row] for row in rows))
    found = evaluate_split(loop, network, some, "features of training images")
    return found.predicted.readable(some), found.seen


def learn_familiarity(loop: Loop, network: EfficientNet, train: Seen, val: Seen) -> Familiarity | None:
    """The detector of unfamiliar images, fitted to some training images; if none works, None and a message why."""
    started = time.perf_counter()
    try:
        classifier = network.classifier
        layer = Linear(*(part.detach().float().cpu().numpy() for part in (classifier.weight, classifier.bias)))
        found = fit_familiarity(train, val, layer, seed=loop.plan.settings.seed)
    except RefusedError as error:
        loop.progress.message(f"unfamiliar images will not be detected: {error}")
        return None
    loop.progress.message(
        f"{found}. It was fitted to {found.images:,} of {len(loop.data.subset('train')):,} training images in "
        f"{time.perf_counter() - started:.0f} s"
    )
    return found
