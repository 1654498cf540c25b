"""Label sets with guaranteed coverage: split-conformal prediction by the probability of a label.

LAC (Sadinle, Lei and Wasserman 2019): the set holds every label whose probability is at least a floor. For a coverage c
the floor is the ceil((n + 1) c)-th largest probability that a true label had among n images that the model was not
trained on. Then a set has the true label of a new image with a chance of at least c: over the draw of both, for images
drawn like these n, and over all classes together, not for each. Two departures: the best label is always in its set, so
that none is empty and the coverage may be higher; and the probabilities are those of a temperature fitted to the same n
images, one number, which the guarantee leaves out. The best weights were chosen on a val split as well, so measure the
coverage on test images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from effnet.metrics.intervals import Interval, Labels, check_arrays, row_blocks, wilson
from effnet.runtime.prediction import probabilities
from effnet.runtime.session import Logits
from effnet.weights.sureness import LEAST, MOST, LabelSets, least_images


@dataclass(frozen=True)
class Covered:
    """The label sets of labelled images."""

    coverage: float  # as requested
    found: Interval  # share of the sets that have the true label
    labels: float  # mean size of a set
    single: Interval  # share of the sets with one label

    def __str__(self) -> str:
        return (
            f"Label sets for a coverage of {self.coverage:.0%} have the true label in {self.found.value:.1%} "
            f"({self.found.low:.1%} to {self.found.high:.1%}) of the images, with {self.labels:.2f} labels on average; "
            f"{self.single.value:.1%} are one label"
        )


def calibrate_sets(
    logits: Logits, labels: Sequence[int] | Labels, temperature: float = 1.0, *, split: str = "val"
) -> LabelSets:
    """The floor of each coverage that this many images can guarantee; see the module's docstring."""
    outputs, truth = check_arrays(logits, labels)
    true = np.empty(len(outputs))
    for rows in row_blocks(outputs):
        chances = probabilities(outputs[rows], temperature)
        true[rows] = np.take_along_axis(chances, truth[rows, None], 1)[:, 0]
    falling, n = np.sort(true)[::-1], len(true)
    ranks = (-(-(n + 1) * percent // 100) for percent in range(LEAST, MOST + 1) if n >= least_images(percent))
    return LabelSets(n, split, tuple(float(falling[rank - 1]) for rank in ranks))


def measure_sets(
    logits: Logits, labels: Sequence[int] | Labels, temperature: float, sets: LabelSets, coverage: float
) -> Covered:
    """Measure the label sets of a coverage on images other than those that they were calibrated on.

    Raises:
        ArgumentError: the coverage is not available, or the arrays do not match.
    """
    outputs, truth = check_arrays(logits, labels)
    sizes, right = np.empty(len(outputs), np.int64), np.empty(len(outputs), bool)
    for rows in row_blocks(outputs):
        members: NDArray[np.bool_] = sets.members(probabilities(outputs[rows], temperature), coverage)
        sizes[rows] = members.sum(1)
        right[rows] = np.take_along_axis(members, truth[rows, None], 1)[:, 0]
    n = len(truth)
    return Covered(coverage, wilson(int(right.sum()), n), float(sizes.mean()), wilson(int((sizes == 1).sum()), n))
