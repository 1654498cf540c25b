"""How a trained model knows its limits, besides its calibration: label sets, and the familiarity of images.

    LabelSets     sets of labels that contain the true one with a requested coverage
    Familiarity   a score per image, high for images like the training images, and its threshold

metrics/conformal.py and metrics/familiarity.py fit them. A score is computed from the logits or from the pooled
features. The arrays that it compares with are stored as the text of a safetensors file, for JSON.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from effnet.errors import ArgumentError
from effnet.fields import check_fields, finite_floats, number, one_of, positive_int, set_field

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]

# Max-softmax: Hendrycks and Gimpel 2017; energy: Liu et al. 2020; Mahalanobis: Lee et al. 2018, with the shared
# covariance of a few principal components; k-nearest neighbours: Sun et al. 2022, among them; ViM: Wang et al. 2022.
ScoreName = Literal["max-softmax", "energy", "mahalanobis", "neighbours", "vim"]
OF_LOGITS: tuple[ScoreName, ...] = ("max-softmax", "energy")  # the others need features
LEAST, MOST = 50, 99  # range of coverages in percent


@dataclass(frozen=True)
class LabelSets:
    """For each coverage the least probability that a label of the set has, found on images not trained on."""

    n: int  # images that they were found on
    split: str  # the split of the data that these are
    floors: tuple[float, ...]  # for 50 %, 51 % ... of coverage, up to 99 % or as far as `n` images reach

    def __post_init__(self) -> None:
        positive_int("n", self.n)
        check_fields(self, finite_floats, "floors")
        if len(self.floors) > MOST - LEAST + 1 or not all(0 <= floor <= 1 for floor in self.floors):
            raise ArgumentError("floors", self.floors[:8], "must be probabilities, one for each percent of coverage.")

    def floor(self, coverage: float) -> float:
        """The least probability of a label in a set of this coverage, which is a whole percentage: .9 or .95.

        Raises:
            ArgumentError: it is not, or there were too few images for it: about 1 / (1 - coverage) are needed.
        """
        percent = 100 * number("sets", coverage)
        index = round(percent) - LEAST
        if abs(percent - round(percent)) > 1e-9 or not 0 <= index <= MOST - LEAST:
            raise ArgumentError("sets", coverage, f"must be whole percents from .{LEAST} to .{MOST}, such as .9.")
        if index >= len(self.floors):
            needed = least_images(round(percent))
            raise ArgumentError(
                "sets", coverage, f"takes at least {needed} images of {self.split}; there were {self.n}."
            )
        return self.floors[index]

    def members(self, probabilities: Floats, coverage: float) -> NDArray[np.bool_]:
        """Which labels are in the set of each image, (N, K), of calibrated probabilities (N, K); never none of them."""
        best = probabilities.max(1, keepdims=True)
        found: NDArray[np.bool_] = (probabilities >= self.floor(coverage)) | (probabilities == best)
        return found


def least_images(percent: int) -> int:
    """The fewest images on which a coverage of so many percent can be calibrated: n with (n + 1) percent <= 100 n."""
    return -(-percent // (100 - percent))


@dataclass(frozen=True)
class Familiarity:
    """How a model detects images unlike its training images.

    The score was chosen by leaving whole classes out: how often an image of the other classes gets a higher score than
    one of a left-out class (AUROC). The network had seen the left-out classes, so images of no class at all may be
    detected more or less well.
    """

    score: ScoreName
    threshold: float  # images below it are unfamiliar
    n: int  # images of `split` that set the threshold, so that 95 % of them are at or above it
    split: str
    images: int  # training images that it was fitted to
    left_out: int  # groups of classes that were left out in turn
    aurocs: Mapping[str, tuple[float, float, float]]  # of each score: value, and its interval at 95 %
    tensors: str = field(default="", repr=False)  # what it compares with: a safetensors file in base64

    def __post_init__(self) -> None:
        one_of("score", self.score, ScoreName)
        check_fields(self, number, "threshold")
        check_fields(self, positive_int, "n", "images", "left_out")
        found = {name: finite_floats("aurocs", values) for name, values in dict(self.aurocs).items()}
        if self.score not in found or not all(len(values) == 3 for values in found.values()):
            raise ArgumentError("aurocs", found, f"must have three numbers for each score, {self.score} among them.")
        set_field(self, "aurocs", found)  # JSON has only lists
        if not isinstance(self.tensors, str):
            raise ArgumentError("tensors", type(self.tensors).__name__, "must be the text of a file.")

    def __str__(self) -> str:
        value, low, high = self.aurocs[self.score]
        return (
            f"Images are told by {self.score}, whose threshold accepts 95 % of {self.n:,} {self.split} images; with "
            f"classes left out in {self.left_out} groups its AUROC was {value:.3f} ({low:.3f} to {high:.3f})"
        )

    @property
    def needs_features(self) -> bool:
        """Whether the pooled features are needed, not only the logits."""
        return self.score not in OF_LOGITS

    @cached_property
    def arrays(self) -> dict[str, Floats]:
        """The arrays that the score compares with, by name."""
        from effnet.weights.arrays import MALFORMED, read_safetensors

        try:
            return read_safetensors(memoryview(base64.b64decode(self.tensors))) if self.tensors else {}
        except MALFORMED as error:
            raise ArgumentError(
                "tensors", self.tensors[:20], f"must be a safetensors file in base64: {error}."
            ) from error

    def of(self, logits: Floats, features: Floats | None = None) -> NDArray[np.float64]:
        """The score (N,) of images by their logits (N, K) and, where it needs them, their pooled features (N, C)."""
        return score_images(self.score, self.arrays, logits, features)


def score_images(
    score: ScoreName, arrays: Mapping[str, Floats], logits: Floats, features: Floats | None = None
) -> NDArray[np.float64]:
    """The familiarity of images, (N,), higher for more familiar ones.

    Args:
        score: which score.
        arrays: what it compares with: `center` (C,) and an orthonormal `basis` (C, d) of features; of mahalanobis
            `whiten` (d, d) and the classes' means as `points` (K, d); of neighbours `points` (M, d) of length 1, and
            `k`; of vim `alpha`.
        logits: (N, K), raw.
        features: (N, C): means over the last feature map; only for a score that needs them.
    """
    import numpy as np

    found: NDArray[np.float64]
    shifted = np.array(logits, np.float64)
    best = shifted.max(1, keepdims=True)
    shifted -= best
    powers = np.exp(shifted)
    if score == "max-softmax":  # its logarithm, which still differs where the probability rounds to 1
        np.put_along_axis(powers, shifted.argmax(1)[:, None], 0.0, 1)
        found = -np.log1p(powers.sum(1))
        return found
    energy: NDArray[np.float64] = np.log(powers.sum(1)) + best[:, 0]
    if score == "energy":
        return energy
    centred = np.asarray(features, np.float64) - arrays["center"]
    inside = centred @ arrays["basis"].astype(np.float64)
    if score == "vim":
        outside = np.maximum((centred**2).sum(1) - (inside**2).sum(1), 0)
        found = energy - float(arrays["alpha"][0]) * np.sqrt(outside)
        return found
    points = arrays["points"].astype(np.float64)
    if score == "mahalanobis":
        found = -_distances(inside @ arrays["whiten"].astype(np.float64), points).min(1)
        return found
    inside /= np.maximum(np.linalg.norm(inside, axis=1, keepdims=True), 1e-12)
    k = int(arrays["k"][0])
    found = -np.sqrt(np.partition(_distances(inside, points), k - 1, axis=1)[:, k - 1])
    return found


def _distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared distances (N, M) of points (N, d) and (M, d)."""
    found: NDArray[np.float64] = ((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T).clip(0)
    return found
