"""Progress bars on standard error, where somebody looks, and remarks that stand above them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Self

from effnet import console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Bars:
    """A bar for each kind of work, with the time left, until all of it is done."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bars away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._tasks = None, {}

    def said(self, words: str) -> None:
        """A remark."""
        if self._bar is not None:
            self._bar.console.print(words, highlight=False, markup=False)
        else:
            console.remark(words)

    def counted(self, doing: str, done: float, total: float) -> None:
        """A bar of its own, until all is done."""
        self.advance(doing, doing, done, total)
        if self._bar is not None and done >= total:
            self._bar.remove_task(self._tasks.pop(doing))

    def advance(self, name: str, words: str, done: float, total: float) -> None:
        """Draw the bar of that name with these words."""
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.6g}/{task.total}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._bar.start()
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(words, total=total)
        self._bar.update(self._tasks[name], completed=done, total=total, description=words)
