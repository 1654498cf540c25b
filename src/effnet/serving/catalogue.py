"""Catalogue: the models that are served, by name; they are loaded, reloaded and released here."""

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

    States: loading; ready; leaving: answers, but says that it is not ready, so that no new clients are sent here;
    draining: answers what is in flight, and nothing else.

    Args:
        models: name -> MODEL; the first is the one that answers where none is named.
        budget: seconds that nine of ten answers may take.
        options: how the models are opened, see effnet.load.
        counters: the server's numbers.
        note: writes a line for whoever runs the server.
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
        # Always the same thread: each has a heap of its own, which keeps what a model took there after it was released.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._closing: set[asyncio.Task[None]] = set()

    def engine(self, name: str = "") -> Engine:
        """The engine of that name, or the first.

        Raises:
            UnknownNameError: there is none of that name.
        """
        name = name or self.first
        if name not in self.engines:
            raise UnknownNameError("model", name, self.models)
        return self.engines[name]

    async def load(self) -> None:
        """Load all; for the errors see effnet.load."""
        async with self._lock:
            for name, model in self.models.items():
                await self._open(name, model)
        if self.state == "loading":
            self.state = "ready"

    async def reload(self) -> None:
        """Load all again; one that cannot be loaded stays. What is in flight is answered by the old one."""
        async with self._lock:
            for name, model in self.models.items():
                old = self.engines[name]
                try:
                    await self._open(name, model)
                except Exception as error:  # a bundle that is being written may fail in any way
                    self.counters.reloads.labels(name, "refused").inc()
                    self._note(f"{name} was not reloaded, and the one before answers: {error}")
                    continue
                self.counters.reloads.labels(name, "done").inc()
                self._note(f"{name} was reloaded from {model}")
                task = asyncio.create_task(old.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Answer what is in flight, and release all."""
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
            pace = Pace(
                self.budget, old.batcher.pace.times, classifier.group
            )  # measured when the machine had nothing else to do
        self.engines[name] = engine = Engine(classifier, pace, self.counters.observer(name))
        batcher = engine.batcher
        self.counters.follow(name, lambda: batcher.taken, lambda: batcher.pace.places)


def name_models(models: Sequence[str]) -> dict[str, str]:
    """NAME=MODEL or MODEL, which is then named after the last part of its path -> name to MODEL.

    Raises:
        ArgumentError: there is none, a name is not fit for a URL, or two are the same.
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
            rule = "has a name that does not fit into a URL (letters, digits, dot, dash, underscore): use NAME=MODEL."
            raise ArgumentError("models", text, rule)
        if name in named:
            raise ArgumentError("models", text, f"has the name of {named[name]}: use NAME=MODEL.")
        named[name] = model
    return named
