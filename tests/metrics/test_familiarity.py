"""Scores of unfamiliar images against pytorch-ood; which one is kept, and what its threshold lets through."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytorch_ood.detector import KNN, EnergyBased, Mahalanobis, MaxSoftmax, ViM
from scipy.stats import t as student

from effnet.errors import RefusedError
from effnet.metrics import familiarity
from effnet.metrics.familiarity import (
    Seen,
    fit_familiarity,
    fit_scores,
    pack,
    principal_components,
    spread_classes,
)
from effnet.metrics.intervals import auroc
from effnet.runtime.session import Linear
from effnet.weights.sureness import OF_LOGITS, Familiarity, score_images

CHANNELS, CLASSES = 24, 6


def world(n: int, seed: int, *, classes: int = CLASSES, spread: float = 3.0) -> Seen:
    """Features in clusters, one of each class, and the logits of the layer that tells the clusters best."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    means = np.random.default_rng(7).normal(0, 2, (classes, CHANNELS))
    features = (means[labels] + random.normal(0, spread, (n, CHANNELS)) * np.linspace(1.5, 0.2, CHANNELS)).astype(
        np.float32
    )
    layer = last_layer(classes)
    return Seen((features @ layer.weight.T + layer.bias).astype(np.float32), features, labels)


def last_layer(classes: int = CLASSES) -> Linear:
    means = np.random.default_rng(7).normal(0, 2, (classes, CHANNELS))
    return Linear((means / 3).astype(np.float32), (-(means**2).sum(1) / 6).astype(np.float32))


def strange(n: int, seed: int = 3) -> np.ndarray:
    """Features that are near no cluster."""
    return np.random.default_rng(seed).normal(0, 2.5, (n, CHANNELS)).astype(np.float32)


def test_the_scores_of_logits_are_pytorch_oods() -> None:
    logits = torch.from_numpy(world(50, 1).logits)
    found = {name: score_images(name, {}, logits.numpy()) for name in OF_LOGITS}
    np.testing.assert_allclose(np.exp(found["max-softmax"]), -MaxSoftmax.score(logits), rtol=1e-5)
    np.testing.assert_allclose(found["energy"], -EnergyBased.score(logits), rtol=1e-5)


def test_a_probability_that_rounds_to_1_still_has_a_score() -> None:
    (nearer, farther) = score_images("max-softmax", {}, np.array([[50.0, 0.0], [60.0, 0.0]]))
    assert nearer < farther < 0


def test_the_scores_of_features_are_pytorch_oods() -> None:
    train, layer, new = world(200, 0), last_layer(), np.concatenate([world(40, 1).features, strange(40)])
    logits = new @ layer.weight.T + layer.bias
    fitted = fit_scores(train, layer)
    found = {name: score_images(name, arrays, logits, new) for name, arrays in fitted.items()}
    labels = torch.from_numpy(train.labels)
    dims = CHANNELS // 2

    def inside(features: np.ndarray, name: str) -> torch.Tensor:
        return torch.from_numpy(((features - fitted[name]["center"]) @ fitted[name]["basis"]).astype(np.float64))

    # Mahalanobis: the oracle's covariance is a sum, not a mean, and its score half the square; ours has a small ridge
    oracle = Mahalanobis(None).fit_features(inside(train.features, "mahalanobis").float(), labels)
    expected = 2 * len(labels) * oracle.predict_features(inside(new, "mahalanobis").float()).numpy()
    np.testing.assert_allclose(-found["mahalanobis"], expected, rtol=0.02)
    assert np.corrcoef(-found["mahalanobis"], expected)[0, 1] > 0.99999

    k = int(fitted["neighbours"]["k"][0])
    nearest = KNN(None, k=k).fit_features(inside(train.features, "neighbours"), labels)
    np.testing.assert_allclose(-found["neighbours"], nearest.predict_features(inside(new, "neighbours")), atol=1e-5)

    weight, bias = (torch.from_numpy(values) for values in layer)
    virtual = ViM(None, dims, weight, bias).fit_features(torch.from_numpy(train.features), labels)
    np.testing.assert_allclose(-found["vim"], virtual.predict_features(torch.from_numpy(new)), rtol=0.01, atol=0.02)


def test_principal_components_are_the_eigenvectors() -> None:
    rows = world(300, 0).features.astype(np.float64)
    found = principal_components(rows, 5)
    values, vectors = np.linalg.eigh(rows.T @ rows)
    np.testing.assert_allclose(found.T @ found, np.eye(5), atol=1e-12)
    cosines = np.abs((found * vectors[:, ::-1][:, :5]).sum(0))
    np.testing.assert_allclose(cosines, 1, atol=1e-3)
    assert ((rows @ found) ** 2).sum() == pytest.approx(values[::-1][:5].sum(), rel=1e-4)


@pytest.fixture(scope="module")
def fitted() -> Familiarity:
    return fit_familiarity(world(300, 0), world(120, 1), last_layer())


def test_a_score_is_kept_that_tells_strangers(fitted: Familiarity) -> None:
    value, low, high = fitted.aurocs[fitted.score]
    assert 0.5 < low < value <= high <= 1
    assert set(fitted.aurocs) == {"max-softmax", "energy", "mahalanobis", "neighbours", "vim"}
    assert (fitted.n, fitted.images, fitted.left_out, fitted.split) == (120, 300, CLASSES, "val")
    layer, new, others = last_layer(), world(200, 2), strange(200)
    familiar = fitted.of(new.logits, new.features)
    unfamiliar = fitted.of(others @ layer.weight.T + layer.bias, others)
    assert auroc(familiar, unfamiliar).value > 0.8


def test_vim_is_kept_unless_another_is_shown_to_be_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images whose features outside the principal components are large or small for no reason spoil it."""

    def spoiled(n: int, seed: int) -> Seen:
        seen, random = world(n, seed, spread=0.7), np.random.default_rng(seed)
        extra = random.normal(size=(n, CHANNELS)) * np.exp(2 * random.normal(size=(n, 1)))
        features = np.concatenate([seen.features, extra], 1).astype(np.float32)
        return Seen(seen.logits, features, seen.labels)

    weight, bias = last_layer()
    layer = Linear(np.concatenate([weight, np.zeros_like(weight)], 1), bias)
    found = fit_familiarity(spoiled(300, 0), spoiled(120, 1), layer)
    best = max(found.aurocs, key=lambda name: found.aurocs[name][0])
    assert found.score == best != "vim"
    assert found.aurocs[best][0] - found.aurocs["vim"][0] > 0.1
    monkeypatch.setattr(familiarity, "MARGIN", 1.0)
    assert fit_familiarity(spoiled(300, 0), spoiled(120, 1), layer).score == "vim"


def test_the_auroc_is_that_of_leaving_each_class_out() -> None:
    """By the formula, for the energy: the left-out class has no logit."""
    train, val, layer = world(300, 0), world(120, 1), last_layer()
    values = []
    for label in range(CLASSES):
        kept = [other for other in range(CLASSES) if other != label]
        energy = np.log(np.exp(val.logits[:, kept].astype(float)).sum(1))
        own, left = energy[val.labels != label], energy[val.labels == label]
        values.append(((own[:, None] > left) + 0.5 * (own[:, None] == left)).mean())
    found = fit_familiarity(train, val, layer).aurocs["energy"]
    reach = student.ppf(0.975, CLASSES - 1) * np.std(values, ddof=1) / CLASSES**0.5
    assert found[0] == pytest.approx(np.mean(values))
    assert found[1] == pytest.approx(np.mean(values) - reach, abs=1e-3)


def test_95_of_100_are_accepted(fitted: Familiarity) -> None:
    """Of val at least, and on average of new images, since the threshold is the 6th smallest of 120 scores."""
    val = world(120, 1)
    below = (fitted.of(val.logits, val.features) < fitted.threshold).sum()
    assert below == int(0.05 * 121) - 1
    new = world(4000, 2)
    assert (fitted.of(new.logits, new.features) >= fitted.threshold).mean() == pytest.approx(0.95, abs=0.03)


def test_what_is_stored_is_small_and_gives_the_same_scores() -> None:
    train, layer, new = world(300, 0), last_layer(), world(50, 2)
    for name, arrays in fit_scores(train, layer).items():
        text = pack(arrays)
        stored = Familiarity(name, 0.0, 1, "val", 1, 1, {name: (1, 1, 1)}, text)
        assert stored.needs_features == bool(text)
        expected = score_images(name, arrays, new.logits, new.features)
        np.testing.assert_allclose(stored.of(new.logits, new.features), expected, rtol=0.01, atol=0.01)


def test_a_score_that_takes_too_much_room_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(familiarity, "LARGEST", 1000)
    found = fit_familiarity(world(300, 0), world(120, 1), last_layer())
    assert found.score in OF_LOGITS
    assert found.tensors == ""


def test_the_largest_network_fits() -> None:
    """B7 has 2560 channels; 1000 classes."""
    random = np.random.default_rng(0)
    labels = np.arange(2000) % 1000
    features = random.normal(size=(2000, 2560)).astype(np.float32)
    layer = Linear(random.normal(size=(1000, 2560)).astype(np.float32), np.zeros(1000, np.float32))
    for arrays in fit_scores(Seen(features @ layer.weight.T, features, labels), layer).values():
        assert len(pack(arrays)) < 10**6


def test_small_data_is_refused() -> None:
    layer = last_layer()
    with pytest.raises(RefusedError, match=r"18 images of val are too few .* takes 19"):
        fit_familiarity(world(300, 0), world(18, 1), layer)
    one = world(240, 1)
    with pytest.raises(RefusedError, match="images of one class"):
        fit_familiarity(world(300, 0), one.take(one.labels == 2), layer)


def test_scores_that_tell_nothing_are_refused() -> None:
    """Features that do not depend on the class: a left-out class looks like any other."""
    random = np.random.default_rng(0)

    def noise(n: int) -> Seen:
        features = random.normal(size=(n, CHANNELS)).astype(np.float32)
        return Seen(features @ last_layer().weight.T, features, np.arange(n) % CLASSES)

    with pytest.raises(RefusedError, match=r"no score tells left-out classes .* AUROC"):
        fit_familiarity(noise(300), noise(120), last_layer())


def test_two_classes_are_enough_and_one_image_of_each_is_not_too_few_to_answer() -> None:
    found = fit_familiarity(world(200, 0, classes=2), world(80, 1, classes=2), last_layer(2))
    assert found.left_out == 2
    with pytest.raises(RefusedError):
        fit_familiarity(world(2, 0, classes=2), world(80, 1, classes=2, spread=8), last_layer(2))


def test_many_classes_are_left_out_in_ten_groups() -> None:
    assert fit_familiarity(world(400, 0, classes=25), world(200, 1, classes=25), last_layer(25)).left_out == 10


def test_images_are_drawn_evenly_over_the_classes() -> None:
    labels = np.repeat([4, 7, 9], [100, 3, 30])
    rows = spread_classes(labels, 33)
    assert np.bincount(labels[rows])[[4, 7, 9]].tolist() == [15, 3, 15]
    assert (np.diff(rows) > 0).all()
    assert spread_classes(labels, 1000).tolist() == list(range(133))
