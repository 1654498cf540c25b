"""Batches for training in an order that can be resumed exactly, from any step, with any number of processes.

An epoch is a permutation that depends only on (seed, epoch), or also on where the images are stored (blocks.py), cut
into steps of `batch` images; the remainder is not used in that epoch. Each step is cut into parts of `part` images,
which the processes take in turn. So any number of processes and workers gets the same images in the same steps, and
with the same size also the same parts; a position is an epoch and a step.
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
KEPT_BYTES = 256 * 2**20  # of decoded images that a process keeps for later epochs
LONGEST_FOLDER = 70  # bytes; a socket's path may have 104, of which multiprocessing needs 32


@dataclass(frozen=True)
class Order:
    """The images of each step."""

    images: int  # in the training split
    batch: int  # images per step, over all processes
    part: int  # images per process and forward pass
    seed: int
    rank: int = 0
    world: int = 1
    blocks: Blocks | None = None  # images to read sequentially

    def __post_init__(self) -> None:
        if self.batch > self.images:
            raise ArgumentError("batch", self.batch, f"must be at most {self.images}, the number of training images.")
        if self.batch % (whole := self.world * self.part):
            rule = f"must be a multiple of {whole}: {self.world} processes, {self.part} images at once."
            raise ArgumentError("batch", self.batch, rule)

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return self.images // self.batch

    @property
    def parts(self) -> int:
        """Parts per step and process, one after another."""
        return self.batch // (self.world * self.part)

    def random(self, epoch: int) -> np.random.Generator:
        """The random generator for an epoch's order."""
        return np.random.default_rng((self.seed, epoch))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Key]]:
        """This process's parts of an epoch, starting at step `start`."""
        random, share = self.random(epoch), self.batch // self.world
        order = self.blocks.permutation(random) if self.blocks else random.permutation(self.images)
        for step in range(start, self.steps):
            begin = step * self.batch + self.rank * share
            for first in range(begin, begin + share, self.part):
                yield [(epoch, index) for index in order[first : first + self.part].tolist()]


class TrainingImages(TorchDataset[Any]):
    """The augmented images of a data set; for an image that cannot be read, the error as text.

    Args:
        data: the images.
        augment: the augmentation.
        seed: of the run.
        keep: bytes of memory for decoded images. If the data set seems to fit, judging by the first image, images are
            decoded only in the first epoch.
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
        """Several images, with as many threads as torch has: one in a worker, all of them in the training process."""
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

    `pinned`: in pinned memory, for asynchronous copies to a CUDA GPU.
    """

    def __init__(self, images: TrainingImages, order: Order, workers: int, *, pinned: bool = False) -> None:
        self.order, self._parts = order, Parts(order)
        more: dict[str, Any] = {}
        if workers:
            _shorten_socket_paths()
            _end_quietly()
            # fork copies locks held by other threads; a fork server has no threads. Windows can only spawn.
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
        """The parts of an epoch, starting at step `start`.

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
                reason = "it printed the reason, or was killed, often because memory ran out: use fewer --workers"
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
    """Let multiprocessing put its sockets in /tmp if the path of the temporary folder is too long for them."""
    if os.name == "posix" and len(os.fsencode(tempfile.gettempdir())) > LONGEST_FOLDER:
        before, tempfile.tempdir = tempfile.tempdir, "/tmp"
        try:
            multiprocessing.util.get_temp_dir()  # remembered, and passed on to its processes
        finally:
            tempfile.tempdir = before


@cache
def _end_quietly() -> None:
    """Let multiprocessing end without tracebacks about sockets that it cannot remove.

    They may be gone because something cleaned /tmp, or the disk became read-only; the training is complete anyway.
    """
    quiet = redirect_stderr(io.StringIO())
    for priority, change in ((1000, quiet.__enter__), (-1000, partial(quiet.__exit__, None, None, None))):
        multiprocessing.util.Finalize(None, change, exitpriority=priority)  # highest first: its own have 0 and -100


def _start_worker(_: int) -> None:
    """Give a worker one thread, and let it exit when the training process is gone, even by kill -9.

    It ignores Ctrl-C, which reaches all processes of a terminal, since the training process needs images until it has
    saved.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_quietly()
    torch.set_num_threads(1)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # torch only checks the fork server, which outlives the training process as long as a worker is alive
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
