"""Out-of-distribution images: the score that detects them best, and its threshold. numpy only.

Five scores (weights/sureness.py has their formulas and papers) are fitted to training images, and compared by leaving
whole classes out, each in turn or in ten groups: their logits and their training images are taken away, and AUROC is
the chance that a val image of the other classes is more familiar than one of a left-out class. The network itself had
seen the left-out classes, so this favours the scores of logits, and it says nothing of images that are like no class at
all. ViM, the energy less what the features show of those, is therefore kept unless another score is shown to be better
by more than MARGIN: in benchmarks/familiarity.py it was best against strangers of three kinds, where leaving classes
out alone chose the energy. The threshold is that of split-conformal prediction: at least 95 % of images like those of
val are at or above it.

Departures from the papers: Mahalanobis and the neighbours look at the first principal components only, and the
neighbours are a sample of the training images, so that all of it stays below a megabyte.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from effnet.errors import RefusedError
from effnet.metrics.intervals import Interval, Labels, auroc, auroc_interval, mean_interval
from effnet.runtime.session import Linear
from effnet.weights.sureness import Familiarity, ScoreName, score_images

ACCEPTED = 0.95  # of the val images
FEWEST = 19  # val images for which 5 % and one more are a whole image
PREFERRED: ScoreName = "vim"
MARGIN = 0.02  # of AUROC; see above
GROUPS = 10  # most groups of classes, each of which is left out once
DIMENSIONS = 64  # most principal components
PER_DIMENSION = 4  # fewest training images per principal component
POINTS, NEIGHBOURS, SHARE = 1000, 10, 5  # training images to compare with; which neighbour counts: 1 of 5 of a class's
LARGEST = 10**6  # most characters to store
SPARE, ROUNDS = 8, 5  # of the subspace iteration that finds principal components
RIDGE = 1e-3  # of the mean variance, added to the shared covariance, which few images leave singular
ScoreArrays = dict[str, NDArray[np.float32]]


class Seen(NamedTuple):
    """A network's outputs for labelled images."""

    logits: NDArray[np.float32]  # (N, K)
    features: NDArray[np.float32]  # (N, C), pooled: the input of the classifier layer
    labels: Labels  # (N,)

    def take(self, rows: NDArray[np.bool_]) -> Seen:
        """Some of the images."""
        return Seen(self.logits[rows], self.features[rows], self.labels[rows])


def fit_familiarity(train: Seen, val: Seen, layer: Linear, *, split: str = "val", seed: int = 0) -> Familiarity:
    """Fit the score that detects left-out classes best to `train`, and its threshold to `val`.

    Raises:
        RefusedError: there are too few images or classes, or no score detects left-out classes.
    """
    require_images(len(val.labels), split)
    groups = [group for group in _groups(val.labels, seed) if np.isin(train.labels, group, invert=True).any()]
    if len(groups) < 2:
        raise RefusedError(f"{split} has images of one class, and choosing a score leaves whole classes out")
    found: dict[ScoreName, list[float]] = {name: [] for name in get_args(ScoreName)}
    for group in groups:
        for name, value in _leave_out(group, train, val, layer, seed):
            found[name].append(value)
    aurocs = {name: _mean(values, len(val.labels)) for name, values in found.items() if len(values) == len(groups)}
    fitted = {name: arrays for name, arrays in fit_scores(train, layer, seed).items() if name in aurocs}
    stored = {name: pack(arrays) for name, arrays in fitted.items()}
    names = [name for name in aurocs if name in stored and len(stored[name]) <= LARGEST]
    best = max(names, key=lambda name: aurocs[name].value)  # of equal ones the first, the cheapest
    if PREFERRED in names and aurocs[PREFERRED].low > 0.5:
        behind = [high - low for high, low in zip(found[best], found[PREFERRED], strict=True)]
        best = PREFERRED if mean_interval(behind).low <= MARGIN else best
    if aurocs[best].low <= 0.5:
        figure = aurocs[best]
        text = f"AUROC {figure.value:.2f} ({figure.low:.2f} to {figure.high:.2f}) of the best, {best}"
        raise RefusedError(f"no score tells left-out classes from the others: {text}")
    figures: dict[str, tuple[float, float, float]] = {
        name: (figure.value, figure.low, figure.high) for name, figure in aurocs.items()
    }
    n, images = len(val.labels), len(train.labels)
    known = Familiarity(best, 0.0, n, split, images, len(groups), figures, stored[best])
    scores = np.sort(known.of(val.logits, val.features))  # with the numbers as stored
    rank = math.floor((1 - ACCEPTED) * (n + 1) + 1e-9)
    return replace(known, threshold=float(scores[rank - 1]))


def require_images(n: int, split: str = "val") -> None:
    """Raise RefusedError if a split has too few images for a threshold."""
    if n < FEWEST:
        raise RefusedError(f"{n} images of {split} are too few for a threshold, which takes {FEWEST}")


def fit_scores(train: Seen, layer: Linear, seed: int = 0) -> dict[ScoreName, ScoreArrays]:
    """Fit the arrays of each score, for `score_images`; scores that need more images are left out."""
    n, channels = train.features.shape
    features, dims = train.features.astype(np.float64), min(DIMENSIONS, channels // 2, n // PER_DIMENSION)
    fitted: dict[ScoreName, ScoreArrays] = {"max-softmax": {}, "energy": {}}
    if dims < 1:
        return fitted
    center = features.mean(0)
    basis = principal_components(features - center, dims, seed)
    inside = (features - center) @ basis
    space = {"center": center, "basis": basis}
    classes, of_class = np.unique(train.labels, return_inverse=True)
    means = np.stack([inside[of_class == index].mean(0) for index in range(len(classes))])
    within = inside - means[of_class]
    shared = within.T @ within / n
    shared += RIDGE * (np.trace(shared) / dims + np.finfo(np.float32).tiny) * np.eye(dims)
    whiten = np.linalg.inv(np.linalg.cholesky(shared)).T
    fitted["mahalanobis"] = _single(space | {"whiten": whiten, "points": means @ whiten})
    rows = spread_classes(train.labels, POINTS, seed)
    lengths = np.maximum(np.linalg.norm(inside[rows], axis=1, keepdims=True), 1e-12)
    k = max(1, min(NEIGHBOURS, len(rows) // (SHARE * len(classes))))
    fitted["neighbours"] = _single(space | {"points": inside[rows] / lengths, "k": np.array([k])})
    # ViM's origin: all logits are 0 there, or as close to it as possible
    origin = np.linalg.lstsq(layer.weight.astype(np.float64), -layer.bias.astype(np.float64), rcond=None)[0]
    centred = features - origin
    vim = {"center": origin, "basis": principal_components(centred, dims, seed), "alpha": np.ones(1)}
    virtual = score_images("energy", {}, train.logits) - score_images("vim", vim, train.logits, features)
    total, largest = virtual.sum(), train.logits.max(1).astype(np.float64).sum()
    if total > 0 and largest > 0:
        fitted["vim"] = _single(vim | {"alpha": np.array([largest / total])})
    return fitted


def principal_components(centred: NDArray[np.float64], dims: int, seed: int = 0) -> NDArray[np.float64]:
    """An orthonormal basis (C, dims) of the directions in which rows (N, C) have the largest mean square.

    Subspace iteration (Halko, Martinsson and Tropp 2011) takes a tenth of the time of all C components.
    """
    channels = centred.shape[1]
    start = np.random.default_rng(seed).normal(size=(channels, min(channels, dims + SPARE)))
    basis = np.linalg.qr(start)[0]
    for _ in range(ROUNDS):
        basis = np.linalg.qr(centred.T @ (centred @ basis))[0]
    _, _, rotation = np.linalg.svd(centred @ basis, full_matrices=False)
    found: NDArray[np.float64] = basis @ rotation[:dims].T
    return found


def spread_classes(labels: Labels, count: int, seed: int = 0) -> NDArray[np.int64]:
    """Indices of at most `count` images, in order, spread over the classes as evenly as possible."""
    order = np.random.default_rng(seed).permutation(len(labels))
    _, of_class = np.unique(labels[order], return_inverse=True)
    turn = np.empty(len(labels), np.int64)  # an image's index within its class
    for index in range(of_class.max(initial=-1) + 1):
        turn[of_class == index] = np.arange((of_class == index).sum())
    return np.sort(order[np.argsort(turn, kind="stable")[:count]])


def most_bytes(channels: int) -> int:
    """The largest output of `pack` for this many features: neighbours with all their points."""
    return int(4 / 3 * (2 * DIMENSIONS * (channels + POINTS) + 4 * channels))


def pack(arrays: ScoreArrays) -> str:
    """A safetensors file in base64; the two large arrays in half precision."""
    from safetensors.numpy import save

    if not arrays:
        return ""
    halves = {"basis", "points"} if "k" in arrays else {"basis"}
    stored = {  # C order: safetensors ignores the strides of other arrays
        name: values.astype(np.float16 if name in halves else np.float32, order="C") for name, values in arrays.items()
    }
    return base64.b64encode(save(stored)).decode()


def _leave_out(
    group: NDArray[np.int64], train: Seen, val: Seen, layer: Linear, seed: int
) -> Iterator[tuple[ScoreName, float]]:
    """The AUROC of each score if these classes are left out."""
    kept = np.setdiff1d(np.arange(train.logits.shape[1]), group)
    some = train.take(np.isin(train.labels, group, invert=True))
    left_out = np.isin(val.labels, group)
    logits, features = val.logits[:, kept], val.features
    reduced = Linear(layer.weight[kept], layer.bias[kept])
    for name, arrays in fit_scores(Seen(some.logits[:, kept], some.features, some.labels), reduced, seed).items():
        scores = score_images(name, arrays, logits, features)
        yield name, auroc(scores[~left_out], scores[left_out]).value


def _groups(labels: Labels, seed: int) -> list[NDArray[np.int64]]:
    """The classes that have images, alone or in GROUPS groups; not all of them in one."""
    classes = np.random.default_rng(seed).permutation(np.unique(labels))
    return [group for group in np.array_split(classes, min(GROUPS, len(classes))) if len(group) < len(classes)]


def _mean(values: list[float], images: int) -> Interval:
    """The mean over the groups with the wider of two intervals: Student's over them, Newcombe's over the images."""
    groups = mean_interval(values)
    by_images = auroc_interval(groups.value, images, images)
    low, high = min(groups.low, by_images.low), max(groups.high, by_images.high)
    return Interval(groups.value, max(0.0, low), min(1.0, high))


def _single(arrays: dict[str, NDArray[np.float64]]) -> ScoreArrays:
    return {name: values.astype(np.float32) for name, values in arrays.items()}
