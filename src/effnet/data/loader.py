"""Batches for training in an order that can be resumed exactly, from any step, with any number of processes.

An epoch is a permutation that depends only on (seed, epoch), or also on where the images lie (blocks.py), cut into
steps of `batch` images; the rest is not used in that epoch. Each step is cut into parts of `part` images: the first
process takes the first of them, and so on. So any number of processes and workers sees the same images in the same
steps, and with the same size the same parts; and a position is an epoch and a step.
"""

from __future__ import annotations

import io
import multiprocessing.util
import os
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from effnet.data.augment import Augment, image_seed
from effnet.data.blocks import Blocks
from effnet.data.dataset import Dataset
from effnet.errors import ArgumentError, DataError, ImageError, TrainingError

Key = tuple[int, int]  # epoch and index of an image in the data set
PREFETCH = 4  # parts that a worker prepares ahead
KEPT_BYTES = 256 * 2**20  # of decoded images that a process keeps for the next epochs
LONGEST_FOLDER = 70  # bytes; the path of a socket has 104 at most, of which multiprocessing needs 32


@dataclass(frozen=True)
class Order:
    """Which images make up which step."""

    images: int  # in the training split
    batch: int  # images of a step, over all processes
    part: int  # images that a process puts through the network at once
    seed: int
    rank: int = 0
    world: int = 1
    blocks: Blocks | None = None  # images that are to be read one after the other

    def __post_init__(self) -> None:
        if self.batch > self.images:
            raise ArgumentError("batch", self.batch, f"must be at most {self.images}, the images to train with.")
        if self.batch % (whole := self.world * self.part):
            rule = f"must be a multiple of {whole}: {self.world} processes, {self.part} images at once."
            raise ArgumentError("batch", self.batch, rule)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.images // self.batch

    @property
    def parts(self) -> int:
        """Parts of a step, one after another in each process."""
        return self.batch // (self.world * self.part)

    def random(self, epoch: int) -> np.random.Generator:
        """What decides the order of an epoch."""
        return np.random.default_rng((self.seed, epoch))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Key]]:
        """This process's parts of an epoch, from step `start` on."""
        random, share = self.random(epoch), self.batch // self.world
        order = self.blocks.permutation(random) if self.blocks else random.permutation(self.images)
        for step in range(start, self.steps):
            begin = step * self.batch + self.rank * share
            for first in range(begin, begin + share, self.part):
                yield [(epoch, index) for index in order[first : first + self.part].tolist()]


class TrainingImages(TorchDataset[Any]):
    """The images of a data set, augmented; instead of an image that cannot be read, its error as text.

    Args:
        data: where they are.
        augment: how they are changed.
        seed: of the run.
        keep: bytes of memory for decoded images. Those of a data set that seems to fit, by the first image that is
            read, are decoded in the first epoch only.
    """

    def __init__(self, data: Dataset, augment: Augment, seed: int, keep: int = 0) -> None:
        self.files = [str(data.file(sample)) for sample in data.samples]
        self.labels = [sample.label for sample in data.samples]
        self.augment, self.seed, self.keep = augment, seed, keep
        self._kept: dict[int, npt.NDArray[np.uint8]] = {}

    def __getitem__(self, key: Key) -> tuple[Any, int]:
        """Pixels (size, size, C) uint8 and label of an image in an epoch."""
        epoch, index = key
        try:
            pixels = self.augment(self._read(index), image_seed(self.seed, epoch, index))
        except ImageError as error:
            return f"{self.files[index]}: {error}", self.labels[index]
        return pixels, self.labels[index]

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Any, int]]:
        """Several of them, on as many threads as torch has: one in a worker, all that wait in the training process."""
        threads = min(len(keys), torch.get_num_threads())
        if threads == 1:
            return [self[key] for key in keys]
        with ThreadPoolExecutor(threads) as pool:
            return [*pool.map(self.__getitem__, keys)]

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, index: int) -> npt.NDArray[np.uint8]:
        if (pixels := self._kept.get(index)) is None:
            pixels = self.augment.read(self.files[index])
            if not self._kept and pixels.nbytes * len(self) > self.keep:
                self.keep = 0
            if pixels.nbytes <= self.keep:
                self.keep -= pixels.nbytes
                self._kept[index] = pixels
        return pixels


class Parts:
    """A batch sampler; its position is set before each epoch."""

    def __init__(self, order: Order) -> None:
        self.order, self.position = order, (0, 0)

    def __iter__(self) -> Iterator[list[Key]]:
        order, (epoch, start) = self.order, self.position
        waiting = deque(order.blocks.schedule(order.random(epoch)) if order.blocks else ())
        used = start * order.batch
        for part in order.epoch(epoch, start):
            while waiting and waiting[0][0] <= used:
                _, end, block = waiting.popleft()
                if order.blocks and end > used:
                    order.blocks.read_soon(block)
            yield part
            used += order.part * order.world

    def __len__(self) -> int:
        return (self.order.steps - self.position[1]) * self.order.parts


class Loader:
    """Images and labels in the order of `Order`: (N, size, size, C) uint8 and (N,) int64.

    `pinned`: in memory that a CUDA GPU copies from by itself.
    """

    def __init__(self, images: TrainingImages, order: Order, workers: int, *, pinned: bool = False) -> None:
        self.order, self._parts = order, Parts(order)
        more: dict[str, Any] = {}
        if workers:
            _shorten_socket_paths()
            _end_quietly()
            # fork copies locks that other threads hold; a fork server has no threads. Windows can only spawn
            methods = multiprocessing.get_all_start_methods()
            more = {
                "multiprocessing_context": "forkserver" if "forkserver" in methods else "spawn",
                "persistent_workers": True,
                "prefetch_factor": PREFETCH,
                "worker_init_fn": _start_worker,
            }
        self._loader: DataLoader[Any] = DataLoader(
            images,
            batch_sampler=cast(Any, self._parts),
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pinned,
            **more,
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The parts of an epoch from step `start` on.

        Raises:
            DataError: an image cannot be read; the message names it.
            TrainingError: a worker process died.
        """
        self._parts.position = epoch, start
        parts = None
        while True:
            try:
                parts = parts or iter(self._loader)
                part = next(parts, None)
            except (RuntimeError, ConnectionError, EOFError) as error:
                if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                    raise
                reason = "it printed why, or was killed, often because memory ran out: use fewer --workers"
                if "bus error" in str(error).lower():  # a container's /dev/shm has 64 MB
                    reason = "shared memory ran out: enlarge /dev/shm (docker run --shm-size) or use --workers 0"
                raise TrainingError(f"a process that loads images died ({reason})") from error
            if part is None:
                return
            pixels, labels, errors = part
            if errors:
                raise DataError(f"{errors[0]} Find all such files with: effnet check DATA --fix clean.csv")
            yield pixels, labels


def collate(samples: Sequence[tuple[Any, int]]) -> tuple[Tensor, Tensor, list[str]]:
    """Pixels, labels and errors of a part."""
    errors = [pixels for pixels, _ in samples if isinstance(pixels, str)]
    if errors:
        return torch.empty(0), torch.empty(0), errors
    pixels = np.stack([pixels for pixels, _ in samples])
    return torch.from_numpy(pixels), torch.tensor([label for _, label in samples]), []


def _shorten_socket_paths() -> None:
    """Let multiprocessing keep its sockets in /tmp where the folder of temporary files has too long a path for one."""
    if os.name == "posix" and len(os.fsencode(tempfile.gettempdir())) > LONGEST_FOLDER:
        before, tempfile.tempdir = tempfile.tempdir, "/tmp"
        try:
            multiprocessing.util.get_temp_dir()  # which it keeps, and hands on to its processes
        finally:
            tempfile.tempdir = before


@cache
def _end_quietly() -> None:
    """Let multiprocessing end without tracebacks of sockets that it cannot remove.

    A cleaner of /tmp did it before, or the disk became read-only; what was asked for is done all the same.
    """
    quiet = redirect_stderr(io.StringIO())
    for priority, change in ((1000, quiet.__enter__), (-1000, partial(quiet.__exit__, None, None, None))):
        multiprocessing.util.Finalize(None, change, exitpriority=priority)  # highest first: its own have 0 and -100


def _start_worker(_: int) -> None:
    """Give a worker one thread, and let it exit when the training process is gone, even by kill -9.

    It ignores Ctrl-C, which reaches all processes of a terminal: the training process still needs images until it has
    saved.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_quietly()
    torch.set_num_threads(1)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # torch only checks the fork server, which outlives the training process as long as a worker lives
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
