"""Plain reference preparation of photos, to compare faster implementations with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from effnet.arch.spec import InputSpec
from effnet.data.image import load_pixels


def normalise(pixels: NDArray[np.uint8], spec: InputSpec) -> NDArray[np.float32]:
    """(pixels / 255 - mean) / std: (..., H, W, C) uint8 -> (..., C, H, W) float32."""
    scaled = pixels / np.float32(255)
    return np.moveaxis((scaled - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32), -1, -3)


def preprocess(photo: Any, spec: InputSpec) -> NDArray[np.float32]:
    """A photo, (C, size, size)."""
    return np.ascontiguousarray(normalise(load_pixels(photo, spec), spec))
