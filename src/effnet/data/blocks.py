"""An order for disks with slow random access: images that are next to each other are read sequentially.

A block is BLOCK_BYTES of images that are next to each other in a shard, or in a folder by name. An epoch takes blocks
in random order, WINDOW at a time, and shuffles the images in each window. While the images of one window are used, the
operating system is told to read ahead the blocks of the next, each from start to end. A data set smaller than
BLOCK_BYTES is one block, so it is shuffled as usual.
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

BLOCK_BYTES = 8 * 2**20  # a hard disk reads them in the time of eight seeks
WINDOW = 32  # blocks: 256 MB, which stay in the system's page cache

Range = tuple[str, int, int]  # file, first byte, number of bytes


@dataclass(frozen=True, eq=False)
class Blocks:
    """Which images are next to each other."""

    images: NDArray[np.int64]  # all images, in the order in which they are stored
    bounds: NDArray[np.int64]  # where each block begins in `images`, and the end of the last one
    ranges: tuple[tuple[Range, ...], ...]  # for each block, its ranges of files; empty for URLs
    window: int

    def permutation(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """All images in an epoch's order."""
        windows = self._windows(rng)
        return np.concatenate([rng.permutation(np.concatenate([self._block(each) for each in w])) for w in windows])

    def schedule(self, rng: np.random.Generator) -> list[tuple[int, int, int]]:
        """For each block, after how many images to read it, after how many it is too late, and its number.

        Blocks of the first window are due at once, those of other windows evenly over the previous window.
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
        """Have the system read a block ahead, if it can."""
        for file, first, count in self.ranges[block] if hasattr(os, "posix_fadvise") else ():
            with suppress(OSError), open(file, "rb", buffering=0) as stream:  # noqa: PTH123  # a Path takes longer
                os.posix_fadvise(stream.fileno(), first, count, os.POSIX_FADV_WILLNEED)

    def _windows(self, rng: np.random.Generator) -> list[list[int]]:
        order = rng.permutation(len(self.bounds) - 1).tolist()
        return [order[first : first + self.window] for first in range(0, len(order), self.window)]

    def _block(self, number: int) -> NDArray[np.int64]:
        return self.images[self.bounds[number] : self.bounds[number + 1]]


def find_blocks(files: Sequence[Path]) -> Blocks:
    """The blocks of images, which are numbered as in `files`."""
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
    """An image's shard and its first byte there, else "" and its number; then its size and its number."""
    if (inside := member_of(file)) is None:
        return "", index, max(0, file_size(file)), index
    return inside[0], inside[1].offset, inside[1].size, index
