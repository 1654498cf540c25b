"""Linear probes: a linear classifier on frozen features, fitted and cross-validated. numpy only.

It is multinomial logistic regression: it minimises the sum of the cross entropies plus penalty / 2 times the squared
weights of the standardised features (mean 0, variance 1); the bias is free. The problem is convex, so nothing is drawn
at random and nothing depends on where it starts. L-BFGS (Liu and Nocedal 1989) solves it for features that are first
decorrelated by Böhning's bound of the Hessian (1992), which takes tens of steps where the features as they are take
hundreds.

Out of fold, every image is predicted by a classifier that saw neither it nor an image of its group.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from effnet.errors import ArgumentError
from effnet.metrics.familiarity import spread_classes
from effnet.metrics.intervals import Labels, row_blocks
from effnet.progress import SILENT, Progress
from effnet.runtime.prediction import probabilities
from effnet.runtime.session import Linear, Logits

TASK = "judging images out of fold"
FOLDS = 5
MOST, HELD_OUT = 4000, 800  # to choose a penalty: most images, and fewest of them held out
PENALTIES = (3000.0, 1000.0, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0)
ITERATIONS, MEMORY = 300, 10  # of L-BFGS: most steps, and length of its history
PRECISION = 1e-7  # distance of the mean loss from its minimum
ARMIJO = 1e-4  # share of the decrease predicted by the slope that a step must reach
ABSENT = -100.0  # the bias of a class without images: a probability of 0 as far as float32 can tell

Features = NDArray[np.float32]  # (N, C)
Doubles = NDArray[np.float64]


def fit_linear(features: Features, labels: Labels, classes: int, penalty: float) -> Linear:
    """The weight (K, C) and the bias (K,) of the classifier.

    Args:
        features: (N, C) float32; float64 features are processed in float64.
        labels: (N,), from 0 to `classes` - 1. A class without images gets a probability of 0.
        classes: K.
        penalty: see the module; it does not depend on the number of images or the scale of the features.

    Raises:
        ArgumentError: the shapes do not match, a value is not finite, or `penalty` is not above 0.
    """
    _check(features, labels, classes, penalty)
    n, present = len(labels), np.unique(labels)
    k = len(present)
    truth = np.searchsorted(present, labels)
    mean = features.mean(0, dtype=np.float64)
    scale, basis = _decorrelate(features, mean, penalty)
    unit = (2 / n) ** 0.5  # of the bias
    spread = np.where(np.isinf(scale), 0, scale)[:, None]  # of the features, (C, 1)

    def layer(values: Doubles) -> tuple[Doubles, Doubles]:
        """The weight (C, K) and the bias for the variables of L-BFGS."""
        weight = basis @ values[:-1]
        return weight, unit * values[-1] - mean @ weight

    def loss(values: Doubles) -> tuple[float, Doubles]:
        weight, bias = layer(values)
        logits = (features @ weight.astype(features.dtype)).astype(np.float64) + bias
        logits -= logits.max(1, keepdims=True)
        chances = np.exp(logits)
        total = chances.sum(1)
        right = np.arange(n), truth
        entropy = (np.log(total) - logits[right]).sum()
        chances /= total[:, None]
        chances[right] -= 1
        errors = chances.sum(0)
        slope = (features.T @ chances.astype(features.dtype)).astype(np.float64) - np.outer(mean, errors)
        slope += penalty * np.square(spread) * weight
        squares = np.square(spread * weight).sum()
        return float(entropy + penalty / 2 * squares), np.vstack([basis.T @ slope, unit * errors])

    found = _minimise(loss, np.zeros((basis.shape[1] + 1, k)), PRECISION * n)
    weight, bias = np.zeros((classes, features.shape[1]), np.float32), np.full(classes, ABSENT, np.float32)
    own_weight, own_bias = layer(found)
    weight[present], bias[present] = own_weight.T, own_bias - own_bias.mean()
    return Linear(weight, bias)


def _decorrelate(features: Features, mean: Doubles, penalty: float) -> tuple[Doubles, Doubles]:
    """The scale (C,) of the features, infinite for constants, and a basis (C, R) of the weights where the bound is 1.

    With few images the weights are combinations of the standardised rows, so R is at most their number.
    """
    n, channels = features.shape
    few = 2 * n <= channels
    variance, covariance = np.zeros(channels), np.zeros((0 if few else channels,) * 2)
    for rows in row_blocks(features):
        centred = features[rows] - mean.astype(features.dtype)
        if few:
            variance += np.square(centred, dtype=np.float64).sum(0) / n
        else:
            covariance += centred.T @ centred / n
    scale = np.sqrt(np.maximum(variance if few else np.diag(covariance), 0))
    scale[scale <= 1e-6 * np.abs(mean)] = np.inf  # constant features get a weight of 0
    if few:
        _, sizes, directions = np.linalg.svd((features - mean) / scale, full_matrices=False)
        return scale, directions.T / np.sqrt(np.square(sizes) / 2 + penalty) / scale[:, None]
    bound = n / 2 * covariance / np.outer(scale, scale)
    np.fill_diagonal(bound, n / 2 + penalty)
    return scale, np.linalg.inv(np.linalg.cholesky(bound)).T / scale[:, None]


def out_of_fold(
    features: Features,
    labels: Labels,
    classes: int,
    folds: NDArray[np.int64],
    penalty: float,
    *,
    progress: Progress = SILENT,
) -> Logits:
    """The logits (N, K) of every image from the classifier that is fitted to the other folds.

    Args:
        features, labels, classes, penalty: see `fit_linear`, whose errors this raises.
        folds: (N,), the fold of each image; see `assign_folds`.
        progress: counts folds.
    """
    logits = np.zeros((len(labels), classes), np.float32)
    names = np.unique(folds)
    for done, fold in enumerate(names):
        progress.update(TASK, done, len(names))
        out = folds == fold
        layer = fit_linear(features[~out], labels[~out], classes, penalty)
        logits[out] = features[out] @ layer.weight.T + layer.bias
    progress.update(TASK, len(names), len(names))
    return logits


def choose_penalty(features: Features, labels: Labels, classes: int, folds: NDArray[np.int64]) -> float:
    """The penalty of PENALTIES with the lowest cross entropy of held-out folds, as many as have HELD_OUT images.

    Tries them from the largest down, until one is worse than the one before. Uses at most MOST images, spread evenly
    over the classes, since the best penalty hardly depends on their number.
    """
    rows = spread_classes(labels, MOST)
    features, labels, folds = features[rows], labels[rows], folds[rows]
    before = np.cumsum(np.bincount(folds)) - np.bincount(folds)
    held_out = [folds == fold for fold in np.unique(folds) if before[fold] < HELD_OUT]
    best, lowest = PENALTIES[0], np.inf
    for penalty in PENALTIES:
        loss = 0.0
        for out in held_out:
            layer = fit_linear(features[~out], labels[~out], classes, penalty)
            chances = probabilities(features[out] @ layer.weight.T + layer.bias)[np.arange(out.sum()), labels[out]]
            loss -= float(np.log(np.maximum(chances, np.finfo(np.float64).tiny)).sum())
        if loss >= lowest:
            break
        best, lowest = penalty, loss
    return best


def assign_folds(labels: Labels, groups: Sequence[object], *, folds: int = FOLDS, seed: int = 0) -> NDArray[np.int64]:
    """Assign each image to a fold, (N,), evenly over the classes, with images of one group together.

    Args:
        labels: (N,).
        groups: (N,), equal for images that must stay in one fold, such as near-duplicates.
        folds: number of folds.
        seed: for the order of groups of equal size.
    """
    members: dict[object, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    units = [*members.values()]
    order = np.random.default_rng(seed).permutation(len(units))
    found, counts = np.zeros(len(labels), np.int64), np.zeros((int(labels.max(initial=0)) + 1, folds), np.int64)
    for unit in sorted((units[place] for place in order), key=len, reverse=True):
        own = labels[unit]
        fold = int(counts[own].sum(0).argmin())
        found[unit] = fold
        counts[:, fold] += np.bincount(own, minlength=len(counts))
    return found


def _check(features: Features, labels: Labels, classes: int, penalty: float) -> None:
    if features.ndim != 2 or not features.size or not np.isfinite(features).all():
        found = f"{features.shape} {features.dtype}"
        raise ArgumentError("features", found, "must be (N, C) finite numbers of at least one image.")
    if labels.shape != (len(features),):
        raise ArgumentError("labels", f"{labels.shape}", f"must be ({len(features)},), one for each image.")
    if labels.min() < 0 or labels.max() >= classes:
        wrong = int(labels[(labels < 0) | (labels >= classes)][0])
        raise ArgumentError("labels", wrong, f"must be from 0 to {classes - 1}, one of {classes} classes.")
    if not 0 < penalty < np.inf:
        raise ArgumentError("penalty", penalty, "must be a number above 0.")


def _minimise(loss: Callable[[Doubles], tuple[float, Doubles]], start: Doubles, enough: float) -> Doubles:
    """Minimise a convex loss, which returns its value and gradient, to about `enough` above its minimum, by L-BFGS."""
    values, (height, slope) = start, loss(start)
    steps: deque[tuple[Doubles, Doubles, float]] = deque(maxlen=MEMORY)
    for _ in range(ITERATIONS):
        direction, shares = -slope, []
        for moved, turned, product in reversed(steps):
            shares.append(np.vdot(moved, direction) / product)
            direction -= shares[-1] * turned
        if steps:
            direction *= steps[-1][2] / np.vdot(steps[-1][1], steps[-1][1])
        for (moved, turned, product), share in zip(steps, reversed(shares), strict=True):
            direction += (share - np.vdot(turned, direction) / product) * moved
        decrease = -float(np.vdot(slope, direction))
        if decrease <= enough:
            break
        moved = direction
        new_height, new_slope = loss(values + moved)
        while new_height > height - ARMIJO * decrease:
            if decrease <= enough:  # about the rounding error
                return values
            moved, decrease = moved / 2, decrease / 2
            new_height, new_slope = loss(values + moved)
        turned = new_slope - slope
        if (product := float(np.vdot(moved, turned))) > 0:
            steps.append((moved, turned, product))
        values, height, slope = values + moved, new_height, new_slope
    return values
