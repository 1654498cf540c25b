"""The jobs of a search: trainings to score, the record of those that ended, and the executors that do them.

A score follows from its job and the plan of the search, never from who trains, how many at once, or in which order. So
the record, trials.csv in the search's folder, is all that a search has to remember: a line for each training that
ended. A search that was killed goes on with the lines that it finds.

Executors: the processes of this machine (LocalExecutor), or a Ray cluster of any size (RayExecutor).
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol, Self

from effnet.console import csv_lines
from effnet.errors import ArgumentError, DataError, EffnetError, TrainingError
from effnet.progress import SILENT, Progress
from effnet.searching.halving import FAILED, Job, Trial
from effnet.searching.plan import CACHE, SearchPlan

ATTEMPTS = 3  # of a training whose worker dies
TICK = 0.5  # seconds between two reports of progress
COLUMNS = ("rung", "seed", "candidate", "network", "score", "seconds", "error")


class TrialRecord:
    """The trials that ended, in a file to which whole lines are appended. One process at a time may hold it.

    A last line without an end was cut off when the process was killed: it is removed, and its job is open again.

    Args:
        file: trials.csv.
        names: of the candidates, for whoever reads the file.

    Raises:
        ArgumentError: another process holds it.
        DataError: a line cannot be read.
    """

    def __init__(self, file: Path, names: Sequence[str]) -> None:
        self.trials: dict[Job, Trial] = {}
        self._names = names
        self._file = file.open("a+b")
        try:
            _lock(self._file.fileno(), file)
            self._file.seek(0)
            content = self._file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._file.truncate(len(whole))
            for number, row in enumerate(csv.DictReader(whole.decode().splitlines()), start=2):
                try:
                    job = Job(int(row["rung"]), int(row["seed"]), int(row["candidate"]))
                    if row["score"]:
                        self.trials[job] = Trial(job, float(row["score"]), float(row["seconds"]), row["error"])
                except (KeyError, TypeError, ValueError) as error:
                    raise DataError(f"{file}, line {number} is not a trial; it should have {COLUMNS}") from error
            if not whole:
                self._write(COLUMNS)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def scores(self) -> dict[Job, float]:
        """The scores of the trainings that ended."""
        return {job: FAILED if trial.score is None else trial.score for job, trial in self.trials.items()}

    def append(self, trial: Trial) -> None:
        """Note how a training ended."""
        job = trial.job
        score = "" if trial.score is None else trial.score
        error = " ".join(trial.error.split())
        self._write((job.rung, job.seed, job.candidate, self.name(job), score, f"{trial.seconds:.2f}", error))
        self.trials[job] = trial

    def name(self, job: Job) -> str:
        """The network that a job trains."""
        return self._names[job.candidate]

    def _write(self, row: Sequence[object]) -> None:
        self._file.write(csv_lines([row]).encode())
        self._file.flush()


def _lock(descriptor: int, file: Path) -> None:
    """Hold the file until it is closed, also by being killed; where the system or the disk has no locks, do nothing."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ArgumentError("resume", str(file.parent), "is being worked on by another process.") from error
    except OSError:
        return


class Executor(Protocol):
    """Trains several jobs at a time."""

    slots: int  # jobs that it takes at a time
    lost: tuple[type[BaseException], ...]  # what a future raises whose worker died

    def submit(self, job: Job) -> Future[Trial | EffnetError]:
        """Begin a job."""

    def partial(self) -> tuple[float, int]:
        """What the running jobs have done, in trainings, where that is known; and the images decoded so far."""

    def close(self) -> None:
        """Stop the running jobs, each between two steps, and end the workers."""


def run_jobs(
    plan: Callable[[Mapping[Job, float]], Sequence[Job]],
    record: TrialRecord,
    executor: Executor,
    progress: Progress = SILENT,
    *,
    total: int,
    minutes: float | None = None,
    trials: int | None = None,
) -> None:
    """Do what there is to do, until all is done, or time or trials are used up.

    A training whose worker dies is tried again, ATTEMPTS times in all; then its failure is recorded.

    Args:
        plan: the open jobs, given the scores.
        record: where trials are noted as they end.
        executor: who trains.
        progress: follows the work.
        total: trainings of the whole search, for the progress.
        minutes: no training begins after so many.
        trials: no more trainings than these.

    Raises:
        TrainingError: workers die, and no training has ended.
        EffnetError: no training can go on.
    """
    began, started, decoded = time.monotonic(), 0, 0
    deaths, running, ended = Counter[Job](), dict[Future[Trial | EffnetError], Job](), 0
    progress.update("trainings", len(record.trials), total)
    while True:
        late = minutes is not None and time.monotonic() - began > 60 * minutes
        for job in plan(record.scores):
            if late or len(running) >= executor.slots or (trials is not None and started >= trials):
                break
            if job not in running.values():
                running[executor.submit(job)] = job
                started += 1
        if not running:
            return
        for future in wait(running, timeout=TICK, return_when=FIRST_COMPLETED).done:
            job = running.pop(future)
            name = f"{record.name(job)}, rung {job.rung + 1}, seed {job.seed + 1}"
            try:
                outcome = future.result()
            except executor.lost as error:
                deaths[job] += 1
                started -= 1
                if deaths[job] < ATTEMPTS:
                    progress.message(f"{name}: its worker died, so it is trained again")
                    continue
                words = f"its worker died {ATTEMPTS} times, perhaps for want of memory: {error}"
                if not ended:
                    raise TrainingError(f"{name}: {words}. Fewer --workers need less.") from error
                outcome = Trial(job, None, 0.0, words)
            if isinstance(outcome, EffnetError):
                raise outcome
            record.append(outcome)
            ended += 1
            shown = f"failed: {outcome.error}" if outcome.error else f"{outcome.score:.2%}"
            progress.message(f"{name}: {shown}")
        share, images = executor.partial()
        detail = f"{images:,} images decoded" if images > decoded else ""
        progress.update("trainings", len(record.trials) + share, total, detail)
        decoded = images


class LocalExecutor:
    """Processes of this machine, which train on one thread each.

    Each is a pool of its own, so that one that dies takes no other along. They end when their parent does.
    """

    lost: tuple[type[BaseException], ...] = (BrokenProcessPool,)

    def __init__(self, plan: SearchPlan, workers: int) -> None:
        self.slots = workers
        self._plan, self._context = plan, multiprocessing.get_context("spawn")
        # Without locks, which a worker that is killed might hold: a training's share and decoded images of each
        # worker, and behind them whether to stop.
        self._shared = self._context.Array("d", 2 * workers + 1, lock=False)
        self._pools = [self._pool(place) for place in range(workers)]
        self._futures: list[Future[Any] | None] = [None] * workers

    def _pool(self, place: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, self._context, _begin, (self._plan, self._shared, place))

    def submit(self, job: Job) -> Future[Trial | EffnetError]:
        """Begin a job in a process that is free."""
        place = next(place for place, future in enumerate(self._futures) if future is None or future.done())
        self._shared[2 * place] = 0.0
        try:
            future = self._pools[place].submit(_attempt, job)
        except BrokenProcessPool:
            self._pools[place] = self._pool(place)
            future = self._pools[place].submit(_attempt, job)
        self._futures[place] = future
        return future

    def partial(self) -> tuple[float, int]:
        """What the running jobs have done, in trainings, and the images decoded."""
        running = [place for place, future in enumerate(self._futures) if future is not None and not future.done()]
        return sum(self._shared[2 * place] for place in running), int(sum(self._shared[1:-1:2]))

    def close(self) -> None:
        """Stop the running jobs and end the processes."""
        self._shared[-1] = 1
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)


def _begin(plan: SearchPlan, shared: Any, place: int) -> None:
    """Prepare a worker process for `_attempt`."""
    from effnet.searching.score import attempt

    global _attempt_here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process; the parent passes it on
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def on_step(share: float) -> None:
        shared[2 * place] = share
        if shared[-1]:
            raise KeyboardInterrupt

    def on_image() -> None:
        shared[2 * place + 1] += 1
        if shared[-1]:
            raise KeyboardInterrupt

    def attempt_here(job: Job) -> Trial | EffnetError:
        return attempt(plan, job, plan.folder / CACHE, on_step, on_image)

    _attempt_here = attempt_here


_attempt_here: Callable[[Job], Trial | EffnetError]  # in a worker process


def _attempt(job: Job) -> Trial | EffnetError:
    return _attempt_here(job)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class RayExecutor:
    """A Ray cluster: one training for each of its cores, or each of its GPUs.

    Every machine needs effnet and the images, under the same path; each decodes into its own temporary folder.

    Args:
        plan: the search.
        address: of the cluster, such as "auto" or "ray://head:10001"; "local" starts one on this machine. A cluster
            that this process already uses is taken in any case, and left running.
        workers: trainings at a time; None: as many as the cluster has room for.

    Raises:
        MissingExtraError: Ray is not installed.
        ArgumentError: the cluster cannot be reached.
    """

    def __init__(self, plan: SearchPlan, address: str, workers: int | None = None) -> None:
        from ray import exceptions

        ray: Any = importlib.import_module("ray")  # which is typed in parts
        self._ray, self._started = ray, not ray.is_initialized()
        self.lost: tuple[type[BaseException], ...] = (
            exceptions.WorkerCrashedError,
            exceptions.NodeDiedError,
            exceptions.LocalRayletDiedError,
            exceptions.ObjectLostError,
            exceptions.OutOfMemoryError,
        )
        if self._started:
            room: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False} if address == "local" else {}
            try:
                ray.init(address, log_to_driver=False, logging_level="ERROR", **room)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ArgumentError("ray", address, f"cannot be reached: {error}") from error
        kind = "GPU" if plan.options.device.startswith("cuda") else "CPU"
        found = int(ray.cluster_resources().get(kind, 0))
        if not found:
            raise ArgumentError("ray", address, f"has no {kind}.")
        self.slots = min(found, workers or found)
        self._cache = f"effnet-search-{plan.data.digest[:16]}-{os.getpid()}"
        task = ray.remote(max_retries=0, num_cpus=int(kind == "CPU"), num_gpus=int(kind == "GPU"))
        self._attempt, self._clear = task(_attempt_on_node), ray.remote(num_cpus=0)(_clear_node)
        self._plan = ray.put(plan)
        self._running: list[Any] = []

    def submit(self, job: Job) -> Future[Trial | EffnetError]:
        """Begin a job where there is room."""
        reference = self._attempt.remote(self._plan, job, self._cache)
        self._running.append(reference)
        future: Future[Trial | EffnetError] = reference.future()
        return future

    def partial(self) -> tuple[float, int]:
        """Nothing is known of running jobs."""
        return 0.0, 0

    def close(self) -> None:
        """Stop the running jobs, and remove decoded images from all machines."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for reference in self._running:
            self._ray.cancel(reference)
        clearing = [
            self._clear.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)).remote(
                self._cache
            )
            for node in self._ray.nodes()
            if node["Alive"]
        ]
        self._ray.wait(clearing, num_returns=len(clearing), timeout=10)
        if self._started:
            self._ray.shutdown()


def _attempt_on_node(plan: SearchPlan, job: Job, cache: str) -> Trial | EffnetError:
    from effnet.searching.score import attempt

    return attempt(plan, job, Path(tempfile.gettempdir()) / cache)


def _clear_node(cache: str) -> None:
    shutil.rmtree(Path(tempfile.gettempdir()) / cache, ignore_errors=True)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM acts as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # another thread: its owner hears the signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
