"""The record of a search and its executors: finished trainings are never repeated, even after kills."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from executor import DiedError, InThisProcess
from forked import CONTEXT
from machines import Machines

from effnet.cluster import ATTEMPTS
from effnet.errors import ArgumentError, DataError, TrainingError
from effnet.searching.halving import Job, Trial, judge, make_rungs, open_jobs
from effnet.searching.jobs import (
    LocalExecutor,
    RayExecutor,
    TrialOutcome,
    _WorkerProgress,
    interruptible,
    open_record,
    run_jobs,
)
from effnet.searching.plan import CACHE, DECODING, SearchPlan
from effnet.searching.score import attempt

RUNGS = make_rungs(4, rungs=2, seeds=2, finalists=2)
OPEN = functools.partial(open_jobs, RUNGS)
TOTAL = sum(rung.trainings for rung in RUNGS)
NAMES = ("a", "b", "c", "d")
JOB = "_attempt_on_node"  # what Ray calls a training


def score(job: Job) -> Trial:
    return Trial(job, job.candidate / 10 + job.seed / 100, 1.0)


class Recorder:
    """Progress that is kept, and something to do after each update."""

    def __init__(self, then: Callable[[float], None] = lambda done: None) -> None:
        self.messages, self.then, self.done = list[str](), then, list[float]()

    def message(self, text: str) -> None:
        self.messages.append(text)

    def update(self, task: str, done: float, total: float, detail: str = "") -> None:
        assert (task, total) == ("trainings", TOTAL)
        self.done.append(done)
        self.then(done)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trials.csv"


def work(file: Path, executor: InThisProcess, progress: Recorder | None = None, **limits: float) -> dict[Job, float]:
    with open_record(file, NAMES) as record:
        run_jobs(OPEN, record, executor, progress or Recorder(), total=TOTAL, **limits)  # type: ignore[arg-type]
        return record.scores


def test_a_search_goes_on_and_repeats_nothing(file: Path) -> None:
    first, second = InThisProcess(score), InThisProcess(score)
    assert len(work(file, first, trials=3)) == 3
    assert work(file, InThisProcess(score), minutes=1e-9) == work(file, InThisProcess(score), trials=0)
    scores = work(file, second)
    assert sorted(first.jobs + second.jobs) == sorted(scores)
    assert len(scores) == len(first.jobs + second.jobs) == TOTAL
    assert judge(RUNGS, scores).best == 3
    lines = file.read_text().splitlines()
    assert lines[0] == "rung,seed,candidate,network,score,seconds,error"
    assert "0,0,3,d,0.3,1.00," in lines


def test_a_line_that_was_cut_off_is_done_again(file: Path) -> None:
    whole = work(file, InThisProcess(score))
    lines = file.read_bytes().splitlines(keepends=True)
    for length in range(1, len(lines[-1])):
        file.write_bytes(b"".join(lines[:-1]) + lines[-1][:length])
        executor = InThisProcess(score)
        assert work(file, executor) == whole
        assert len(executor.jobs) == 1
    assert file.read_bytes() == b"".join(lines)


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_a_disk_that_fails_is_named_and_done_again(file: Path) -> None:
    import resource

    work(file, InThisProcess(score), trials=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(OSError, match=r"trials\.csv"):
            work(file, InThisProcess(score))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(file.read_bytes().splitlines()[-1]) == 5
    assert len(work(file, InThisProcess(score))) == TOTAL


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="a file that cannot become shorter: Linux has them")
def test_half_a_line_that_cannot_be_removed_is_named() -> None:
    import fcntl

    memory = os.memfd_create("trials", os.MFD_ALLOW_SEALING)
    os.write(memory, b"rung,seed")
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    file = Path(f"/proc/self/fd/{memory}")
    with pytest.raises(OSError, match=f"{file}"), open_record(file, NAMES):
        pass
    os.close(memory)


def test_one_process_at_a_time_and_whole_lines_only(file: Path) -> None:
    with open_record(file, NAMES), pytest.raises(ArgumentError, match="by another process"), open_record(file, NAMES):
        pass
    file.write_text("rung,seed,candidate,network,score,seconds,error\n0,0,x,a,0.5,1,\n")
    with pytest.raises(DataError, match=r"trials\.csv, line 2"), open_record(file, NAMES):
        pass


def test_a_network_that_cannot_be_trained_scores_nothing(file: Path) -> None:
    def failing(job: Job) -> Trial:
        return Trial(job, 0.0, 1.0, "the loss\nis nan, sadly") if job.candidate == 3 else score(job)

    progress = Recorder()
    scores = work(file, InThisProcess(failing), progress)
    assert scores[Job(0, 0, 3)] == 0
    assert work(file, InThisProcess(failing)) == scores
    assert '"the loss is nan, sadly"' in file.read_text()
    assert any("nan" in text for text in progress.messages)


def test_a_worker_that_dies_again_and_again(file: Path) -> None:
    def dying(job: Job) -> Trial:
        if job.candidate == 3:
            raise DiedError("signal 9")
        return score(job)

    executor, progress = InThisProcess(dying), Recorder()
    scores = work(file, executor, progress)
    assert executor.jobs.count(Job(0, 0, 3)) == ATTEMPTS
    assert scores[Job(0, 0, 3)] == 0
    assert sum("trained again" in text for text in progress.messages) == ATTEMPTS - 1
    assert any(f"died {ATTEMPTS} times" in text and "signal 9" in text for text in progress.messages)
    assert work(file, InThisProcess(score))[Job(0, 0, 3)] == score(Job(0, 0, 3)).score  # another run tries it again


def test_what_no_training_survives_ends_it(file: Path) -> None:
    def dying(job: Job) -> Trial:
        raise DiedError

    def broken(job: Job) -> TrialOutcome:
        found: TrialOutcome = pickle.loads(
            pickle.dumps(DataError("broken.png is not an image"))
        )  # as a worker sends it
        return found

    with pytest.raises(TrainingError, match=f"died {ATTEMPTS} times"):
        work(file, InThisProcess(dying))
    with pytest.raises(DataError, match=r"broken\.png"):
        work(file, InThisProcess(broken))
    assert len(file.read_text().splitlines()) == 1


@pytest.fixture(scope="module")
def scores(plan: SearchPlan, tmp_path_factory: pytest.TempPathFactory) -> dict[Job, float]:
    """In this process."""
    executor = InThisProcess(lambda job: attempt(plan, job, plan.folder / CACHE))
    return work(tmp_path_factory.mktemp("here") / "trials.csv", executor)


@pytest.fixture
def no_children() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()


@pytest.fixture
def quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that need not import torch first; effnet's own are spawned."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: CONTEXT)


@pytest.mark.usefixtures("no_children", "quick_workers")
def test_a_killed_worker_changes_no_score(plan: SearchPlan, scores: dict[Job, float], file: Path) -> None:
    killed = list[int]()

    def kill(done: float) -> None:
        if done > 1 and not killed:
            killed.append(multiprocessing.active_children()[0].pid or 0)
            os.kill(killed[0], signal.SIGKILL)

    progress = Recorder(kill)
    with open_record(file, NAMES) as record, closing(LocalExecutor(plan, 2)) as executor:
        run_jobs(OPEN, record, executor, progress, total=TOTAL)
        assert record.scores == scores
    assert killed
    assert any("worker died" in text for text in progress.messages)
    assert max(progress.done) == TOTAL


@pytest.mark.usefixtures("no_children")
def test_stopping_keeps_what_is_finished(plan: SearchPlan, scores: dict[Job, float], file: Path) -> None:
    def stop(done: float) -> None:
        if 1 < done < TOTAL:  # one training is finished, another one has begun
            signal.raise_signal(signal.SIGTERM)

    progress = Recorder(stop)
    with (
        open_record(file, NAMES) as record,
        pytest.raises(KeyboardInterrupt),
        interruptible(),
        closing(LocalExecutor(plan, 1)) as executor,
    ):
        run_jobs(OPEN, record, executor, progress, total=TOTAL)
    with open_record(file, NAMES) as record:
        assert 1 <= len(record.trials) < TOTAL
        assert record.scores.items() <= scores.items()


def test_a_worker_shares_its_progress() -> None:
    shared = [0.0] * 5
    progress = _WorkerProgress(shared, 1)
    progress.update("training", 1, 4)
    progress.update(DECODING, 1, 2)
    assert shared == [0, 0, 1 / 4, 1 / 2, 0]
    shared[-1] = 1
    with pytest.raises(KeyboardInterrupt):
        progress.update("training", 2, 4)


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """A Ray cluster of two machines with one core each."""
    with Machines() as found:
        yield found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_ray_gives_the_same_scores_and_survives_a_killed_worker(
    plan: SearchPlan, scores: dict[Job, float], file: Path, machines: Machines
) -> None:
    killed = list[int]()

    def kill(done: float) -> None:
        if done >= 1 and not killed:
            killed.extend(machines.workers(machines.first, JOB)[:1])
            for worker in killed:
                os.kill(worker, signal.SIGKILL)

    progress = Recorder(kill)
    with interruptible():
        executor = RayExecutor(plan, machines.address)
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler  # Ray's would end the search at once
    assert executor.slots == 2
    with open_record(file, NAMES) as record, closing(executor):
        run_jobs(OPEN, record, executor, progress, total=TOTAL)
        assert record.scores == scores
    assert killed
    assert any("worker died" in text for text in progress.messages)
    assert not list(Path(tempfile.gettempdir()).glob(f"effnet-search-*-{os.getpid()}"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_a_machine_that_is_killed_in_the_middle_changes_no_score(
    plan: SearchPlan, scores: dict[Job, float], file: Path, machines: Machines
) -> None:
    progress, executor = Recorder(), RayExecutor(plan, machines.address)
    with open_record(file, NAMES) as record, closing(executor), machines.second_dies(JOB):
        run_jobs(OPEN, record, executor, progress, total=TOTAL)
        assert record.scores == scores
    assert any("worker died" in text for text in progress.messages)
