"""Short trainings, and how to stop them."""

from __future__ import annotations

from typing import Any

from effnet.progress import Silent

QUICK: dict[str, Any] = {"batch": 8, "epochs": 3, "workers": 0, "threads": 1, "lr": 0.02, "save_seconds": 0.0}


class CrashError(Exception):
    """The machine stopped at once."""


class Recorder(Silent):
    """Keeps messages, and stops the run after a step, or after an epoch's validation."""

    def __init__(self, stop: int | None = None, stop_epoch: int | None = None) -> None:
        self.messages: list[str] = []
        self.stop, self.stop_epoch = stop, stop_epoch

    def message(self, text: str) -> None:
        self.messages.append(text)
        if text.startswith("  ") and text.split()[0] == str(self.stop_epoch):
            raise CrashError

    def update(self, task: str, done: float, total: float, detail: str = "") -> None:
        if (task, done) == ("training", self.stop):
            raise CrashError

    def has(self, text: str) -> bool:
        return any(text in message for message in self.messages)
