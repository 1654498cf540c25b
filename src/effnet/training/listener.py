"""Who is told how a run goes, and who may ask it to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol


class Onlooker(Protocol):
    """Who is told how long work goes."""

    def said(self, words: str) -> None:
        """Something a user should know."""

    def counted(self, doing: str, done: float, total: float) -> None:
        """How much is done and in all, of what takes its time."""


class Listener(Onlooker, Protocol):
    """Who is told how a run goes."""

    def steps(self, done: int, total: int, loss: float) -> None:
        """Steps done and planned, and the running mean of the loss."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """A row of results.csv."""


class Silent:
    """Nobody is told."""

    def said(self, words: str) -> None:
        """Nothing happens."""

    def steps(self, done: int, total: int, loss: float) -> None:
        """Nothing happens."""

    def counted(self, doing: str, done: float, total: float) -> None:
        """Nothing happens."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Nothing happens."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; its state was saved."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(f"stopped and saved after {step} steps; go on with: effnet train --resume {folder}")


@contextmanager
def listening() -> Iterator[list[int]]:
    """A list into which SIGTERM and Ctrl-C put themselves; the second one acts as if nobody listened."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: object) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    try:
        for heard in (signal.SIGINT, signal.SIGTERM):
            before[heard] = signal.getsignal(heard)
            signal.signal(heard, note)
    except ValueError:  # not the main thread: its owner hears the signals
        before.clear()
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
