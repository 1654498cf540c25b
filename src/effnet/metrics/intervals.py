"""Confidence intervals of figures on n images, and whether two models differ.

    accuracy, recall, coverage   Wilson's interval for a share (Wilson 1927): never outside 0 ... 1, and not empty at 0
    difference of accuracies     the same images for both models: Bonett and Price's adjusted interval (2012), and
                                 McNemar's exact test on the images that only one of them gets right
    a mean                       Student's t
    area under the ROC curve     Newcombe's method 5 (2006, part 2), which like Wilson's is not empty at 1

All intervals are at 95 %. They assume images drawn independently from one population: video frames and near-duplicates
are worth fewer images than they are, and another camera is another population.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effnet.errors import ArgumentError
from effnet.runtime.session import Logits

CONFIDENCE = 0.95
ROWS, CELLS = 4096, 2**22  # images and logits per block: 34 MB in double precision
BISECTIONS = 50  # of an interval of 1, to the precision of a float
Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)  # 1.96

Labels = NDArray[np.int64]  # (N,)


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds of its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Two models on the same images; positive if the second is better."""

    n: int
    accuracy_a: Interval
    accuracy_b: Interval
    accuracy: Interval  # accuracy of b minus accuracy of a
    only_a: int  # images that only a gets right: McNemar's b
    only_b: int  # images that only b gets right: McNemar's c
    p: float  # McNemar's exact test, two-sided

    @property
    def significant(self) -> bool:
        """Whether the models differ by both the test and the interval."""
        return self.p < 1 - CONFIDENCE and not self.accuracy.low <= 0 <= self.accuracy.high

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values."""
        return {**asdict(self), "significant": self.significant}


def wilson(count: int, n: int) -> Interval:
    """The share count / n with Wilson's interval.

    Raises:
        ArgumentError: `n` is below 1, or `count` is not between 0 and `n`.
    """
    if n < 1 or not 0 <= count <= n:
        raise ArgumentError("count", f"{count} of {n}", "must be a count from 0 to n, of at least 1.")
    share, weight = count / n, Z * Z / n
    middle = (share + weight / 2) / (1 + weight)
    reach = Z / (1 + weight) * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    low = 0.0 if count == 0 else max(0.0, middle - reach)  # exactly 0 and 1 despite rounding
    return Interval(share, low, 1.0 if count == n else min(1.0, middle + reach))


def binomial_tail(count: int, n: int, chance: float) -> float:
    """The probability of at most `count` successes in `n` trials, each of probability `chance`, above 0, below 1."""
    whole, hit, miss = math.lgamma(n + 1), math.log(chance), math.log1p(-chance)
    terms = (
        math.exp(whole - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * hit + (n - i) * miss)
        for i in range(count + 1)
    )
    return min(1.0, math.fsum(terms))


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of at least two values with the interval of Student's t."""
    if len(values) < 2:
        raise ArgumentError("values", f"{len(values)}", "must be at least two.")
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    reach = student(len(values) - 1) * spread
    return Interval(mean, mean - reach, mean + reach)


def student(freedom: int) -> float:
    """Student's t that is not exceeded, on either side, with a probability of CONFIDENCE, by bisection.

    The probability is Abramowitz and Stegun's finite sum (26.7.3 and 26.7.4), in the angle atan(t / sqrt(freedom)).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        cosine, odd = math.cos(angle), freedom % 2
        term, total = (cosine, 0.0) if odd else (1.0, 0.0)
        for k in range(2 + odd, freedom + 1, 2):
            total += term
            term *= cosine * cosine * (k - 1) / k
        within = math.sin(angle) * total
        within = 2 / math.pi * (angle + within) if odd else within
        low, high = (angle, high) if within < CONFIDENCE else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def compare_top1(logits_a: Logits, logits_b: Logits, labels: Sequence[int] | Labels) -> Difference:
    """Compare the accuracy of two models on the same images; either may have more classes than the labels.

    Raises:
        ArgumentError: the arrays do not match; see `check_arrays`.
    """
    if len(logits_a) != len(logits_b):
        raise ArgumentError("logits_b", f"{len(logits_b)} images", f"must be of the same {len(logits_a)} images.")
    right = []
    for logits in (logits_a, logits_b):
        outputs, truth = check_arrays(logits, labels)
        right.append(outputs.argmax(1) == truth)
    return compare_right(*right)


def compare_right(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> Difference:
    """Compare two models by which images they get right, (N,) each."""
    n, only_a, only_b = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    share_a, share_b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    reach = Z * math.sqrt((share_a + share_b - (share_b - share_a) ** 2) / (n + 2))
    middle = share_b - share_a
    gain = Interval((only_b - only_a) / n, max(-1.0, middle - reach), min(1.0, middle + reach))
    p = min(1.0, 2 * binomial_tail(min(only_a, only_b), only_a + only_b, 0.5))
    return Difference(n, wilson(int(a.sum()), n), wilson(int(b.sum()), n), gain, only_a, only_b, p)


def auroc(higher: NDArray[np.floating[Any]], lower: NDArray[np.floating[Any]]) -> Interval:
    """The probability that a score of the first kind (M,) is above one of the second (N,); ties count half.

    Raises:
        ArgumentError: a kind has no scores, or one that is not a number.
    """
    scores = np.concatenate([higher, lower])
    if not len(higher) or not len(lower) or np.isnan(scores).any():
        raise ArgumentError(
            "scores", f"{len(higher)} and {len(lower)}", "must be at least one of each kind, of numbers."
        )
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # from 1; equal scores share the mean of theirs
    wins = ranks[: len(higher)].sum() - len(higher) * (len(higher) + 1) / 2
    return auroc_interval(float(wins) / (len(higher) * len(lower)), len(higher), len(lower))


def auroc_interval(value: float, m: int, n: int) -> Interval:
    """The interval of an AUROC of m and n scores: where its distance from `value` is Z standard errors of itself."""

    def beyond(area: float) -> bool:
        many = (m + n) / 2 - 1
        variance = area * (1 - area) / (m * n)
        variance *= 1 + many * (1 - area) / (2 - area) + many * area / (1 + area)
        return (area - value) ** 2 > Z * Z * variance

    ends = []
    for end in (0.0, 1.0):
        near, far = value, end
        for _ in range(BISECTIONS):
            middle = (near + far) / 2
            near, far = (near, middle) if beyond(middle) else (middle, far)
        ends.append(end if value == end else (near + far) / 2)
    return Interval(value, *ends)


def row_blocks(logits: Logits) -> Iterator[slice]:
    """Slices of rows to process at once, so that temporary arrays stay small for any number of classes."""
    rows = max(1, min(ROWS, CELLS // max(1, logits.shape[1])))
    return (slice(first, first + rows) for first in range(0, len(logits), rows))


def check_arrays(logits: Logits, labels: Sequence[int] | Labels) -> tuple[Logits, Labels]:
    """Check that the arrays are (N, K) finite floats and N labels from 0 to K - 1, N at least 1, and return them.

    Raises:
        ArgumentError: they are not.
    """
    outputs, truth = np.asarray(logits), np.asarray(labels)
    if outputs.ndim != 2 or not outputs.shape[1] or not np.issubdtype(outputs.dtype, np.floating):
        raise ArgumentError("logits", f"{outputs.shape} {outputs.dtype}", "must be (N, K) floats.")
    if not len(outputs):
        raise ArgumentError("logits", "0 images", "must be of at least one image.")
    if truth.shape != (len(outputs),) or not np.issubdtype(truth.dtype, np.integer):
        raise ArgumentError("labels", f"{truth.shape} {truth.dtype}", f"must be ({len(outputs)},) whole numbers.")
    broken = np.concatenate([~np.isfinite(outputs[rows]).all(1) for rows in row_blocks(outputs)])
    if broken.any():
        index = int(broken.argmax())
        raise ArgumentError("logits", outputs[index].tolist()[:8], f"must be finite; image {index} is the first.")
    classes = outputs.shape[1]
    if truth.min() < 0 or truth.max() >= classes:
        wrong = int(truth[(truth < 0) | (truth >= classes)][0])
        raise ArgumentError("labels", wrong, f"must be from 0 to {classes - 1}, one of the {classes} outputs.")
    return outputs, truth.astype(np.int64)
