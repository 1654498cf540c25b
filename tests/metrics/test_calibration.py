"""Calibration against torchmetrics and scipy; the promise of the threshold, kept in simulated validations."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from torchmetrics.functional.classification import multiclass_calibration_error

from effnet.errors import ArgumentError
from effnet.metrics.calibration import (
    Abstention,
    abstain,
    apply_threshold,
    calibrate,
    confidence,
    fit_temperature,
    reliability,
)
from effnet.metrics.intervals import wilson


def made(n: int, k: int, sharpness: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are calibrated at temperature `sharpness`: the labels are drawn by their probabilities."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2.5, (n, k))
    labels = (np.cumsum(softmax(logits, 1), 1) < random.random((n, 1))).sum(1).clip(max=k - 1)
    return (logits * sharpness).astype(np.float32), labels


@pytest.mark.parametrize(("k", "temperature"), [(2, 0.5), (7, 1.0), (1000, 3.0)])
def test_the_calibration_error_is_torchmetrics(k: int, temperature: float) -> None:
    logits, labels = made(500, k, 2.0)
    found = reliability(logits, labels, temperature)
    chances = softmax(logits.astype(float) / temperature, 1)
    expected = multiclass_calibration_error(
        torch.from_numpy(chances), torch.from_numpy(labels), num_classes=k, n_bins=15, norm="l1"
    )
    assert found.ece == pytest.approx(float(expected), abs=1e-6)
    truth = np.eye(k)[labels]
    assert found.brier == pytest.approx(((chances - truth) ** 2).sum(1).mean())
    assert found.loss == pytest.approx(-np.log(chances[np.arange(500), labels]).mean())
    np.testing.assert_allclose(confidence(logits, temperature), chances.max(1))


def test_bins_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = made(300, 4)
    logits[:3] = [500, 0, 0, 0]  # a confidence of exactly 1 belongs to the last bin
    found = reliability(logits, labels)
    assert len(found.counts) == 15
    assert sum(found.counts) == 300
    assert found.counts[-1] >= 3
    right = (logits.argmax(1) == labels).mean()
    assert np.dot(found.counts, found.accuracy) / 300 == pytest.approx(right)
    assert np.dot(found.counts, found.confidence) / 300 == pytest.approx(confidence(logits).mean())
    monkeypatch.setattr("effnet.metrics.intervals.ROWS", 7)  # some at a time, or all
    assert reliability(logits, labels).ece == pytest.approx(found.ece)


def test_a_bin_holds_its_fifteenth() -> None:
    found = reliability(*sure_and_right([0.61, 0.65, 0.8, 0.99], [True, False, True, True]))
    counts = [0] * 15
    counts[9], counts[12], counts[14] = 2, 1, 1  # from 9/15 = 0.6, 12/15 = 0.8, 14/15 = 0.933 on
    assert found.counts == tuple(counts)
    assert found.accuracy[9] == 0.5
    assert found.confidence[9] == pytest.approx(0.63)


@pytest.mark.parametrize("sharpness", [0.02, 1.0, 40.0])
@pytest.mark.parametrize("k", [2, 10])
def test_the_temperature_is_where_scipy_finds_it(sharpness: float, k: int) -> None:
    logits, labels = made(400, k, sharpness)

    def cost(log: float) -> float:
        scores = log_softmax(logits.astype(float) / np.exp(log), 1)
        return -scores[np.arange(len(labels)), labels].sum() + log**2 / 2

    expected = np.exp(minimize_scalar(cost, bounds=(-8, 8), method="bounded", options={"xatol": 1e-9}).x)
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-4)


def test_many_images_outweigh_what_keeps_it_within_reason() -> None:
    logits, labels = made(4000, 5, 3.0)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(3.0, rel=0.06)
    assert reliability(logits, labels, found).ece < 0.03 < reliability(logits, labels).ece
    plain = minimize_scalar(lambda t: reliability(logits, labels, t).loss, bounds=(1, 9), method="bounded")
    assert found == pytest.approx(plain.x, rel=0.003)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_temperature_stays_finite_where_nothing_or_everything_is_wrong(scale: float) -> None:
    labels = np.arange(30) % 3
    right = (np.eye(3)[labels] * 5 * scale).astype(np.float32)
    assert 0.1 < fit_temperature(right, labels) <= 1.0
    assert 1 < fit_temperature(right, (labels + 1) % 3) < 1e6
    assert fit_temperature(np.zeros((30, 3)), labels) == 1
    assert fit_temperature(np.ones((3, 1)), [0, 0, 0]) == 1


def sure_and_right(chances: list[float], right: list[bool]) -> tuple[np.ndarray, list[int]]:
    """Two classes, the first named with these probabilities (over a half)."""
    logits = np.zeros((len(chances), 2))
    logits[:, 0] = np.log(np.array(chances) / (1 - np.array(chances)))
    return logits, [0 if each else 1 for each in right]


def test_everything_is_answered_where_nothing_is_wrong() -> None:
    found = abstain(*sure_and_right(np.linspace(0.6, 0.99, 59).tolist(), [True] * 59))
    assert found == Abstention(0.0, wilson(59, 59), wilson(0, 59))
    # one image fewer cannot show it: 0.95 ** 58 is above 0.05
    found = abstain(*sure_and_right(np.linspace(0.6, 0.99, 58).tolist(), [True] * 58))
    assert found == Abstention(None, wilson(0, 58), None)


def test_the_threshold_leaves_the_unsure_out() -> None:
    chances = [0.99] * 300 + [0.6] * 100
    found = abstain(*sure_and_right(chances, [True] * 300 + [False] * 100))
    assert found.threshold == pytest.approx(0.99)
    assert found.coverage.value == 0.75
    assert found.error == wilson(0, 300)
    warmer = abstain(*sure_and_right(chances, [True] * 300 + [False] * 100), temperature=2.0)
    assert warmer.threshold == pytest.approx(99**0.5 / (1 + 99**0.5))


def test_the_first_share_that_fails_ends_it() -> None:
    assert abstain(*sure_and_right([0.99] * 200 + [0.6] * 200, [False] * 200 + [True] * 200)).threshold is None
    # 25 of the surest 400 are wrong, and of all 1200 no more: more than 0.05, then less
    chances = np.linspace(0.99, 0.8, 1200).tolist()
    assert abstain(*sure_and_right(chances, [False] * 25 + [True] * 1175)).threshold is None
    assert abstain(*sure_and_right(chances, [True] * 1175 + [False] * 25)).threshold == 0.0

    # one wrong label among the surest does not
    chances = np.linspace(0.99, 0.8, 400).tolist()
    found = abstain(*sure_and_right(chances, [False] + [True] * 399))
    assert found.threshold == 0.0
    assert found.error == wilson(1, 400)


@pytest.mark.parametrize("n", [100, 1500])
def test_the_promise_is_kept_in_19_of_20_validations(n: int) -> None:
    random = np.random.default_rng(n)

    def draw(images: int) -> tuple[np.ndarray, np.ndarray]:
        chances = random.beta(6, 0.8, images) / 2 + 0.499  # half a percent of the surest is wrong, a half of the others
        return chances, random.random(images) < chances

    chances, right = draw(400_000)
    order = np.argsort(-chances)
    surest, wrong = chances[order], np.cumsum(~right[order]) / np.arange(1, len(order) + 1)
    broken = covered = 0
    for _ in range(300):
        threshold = abstain(*sure_and_right(*(each.tolist() for each in draw(n)))).threshold
        if threshold is not None:
            answered = int((surest >= threshold).sum())
            broken += wrong[answered - 1] > 0.05
            covered += answered / len(surest)
    assert broken / 300 <= 0.06  # 0.05, and a little for so few validations
    if n == 1500:
        assert covered / 300 > 0.4  # and it is not kept by answering nothing


def test_another_error_is_another_threshold() -> None:
    chances = np.concatenate([np.linspace(0.9, 0.999, 600), np.linspace(0.5, 0.9, 400)])
    logits, labels = sure_and_right(chances.tolist(), [True] * 600 + [True, False] * 200)
    strict, loose = (abstain(logits, labels, error=error) for error in (0.02, 0.2))
    assert strict.threshold is not None
    assert loose.threshold is not None
    assert strict.threshold > loose.threshold
    with pytest.raises(ArgumentError, match=r"`error` \(=1\)"):
        abstain(logits, labels, error=1)


def test_a_threshold_is_used_as_it_was_chosen() -> None:
    logits, labels = made(2000, 4, 2.0, seed=2)
    temperature = fit_temperature(logits, labels)
    chosen = abstain(logits, labels, temperature, 0.1)
    assert apply_threshold(logits, labels, temperature, chosen.threshold) == chosen
    assert apply_threshold(logits, labels, temperature, None).error is None
    fitted = calibrate(logits, labels, error=0.1)
    assert (fitted.temperature, fitted.threshold) == (temperature, chosen.threshold)
    assert (fitted.error, fitted.n, fitted.split) == (0.1, 2000, "val")


@pytest.mark.parametrize("temperature", [0, -1, float("nan"), float("inf")])
def test_a_temperature_is_above_zero(temperature: float) -> None:
    with pytest.raises(ArgumentError, match="`temperature`"):
        reliability(*made(3, 2), temperature)
