"""A hand-made network that looks at one corner: it counts the bright pixels of each cell."""

from __future__ import annotations

import numpy as np

import effnet
from effnet.arch.spec import InputSpec, NumericPolicy
from effnet.runtime.classifier import Classifier
from effnet.runtime.session import Linear, Logits, Maps, Pixels
from effnet.weights.bundle import BundleConfig

SIZE, CELLS, CORNER = 32, 8, 3  # pixels, cells of the map, cells of the corner, along each side
STEP = SIZE // CELLS
CLASSES = ("corner", "elsewhere", "nothing")
WEIGHT = 10 * CELLS**2 / CORNER**2


class Corner:
    """A session: one map has the corner at the top left, the other all other cells. A bright corner's logit is 6."""

    batch = 8
    linear = Linear(np.array([[WEIGHT, 0], [0, WEIGHT], [0, 0]], np.float32), np.array([-4, 0.5, 1], np.float32))

    def maps(self, pixels: Pixels) -> tuple[Logits, Maps]:
        bright = (pixels[..., 0] > 200).astype(np.float32)
        means = bright.reshape(len(pixels), CELLS, STEP, CELLS, STEP).mean((2, 4))
        corner = np.zeros((CELLS, CELLS), np.float32)
        corner[:CORNER, :CORNER] = 1
        maps = np.stack([means * corner, means * (1 - corner)], 1)
        return maps.mean((2, 3)) @ self.linear.weight.T + self.linear.bias, maps

    def __call__(self, pixels: Pixels) -> Logits:
        return self.maps(pixels)[0]


def corner_classifier() -> Classifier:
    spec = effnet.spec("b0", resolution=SIZE, num_classes=len(CLASSES))
    return Classifier(Corner(), BundleConfig(spec, NumericPolicy(), InputSpec(SIZE, SIZE), CLASSES), decode="exact")


def bright_corner() -> np.ndarray:
    """A black image (SIZE, SIZE, 3) with a white corner."""
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    pixels[: CORNER * STEP, : CORNER * STEP] = 255
    return pixels
