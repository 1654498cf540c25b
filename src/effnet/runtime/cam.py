"""Class activation maps by exact decomposition: what each cell of the last feature map adds to the logit of a class.

The logit of class c is b_c + the mean over h x w places of W_c . f(place) (Zhou et al. 2016, section 2). So a cell of
the map is (W_c . f + b_c) / (h w), with the bias spread evenly, and the cells sum to the logit.
For one class against another W_c and b_c are differences, and so is the logit. Nothing is cut at zero or stretched.

The value of a cell is exact, but is not the effect of the pixels below it: a cell's receptive field is much larger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from effnet.runtime.session import Linear, Logits, Maps, Pixels

Map = NDArray[np.float64]  # (h, w)

SHIFTS = 4  # of the image per axis for a fine map, by a quarter of a cell each


@dataclass(frozen=True, eq=False)
class Explanation:
    """Where the logit of a class comes from in one image."""

    index: int
    label: str
    versus: int | None  # the class that it is compared with
    versus_label: str | None
    logit: float  # of the class, less that of `versus`; of a fine map the mean over shifted inputs
    residual: float  # difference between the map's sum and the logit, as a share of the image's largest logit
    map: Map  # what each cell adds
    pixels: NDArray[np.uint8]  # (size, size, C), the network's input
    fine: bool = False  # whether the map is the mean over shifted inputs

    @property
    def title(self) -> str:
        """The class, and the one that it is compared with."""
        return self.label if self.versus is None else f"{self.label} against {self.versus_label}"

    def enlarge(self, side: int) -> Map:
        """The map with `side` pixels a side, interpolated; the pixels sum to what the cells sum to."""
        return enlarge(self.map, side)


def decompose(
    ask: Callable[[Pixels], tuple[Logits, Maps]], pixels: NDArray[np.uint8], linear: Linear, fine: bool
) -> tuple[Logits, Callable[[int, int | None], tuple[float, float, Map]]]:
    """The logits (K,) of an image, and a function from a class, and one against it, to its logit, residual and map.

    Args:
        ask: a session's `maps`.
        pixels: (size, size, C) uint8.
        linear: the classifier.
        fine: whether the map is the mean over SHIFTS x SHIFTS inputs, in as many cells for each. Each is exact for its
            own shifted input only.
    """
    size = len(pixels)
    logits, maps = ask(pixels[None])
    height, steps = maps.shape[2], range(-(SHIFTS // 2), SHIFTS - SHIFTS // 2)
    places = [(y, x) for y in steps for x in steps] if fine else [(0, 0)]
    if fine:
        offsets = [(round(y * size / height / SHIFTS), round(x * size / height / SHIFTS)) for y, x in places]
        logits, maps = ask(np.stack([_shift(pixels, *offset) for offset in offsets]))
    mean = logits.mean(0, dtype=np.float64)

    def explain(index: int, versus: int | None = None) -> tuple[float, float, Map]:
        weight, bias = (array[index].astype(np.float64) for array in linear)
        logit = mean[index]
        if versus is not None:
            weight, bias, logit = weight - linear.weight[versus], bias - linear.bias[versus], logit - mean[versus]
        cells = (np.einsum("c,nchw->nhw", weight, maps.astype(np.float64)) + bias) / maps[0, 0].size
        found = _average(cells, places) if fine else cells[0]
        return float(logit), float(abs(found.sum() - logit) / (np.abs(logits).max() or 1)), found

    return mean.astype(np.float32), explain


def enlarge(values: Map, side: int) -> Map:
    """A map (h, w) as (side, side), interpolated linearly; its sum stays."""
    rows, columns = (_interpolation(count, side) for count in values.shape)
    return rows @ values @ columns.T


def _interpolation(cells: int, side: int) -> Map:
    """(side, cells): each pixel's share of each cell; those of a cell sum to 1."""
    places = np.clip((np.arange(side) + 0.5) * cells / side - 0.5, 0, cells - 1)
    shares = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(cells)))
    return np.asarray(shares / shares.sum(0))


def _shift(pixels: NDArray[np.uint8], down: int, right: int) -> NDArray[np.uint8]:
    """The image shifted, with edge pixels repeated."""
    size, room = len(pixels), max(abs(down), abs(right))
    wide = np.pad(pixels, ((room, room), (room, room), (0, 0)), mode="edge")
    return wide[room - down : room - down + size, room - right : room - right + size]


def _average(cells: Map, places: list[tuple[int, int]]) -> Map:
    """The mean, in parts of cells, of maps (N, h, w) of images that were moved; what is beyond a side counts at it."""
    count, height, width = cells.shape
    total = np.zeros((height * SHIFTS, width * SHIFTS))
    for each, (down, right) in zip(cells, places, strict=True):
        spread = np.kron(each, np.full((SHIFTS, SHIFTS), SHIFTS**-2))
        rows = np.clip(np.arange(height * SHIFTS) - down, 0, height * SHIFTS - 1)
        columns = np.clip(np.arange(width * SHIFTS) - right, 0, width * SHIFTS - 1)
        np.add.at(total, (rows[:, None], columns), spread)
    mean: Map = total / count
    return mean
