"""Which images are copies of each other: re-compressed, resized, converted, brightened or mirrored. No torch.

    1  files with the same bytes, and images with the same thumbnail, are one content with several copies
    2  contents whose hashes, or mirrored hashes, differ in at most BITS of 64 bits are candidates
    3  candidates are compared by the slopes of their thumbnails (`likeness`): a JPEG's noise and a change of size make
       them a little less alike (SAME), another photo is far from it
    4  their colours must agree, unless one of them is grey
    5  an image of nearly one colour has no slopes to compare, and is no near-duplicate of anything

Plain objects before a plain background have many look-alikes that are no copies: of Fashion-MNIST's 60,000 pieces of
clothing 18,800 pairs correlate by 0.95. Hence two more steps:

    6  below SURE, a pair counts only where both images have few look-alikes, copies of one another counted once
    7  what is left is read again and compared at up to LARGE pixels, where different trousers differ

The thresholds were set on 3,384 disjoint parts of 42 photographs and wallpapers, 796 cut-outs and Fashion-MNIST, each
with copies made of 600. Crops are found seldom, those of 1 % of each side in 4 of 10 cases: to find more of them,
different trousers would have to be the same.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from effnet.data import likeness
from effnet.data.fingerprint import COLOUR_SIDE, SIDE, Fingerprint, fingerprint, read_small, require_hashing
from effnet.data.likeness import Bytes, Floats, Places
from effnet.data.paths import read_ahead
from effnet.errors import ImageError
from effnet.machine import this_machine

BITS = 12  # 95 % of the copies at quality 30, 99 % at quality 60; 1 pair in 300 of Fashion-MNIST
COARSE = 0.97  # correlation of 8 x 8 grey levels, quick to ask; 99.8 % of the copies have 0.98
LOOK_ALIKE = 0.9  # correlation of slopes, here and below
SAME = 0.97
SAME_TINY = 0.99
TINY = 40  # pixels of the shorter side up to which a thumbnail shows all that there is
NOISE, NOISE_LARGE = 0.5, 1.0  # levels of the slopes that a JPEG of quality 30 adds: what is flat correlates less
SURE = 0.995
CROWD = 5  # look-alikes of an image, at most, for a pair below SURE
FLAT = 0.8  # levels of the slopes; below it, noise is all that remains
SAME_COLOURS = 0.25  # of the colours' strength; brightened copies reach 0.2, where recoloured ones begin
LARGE, LARGER = 128, 1.5  # pixels of the last comparison, if that is so many times more than a thumbnail has
MOST = 32  # pairs that are kept of each image, the likest; a film of a still scene has millions
WINDOW = 64  # files that are read ahead
KEPT = 1024  # images that are kept in memory while pairs are compared again

Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True)
class Pair:
    """Two contents that are near-duplicates."""

    first: int  # place among the files
    second: int
    likeness: float  # correlation of the thumbnails' slopes
    mirrored: bool


@dataclass(frozen=True)
class Duplicates:
    """What was found among some files; every number is a place among them."""

    files: tuple[Path, ...]
    prints: tuple[Fingerprint | ImageError, ...]  # what each file is, or why it could not be read
    contents: tuple[int, ...]  # for each file the first one with the same content: bytes, or thumbnail and colours
    pairs: tuple[Pair, ...]  # between contents; of each image the MOST that are likest
    groups: tuple[int, ...]  # for each file the first one that it is connected with, over pairs and contents

    @cached_property
    def copies(self) -> dict[int, tuple[int, ...]]:
        """All files of each content."""
        found: dict[int, list[int]] = defaultdict(list)
        for place, content in enumerate(self.contents):
            found[content].append(place)
        return {content: tuple(places) for content, places in found.items()}

    def is_exact(self, places: Sequence[int]) -> bool:
        """Whether these files have the same bytes."""
        looks = [self.prints[place] for place in places]
        return len({look.sha256 for look in looks if isinstance(look, Fingerprint)}) == 1


def find_duplicates(
    files: Sequence[Path], *, threads: int | None = None, progress: Progress | None = None
) -> Duplicates:
    """Read every file and find the copies.

    Args:
        files: images. One that cannot be read is in nobody's group.
        threads: that read and decode; as many as there are cores by default.
        progress: called with the number of files read and of all.

    Raises:
        MissingExtraError: ImageHash is not installed.
    """
    require_hashing()
    prints: list[Fingerprint | ImageError] = []
    workers = this_machine().cores if threads is None else threads
    for _, answer in read_ahead(files, fingerprint, threads=workers, window=max(WINDOW, workers)):
        prints.append(answer)
        if progress:
            progress(len(prints), len(files))
    contents = _contents(prints)
    firsts = [place for place, content in enumerate(contents) if place == content]
    pairs = tuple(pair for pair in _find_pairs(firsts, prints) if _is_confirmed(pair, files, prints))
    _small.cache_clear()
    groups = united(len(files), [*enumerate(contents), *((pair.first, pair.second) for pair in pairs)])
    return Duplicates(tuple(files), tuple(prints), tuple(contents), pairs, tuple(groups))


def united(count: int, links: Iterable[tuple[int, int]]) -> list[int]:
    """For each of `count` places the first that it is connected with, over any number of links."""
    parent = list(range(count))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for one, two in links:
        low, high = sorted((root(int(one)), root(int(two))))
        parent[high] = low
    return [root(place) for place in range(count)]


@dataclass(frozen=True)
class _Links:
    """Pairs of look-alikes, one array for each of their qualities."""

    one: Places
    two: Places
    likeness: Floats
    mirrored: NDArray[np.bool_]


def _contents(prints: Sequence[Fingerprint | ImageError]) -> list[int]:
    """For each file the first with the same bytes, or with the same thumbnail where that shows something."""
    known = [(place, look) for place, look in enumerate(prints) if isinstance(look, Fingerprint)]
    first: dict[object, int] = {}
    same = []
    for (place, look), strength in zip(known, likeness.strengths(_thumbnails(known)), strict=True):
        same.append((place, first.setdefault(look.sha256, place)))
        if strength >= FLAT:
            same.append((place, first.setdefault((look.thumbnail, look.colours), place)))
    return united(len(prints), same)


def _find_pairs(places: Sequence[int], prints: Sequence[Fingerprint | ImageError]) -> list[Pair]:
    """What steps 2 to 6 take for near-duplicates among the files at `places`."""
    known = [(place, look) for place in places if isinstance(look := prints[place], Fingerprint)]
    thumbnails = _thumbnails(known)
    strengths = likeness.strengths(thumbnails)
    links = _join(_look_alikes([look for _, look in known], thumbnails, strengths))
    one, two = links.one, links.two
    tiny = np.array([min(look.width, look.height) <= TINY for _, look in known], bool)
    demanded = likeness.demanded(SAME, NOISE, np.minimum(strengths[one], strengths[two]))
    demanded[tiny[one] | tiny[two]] = SAME_TINY
    shape = len(known), COLOUR_SIDE, COLOUR_SIDE, 2
    colours = np.frombuffer(b"".join(look.colours for _, look in known), np.uint8).reshape(shape)
    alike = likeness.colours_agree(colours, one, two, links.mirrored, SAME_COLOURS)
    sure = alike & (links.likeness >= SURE)
    crowd = _crowds(links, united(len(known), zip(one[sure], two[sure], strict=True)))
    chosen = sure | (alike & (links.likeness >= demanded) & (np.maximum(crowd[one], crowd[two]) <= CROWD))
    best: dict[tuple[int, int], Pair] = {}
    had = Counter[int]()
    order = np.flatnonzero(chosen)
    for at in order[np.argsort(-links.likeness[order], kind="stable")].tolist():
        ends = known[one[at]][0], known[two[at]][0]
        if ends not in best and min(had[ends[0]], had[ends[1]]) < MOST:  # else it is there, not mirrored or mirrored
            best[ends] = Pair(*ends, min(1.0, round(float(links.likeness[at]), 4)), bool(links.mirrored[at]))
            had.update(ends)
    return [best[ends] for ends in sorted(best)]


def _look_alikes(looks: Sequence[Fingerprint], thumbnails: Bytes, strengths: Floats) -> Iterator[_Links]:
    """The pairs whose slopes correlate by LOOK_ALIKE or more, each with a later one.

    A block of rows is compared with all others in three steps, each on what the one before has left.
    """
    signs, coarse = likeness.signs([look.hash for look in looks]), likeness.coarse(thumbnails)
    flipped, flipped_signs = thumbnails[..., ::-1], likeness.signs([look.mirrored_hash for look in looks])
    seconds = (signs, coarse, thumbnails, False), (flipped_signs, likeness.coarse(flipped), flipped, True)
    rows = max(1, likeness.CELLS // max(1, len(looks)))
    for start in range(0, len(looks), rows):
        for other_signs, other_coarse, other_thumbnails, mirrored in seconds:
            one, two = np.nonzero(signs[start : start + rows] @ other_signs[start:].T >= 64 - 2 * BITS)
            one, two = one + start, two + start
            kept = (two > one) & (strengths[one] >= FLAT) & (strengths[two] >= FLAT)
            one, two = one[kept], two[kept]
            kept = likeness.dots(coarse, other_coarse, one, two) >= COARSE
            one, two = one[kept], two[kept]
            found = likeness.correlate(thumbnails, other_thumbnails, one, two)
            kept = found >= LOOK_ALIKE
            yield _Links(one[kept], two[kept], found[kept], np.full(np.count_nonzero(kept), mirrored))


def _join(links: Iterable[_Links]) -> _Links:
    none = np.zeros(0, np.int64)
    parts = [_Links(none, none, none.astype(np.float32), none.astype(bool)), *links]
    return _Links(
        np.concatenate([part.one for part in parts]),
        np.concatenate([part.two for part in parts]),
        np.concatenate([part.likeness for part in parts]),
        np.concatenate([part.mirrored for part in parts]),
    )


def _crowds(links: _Links, roots: Sequence[int]) -> Places:
    """For each image how many look-alikes it has, those that are copies of one another counted once."""
    root = np.array(roots, np.int64)
    apart = root[links.one] != root[links.two]
    one, two = links.one[apart], links.two[apart]
    ends = np.stack((np.concatenate((one, two)), root[np.concatenate((two, one))]))
    return np.bincount(np.unique(ends, axis=1)[0], minlength=len(root))


def _is_confirmed(pair: Pair, files: Sequence[Path], prints: Sequence[Fingerprint | ImageError]) -> bool:
    """Whether a pair is as alike when more of it is seen; the smaller of the two says how much there is to see."""
    sides = [side for place in (pair.first, pair.second) for side in _sides(prints[place])]
    side = min(LARGE, *sides)
    if side < LARGER * SIDE:
        return True
    try:
        both = np.stack([_small(files[place], side) for place in (pair.first, pair.second)])
    except ImageError:  # it was there a moment ago
        return False
    if pair.mirrored:
        both[1] = both[1, :, ::-1].copy()
    strength = likeness.strengths(both).min(keepdims=True)
    one, two = np.array([0]), np.array([1])
    return bool(likeness.correlate(both, both, one, two) >= likeness.demanded(SAME, NOISE_LARGE, strength))


@lru_cache(KEPT)
def _small(file: Path, side: int) -> Bytes:
    return np.asarray(read_small(file, side).convert("L").resize((side, side), Image.Resampling.LANCZOS))


def _sides(look: Fingerprint | ImageError) -> tuple[int, ...]:
    return (look.width, look.height) if isinstance(look, Fingerprint) else ()


def _thumbnails(known: Sequence[tuple[int, Fingerprint]]) -> Bytes:
    pixels = np.frombuffer(b"".join(look.thumbnail for _, look in known), np.uint8)
    return pixels.reshape(len(known), SIDE, SIDE)
