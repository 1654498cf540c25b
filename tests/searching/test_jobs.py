"""The record of a search and its executors: nothing finished is repeated, whoever is killed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

import pytest
from tiny import draw_images, tiny_spec

from effnet.data.dataset import read_data, split_data
from effnet.errors import ArgumentError, DataError, EffnetError, TrainingError
from effnet.searching.candidates import Candidate
from effnet.searching.halving import Job, Trial, all_jobs, ladder, open_jobs, verdict
from effnet.searching.jobs import ATTEMPTS, LocalExecutor, RayExecutor, TrialRecord, interruptible, run_jobs
from effnet.searching.plan import SearchOptions, SearchPlan
from effnet.training.recipe import read_recipe

RUNGS = ladder(4, rungs=2, seeds=2, finalists=2)
OPEN = functools.partial(open_jobs, RUNGS)
TOTAL = len(all_jobs(RUNGS))
NAMES = ("a", "b", "c", "d")


class DiedError(Exception):
    """Of a worker."""


class InOneProcess:
    """An executor that scores at once."""

    slots = 2
    lost = (DiedError,)

    def __init__(self, score: Callable[[Job], Trial | EffnetError]) -> None:
        self.score, self.begun = score, list[Job]()

    def submit(self, job: Job) -> Future[Trial | EffnetError]:
        self.begun.append(job)
        future = Future[Trial | EffnetError]()
        try:
            future.set_result(self.score(job))
        except DiedError as error:
            future.set_exception(error)
        return future

    def partial(self) -> tuple[float, int]:
        return 0.0, 0

    def close(self) -> None:
        pass


def score(job: Job) -> Trial:
    return Trial(job, job.candidate / 10 + job.seed / 100, 1.0)


class Told:
    """Notes what it is told, and does something when trainings end."""

    def __init__(self, then: Callable[[float], None] = lambda done: None) -> None:
        self.messages, self.then, self.done, self.details = list[str](), then, list[float](), set[str]()

    def message(self, text: str) -> None:
        self.messages.append(text)

    def update(self, task: str, done: float, total: float, detail: str = "") -> None:
        assert (task, total) == ("trainings", TOTAL)
        self.done.append(done)
        self.details.add(detail)
        self.then(done)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trials.csv"


def work(file: Path, executor: InOneProcess, told: Told | None = None, **limits: float) -> dict[Job, float]:
    with TrialRecord(file, NAMES) as record:
        run_jobs(OPEN, record, executor, told or Told(), total=TOTAL, **limits)  # type: ignore[arg-type]
        return record.scores


def test_a_search_goes_on_and_repeats_nothing(file: Path) -> None:
    first, second = InOneProcess(score), InOneProcess(score)
    assert len(work(file, first, trials=3)) == 3
    assert work(file, InOneProcess(score), minutes=1e-9) == work(file, InOneProcess(score), trials=0)
    scores = work(file, second)
    assert sorted(first.begun + second.begun) == sorted(scores)
    assert len(scores) == len(first.begun + second.begun) == TOTAL
    judged = verdict(RUNGS, scores)
    assert judged
    assert judged.best == 3
    lines = file.read_text().splitlines()
    assert lines[0] == "rung,seed,candidate,network,score,seconds,error"
    assert "0,0,3,d,0.3,1.00," in lines


def test_a_line_that_was_cut_off_is_done_again(file: Path) -> None:
    whole = work(file, InOneProcess(score))
    lines = file.read_bytes().splitlines(keepends=True)
    for length in range(1, len(lines[-1])):
        file.write_bytes(b"".join(lines[:-1]) + lines[-1][:length])
        executor = InOneProcess(score)
        assert work(file, executor) == whole
        assert len(executor.begun) == 1
    assert file.read_bytes() == b"".join(lines)


def test_one_process_at_a_time(file: Path) -> None:
    with TrialRecord(file, NAMES), pytest.raises(ArgumentError, match="by another process"):
        TrialRecord(file, NAMES)
    TrialRecord(file, NAMES).__exit__()


def test_a_line_that_is_no_trial_is_named(file: Path) -> None:
    file.write_text("rung,seed,candidate,network,score,seconds,error\n0,0,x,a,0.5,1,\n")
    with pytest.raises(DataError, match=r"trials\.csv, line 2"):
        TrialRecord(file, NAMES)


def test_a_network_that_cannot_be_trained_is_worth_nothing(file: Path) -> None:
    def failing(job: Job) -> Trial:
        return Trial(job, 0.0, 1.0, "the loss\nis nan, sadly") if job.candidate == 3 else score(job)

    told = Told()
    scores = work(file, InOneProcess(failing), told)
    assert scores[Job(0, 0, 3)] == 0
    assert work(file, InOneProcess(failing)) == scores
    assert '"the loss is nan, sadly"' in file.read_text()
    assert any("nan" in text for text in told.messages)


def test_a_worker_that_dies_again_and_again(file: Path) -> None:
    def dying(job: Job) -> Trial:
        if job.candidate == 3:
            raise DiedError("signal 9")
        return score(job)

    executor, told = InOneProcess(dying), Told()
    scores = work(file, executor, told)
    assert executor.begun.count(Job(0, 0, 3)) == ATTEMPTS
    assert scores[Job(0, 0, 3)] == 0
    assert sum("trained again" in text for text in told.messages) == ATTEMPTS - 1
    assert any(f"died {ATTEMPTS} times" in text and "signal 9" in text for text in told.messages)
    assert work(file, InOneProcess(score))[Job(0, 0, 3)] == score(Job(0, 0, 3)).score  # another run tries it again


def test_workers_that_all_die_end_it(file: Path) -> None:
    def dying(job: Job) -> Trial:
        raise DiedError

    with pytest.raises(TrainingError, match=f"died {ATTEMPTS} times"):
        work(file, InOneProcess(dying))
    assert len(file.read_text().splitlines()) == 1


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> SearchPlan:
    folder = tmp_path_factory.mktemp("plan")
    data = split_data(read_data(draw_images(folder / "shapes", 40)), val=0.3, test=0)
    networks = [dataclasses.replace(tiny_spec(), width=width) for width in (1.0, 1.5, 2.0, 3.0)]
    found = tuple(Candidate.of(tiny_spec(), network, ()) for network in networks)
    options = SearchOptions(rungs=2, seeds=2, finalists=2)
    return SearchPlan(folder, options, data, read_recipe("scratch", batch=16), tiny_spec(), found, 3.0)


def train(plan: SearchPlan, file: Path, told: Told, workers: int = 2) -> dict[Job, float]:
    with TrialRecord(file, NAMES) as record, interruptible(), closing(LocalExecutor(plan, workers)) as executor:
        run_jobs(OPEN, record, executor, told, total=TOTAL)
        return record.scores


@pytest.fixture(scope="module")
def scores(plan: SearchPlan, tmp_path_factory: pytest.TempPathFactory) -> dict[Job, float]:
    """By one worker."""
    told = Told()
    found = train(plan, tmp_path_factory.mktemp("one") / "trials.csv", told, workers=1)
    assert len(found) == TOTAL
    assert max(told.done) == TOTAL
    assert any(done % 1 for done in told.done)  # within a training
    assert any("images decoded" in detail for detail in told.details)
    return found


@pytest.fixture
def no_children() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("no_children")
def test_a_killed_worker_changes_no_score(plan: SearchPlan, scores: dict[Job, float], file: Path) -> None:
    killed = list[int]()

    def kill(done: float) -> None:
        if done > 1 and not killed:
            killed.append(multiprocessing.active_children()[0].pid or 0)
            os.kill(killed[0], signal.SIGKILL)

    told = Told(kill)
    assert train(plan, file, told) == scores
    assert killed
    assert any("worker died" in text for text in told.messages)


@pytest.mark.usefixtures("no_children")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_keeps_what_is_finished(
    plan: SearchPlan, scores: dict[Job, float], file: Path, number: signal.Signals
) -> None:
    def stop(done: float) -> None:
        if done >= 2:
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt):
        train(plan, file, Told(stop))
    with TrialRecord(file, NAMES) as record:
        assert 1 <= len(record.trials) < TOTAL
        assert record.scores.items() <= scores.items()


@pytest.mark.usefixtures("no_children")
def test_a_broken_image_stops_all(plan: SearchPlan, tmp_path: Path, file: Path) -> None:
    broken, data = tmp_path / "broken.png", plan.data
    broken.write_bytes(b"no image")
    samples = (*data.samples, dataclasses.replace(data.part("train").samples[0], path=str(broken)))
    spoiled = dataclasses.replace(plan, data=dataclasses.replace(data, samples=samples), folder=tmp_path)
    with pytest.raises(DataError, match=r"broken\.png"):
        train(spoiled, file, Told(), workers=1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of two cores; this process may use it."""
    ray = pytest.importorskip("ray")
    small = {"include_dashboard": False, "object_store_memory": 80 * 2**20}
    ray.init("local", num_cpus=2, log_to_driver=False, logging_level="ERROR", **small)
    yield
    ray.shutdown()


def ray_workers() -> list[int]:
    """Processes of this process's Ray that train: the raylet's children."""
    parents, training = dict[int, int](), set[int]()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if b"ray::_attempt" in (folder / "cmdline").read_bytes():
                training.add(int(folder.name))
    return [worker for worker in training if parents.get(parents[worker]) == os.getpid()]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("cluster")
def test_ray_gives_the_same_scores_and_survives_a_killed_worker(
    plan: SearchPlan, scores: dict[Job, float], file: Path
) -> None:
    killed = list[int]()

    def kill(done: float) -> None:
        if done >= 1 and not killed:
            killed.extend(ray_workers()[:1])
            for worker in killed:
                os.kill(worker, signal.SIGKILL)

    told = Told(kill)
    executor = RayExecutor(plan, "local")
    assert executor.slots == 2
    with TrialRecord(file, NAMES) as record, closing(executor):
        run_jobs(OPEN, record, executor, told, total=TOTAL)
        assert record.scores == scores
    assert killed
    assert any("worker died" in text for text in told.messages)
    assert not list(Path(tempfile.gettempdir()).glob(f"effnet-search-*-{os.getpid()}"))
