"""Finds images that are copies of each other: re-compressed, resized, converted, brightened or mirrored. No torch.

    1  each file is read and decoded once, a large JPEG at a fraction of its size, into a `Fingerprint`: the sha256 of
       its bytes, a thumbnail of 32 x 32 grey levels, and 8 x 8 values of blue and red chroma
    2  files with the same bytes, and images with the same thumbnail and chroma, count as copies of one content
    3  for each content and its mirror image, a perceptual hash (pHash: which of the 8 x 8 lowest frequencies of the
       thumbnail are above their median) proposes the CANDIDATES nearest ones that differ in at most BITS of 64 bits
    4  these are near-duplicates if the slopes of their thumbnails correlate by SAME or more and their colours agree,
       unless one of them is grey; pairs whose slopes already differ too much in low frequencies are skipped

Slopes are differences between neighbouring pixels, slightly blurred: brightness does not change them, contrast changes
only their strength. An image of nearly one colour has none and is never a near-duplicate.

Crops are not found: cropped by 2 % per side, a photo correlates with itself no more than with similar photos. Images of
plain objects on a plain background may count as near-duplicates if they differ by less than JPEG noise.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from effnet.data.fingerprint import COLOUR_SIDE, SIDE, Fingerprint, read_fingerprint
from effnet.data.fingerprint_cache import FingerprintCache, load_table, save_table
from effnet.data.paths import READERS, read_ahead
from effnet.errors import ImageError
from effnet.progress import SILENT, Progress

HASH_SIDE = 8  # frequencies of a hash
BITS = 12  # finds 95 % of the copies at JPEG quality 30, 99 % at quality 60
CANDIDATES = 32  # later contents that each one is compared with, at most; frames of a still scene would give millions
SAME = 0.985  # correlation of slopes
NOISE = 0.5  # levels that JPEG at quality 30 adds to the slopes, which lowers the correlation of flat images
FLAT = 0.8  # levels of the slopes below which there is only noise
SAME_COLOURS = 0.25  # difference relative to the stronger chroma; brightened copies reach 0.2
GREY, FAINT = 1.0, 2.0  # mean levels of chroma: below the first an image is grey; the second is always tolerated
CELLS = 2**24  # hashes compared at a time, 64 MB
BLOCK = 256  # images whose slopes are compared at a time, so that they stay in the processor's cache
COARSE = 12  # frequencies of the slopes in each direction for the first comparison
ROUNDING = 1e-4  # generous bound for a squared distance in float32
WINDOW = 64  # files that are read ahead
MANY = 1000  # contents from which on the pairs are cached; fewer are compared in no time

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
Match = tuple[int, int, float, bool]  # indices of two contents, their similarity, whether one is mirrored
PAIR = np.dtype([("first", "<i8"), ("second", "<i8"), ("similarity", "<f8"), ("mirrored", "?")])


@dataclass(frozen=True)
class Pair:
    """Two contents that are near-duplicates."""

    first: int  # index among the files
    second: int
    similarity: float  # correlation of the thumbnails' slopes
    mirrored: bool


@dataclass(frozen=True)
class Duplicates:
    """The copies among files; all numbers are indices of files."""

    files: tuple[Path, ...]
    fingerprints: tuple[Fingerprint | ImageError, ...]  # an error for a file that could not be read
    contents: tuple[int, ...]  # for each file, the first one with the same content
    pairs: tuple[Pair, ...]  # between contents
    groups: tuple[int, ...]  # for each file, the first one that is connected to it by pairs and contents

    @cached_property
    def copies(self) -> dict[int, tuple[int, ...]]:
        """All files of each content."""
        found: dict[int, list[int]] = defaultdict(list)
        for index, content in enumerate(self.contents):
            found[content].append(index)
        return {content: tuple(indices) for content, indices in found.items()}

    def is_exact(self, indices: Sequence[int]) -> bool:
        """Whether these files have the same bytes."""
        found = [self.fingerprints[index] for index in indices]
        return len({each.sha256 for each in found if isinstance(each, Fingerprint)}) == 1


def find_duplicates(files: Sequence[Path], *, threads: int = READERS, progress: Progress = SILENT) -> Duplicates:
    """Read every image file and find the copies; a file that cannot be read gets its own group.

    Files known from earlier runs are not read again: see fingerprint_cache.py.
    """
    cache = FingerprintCache(files)
    answers: list[Fingerprint | ImageError | None] = [*cache.fingerprints()]
    missing = [index for index, answer in enumerate(answers) if answer is None]
    if done := len(files) - len(missing):
        progress.update("reading images", done, len(files))
    unread = (files[index] for index in missing)
    reader = read_ahead(unread, read_fingerprint, threads=threads, window=max(WINDOW, threads))
    try:
        for index, (_, answer) in zip(missing, reader, strict=True):
            answers[index] = answer
            done += 1
            progress.update("reading images", done, len(files))
    finally:  # also keeps what was read before Ctrl-C
        cache.keep(answers)
    fingerprints = tuple(answer for answer in answers if answer is not None)
    known = [(index, each) for index, each in enumerate(fingerprints) if isinstance(each, Fingerprint)]
    contents = _contents(len(files), known)
    first = [(index, each) for index, each in known if contents[index] == index]
    matches = _recall_pairs([each for _, each in first])
    pairs = tuple(Pair(first[one][0], first[two][0], alike, mirrored) for one, two, alike, mirrored in matches)
    groups = connect(len(files), [*enumerate(contents), *((pair.first, pair.second) for pair in pairs)])
    return Duplicates(tuple(files), fingerprints, tuple(contents), pairs, tuple(groups))


def connect(count: int, links: Iterable[tuple[int, int]]) -> list[int]:
    """For each of `count` indices, the first one of its connected component."""
    parent = list(range(count))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for one, two in links:
        low, high = sorted((root(one), root(two)))
        parent[high] = low
    return [root(index) for index in range(count)]


def _contents(count: int, known: Sequence[tuple[int, Fingerprint]]) -> list[int]:
    """For each file, the first one with the same bytes, or with the same thumbnail if that is not flat."""
    first: dict[object, int] = {}
    links = []
    strengths = _strengths(_thumbnails([fingerprint for _, fingerprint in known]))
    for (index, fingerprint), strength in zip(known, strengths.tolist(), strict=True):
        links.append((index, first.setdefault(fingerprint.sha256, index)))
        if strength >= FLAT:
            links.append((index, first.setdefault((fingerprint.thumbnail, fingerprint.colours), index)))
    return connect(count, links)


def _recall_pairs(known: Sequence[Fingerprint]) -> Sequence[Match]:
    """The near-duplicates among contents, from the cache if an earlier run had the same contents."""
    pixels = hashlib.sha256()
    for each in known:
        pixels.update(each.thumbnail + each.colours)
    name = f"{pixels.hexdigest()}.pairs"
    if len(known) >= MANY and (table := load_table(name, PAIR)) is not None:
        found: list[Match] = table.tolist()
        return found
    found = [*_find_pairs(known)]
    if len(known) >= MANY:
        save_table(name, np.array(found, PAIR))
    return found


def _find_pairs(known: Sequence[Fingerprint]) -> Iterator[Match]:
    """The near-duplicates among contents, each pair once, in the order of the indices."""
    thumbnails = _thumbnails(known)
    shape = len(known), COLOUR_SIDE, COLOUR_SIDE, 2
    chroma = np.frombuffer(b"".join(fingerprint.colours for fingerprint in known), np.uint8).reshape(shape)
    strengths = _strengths(thumbnails)
    best: dict[tuple[int, int], Match] = {}
    for mirrored in (False, True):
        others, other_chroma = (thumbnails[..., ::-1], chroma[:, :, ::-1]) if mirrored else (thumbnails, chroma)
        coarse, other_coarse = _coarse_slopes(thumbnails), _coarse_slopes(others)
        for one, two in _propose(_hashes(thumbnails), _hashes(others), strengths >= FLAT):
            noise = NOISE / np.minimum(strengths[one], strengths[two])
            least = np.sqrt(1 - np.maximum(1 - SAME**2, noise**2))
            # The squared distance of unit vectors that correlate by c is 2 - 2c, and no larger in any subset of axes.
            near = np.square(coarse[one] - other_coarse[two]).sum(axis=1) <= 2 - 2 * least + ROUNDING
            one, two, least = one[near], two[near], least[near]
            found = np.einsum("ij,ij->i", _unit_slopes(thumbnails[one]), _unit_slopes(others[two]))
            kept = np.flatnonzero((found >= least) & _colours_agree(chroma[one], other_chroma[two]))
            for at in kept.tolist():
                ends = int(one[at]), int(two[at])
                pair = *ends, min(1.0, round(float(found[at]), 4)), mirrored
                best[ends] = max(pair, best.get(ends, pair), key=lambda pair: pair[2])
    for ends in sorted(best):
        yield best[ends]


def _propose(signs: Floats, others: Floats, usable: NDArray[np.bool_]) -> Iterator[tuple[Indices, Indices]]:
    """Indices of usable images, each with its CANDIDATES nearest later ones by hash, BLOCK pairs at a time."""
    rows = max(1, CELLS // max(1, len(signs)))
    for start in range(0, len(signs), rows):
        products = signs[start : start + rows] @ others[start:].T
        one, two = np.nonzero(products >= 64 - 2 * BITS)
        bits = -products[one, two]
        one, two = one + start, two + start
        kept = (two > one) & usable[one] & usable[two]
        one, two, bits = one[kept], two[kept], bits[kept]
        order = np.lexsort((two, bits, one))
        one, two = one[order], two[order]
        rank = np.arange(len(one)) - np.searchsorted(one, one)
        one, two = one[rank < CANDIDATES], two[rank < CANDIDATES]
        for first in range(0, len(one), BLOCK):
            yield one[first : first + BLOCK], two[first : first + BLOCK]


def _cosines(count: int, side: int) -> Floats:
    """The lowest `count` waves of the DCT-II of `side` pixels, (count, side), not normalised."""
    waves = np.arange(count)[:, None] * (2 * np.arange(side) + 1)
    cosines: Floats = np.cos(np.pi / (2 * side) * waves).astype(np.float32)
    return cosines


def _hashes(grey: Bytes) -> Floats:
    """The pHash of images (N, S, S) as 64 numbers, -1 or 1: the product of two is 64 - 2 x differing bits."""
    cosines = _cosines(HASH_SIDE, SIDE)
    frequencies = (cosines @ grey.astype(np.float32) @ cosines.T).reshape(len(grey), HASH_SIDE**2)
    signs: Floats = np.where(frequencies > np.median(frequencies, axis=1, keepdims=True), np.float32(1), np.float32(-1))
    return signs


def _slopes(grey: Bytes) -> Floats:
    """Differences to the right and downwards of images (N, S, S), blurred by 1 2 1 both ways: (N, 2 * (S - 1) ** 2)."""
    soft: Floats = np.pad(grey.astype(np.float32), ((0, 0), (1, 1), (1, 1)), mode="edge")
    quarter = np.float32(0.25)
    soft = quarter * (soft[:, :-2] + soft[:, 2:]) + 2 * quarter * soft[:, 1:-1]
    soft = quarter * (soft[:, :, :-2] + soft[:, :, 2:]) + 2 * quarter * soft[:, :, 1:-1]
    corner = soft[:, :-1, :-1]
    both = np.stack((soft[:, :-1, 1:] - corner, soft[:, 1:, :-1] - corner), axis=1)
    return both.reshape(len(grey), 2 * (SIDE - 1) ** 2)


def _unit_slopes(grey: Bytes) -> Floats:
    slopes = _slopes(grey)
    unit: Floats = slopes / np.linalg.norm(slopes, axis=1, keepdims=True)
    return unit


def _coarse_slopes(grey: Bytes) -> Floats:
    """The lowest frequencies of the unit slopes of images (N, S, S): (N, 2 * COARSE ** 2), of length 1 at most."""
    cosines = _cosines(COARSE, SIDE - 1)
    cosines /= np.linalg.norm(cosines, axis=1, keepdims=True)
    found = np.zeros((len(grey), 2 * COARSE**2), np.float32)
    for start in range(0, len(grey), BLOCK):
        slopes = _slopes(grey[start : start + BLOCK])
        slopes /= np.maximum(np.linalg.norm(slopes, axis=1, keepdims=True), np.float32(1e-6))
        maps = slopes.reshape(-1, 2, SIDE - 1, SIDE - 1)
        found[start : start + BLOCK] = (cosines @ maps @ cosines.T).reshape(len(maps), -1)
    return found


def _strengths(grey: Bytes) -> Floats:
    """Root mean square of each image's slopes, in levels."""
    parts = (_slopes(grey[start : start + BLOCK]) for start in range(0, len(grey), BLOCK))
    return np.concatenate([np.zeros(0, np.float32), *(np.sqrt(np.square(part).mean(axis=1)) for part in parts)])


def _colours_agree(chroma: Bytes, others: Bytes) -> NDArray[np.bool_]:
    """Whether images (N, S, S, 2) have the same colours, or one of the two is grey."""
    one, two = chroma.astype(np.float32) - 128, others.astype(np.float32) - 128
    first, second, apart = (np.abs(each).mean(axis=(1, 2, 3)) for each in (one, two, one - two))
    agree: NDArray[np.bool_] = apart <= SAME_COLOURS * (FAINT + np.maximum(first, second))
    agree |= np.minimum(first, second) < GREY
    return agree


def _thumbnails(known: Sequence[Fingerprint]) -> Bytes:
    pixels = np.frombuffer(b"".join(fingerprint.thumbnail for fingerprint in known), np.uint8)
    return pixels.reshape(len(known), SIDE, SIDE)
