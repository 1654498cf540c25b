"""Batcher: items that come one by one are computed in batches, in a thread of its own."""

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

Observer = Callable[[Sequence[float], float], None]  # told what each item of a batch waited, and what computing it took


class FullError(Exception):
    """Every place is taken."""


class Batcher(Generic[T, R]):
    """Collects items and computes them together. Belongs to one event loop.

    Whoever wants an answer takes a place first, which bounds what is in flight. A caller that is cancelled leaves:
    its item is not computed unless its batch has begun.

    Attributes:
        pace: how many are computed together, how long they wait for others, and how many places there are.
        taken: places that are taken.

    Args:
        compute: a batch of items -> their answers, in order; called in one thread, always the same.
        pace: see the attributes.
        observe: told about each batch.
    """

    def __init__(self, compute: Callable[[list[T]], Sequence[R]], pace: Pace, observe: Observer) -> None:
        self.pace, self.taken = pace, 0
        self._compute, self._observe = compute, observe
        self._waiting: dict[asyncio.Future[R], tuple[T, float]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._came = asyncio.Event()
        self._ended = 0.0  # when the last batch was finished, if the server was busy then
        self._task = asyncio.create_task(self._run())

    @property
    def full(self) -> bool:
        """Whether no place is free."""
        return self.taken >= self.pace.places

    @contextmanager
    def place(self) -> Iterator[None]:
        """Take a place, and give it back at the end.

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
        """The answer to one item, for a caller that has a place."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting[future] = item, time.perf_counter()
        self._came.set()
        try:
            return await future
        finally:
            self._waiting.pop(future, None)

    async def close(self) -> None:
        """End, once everyone who has a place has been answered."""
        while self.taken:
            await asyncio.sleep(0.01)
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._thread.shutdown()
        del self._compute  # which knows what has this batcher: both go now, and not when Python looks for cycles

    async def _run(self) -> None:
        while True:
            await self._fill()
            batch = [*self._waiting.items()][: self.pace.batch]
            for future, _ in batch:
                del self._waiting[future]
            await self._answer(batch)

    async def _fill(self) -> None:
        """Wait for a first item, and for those on their way while the delay lasts."""
        end = None
        while not self._waiting or len(self._waiting) < min(self.pace.batch, self.taken):
            if not self._waiting:
                end = left = None  # those that came have left
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
        await asyncio.sleep(0)  # whoever was answered gives its place back first, and is not on its way any more
