"""Label sets against crepes, and their coverage in simulated validations."""

import numpy as np
import pytest
from crepes import ConformalClassifier
from scipy.special import softmax

from effnet.errors import ArgumentError
from effnet.metrics.conformal import Covered, calibrate_sets, measure_sets
from effnet.metrics.intervals import wilson
from effnet.weights.sureness import LabelSets


def made(n: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are right about two times in three."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, k, n)
    logits = random.normal(0, 1, (n, k))
    logits[np.arange(n), labels] += random.normal(1.5, 1, n)
    return logits.astype(np.float32), labels


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_sets_are_those_of_crepes(coverage: float, temperature: float) -> None:
    logits, labels = made(400, 6, 0)
    new, _ = made(300, 6, 1)
    sets = calibrate_sets(logits, labels, temperature)
    chances, others = (softmax(each.astype(float) / temperature, 1) for each in (logits, new))
    oracle = ConformalClassifier()
    oracle.fit(1 - chances[np.arange(400), labels])
    expected = oracle.predict_set(1 - others, confidence=coverage, smoothing=False).astype(bool)
    expected[np.arange(300), others.argmax(1)] = True  # ours always has the best label
    np.testing.assert_array_equal(sets.members(others, coverage), expected)
    assert 1 < expected.sum(1).mean() < 6 or coverage == 0.5


@pytest.mark.parametrize(("n", "coverage"), [(30, 0.9), (300, 0.95)])
def test_new_images_are_covered(n: int, coverage: float) -> None:
    """Over many validations of n images; with continuous scores the mean is between c and c + 1 / (n + 1)."""
    hits = []
    for seed in range(150):
        logits, labels = made(n + 200, 5, seed)
        sets = calibrate_sets(logits[:n], labels[:n])
        hits.append(measure_sets(logits[n:], labels[n:], 1.0, sets, coverage).found.value)
    error = np.std(hits) / 150**0.5
    assert coverage - 3 * error < np.mean(hits) < coverage + 1 / (n + 1) + 3 * error + 0.005  # the best label's share


def test_too_few_images_refuse_a_coverage() -> None:
    logits, labels = made(8, 3, 0)
    sets = calibrate_sets(logits, labels)
    assert sets.n == 8
    assert sets.members(np.eye(3), 0.88).any()  # 9 x .88 rounds up to 8
    with pytest.raises(ArgumentError, match=r"at least 9 images of val; there were 8"):
        sets.floor(0.9)
    assert calibrate_sets(*made(9, 3, 0)).floor(0.9) > 0
    with pytest.raises(ArgumentError, match="at least 99 images"):
        calibrate_sets(*made(98, 3, 0)).floor(0.99)
    assert len(calibrate_sets(*made(99, 3, 0)).floors) == 50


@pytest.mark.parametrize("coverage", [0.49, 0.995, 1.0, 90, 0.905, -0.9])
def test_a_coverage_is_a_whole_percentage(coverage: float) -> None:
    with pytest.raises(ArgumentError, match=r"whole percents from \.50 to \.99"):
        calibrate_sets(*made(500, 3, 0)).floor(coverage)


def test_every_percentage_is_one() -> None:
    sets = LabelSets(500, "val", tuple(1 - percent / 100 for percent in range(50, 100)))
    for percent in range(50, 100):
        assert sets.floor(percent / 100) == 1 - percent / 100


def test_sets_are_counted() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.1, 0.1, 0.8], [0.34, 0.33, 0.33]]))
    sets = LabelSets(20, "val", (0.3,))
    found = measure_sets(logits, [0, 2, 0, 1], 1.0, sets, 0.5)
    assert found == Covered(0.5, wilson(2, 4), (1 + 2 + 1 + 3) / 4, wilson(2, 4))
    assert measure_sets(logits[:1] * 0.01, [0], 0.01, sets, 0.5).labels == 1  # at the temperature


def test_no_set_is_empty() -> None:
    sets = LabelSets(20, "val", (0.9,))
    np.testing.assert_array_equal(sets.members(np.array([[0.5, 0.3, 0.2]]), 0.5), [[True, False, False]])
