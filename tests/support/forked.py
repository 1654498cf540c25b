"""Commands in forked processes, which need not import torch; the import takes longer than the tests' work.

They are forked from multiprocessing's forkserver, a fresh interpreter that has imported it: nothing that a test changed
in its own process is in them. Whatever ends a process of `python -m effnet` ends one of these, too.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch._dynamo", "effnet.training.train", "effnet.training.result", "effnet.cli"])


class Forked:
    """A process that runs a function, or a command.

    Args:
        log: the file for what it prints; .err beside it has what goes to stderr.
        function: of a module that can be imported.
        arguments: the function's.
        environment: variables that differ from this process's.
    """

    def __init__(
        self, log: Path, function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        self.store: TCPStore | None = None
        log.parent.mkdir(exist_ok=True)
        self.process: BaseProcess = CONTEXT.Process(
            target=_begin, args=(str(log), dict(environment or {}), function, arguments)
        )
        self.process.start()

    @classmethod
    def command(cls, log: Path, *words: object) -> Forked:
        """An effnet command by its words."""
        return cls(log, _main, list(map(str, words)))

    @property
    def pid(self) -> int:
        """Of the process, which leads a group of its own."""
        assert self.process.pid
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        """As subprocess has it."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self.process.exitcode

    @property
    def stderr(self) -> str:
        """What it said there so far."""
        return self.log.with_suffix(".err").read_text()

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it printed until its end."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "it did not end"
        return self.log.read_text(), self.stderr


def ranks(folder: Path, world: int, function: Callable[..., Any], *arguments: Any) -> list[Forked]:
    """A function in several processes with what torchrun would tell them; their logs are in the folder.

    As with torchrun, the store in which they find each other is in none of them.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_RUN_ID": "none"}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    found = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        found.append(Forked(folder / f"{rank}.log", function, *arguments, environment=shared | own))
        found[-1].store = store
    return found


def _main(words: list[str]) -> None:
    from effnet.cli import main

    main(words)


def _begin(log: str, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    os.environ.update(environment)
    for number, name in ((1, log), (2, str(Path(log).with_suffix(".err")))):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    warnings.simplefilter("ignore")
    try:
        function(*arguments)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
