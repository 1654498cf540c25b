"""The classifier on frozen features against scikit-learn, and its folds."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from effnet.errors import ArgumentError
from effnet.metrics.linear_probe import PENALTIES, assign_folds, choose_penalty, fit_linear, out_of_fold
from effnet.runtime.prediction import probabilities

CHANNELS, CLASSES = 24, 4


def world(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features in overlapping clusters, strongly correlated, of very different scales, one of them constant."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, n)
    means = np.random.default_rng(7).normal(0, 1, (CLASSES, CHANNELS))
    mixing = np.random.default_rng(8).normal(0, 1, (CHANNELS, CHANNELS)) * np.geomspace(1, 0.01, CHANNELS)
    features = (means[labels] + random.normal(0, 2.5, (n, CHANNELS))) @ mixing * np.geomspace(0.1, 30, CHANNELS) + 3
    features[:, 5] = 3
    return features, labels


def oracle(features: np.ndarray, labels: np.ndarray, penalty: float, new: np.ndarray) -> np.ndarray:
    scaler = StandardScaler().fit(features)
    fitted = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10_000).fit(scaler.transform(features), labels)
    return fitted.predict_proba(scaler.transform(new))


@pytest.mark.parametrize("penalty", [100.0, 1.0])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("n", [300, 12])  # more images than features, and fewer
def test_probabilities_are_scikit_learns(n: int, penalty: float, dtype: type) -> None:
    features, labels = world(n)
    new, _ = world(100, seed=1)
    layer = fit_linear(features.astype(dtype), labels, CLASSES, penalty)
    assert layer.weight.shape == (CLASSES, CHANNELS)
    assert not layer.weight[:, 5].any()
    found = probabilities(new @ layer.weight.T + layer.bias)
    np.testing.assert_allclose(found, oracle(features, labels, penalty, new), atol=1e-3)


def test_a_class_without_images_has_no_probability() -> None:
    features, labels = world(120)
    whole = fit_linear(features, labels, CLASSES, 10)
    more = fit_linear(features, np.where(labels == 3, 4, labels), CLASSES + 1, 10)
    np.testing.assert_allclose(more.weight[[0, 1, 2, 4]], whole.weight)
    assert probabilities(features @ more.weight.T + more.bias)[:, 3].max() < 1e-20


def test_every_image_is_judged_by_the_other_folds() -> None:
    features, labels = world(200)
    folds = assign_folds(labels, range(200), folds=4)
    found = probabilities(out_of_fold(features, labels, CLASSES, folds, 10))
    for fold in range(4):
        out = folds == fold
        expected = oracle(features[~out], labels[~out], 10, features[out])
        np.testing.assert_allclose(found[out], expected, atol=1e-3)


def test_the_penalty_has_the_lowest_cross_entropy_of_held_out_folds() -> None:
    features, labels = world(200)
    features += np.random.default_rng(1).normal(0, 10, features.shape) * features.std(0)
    folds = assign_folds(labels, range(200))
    losses = dict.fromkeys(PENALTIES, 0.0)
    for penalty in PENALTIES:
        for fold in range(5):
            out = folds == fold
            chances = oracle(features[~out], labels[~out], penalty, features[out])
            losses[penalty] -= np.log(chances[np.arange(out.sum()), labels[out]]).sum()
    best = min(losses, key=losses.__getitem__)
    assert best not in (PENALTIES[0], PENALTIES[-1])  # else the path would be too short to show anything
    assert choose_penalty(features, labels, CLASSES, folds) == best


def test_folds_keep_groups_together_and_classes_even() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 400)
    groups = [f"film {number // 6}" if number < 60 else number for number in range(400)]
    folds = assign_folds(labels, groups, seed=3)
    assert np.array_equal(folds, assign_folds(labels, groups, seed=3))
    assert not np.array_equal(folds, assign_folds(labels, groups, seed=4))
    for film in range(10):
        assert len(set(folds[6 * film : 6 * film + 6])) == 1
    for label in range(3):
        counts = np.bincount(folds[labels == label], minlength=5)
        assert counts.max() - counts.min() <= 2


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"features": np.full((3, 2), np.nan)}, ["features", "finite"]),
        ({"features": np.zeros((0, 2))}, ["features", "at least one"]),
        ({"labels": np.array([0, 1])}, ["labels", "(3,)"]),
        ({"labels": np.array([0, 1, 2])}, ["labels", "2", "0 to 1"]),
        ({"penalty": 0.0}, ["penalty", "above 0"]),
    ],
)
def test_what_cannot_be_fitted_is_refused(changes: dict[str, object], facts: list[str]) -> None:
    arguments = {"features": np.eye(3, 2), "labels": np.array([0, 1, 0]), "classes": 2, "penalty": 1.0} | changes
    with pytest.raises(ArgumentError) as caught:
        fit_linear(**arguments)
    assert all(fact in str(caught.value) for fact in facts)
