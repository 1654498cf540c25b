"""A hand-made network whose answer lies in one corner: it counts the bright pixels of each cell."""

from __future__ import annotations

import numpy as np

import effnet
from effnet.arch.spec import InputSpec, NumericPolicy
from effnet.runtime.classifier import Classifier
from effnet.runtime.session import Linear, Logits, Maps, Pixels
from effnet.weights.bundle import BundleConfig

CELLS, SIZE = 4, 32
CLASSES = ("corner", "elsewhere", "nothing")


class Corner:
    """A session: one map is bright in the corner at the top left, the other in all other cells."""

    batch = 8
    linear = Linear(
        np.array([[160, -16], [0, 16], [0, 0]], np.float32), np.array([-4, 0.5, 1], np.float32)
    )  # a bright corner: 160 / 16 - 4 = 6

    def maps(self, pixels: Pixels) -> tuple[Logits, Maps]:
        bright = (pixels[..., 0] > 200).astype(np.float32)
        means = bright.reshape(len(pixels), CELLS, SIZE // CELLS, CELLS, SIZE // CELLS).mean((2, 4))
        corner = np.zeros((CELLS, CELLS), np.float32)
        corner[0, 0] = 1
        maps = np.stack([means * corner, means * (1 - corner)], 1)
        return maps.mean((2, 3)) @ self.linear.weight.T + self.linear.bias, maps

    def __call__(self, pixels: Pixels) -> Logits:
        return self.maps(pixels)[0]


def corner_classifier() -> Classifier:
    spec = effnet.spec("b0", resolution=SIZE, num_classes=len(CLASSES))
    return Classifier(Corner(), BundleConfig(spec, NumericPolicy(), InputSpec(SIZE, SIZE), CLASSES), decode="exact")


def bright(row: int, column: int) -> np.ndarray:
    """A black image (SIZE, SIZE, 3) with one cell white."""
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    step = SIZE // CELLS
    pixels[row * step : (row + 1) * step, column * step : (column + 1) * step] = 255
    return pixels
