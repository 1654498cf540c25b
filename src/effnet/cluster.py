"""Jobs on a Ray cluster: each takes some cores of a machine, and moves to another if its worker or machine dies.

Jobs are Ray tasks, not actors. Ray reuses the processes that run them, so the next job finds what a job opened and
cached; and a task runs on any machine with room, even one that joined later, while an actor whose machine died waits
for as much room as it had.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import signal
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from effnet.errors import ArgumentError, ClusterError, EffnetError
from effnet.process import unchanged
from effnet.progress import SILENT, Progress
from effnet.version import __version__

ATTEMPTS = 3  # for a job whose worker dies
CONNECT_SECONDS = 10.0  # time for a machine of the cluster to answer; Ray itself tries for minutes
AHEAD = 2  # jobs submitted per running job, so that none waits for this process and a cluster that can grow does

R = TypeVar("R")
ClusterJob = tuple[str, tuple[Any, ...]]  # a name for messages, and the function's arguments


class Cluster:
    """A Ray cluster. `close`, or leaving a with statement, cancels its jobs and disconnects.

    Every machine needs effnet, and the files that jobs read under the same path. If this process is already connected
    to a cluster, that one is used whatever the address, and stays connected.

    Attributes:
        each: CPUs or GPUs per job.
        lost: the errors that a job's future raises if its worker died.

    Args:
        address: auto, HOST:PORT, ray://HOST:10001; local starts Ray on this machine.
        each: CPUs or GPUs per job, at most those of the largest machine.
        unit: whether these are CPUs or GPUs.
        most: jobs at a time; None means as many as there is room for.
        scratch: a name for the jobs' folder on each machine (`scratch_folder`), which `close` removes.

    Raises:
        ArgumentError: the cluster cannot be reached, or has none of that unit.
    """

    def __init__(
        self,
        address: str,
        each: int = 1,
        *,
        unit: Literal["CPU", "GPU"] = "CPU",
        most: int | None = None,
        scratch: str = "",
    ) -> None:
        with unchanged():
            ray: Any = importlib.import_module("ray")  # only partly typed
        self._ray, self._unit, self._most, self._scratch = ray, unit, most, scratch
        self._started, self._running = not ray.is_initialized(), dict[Future[Any], Any]()
        if self._started:
            hint = ". Something listens there: another version of Ray, or one that requires a token" * _knock(address)
            local = {"num_cpus": most and each * most, "include_dashboard": False} if address == "local" else {}
            try:
                with unchanged(), _same_sigterm():
                    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage reports
                    ray.init(address, log_to_driver=False, logging_level="ERROR", **local)
            except Exception as error:  # a plain Exception if Ray's processes do not start in time
                raise ArgumentError("ray", address, f"cannot be reached: {str(error).rstrip('.')}{hint}.") from error
        largest = max(self._rooms(), default=0)
        if not largest:
            self.close()
            raise ArgumentError("ray", address, f"has no {unit}.")
        self.each = min(each, largest)
        errors = ray.exceptions
        self.lost: tuple[type[BaseException], ...] = (
            errors.WorkerCrashedError,
            errors.NodeDiedError,
            errors.LocalRayletDiedError,
            errors.ObjectLostError,
            errors.OutOfMemoryError,
        )
        room = {"num_cpus": self.each} if unit == "CPU" else {"num_cpus": 0, "num_gpus": self.each}
        self._run = ray.remote(max_retries=0, **room)(_run)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rooms(self) -> list[int]:
        """The CPUs or GPUs of each machine that is connected now."""
        return [int(node["Resources"].get(self._unit, 0)) for node in self._ray.nodes() if node["Alive"]]

    @property
    def slots(self) -> int:
        """Jobs at a time on the machines that are connected now; 1 if there are none, which waits for one."""
        room = sum(machine // self.each for machine in self._rooms())
        return max(1, room if self._most is None else min(room, self._most))

    def share(self, value: object) -> Any:
        """A reference to a value that many jobs take as an argument, so that it is sent only once to each machine."""
        return self._ray.put(value)

    def submit(self, function: Callable[..., R], *arguments: Any) -> Future[R | EffnetError]:
        """Start a job where there is room; an EffnetError raised by its function becomes its result."""
        reference = self._run.options(name=function.__name__).remote(__version__, function, *arguments)
        future: Future[R | EffnetError] = reference.future()
        self._running = {each: there for each, there in self._running.items() if not each.done()}
        self._running[future] = reference
        return future

    def run(
        self, function: Callable[..., R], jobs: Iterable[ClusterJob], progress: Progress = SILENT
    ) -> Iterator[tuple[str, R]]:
        """Yields each job's name and the result of `function` as jobs finish.

        Jobs are taken from the iterable as room becomes free. A job whose worker dies is run up to ATTEMPTS times.

        Raises:
            ClusterError: every worker of a job died; raised after all other jobs have ended.
            EffnetError: raised by the function; `close` cancels the other jobs.
        """
        waiting, again, running = iter(jobs), list[ClusterJob](), dict[Future[R | EffnetError], ClusterJob]()
        deaths, dead = Counter[str](), dict[str, BaseException]()
        while True:
            room = AHEAD * self.slots - len(running)
            drawn, again = again[:room], again[room:]
            for job in (*drawn, *islice(waiting, max(0, room - len(drawn)))):
                running[self.submit(function, *job[1])] = job
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                name = job[0]
                try:
                    result = future.result()
                except self.lost as error:
                    deaths[name] += 1
                    if deaths[name] < ATTEMPTS:
                        progress.message(f"{name}: its worker or machine died; it runs again")
                        again.append(job)
                    else:
                        dead[name] = error
                    continue
                if isinstance(result, EffnetError):
                    raise result
                yield name, result
        for name, cause in dead.items():
            others = f", and those of {len(dead) - 1} more" if len(dead) > 1 else ""
            why = f"perhaps for lack of memory: {' '.join(str(cause).split())}"
            raise ClusterError(f"{name}: its worker died {ATTEMPTS} times{others}, {why}")

    def close(self) -> None:
        """Cancel running jobs, remove the jobs' folders from all machines, and disconnect."""
        for reference in self._running.values():
            self._ray.cancel(reference)
        if self._scratch:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            clear = self._ray.remote(num_cpus=0)(_clear)
            nodes = [node["NodeID"] for node in self._ray.nodes() if node["Alive"]]
            strategies = (NodeAffinitySchedulingStrategy(node, soft=True) for node in nodes)
            clearing = [clear.options(scheduling_strategy=each).remote(self._scratch) for each in strategies]
            self._ray.wait(clearing, num_returns=len(clearing), timeout=10)
        if self._started:
            with unchanged(), _same_sigterm():
                self._ray.shutdown()


def check_cluster(address: str | None) -> None:
    """Raise ArgumentError early if there is no cluster at an address."""
    if address not in (None, "local"):  # local is still to be started
        Cluster(address).close()


def _knock(address: str) -> bool:
    """Whether something listens at an address; False if it has no port: auto, local, or an address that Ray rejects.

    Raises:
        ArgumentError: the address is empty, or nothing listens at its port.
    """
    if not address:
        raise ArgumentError("ray", address, "must be auto, local, HOST:PORT or ray://HOST:PORT.")
    place = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    host, _, port = place.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return False
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:  # the last two: impossible host or port
        raise ArgumentError("ray", address, f"cannot be reached: {place}: {error}") from error
    return True


@contextmanager
def _same_sigterm() -> Iterator[None]:
    """Keep the SIGTERM handler, which Ray replaces as it starts, and takes away as it ends.

    Commands have their own, and forked processes hang in Ray's.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # None: the handler was not set from Python, which cannot restore it
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def scratch_folder(name: str) -> Path:
    """The folder with this name for jobs on this machine."""
    return Path(tempfile.gettempdir()) / name


def _clear(scratch: str) -> None:
    shutil.rmtree(scratch_folder(scratch), ignore_errors=True)


def _run(version: str, function: Callable[..., R], *arguments: Any) -> R | EffnetError:
    """Run a job, on its machine."""
    try:
        if version != __version__:
            raise ClusterError(f"{platform.node()} has effnet {__version__}, not {version} as here: install the same")
        return function(*arguments)
    except EffnetError as error:
        return error
