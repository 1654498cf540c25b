"""Intervals and the comparison of two models, against scipy and by simulation."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest, t, ttest_1samp
from torchmetrics.functional.classification import binary_auroc

from effnet.errors import ArgumentError
from effnet.metrics.intervals import (
    auroc,
    auroc_interval,
    binomial_tail,
    check_arrays,
    compare_top1,
    mean_interval,
    student,
    wilson,
)


@pytest.mark.parametrize(("count", "n"), [(0, 1), (1, 1), (0, 40), (37, 40), (40, 40), (1, 1000), (77_123, 100_000)])
def test_wilsons_interval_is_scipys(count: int, n: int) -> None:
    expected = binomtest(count, n).proportion_ci(0.95, method="wilson")
    found = wilson(count, n)
    assert (found.value, found.low, found.high) == pytest.approx((count / n, expected.low, expected.high), abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize(("count", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_there_is_no_share_of_nothing(count: int, n: int) -> None:
    with pytest.raises(ArgumentError, match=f"{count} of {n}"):
        wilson(count, n)


@pytest.mark.parametrize(("count", "n", "chance"), [(0, 59, 0.05), (3, 20, 0.5), (20, 20, 0.3), (400, 20_000, 0.02)])
def test_the_tail_is_scipys(count: int, n: int, chance: float) -> None:
    assert binomial_tail(count, n, chance) == pytest.approx(binom.cdf(count, n, chance), rel=1e-9)


def made(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of two models for images of three classes, so many of which each gets right."""
    labels = np.arange(both + only_a + only_b + neither) % 3
    right_a = np.repeat([True, True, False, False], (both, only_a, only_b, neither))
    right_b = np.repeat([True, False, True, False], (both, only_a, only_b, neither))
    a, b = (np.eye(3, dtype=np.float32)[np.where(right, labels, (labels + 1) % 3)] for right in (right_a, right_b))
    return a, b, labels


@pytest.mark.parametrize("cells", [(70, 3, 12, 15), (70, 12, 3, 15), (5, 0, 0, 5), (0, 0, 6, 0), (900, 40, 42, 18)])
def test_a_comparison_is_of_the_same_images(cells: tuple[int, int, int, int]) -> None:
    both, only_a, only_b, _ = cells
    n = sum(cells)
    found = compare_top1(*made(*cells))
    assert (found.n, found.only_a, found.only_b) == (n, only_a, only_b)
    assert found.accuracy_a == wilson(both + only_a, n)
    assert found.accuracy_b == wilson(both + only_b, n)
    assert found.accuracy.value == pytest.approx((only_b - only_a) / n)
    # McNemar's exact test is a sign test on the images that the models disagree on
    expected = binomtest(only_b, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert found.p == pytest.approx(expected)
    # Bonett and Price 2012: one more image in each of the two cells, two more in all
    p, q = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    reach = 1.959964 * math.sqrt((p + q - (q - p) ** 2) / (n + 2))
    assert (found.accuracy.low, found.accuracy.high) == pytest.approx((q - p - reach, min(1, q - p + reach)), abs=1e-6)
    json.dumps(found.to_dict())


def test_what_can_be_told() -> None:
    better = compare_top1(*made(70, 3, 17, 10))
    assert better.significant
    assert better.accuracy.low > 0
    worse = compare_top1(*made(70, 17, 3, 10))
    assert worse.significant
    assert (worse.accuracy.low, worse.accuracy.high) == pytest.approx((-better.accuracy.high, -better.accuracy.low))
    assert worse.p == better.p
    assert not compare_top1(*made(70, 8, 12, 10)).significant


def test_the_interval_of_a_difference_holds_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    chances = (0.75, 0.05, 0.12, 0.08)
    held = []
    for cells in random.multinomial(150, chances, 400):
        found = compare_top1(*made(*cells.tolist())).accuracy
        held.append(found.low <= 0.07 <= found.high)
    assert np.mean(held) >= 0.93


def test_models_may_have_other_classes_beyond_the_labels() -> None:
    a, b, labels = made(5, 1, 2, 2)
    wider = np.concatenate([b, np.full((10, 4), -9, np.float32)], 1)
    assert compare_top1(a, wider, labels) == compare_top1(a, b, labels)
    with pytest.raises(ArgumentError, match="must be of the same 10 images"):
        compare_top1(a, b[:9], labels)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 31, 190, 1001])
def test_students_t_is_scipys(freedom: int) -> None:
    assert student(freedom) == pytest.approx(t.ppf(0.975, freedom), rel=1e-12)


def test_the_interval_of_a_mean_is_scipys() -> None:
    values = [0.3, -0.1, 0.25, 0.7]
    found, expected = mean_interval(values), ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(values), *expected))
    with pytest.raises(ArgumentError, match="at least two"):
        mean_interval([1.0])


GOOD = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (GOOD[:0], [], "0 images"),
        (GOOD[0], [0], r"must be \(N, K\) floats"),
        (np.zeros((2, 0)), [0, 0], r"must be \(N, K\) floats"),
        (GOOD.astype(int), [0, 1], r"must be \(N, K\) floats"),
        (GOOD, [0], r"must be \(2,\) whole numbers"),
        (GOOD, [0.0, 1.0], r"must be \(2,\) whole numbers"),
        (GOOD, [0, 3], r"`labels` \(=3\) must be from 0 to 2"),
        (GOOD, [0, -1], r"`labels` \(=-1\) must be from 0 to 2"),
        (np.array([[0.0, 0, 0], [0, np.nan, 0]]), [0, 1], "must be finite; image 1 is the first"),
        (np.array([[0.0, np.inf, 0], [0, 0, 0]]), [0, 1], "must be finite; image 0 is the first"),
    ],
)
def test_arrays_that_do_not_fit(logits: np.ndarray, labels: list[int], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        check_arrays(logits, labels)


def test_the_auroc_is_torchmetrics() -> None:
    random = np.random.default_rng(0)
    higher, lower = random.integers(2, 9, 60).astype(float), random.integers(0, 7, 45).astype(float)  # many are equal
    scores, kind = torch.from_numpy(np.concatenate([higher, lower])), torch.tensor([1] * 60 + [0] * 45)
    assert auroc(higher, lower).value == pytest.approx(float(binary_auroc(scores / 9, kind)))


@pytest.mark.parametrize(("value", "m", "n"), [(0.8, 30, 50), (0.5, 10, 10), (1.0, 20, 5), (0.97, 1000, 3)])
def test_the_ends_of_an_aurocs_interval_are_where_newcombe_puts_them(value: float, m: int, n: int) -> None:
    found = auroc_interval(value, m, n)
    for area in (found.low, found.high):
        many = (m + n) / 2 - 1  # in place of m - 1 and n - 1 in Hanley and McNeil's variance
        first, second = area / (2 - area), 2 * area**2 / (1 + area)
        variance = area * (1 - area) + many * (first - area**2) + many * (second - area**2)
        assert abs(area - value) == pytest.approx(1.959964 * (variance / (m * n)) ** 0.5, abs=1e-6)
    assert found.low < value <= found.high


def test_the_auroc_of_normal_scores_is_within_its_interval() -> None:
    """P(x > y) of N(1, 1) and N(0, 1) is Phi(1 / sqrt 2) = .7602."""
    random = np.random.default_rng(0)
    drawn = [auroc(random.normal(1, 1, 25), random.normal(0, 1, 40)) for _ in range(400)]
    assert 0.93 <= np.mean([found.low <= 0.7602 <= found.high for found in drawn]) <= 0.985


def test_scores_of_both_kinds_are_needed() -> None:
    for pair in (([], [1.0]), ([1.0], []), ([float("nan")], [1.0])):
        with pytest.raises(ArgumentError, match="`scores`"):
            auroc(*(np.array(each) for each in pair))
