"""An order for disks that are slow at jumping: images that lie beside each other are read one after the other.

A block is BLOCK_BYTES of images that lie beside each other in a shard; of a folder, in the order of their names. An
epoch takes the blocks in random order, WINDOW at a time, and the images of these in random order. While the images of
one window are used, the operating system is told to read the blocks of the next one, each from its start to its end.
What lies within BLOCK_BYTES is one block, so that small data sets are shuffled as they always are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from effnet.data.shards import file_size, member_of, url

BLOCK_BYTES = 8 * 2**20  # a hard disk reads them in the time of eight jumps
WINDOW = 32  # blocks: 256 MB, which stay in the system's memory

Range = tuple[str, int, int]  # a file, the first byte and how many


@dataclass(frozen=True, eq=False)
class Blocks:
    """Which images lie beside each other."""

    images: NDArray[np.int64]  # all of them, as they lie
    bounds: NDArray[np.int64]  # where each block begins among them, and the end of the last one
    ranges: tuple[tuple[Range, ...], ...]  # what of which files holds a block; nothing behind a URL
    window: int

    def permutation(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """All images in the order of an epoch."""
        windows = self._windows(rng)
        return np.concatenate([rng.permutation(np.concatenate([self._block(each) for each in w])) for w in windows])

    def schedule(self, rng: np.random.Generator) -> list[tuple[int, int, int]]:
        """For each block after how many images it is to be read, after how many no longer, and which one it is.

        Those of the first window are due at once, those of another evenly over the window before it.
        """
        found = list[tuple[int, int, int]]()
        before = begin = 0
        for window in self._windows(rng):
            end = begin + sum(len(self._block(each)) for each in window)
            for place, block in enumerate(window):
                found.append((before + (begin - before) * place // len(window), end, block))
            before, begin = begin, end
        return found

    def read_soon(self, block: int) -> None:
        """Have the system read a block ahead, where it can."""
        for file, first, count in self.ranges[block] if hasattr(os, "posix_fadvise") else ():
            with suppress(OSError), open(file, "rb", buffering=0) as stream:  # noqa: PTH123  # a Path takes longer
                os.posix_fadvise(stream.fileno(), first, count, os.POSIX_FADV_WILLNEED)

    def _windows(self, rng: np.random.Generator) -> list[list[int]]:
        order = rng.permutation(len(self.bounds) - 1).tolist()
        return [order[first : first + self.window] for first in range(0, len(order), self.window)]

    def _block(self, number: int) -> NDArray[np.int64]:
        return self.images[self.bounds[number] : self.bounds[number + 1]]


def find_blocks(files: Sequence[Path]) -> Blocks:
    """The blocks of images, which are numbered as `files` are."""
    places = sorted(_place(file, index) for index, file in enumerate(files))
    bounds, ranges, used, last = list[int](), list[list[Range]](), 0, ""
    for number, (shard, offset, size, index) in enumerate(places):
        if not bounds or shard != last or used + size > BLOCK_BYTES:
            bounds.append(number)
            ranges.append([])
            used, last = 0, shard
        used += size
        if not shard:
            ranges[-1].append((str(files[index]), 0, size))
        elif not url(shard):
            first = ranges[-1][0][1] if ranges[-1] else offset
            ranges[-1] = [(shard, first, offset + size - first)]
    images = np.array([index for *_, index in places], np.int64)
    return Blocks(images, np.array([*bounds, len(places)]), tuple(map(tuple, ranges)), WINDOW)


def _place(file: Path, index: int) -> tuple[str, int, int, int]:
    """The shard that an image is in and its first byte there, else "" and its number; its bytes and its number."""
    if (inside := member_of(file)) is None:
        return "", index, max(0, file_size(file)), index
    return inside[0], inside[1].offset, inside[1].size, index
