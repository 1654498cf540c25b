"""Inputs for the tests of reports: odd class names, coloured noise, made-up answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import effnet
from effnet.data.dataset import Dataset, Sample

CLASSES = ("<script>alert(1)</script>", "a & b", 'it\'s "quoted"', "|猫| `x` ${y} {{z}}")
SPEC = effnet.spec("b0", width=0.25, depth=0.4, resolution=32, num_classes=len(CLASSES))
N = 120


def draw(folder: Path, count: int, classes: int = len(CLASSES), size: tuple[int, int] = (40, 48)) -> Dataset:
    """Coloured noise, one file for each image, the classes in turn."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for row in range(count):
        pixels = random.integers(0, 200, (*size, 3)) + 55 * (np.arange(3) == row % classes % 3)
        name = f"<b>{row}&.png"
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
        samples.append(Sample(name, row % classes, "test"))
    return Dataset(folder, CLASSES, tuple(samples))


def answers(labels: np.ndarray[Any, Any], classes: int) -> np.ndarray[Any, Any]:
    """Logits that are right for about two thirds of the images."""
    random = np.random.default_rng(1)
    logits = random.normal(size=(len(labels), classes)) * 1.5
    logits[np.arange(len(labels)), labels] += 2.5
    return logits.astype(np.float32)
