"""Commands in their own processes: starting them, killing them, waiting for them.

Starting Python with torch takes two seconds or more, so most commands are forked from a single-threaded process that
has imported everything: the child changes to its folder and calls `effnet.cli.main` with the words of the command line.
Others are started as a user would, with `python -m effnet`.

A forked command can be killed just before its n-th file operation: opening for writing, renaming, removing or creating.
Python reports each to an audit hook, and a counter shared by the command's processes counts them.
"""

from __future__ import annotations

import atexit
import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HANG = 600.0  # seconds after which a command counts as hanging; the longest takes 10
PATIENCE = 60.0  # seconds in which child processes must end after their parent
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Aim:
    """When to kill a command, and which of its processes."""

    seconds: float | None = None  # after its start
    change: int | None = None  # just before this file operation, counted from 1
    alone: int | None = None  # kill only this one of its processes; the others must end by themselves


NEVER = Aim()


@dataclass
class Running:
    """A running command with its processes."""

    pids: list[int]
    log: Path
    aim: Aim
    counter: mmap.mmap | None = None
    began: float = field(default_factory=time.monotonic)
    codes: dict[int, int] = field(default_factory=dict)

    @property
    def changes(self) -> int:
        """The number of file operations so far."""
        return 0 if self.counter is None else int(struct.unpack("q", self.counter[:8])[0])

    @property
    def seconds(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self.began

    def poll(self) -> bool:
        """Whether its first process has ended."""
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return self.pids[0] in self.codes

    def kill(self, only: Sequence[int] = ()) -> None:
        """Kill -9 all of its processes, or only some."""
        victims = only or [*self.pids, *descendants(self.pids[0])]
        if not only:
            with suppress(ProcessLookupError):
                os.killpg(self.pids[0], signal.SIGKILL)
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait(self) -> int | None:
        """Kill it as aimed, wait until all of its processes have ended, and return its exit code, or None if killed.

        Raises:
            TimeoutError: the command hangs, or leaves processes behind.
        """
        killed = False
        while not self.poll():
            if self.aim.seconds is not None and not killed and self.seconds > self.aim.seconds:
                self.kill(() if self.aim.alone is None else self.pids[self.aim.alone : self.aim.alone + 1])
                killed = True
                self._end_others()
            if self.seconds > HANG:
                self.kill()
                raise TimeoutError(f"hangs: {self.tail()}")
            time.sleep(0.002)
        if self.codes[self.pids[0]] == -signal.SIGKILL and self.aim.alone is None:
            self.kill()  # the others, if a hook has killed the first
        self._end_others()
        end = time.monotonic() + PATIENCE
        while not all(pid in self.codes for pid in self.pids) or members(self.pids[0]):
            self.poll()
            if time.monotonic() > end:
                left = members(self.pids[0])
                self.kill()
                raise TimeoutError(f"leaves processes behind: {left}")
            time.sleep(0.005)
        return None if -signal.SIGKILL in self.codes.values() else self.codes[self.pids[0]]

    def _end_others(self) -> None:
        """End the other processes if one has failed, as torchrun does."""
        if len(self.pids) > 1:
            time.sleep(0.1)
            self.poll()
            if any(self.codes.values()):
                for pid in self.pids:
                    if pid not in self.codes:
                        os.kill(pid, signal.SIGTERM)

    def tail(self) -> str:
        """The end of its output."""
        return " | ".join(self.log.read_text(errors="replace").splitlines()[-6:])[-700:]


def fork(
    words: Sequence[str], place: Path, log: Path, aim: Aim = NEVER, processes: int = 1, **environment: str
) -> Running:
    """Start a command as a fork of this process, or several as torchrun would."""
    if len(os.listdir("/proc/self/task")) > 1:  # noqa: PTH208  # only the names are counted
        raise RuntimeError("this process has other threads, so it cannot be forked")
    counter = mmap.mmap(-1, 8)
    pids: list[int] = []
    for rank in range(processes):
        named = {**environment, **({} if processes == 1 else {"RANK": str(rank), "LOCAL_RANK": str(rank)})}
        counted = (place, counter, aim) if rank == 0 else None

        def work(counted: tuple[Path, mmap.mmap, Aim] | None = counted) -> int:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
            if counted:
                _count_changes(*counted)
            return run_effnet(words)

        pids.append(begin(work, place, log, named, group=pids[0] if pids else 0))
    return Running(pids, log, aim, counter)


def run_effnet(words: Sequence[str]) -> int:
    """Run an effnet command in this process, as in one of its own."""
    from effnet.cli import main

    sys.argv = ["effnet", *words]
    main()
    return 0


def begin(
    work: Callable[[], int | None],
    place: Path,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    group: int | None = None,
) -> int:
    """Start some work in a fork of this process, which exits like a normal Python process.

    Args:
        work: returns the exit code, or exits with one.
        place: the working folder.
        log: the file for its output; default: this process's output.
        environment: variables to add.
        group: process group to join; 0: a new one.

    Returns:
        The pid.
    """
    sys.stdout.flush()
    if pid := os.fork():
        if group is not None:
            with suppress(PermissionError, ProcessLookupError):
                os.setpgid(pid, group or pid)  # in parent and child, so that it is set whichever runs first
        return pid
    code: Any = 70
    try:
        if group is not None:
            with suppress(PermissionError):
                os.setpgid(0, group)
        if log:
            stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            nothing = os.open(os.devnull, os.O_RDONLY)
            for source, target in ((nothing, 0), (stream, 1), (stream, 2)):
                os.dup2(source, target)
        os.chdir(place)
        os.environ.update(environment or {})
        tempfile.tempdir = None  # so that the environment decides
        code = work()
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _count_changes(place: Path, counter: mmap.mmap, aim: Aim) -> None:
    """Count file operations below a folder, and kill this command just before the one of `aim`."""
    root = f"{place}{os.sep}"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            name, _, flags = arguments
            if not (isinstance(flags, int) and flags & WRITING) or isinstance(name, int):
                return
        elif event in CHANGES:
            name = arguments[0]
        else:
            return
        path = os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else ""
        if os.path.isabs(path) and not path.startswith(root):  # noqa: PTH117  # runs at every file operation
            return
        count = struct.unpack("q", counter[:8])[0] + 1
        counter[:8] = struct.pack("q", count)
        if count == aim.change:
            (os.killpg if aim.alone is None else os.kill)(os.getpgrp(), signal.SIGKILL)
            time.sleep(60)  # until the signal arrives

    sys.addaudithook(hook)


def start(
    words: Sequence[str], place: Path, log: Path, aim: Aim = NEVER, processes: int = 1, **environment: str
) -> Running:
    """Start a command as a user does, in a new Python process."""
    command = [sys.executable, "-m", "effnet", *words]
    if processes > 1:
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *run, "-m", "effnet", *words]
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command,
            cwd=place,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            process_group=0,
        )
    process.returncode = 0  # `Running` waits for it
    return Running([process.pid], log, aim)


def in_child(work: Callable[[], int | None], place: Path, log: Path | None = None) -> int:
    """Do some work in a fork, so that its threads end with it; return its exit code as `await_child` does."""
    return await_child(begin(work, place, log))


def await_child(child: int) -> int:
    """The exit code of a fork, or minus the signal that ended it, as in subprocess; -1000 if it hangs."""
    end = time.monotonic() + HANG
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1000


def descendants(pid: int) -> list[int]:
    """All descendants of a process."""
    found: list[int] = []
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (thread / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def members(group: int) -> list[str]:
    """The running processes of a group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                name, _, rest = (entry / "stat").read_text().rpartition(")")
                state, _, owner, *_ = rest.split()
                if int(owner) == group and state != "Z":
                    found.append(f"{name})")
    return found


def fork_search_workers() -> None:
    """Make the workers of a search forks, which start at once."""
    import multiprocessing
    from types import SimpleNamespace

    import effnet.searching.jobs as jobs

    jobs.multiprocessing = SimpleNamespace(
        get_context=lambda _: multiprocessing.get_context("fork"), parent_process=multiprocessing.parent_process
    )
