"""The protocol of progress: long work reports how much is done and what the user should know; the caller draws it.

Library functions take `progress: Progress = SILENT` and print nothing themselves; `console.Display` draws.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of long work."""

    def message(self, text: str) -> None:
        """Something the user should know: a rule that was applied, a fallback that was taken."""

    def update(self, task: str, done: float, total: float, detail: str = "") -> None:
        """How much of a task is done; each name is a task of its own, finished when `done` reaches `total`.

        Args:
            task: what is being done, such as "reading images".
            done: units done so far.
            total: units in all; it may change from call to call.
            detail: what changes from step to step, such as "loss 2.31".
        """


class Silent:
    """Ignores everything."""

    def message(self, text: str) -> None:
        """Nothing is shown."""

    def update(self, task: str, done: float, total: float, detail: str = "") -> None:
        """Nothing is shown."""


SILENT: Progress = Silent()
