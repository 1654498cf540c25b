"""Rate and temperature of label noise against scipy, and whether the probabilities come true."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from effnet.metrics.label_noise import LabelNoise, fit_label_noise


def world(n: int, classes: int, rate: float, temperature: float, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Logits that are `temperature` times too large, labels drawn from them, and which of those were mixed up."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, (n, classes))
    right = (logits + random.gumbel(size=(n, classes))).argmax(1)
    mixed = random.random(n) < rate
    labels = np.where(mixed, (right + random.integers(1, classes, n)) % classes, right)
    return (temperature * logits).astype(np.float32), labels, mixed


@pytest.mark.parametrize(("classes", "rate", "temperature"), [(2, 0.05, 1.0), (5, 0.1, 2.0), (10, 0.02, 0.5)])
def test_the_given_labels_are_most_probable(classes: int, rate: float, temperature: float) -> None:
    logits, labels, _ = world(3000, classes, rate, temperature)
    found = fit_label_noise(logits, labels, classes)

    def loss(values: np.ndarray) -> float:
        rate, scaled = 1 / (1 + np.exp(-values[0])), logits.astype(np.float64) / np.exp(values[1])
        chances = np.exp(scaled - scaled.max(1, keepdims=True))
        own = (chances / chances.sum(1, keepdims=True))[np.arange(len(labels)), labels]
        return values[1] ** 2 / 2 - np.log((1 - rate) * own + rate * (1 - own) / (classes - 1)).sum()

    start = [np.log(rate / (1 - rate)), np.log(temperature)]
    best = minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-8}).x
    np.testing.assert_allclose(
        [found.rate, np.log(found.temperature)], [1 / (1 + np.exp(-best[0])), best[1]], atol=3e-4
    )
    assert found.rate == pytest.approx(rate, abs=0.02)
    assert found.temperature == pytest.approx(temperature, rel=0.1)


def test_labels_that_were_not_mixed_up() -> None:
    logits, labels, _ = world(3000, 6, 0.0, 1.0)
    assert fit_label_noise(logits, labels, 6).rate < 0.003


@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_as_many_are_wrong_as_the_probabilities_say(rate: float) -> None:
    logits, labels, mixed = world(20_000, 10, rate, 1.5)
    noise = fit_label_noise(logits, labels, 10)
    wrong = noise.wrong(noise.self_confidence(logits, labels), 10)
    for low, high in ((0.1, 0.3), (0.3, 0.7), (0.7, 1.0)):
        rows = (wrong >= low) & (wrong < high)
        spread = np.sqrt((wrong[rows] * (1 - wrong[rows])).sum())
        assert abs(mixed[rows].sum() - wrong[rows].sum()) < 4 * spread
        assert rows.sum() > 20


def test_the_probability_by_hand() -> None:
    # of 100 labels 10 were mixed up among 3 classes: 0.9 * 0.2 are right for each 0.1 * 0.8 / 2 that are wrong
    noise = LabelNoise(0.1, 1.0)
    assert noise.wrong(np.array([0.2, 1.0, 0.0]), 3) == pytest.approx([0.04 / (0.18 + 0.04), 0.0, 1.0])
    logits = np.log(np.array([[0.2, 0.3, 0.5]], np.float32))
    assert noise.self_confidence(logits, np.array([0])) == pytest.approx([0.2])
