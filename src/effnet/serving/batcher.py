"""Batcher: computes items that arrive one by one in batches, in a separate thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

from effnet.serving.pace import Pace

T = TypeVar("T")
R = TypeVar("R")

Observer = Callable[[Sequence[float], float], None]  # receives each item's wait in a batch, and the batch's time


class FullError(Exception):
    """All places are taken."""


class Batcher(Generic[T, R]):
    """Collects items and computes them together. Belongs to one event loop.

    Callers take a place first, which bounds the number of items in flight. If a caller is cancelled, its item is not
    computed unless its batch has begun.

    Attributes:
        pace: the batch size, how long items wait for others, and the number of places.
        taken: places in use.

    Args:
        compute: a batch of items -> their answers, in order; always called in the same thread.
        pace: see the attributes.
        observe: called for each batch.
    """

    def __init__(self, compute: Callable[[list[T]], Sequence[R]], pace: Pace, observe: Observer) -> None:
        self.pace, self.taken = pace, 0
        self._compute, self._observe = compute, observe
        self._waiting: dict[asyncio.Future[R], tuple[T, float]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._came = asyncio.Event()
        self._ended = 0.0  # when the last batch finished, if the server was busy then
        self._task = asyncio.create_task(self._run())

    @property
    def full(self) -> bool:
        """Whether all places are taken."""
        return self.taken >= self.pace.places

    @contextmanager
    def place(self) -> Iterator[None]:
        """Take a place, and release it at the end.

        Raises:
            FullError: none is free.
        """
        if self.full:
            raise FullError
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    async def __call__(self, item: T) -> R:
        """The answer for one item; the caller must have a place."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting[future] = item, time.perf_counter()
        self._came.set()
        try:
            return await future
        finally:
            self._waiting.pop(future, None)

    async def close(self) -> None:
        """End, once every caller with a place has its answer."""
        while self.taken:
            await asyncio.sleep(0.01)
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._thread.shutdown()
        del self._compute  # breaks a reference cycle, so that memory is freed now

    async def _run(self) -> None:
        while True:
            await self._fill()
            batch = [*self._waiting.items()][: self.pace.batch]
            for future, _ in batch:
                del self._waiting[future]
            await self._answer(batch)

    async def _fill(self) -> None:
        """Wait for a first item, then during the delay for others that are on their way."""
        end = None
        while not self._waiting or len(self._waiting) < min(self.pace.batch, self.taken):
            if not self._waiting:
                end = left = None  # all that arrived were cancelled
            else:
                now = time.perf_counter()
                end = end or now + self.pace.delay
                if (left := end - now) <= 0:
                    return
            self._came.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._came.wait(), left)

    async def _answer(self, batch: list[tuple[asyncio.Future[R], tuple[T, float]]]) -> None:
        began = time.perf_counter()
        items, waits = [item for _, (item, _) in batch], [began - came for _, (_, came) in batch]
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._compute, items)
        except Exception as error:
            for future, _ in batch:
                if not future.done():
                    future.set_exception(error)
            self._ended = 0.0
            return
        ended = time.perf_counter()
        self._observe(waits, ended - began)
        if self._ended:
            self.pace.observe(len(batch), ended - self._ended)
        busy = self.taken > len(batch) and 2 * self.taken >= self.pace.places
        self._ended = ended if busy else 0.0
        for (future, _), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)
        await asyncio.sleep(0)  # lets answered callers release their places first
