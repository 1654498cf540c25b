"""The batcher with a function instead of an engine, which tests hold back and release."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from effnet.serving.batcher import Batcher, FullError
from effnet.serving.pace import Pace


class Engine:
    """Doubles numbers; waits until it is let go."""

    def __init__(self) -> None:
        self.go, self.batches, self.waits = threading.Event(), list[list[int]](), list[Sequence[float]]()

    def compute(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        assert self.go.wait(30)
        if 13 in items:
            raise ArithmeticError(items)
        return [2 * item for item in items]

    def batcher(self, *, largest: int = 4, delay: float = 0.0, places: int = 100) -> Batcher[int, int]:
        pace = Pace(1.0, {1: 0.01}, largest)
        pace.delay, pace.rate = delay, places / 0.8
        return Batcher(self.compute, pace, lambda waits, seconds: self.waits.append(waits))


async def ask(batcher: Batcher[int, int], item: int) -> int:
    with batcher.place():
        return await batcher(item)


async def until(condition: object) -> None:
    while not condition():  # type: ignore[operator]
        await asyncio.sleep(0.001)


def test_what_comes_meanwhile_goes_together_and_answers_keep_their_order() -> None:
    async def scene() -> None:
        engine = Engine()
        batcher = engine.batcher()
        first = asyncio.create_task(ask(batcher, 0))
        await until(lambda: engine.batches)
        others = [asyncio.create_task(ask(batcher, item)) for item in range(1, 8)]
        await asyncio.sleep(0.01)
        engine.go.set()
        assert await asyncio.gather(first, *others) == [2 * item for item in range(8)]
        assert engine.batches == [[0], [1, 2, 3, 4], [5, 6, 7]]
        assert [len(waits) for waits in engine.waits] == [1, 4, 3]
        await batcher.close()

    asyncio.run(scene())


def test_who_gives_up_leaves() -> None:
    async def scene() -> None:
        engine = Engine()
        batcher = engine.batcher()
        first = asyncio.create_task(ask(batcher, 0))
        await until(lambda: engine.batches)
        others = [asyncio.create_task(ask(batcher, item)) for item in (1, 2, 3)]
        await asyncio.sleep(0.01)
        first.cancel()  # its batch is computed all the same
        others[1].cancel()
        await asyncio.sleep(0.01)
        assert batcher.taken == 2
        engine.go.set()
        assert await asyncio.gather(others[0], others[2]) == [2, 6]
        assert engine.batches == [[0], [1, 3]]
        assert batcher.taken == 0
        await batcher.close()

    asyncio.run(scene())


def test_everyone_may_give_up() -> None:
    async def scene() -> None:
        engine = Engine()
        batcher = engine.batcher(delay=0.02)
        engine.go.set()
        with batcher.place():  # someone who is still being read, for whom the batch waits
            alone = asyncio.create_task(ask(batcher, 1))
            await asyncio.sleep(0.005)
            alone.cancel()
            await asyncio.sleep(0.05)
        assert engine.batches == []
        assert await ask(batcher, 2) == 4
        await batcher.close()

    asyncio.run(scene())


def test_a_batch_waits_for_those_on_their_way_and_no_longer_than_the_delay() -> None:
    async def scene() -> None:
        engine = Engine()
        engine.go.set()
        batcher = engine.batcher(delay=10.0)
        assert await ask(batcher, 1) == 2  # alone: nobody to wait for

        async def slowly(item: int) -> int:
            with batcher.place():
                await asyncio.sleep(0.02)  # being read
                return await batcher(item)

        assert await asyncio.gather(slowly(2), ask(batcher, 3)) == [4, 6]
        assert engine.batches == [[1], [3, 2]]
        batcher.pace.delay = 0.005
        with batcher.place():  # never arrives
            assert await ask(batcher, 4) == 8
        await batcher.close()

    asyncio.run(scene())


def test_nobody_waits_for_one_who_never_arrives() -> None:
    async def scene() -> None:
        engine = Engine()
        batcher = engine.batcher()
        first = asyncio.create_task(ask(batcher, 0))
        await until(lambda: engine.batches)
        with batcher.place():  # cannot be read
            second = asyncio.create_task(ask(batcher, 1))  # waits already when the first batch ends
            await asyncio.sleep(0.01)
            engine.go.set()
            assert await asyncio.wait_for(asyncio.gather(first, second), 30) == [0, 2]
        await batcher.close()

    asyncio.run(scene())


def test_a_full_server_lets_nobody_in() -> None:
    async def scene() -> None:
        engine = Engine()
        batcher = engine.batcher(places=3)
        tasks = [asyncio.create_task(ask(batcher, item)) for item in range(3)]
        await until(lambda: batcher.full)
        with pytest.raises(FullError):
            await ask(batcher, 3)
        engine.go.set()
        assert await asyncio.gather(*tasks) == [0, 2, 4]
        assert await ask(batcher, 3) == 6
        await batcher.close()

    asyncio.run(scene())


def test_a_batch_that_fails_fails_for_its_own_only() -> None:
    async def scene() -> None:
        engine = Engine()
        engine.go.set()
        batcher = engine.batcher()
        answers = await asyncio.gather(*(ask(batcher, item) for item in (13, 1)), return_exceptions=True)
        assert [type(answer) for answer in answers] == [ArithmeticError, ArithmeticError]
        assert await ask(batcher, 1) == 2
        await batcher.close()

    asyncio.run(scene())


def test_closing_waits_for_everyone() -> None:
    async def scene() -> None:
        engine = Engine()
        batcher = engine.batcher()
        task = asyncio.create_task(ask(batcher, 1))
        await until(lambda: engine.batches)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.03)
        assert not closing.done()
        engine.go.set()
        assert await task == 2
        await closing

    asyncio.run(scene())


def test_the_rate_is_measured_on_a_busy_server_only() -> None:
    async def scene() -> None:
        engine = Engine()
        engine.go.set()
        batcher = engine.batcher(places=100)
        rate = batcher.pace.rate
        for item in range(3):
            await ask(batcher, item)
        assert batcher.pace.rate == rate
        batcher.pace.rate = 20 / 0.8
        await asyncio.gather(*(ask(batcher, item) for item in range(20, 36)))
        assert batcher.pace.rate != 20 / 0.8
        await batcher.close()

    asyncio.run(scene())
