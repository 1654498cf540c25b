"""How alike images are, as arithmetic on many small grey images at a time. Numpy only.

The slopes of an image are the differences of its blurred grey levels to the right and downwards: brightness does not
change them, contrast only their strength. Two images are as alike as their slopes correlate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float32]
Places: TypeAlias = NDArray[np.int64]

COARSE_SIDE = 8
EPSILON = 1e-6  # the length of nothing
CELLS = 2**24  # of the tables that are worked on at a time, 64 MB
GREY = 1.0  # levels of chroma; below it there is no colour to compare
FAINT = 2.0  # levels of chroma that always may differ


def slopes(grey: Bytes) -> Floats:
    """The slopes of images (N, S, S), blurred by 1 2 1 both ways: (N, 2 * (S - 1) ** 2)."""
    soft: Floats = np.pad(grey.astype(np.float32), ((0, 0), (1, 1), (1, 1)), mode="edge")
    quarter, half = np.float32(0.25), np.float32(0.5)
    soft = quarter * (soft[:, :-2] + soft[:, 2:]) + half * soft[:, 1:-1]
    soft = quarter * (soft[:, :, :-2] + soft[:, :, 2:]) + half * soft[:, :, 1:-1]
    corner = soft[:, :-1, :-1]
    both = np.stack((soft[:, :-1, 1:] - corner, soft[:, 1:, :-1] - corner), axis=1)
    return both.reshape(len(grey), -1)


def strengths(grey: Bytes) -> Floats:
    """Root mean square of each image's slopes, in levels."""
    step = max(1, CELLS // (2 * grey.shape[1] ** 2))
    parts = [slopes(grey[start : start + step]) for start in range(0, len(grey), step)]
    return np.concatenate([np.zeros(0, np.float32), *(np.sqrt(np.square(part).mean(axis=1)) for part in parts)])


def correlate(grey: Bytes, others: Bytes, one: Places, two: Places) -> Floats:
    """The correlation of the slopes of grey[one] and others[two]."""
    likeness = np.zeros(len(one), np.float32)
    order, step = np.argsort(two), max(1, CELLS // (2 * grey.shape[1] ** 2))
    for start in range(0, len(one), step):  # neighbours in this order share their second image
        part = order[start : start + step]
        ones, first = np.unique(one[part], return_inverse=True)
        twos, second = np.unique(two[part], return_inverse=True)
        likeness[part] = dots(unit(slopes(grey[ones])), unit(slopes(others[twos])), first, second)
    return likeness


def demanded(same: float, noise: float, strength: Floats) -> Floats:
    """The correlation that copies reach: `same`, or less where `noise` levels of noise are much of the slopes."""
    differing = np.maximum(1 - same**2, np.square(noise / np.maximum(strength, noise)))
    least: Floats = np.sqrt(1 - differing).astype(np.float32)
    return least


def coarse(grey: Bytes) -> Floats:
    """Each image in 8 x 8 grey levels, of mean 0 and length 1: (N, 64)."""
    tile = grey.shape[1] // COARSE_SIDE
    means = grey.reshape(-1, COARSE_SIDE, tile, COARSE_SIDE, tile).mean(axis=(2, 4), dtype=np.float32)
    flat = means.reshape(len(grey), COARSE_SIDE**2)
    return unit(flat - flat.mean(axis=1, keepdims=True))


def signs(hashes: Sequence[int]) -> Floats:
    """Each hash as 64 numbers, -1 or 1: the product of two of them is 64 - 2 * the bits that differ."""
    bits = np.frombuffer(b"".join(number.to_bytes(8, "big") for number in hashes), np.uint8)
    return np.unpackbits(bits).reshape(len(hashes), 64).astype(np.float32) * np.float32(2) - np.float32(1)


def unit(rows: Floats) -> Floats:
    """Each row at length 1; what is 0 stays 0."""
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    lengths[lengths < EPSILON] = 1
    divided: Floats = rows / lengths[:, None]
    return divided


def dots(rows: Floats, others: Floats, one: Places, two: Places) -> Floats:
    """The products of rows[one] and others[two], a block at a time."""
    step = max(1, CELLS // max(1, rows.shape[1]))
    blocks = [(one[start : start + step], two[start : start + step]) for start in range(0, len(one), step)]
    parts = [np.einsum("ij,ij->i", rows[first], others[second]) for first, second in blocks]
    return np.concatenate([np.zeros(0, np.float32), *parts])


def colours_agree(
    stored: Bytes, one: Places, two: Places, mirrored: NDArray[np.bool_], same: float
) -> NDArray[np.bool_]:
    """Whether stored[one] and stored[two] have the same colours, or one of them none.

    Args:
        stored: chroma (N, S, S, 2), 128 where there is no colour.
        one: the first of each pair.
        two: the second.
        mirrored: whether the second one is to be mirrored.
        same: how much they may differ, as a share of the stronger one's chroma.
    """
    step = max(1, CELLS // max(1, stored[:1].size))
    parts = [_level(_chroma(stored[start : start + step])) for start in range(0, len(stored), step)]
    strong = np.concatenate([np.zeros(0, np.float32), *parts])
    answers = [np.zeros(0, bool)]
    for start in range(0, len(one), step):
        some = slice(start, start + step)
        first, second = _chroma(stored[one[some]]), _chroma(stored[two[some]])
        second[mirrored[some]] = second[mirrored[some]][:, :, ::-1]
        low, high = np.minimum(strong[one[some]], strong[two[some]]), np.maximum(strong[one[some]], strong[two[some]])
        answers.append((low < GREY) | (_level(first - second) <= same * (FAINT + high)))
    return np.concatenate(answers)


def _chroma(stored: Bytes) -> Floats:
    return stored.astype(np.float32) - np.float32(128)


def _level(chroma: Floats) -> Floats:
    """Mean size of each image's chroma."""
    means: Floats = np.abs(chroma).mean(axis=(1, 2, 3))
    return means
