"""Catalogue: the served models by name; loads, reloads and releases them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from effnet.errors import ArgumentError, UnknownNameError
from effnet.serving.counters import Counters
from effnet.serving.engine import Engine, open_engine
from effnet.serving.pace import Pace

State = Literal["loading", "ready", "leaving", "draining"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Catalogue:
    """The models of a server and its state. Belongs to one event loop.

    States: loading; ready; leaving: answers, but reports not ready, so that no new clients are sent here; draining:
    only answers requests in flight.

    Args:
        models: name -> MODEL; the first one answers requests that name none.
        budget: seconds that nine of ten answers may take.
        options: options of effnet.load.
        counters: the server's metrics.
        note: writes a line to the server's log.
    """

    def __init__(
        self,
        models: Mapping[str, str],
        budget: float,
        options: dict[str, Any],
        counters: Counters,
        note: Callable[[str], object],
    ) -> None:
        self.models, self.budget, self.counters = dict(models), budget, counters
        self.first = next(iter(models))
        self.engines: dict[str, Engine] = {}
        self.state: State = "loading"
        self._options, self._note = options, note
        self._lock = asyncio.Lock()
        # Always the same thread: each thread has its own heap, which keeps a released model's memory.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._closing: set[asyncio.Task[None]] = set()

    def engine(self, name: str = "") -> Engine:
        """The engine with this name, or the first one.

        Raises:
            UnknownNameError: there is none with this name.
        """
        name = name or self.first
        if name not in self.engines:
            raise UnknownNameError("model", name, self.models)
        return self.engines[name]

    async def load(self) -> None:
        """Load all models; for errors see effnet.load."""
        async with self._lock:
            for name, model in self.models.items():
                await self._open(name, model)
        if self.state == "loading":
            self.state = "ready"

    async def reload(self) -> None:
        """Reload all models; one that cannot be loaded stays. The old ones answer requests in flight."""
        async with self._lock:
            for name, model in self.models.items():
                old = self.engines[name]
                try:
                    await self._open(name, model)
                except Exception as error:  # a bundle that is being written may fail in any way
                    self.counters.reloads.labels(name, "refused").inc()
                    self._note(f"{name} was not reloaded, and the previous one answers: {error}")
                    continue
                self.counters.reloads.labels(name, "done").inc()
                self._note(f"{name} was reloaded from {model}")
                task = asyncio.create_task(old.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Answer requests in flight, and release all models."""
        async with self._lock:
            await asyncio.gather(*self._closing, *(engine.close() for engine in self.engines.values()))
            self.engines.clear()
        self._loader.shutdown()

    async def _open(self, name: str, model: str) -> None:
        old = self.engines.get(name)
        classifier, pace = await asyncio.get_running_loop().run_in_executor(
            self._loader, open_engine, model, self._options, self.budget
        )
        if old and (old.classifier.spec, old.classifier.selection) == (classifier.spec, classifier.selection):
            pace = Pace(self.budget, old.batcher.pace.times, classifier.group)  # measured while the machine was idle
        self.engines[name] = engine = Engine(classifier, pace, self.counters.observer(name))
        batcher = engine.batcher
        self.counters.follow(name, lambda: batcher.taken, lambda: batcher.pace.places)


def name_models(models: Sequence[str]) -> dict[str, str]:
    """A mapping from name to MODEL for NAME=MODEL, or MODEL, which is named after the last part of its path.

    Raises:
        ArgumentError: no model is given, a name is not valid in a URL, or two names are equal.
    """
    if not models:
        raise ArgumentError("models", "", "must name at least one model, such as lite0 or runs/train/latest/best.")
    named: dict[str, str] = {}
    for text in models:
        name, equals, model = text.partition("=")
        if not equals or Path(text).exists():
            model, path = text, Path(text)
            name = (path.name if path.is_dir() else path.stem) if path.exists() else text.rpartition("/")[2]
            name = name.rpartition(":")[2]
        if not NAME.fullmatch(name):
            rule = "has a name that does not suit a URL (letters, digits, dot, dash, underscore): use NAME=MODEL."
            raise ArgumentError("models", text, rule)
        if name in named:
            raise ArgumentError("models", text, f"has the same name as {named[name]}: use NAME=MODEL.")
        named[name] = model
    return named
