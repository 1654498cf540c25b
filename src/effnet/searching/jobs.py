"""The jobs of a search: trainings to score, the record of finished ones, and the executors that run them.

A score depends on its job and the search's plan, never on the worker, the number of workers or the order. So the
record, trials.csv in the search's folder with a line for each finished training, is the only state of a search.

Executors: processes of this machine (LocalExecutor), or a Ray cluster of any size (RayExecutor).
"""

from __future__ import annotations

import contextlib
import csv
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from effnet.cluster import ATTEMPTS, Cluster, scratch_folder
from effnet.console import csv_lines
from effnet.errors import DataError, EffnetError, TrainingError
from effnet.files import hold_lock, name_file
from effnet.progress import SILENT, Progress, Silent
from effnet.searching.halving import FAILED, Job, Trial
from effnet.searching.plan import CACHE, DECODING, SearchPlan

TICK = 0.5  # seconds between two reports of progress
COLUMNS = ("rung", "seed", "candidate", "network", "score", "seconds", "error")
TrialOutcome = Trial | EffnetError


class TrialRecord:
    """The finished trials, in an open file to which whole lines are appended.

    A last line that was cut off when the process was killed is removed, so its job is open again. `names` are the
    candidates', for human readers.
    """

    def __init__(self, file: FileIO, names: Sequence[str]) -> None:
        self.trials: dict[Job, Trial] = {}
        self._file, self._names = file, names
        with name_file(Path(file.name)):
            file.seek(0)
            content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            file.truncate(len(whole))
        for number, row in enumerate(csv.DictReader(whole.decode().splitlines()), start=2):
            try:
                job = Job(int(row["rung"]), int(row["seed"]), int(row["candidate"]))
                if row["score"]:
                    self.trials[job] = Trial(job, float(row["score"]), float(row["seconds"]), row["error"])
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{file.name}, line {number} is not a trial; it should have {COLUMNS}") from error
        if not whole:
            self._write(COLUMNS)

    @property
    def scores(self) -> dict[Job, float]:
        """The scores of finished trainings."""
        return {job: FAILED if trial.score is None else trial.score for job, trial in self.trials.items()}

    def append(self, trial: Trial) -> None:
        """Write a finished trial."""
        job, score, error = trial.job, "" if trial.score is None else trial.score, " ".join(trial.error.split())
        name = self._names[job.candidate]
        self._write((job.rung, job.seed, job.candidate, name, score, f"{trial.seconds:.2f}", error))
        self.trials[job] = trial

    def title(self, job: Job) -> str:
        """A job's network, rung and seed, for messages."""
        return f"{self._names[job.candidate]}, rung {job.rung + 1}, seed {job.seed + 1}"

    def _write(self, row: Sequence[object]) -> None:
        line = csv_lines([row]).encode()
        with name_file(Path(self._file.name)):
            while line:
                line = line[self._file.write(line) :]


@contextlib.contextmanager
def open_record(file: Path, names: Sequence[str]) -> Iterator[TrialRecord]:
    """Open the record in a file, which is locked meanwhile, unless the system or the disk has no locks.

    Raises:
        ArgumentError: another process has locked the file.
        DataError: a line cannot be read.
    """
    with file.open("a+b", buffering=0) as stream, hold_lock(file):
        yield TrialRecord(stream, names)


def run_jobs(
    plan: Callable[[Mapping[Job, float]], Sequence[Job]],
    record: TrialRecord,
    executor: LocalExecutor | RayExecutor,
    progress: Progress = SILENT,
    *,
    total: int,
    minutes: float | None = None,
    trials: int | None = None,
) -> None:
    """Run the jobs that are open given the current scores, until none is left.

    After `minutes`, or once `trials` were started, no more are started. A training whose worker dies is tried up to
    ATTEMPTS times; then its failure is recorded. `total` is the number of trainings of the whole search.

    Raises:
        TrainingError: workers die, and no training has ended.
        EffnetError: no training can succeed, for instance because an image cannot be read.
    """
    start, started, ended = time.monotonic(), 0, 0
    deaths, running = Counter[Job](), dict[Future[TrialOutcome], Job]()
    while True:
        share, detail = executor.partial()
        progress.update("trainings", len(record.trials) + share, total, detail)
        late = minutes is not None and time.monotonic() - start > 60 * minutes
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
            title = record.title(job)
            try:
                outcome = future.result()
            except executor.lost as error:
                deaths[job] += 1
                started -= 1
                if deaths[job] < ATTEMPTS:
                    progress.message(f"{title}: its worker died; it is trained again")
                    continue
                why = f"its worker died {ATTEMPTS} times, perhaps for lack of memory: {str(error).rstrip('.')}"
                if not ended:
                    raise TrainingError(f"{title}: {why}. Use fewer --workers.") from error
                outcome = Trial(job, None, 0.0, why)
            if isinstance(outcome, EffnetError):
                raise outcome
            record.append(outcome)
            ended += 1
            progress.message(f"{title}: {f'failed: {outcome.error}' if outcome.error else f'{outcome.score:.2%}'}")


class LocalExecutor:
    """Processes on this machine, which train on one thread each and end with their parent.

    Each has its own pool, so that the others survive if one dies.
    """

    lost: tuple[type[BaseException], ...] = (BrokenProcessPool,)  # what the future of a dead worker raises

    def __init__(self, plan: SearchPlan, workers: int) -> None:
        self.slots = workers  # jobs at a time
        self._plan, self._context = plan, multiprocessing.get_context("spawn")
        # Each worker's progress of its training and of decoding images, then whether to stop. Without a lock, which a
        # killed worker might hold.
        self._shared = self._context.Array("d", 2 * workers + 1, lock=False)
        self._pools = [self._pool(place) for place in range(workers)]
        self._futures: list[Future[Any] | None] = [None] * workers

    def _pool(self, place: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, self._context, _begin, (self._plan, self._shared, place))

    def submit(self, job: Job) -> Future[TrialOutcome]:
        """Start a job in a free process."""
        place = next(place for place, future in enumerate(self._futures) if future is None or future.done())
        self._shared[2 * place] = self._shared[2 * place + 1] = 0.0
        try:
            future = self._pools[place].submit(_attempt, job)
        except BrokenProcessPool:
            self._pools[place] = self._pool(place)
            future = self._pools[place].submit(_attempt, job)
        self._futures[place] = future
        return future

    def partial(self) -> tuple[float, str]:
        """Progress of the running jobs, in trainings, and the current task if images are being decoded."""
        running = [place for place, future in enumerate(self._futures) if future is not None and not future.done()]
        decoding = any(0 < self._shared[2 * place + 1] < 1 for place in running)
        return sum(self._shared[2 * place] for place in running), DECODING if decoding else ""

    def close(self) -> None:
        """Stop the running jobs, each between two steps, and end the processes."""
        self._shared[-1] = 1
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)


class _WorkerProgress(Silent):
    """Shares a worker's progress with its parent, and stops the worker when the parent asks for it."""

    def __init__(self, shared: Any, place: int) -> None:
        self.shared, self.place = shared, place

    def update(self, task: str, done: float, total: float, detail: str = "") -> None:
        self.shared[2 * self.place + (task == DECODING)] = done / total
        if self.shared[-1]:
            raise KeyboardInterrupt


_worker: tuple[SearchPlan, Progress]  # set in worker processes


def _begin(plan: SearchPlan, shared: Any, place: int) -> None:
    """Initialize a worker process."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent passes it on
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = plan, _WorkerProgress(shared, place)


def _attempt(job: Job) -> TrialOutcome:
    from effnet.searching.score import attempt

    plan, progress = _worker
    return attempt(plan, job, plan.folder / CACHE, progress)


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


class RayExecutor:
    """A Ray cluster: one training per core or GPU.

    Each machine decodes the images into its own temporary folder. For arguments and errors see Cluster.
    """

    def __init__(self, plan: SearchPlan, address: str, workers: int | None = None) -> None:
        unit: Literal["CPU", "GPU"] = "GPU" if plan.options.device.startswith("cuda") else "CPU"
        self._cache = f"effnet-search-{plan.data.digest[:16]}-{os.getpid()}"
        self._cluster = Cluster(address, unit=unit, most=workers, scratch=self._cache)
        self.lost, self._plan = self._cluster.lost, self._cluster.share(plan)

    @property
    def slots(self) -> int:
        """Jobs at a time."""
        return self._cluster.slots

    def submit(self, job: Job) -> Future[TrialOutcome]:
        """Start a job where there is room."""
        return self._cluster.submit(_attempt_on_node, self._plan, job, self._cache)

    def partial(self) -> tuple[float, str]:
        """Unknown for running jobs."""
        return 0.0, ""

    def close(self) -> None:
        """Stop the running jobs, and remove decoded images from all machines."""
        self._cluster.close()


def _attempt_on_node(plan: SearchPlan, job: Job, cache: str) -> TrialOutcome:
    from effnet.searching.score import attempt

    return attempt(plan, job, scratch_folder(cache))


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C; has no effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
