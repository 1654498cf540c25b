"""Processes of this machine that share a study's trainings, and what they are told.

Each trains on one thread, so that the scores are the same however many there are. What kills one of them kills none of
the others, and its training is done again by another; when their parent dies, they stop.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effnet.arch.spec import InputSpec, NetworkSpec
from effnet.data.dataset import Dataset
from effnet.errors import EffnetError, TrainingError
from effnet.progress import Progress
from effnet.searching.halving import Job, Plan, Scores
from effnet.searching.score import Scorer
from effnet.searching.study import GRACE, HEARTBEAT, Study
from effnet.training.recipe import Recipe

LOOKS = 0.5  # seconds between two looks at what is done
STOPPED = 130  # exit code after Ctrl-C
CACHE = "pixels"  # a folder that can be deleted at any time


@dataclass(frozen=True)
class Done:
    """What each worker has done, in memory that they share with their parent."""

    shares: Any  # of the training that it is at
    images: Any  # decoded


@dataclass(frozen=True)
class Task:
    """What the workers do, in a form that travels to another process."""

    out: Path
    storage: str | None
    plan: Plan
    total: int  # trainings of the whole plan
    networks: tuple[NetworkSpec, ...]
    epochs: tuple[float, ...]  # of a training at each rung
    data: Dataset
    recipe: Recipe
    see: InputSpec
    seed: int
    device: str
    beat: tuple[int, int] = (HEARTBEAT, GRACE)  # seconds between signs of life, and without one until one is dead

    def study(self) -> Study:
        """The database."""
        return Study(self.out, storage=self.storage, heartbeat=self.beat[0], grace=self.beat[1])

    def scorer(self, decoded: Callable[[], None] = lambda: None) -> Scorer:
        """What trains a network, and whom it tells of each decoded image."""
        return Scorer(self.data, self.recipe, self.see, self.out / CACHE, self.device, decoded)


def together(
    task: Task, workers: int, progress: Progress, *, minutes: float | None = None, until: int | None = None
) -> bool:
    """Let workers do what there is to do; whether all is done.

    Args:
        task: what they do.
        workers: how many there are.
        progress: told of each finished training.
        minutes: no training begins after so many.
        until: no training begins when so many are finished.

    Raises:
        TrainingError: all workers died.
        EffnetError: what a worker could not go on with.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the finished trainings are kept.
    """
    context = multiprocessing.get_context("spawn")
    done = Done(context.Array("d", workers, lock=False), context.Array("q", workers, lock=False))
    study, members = task.study(), list[tuple[Any, Connection]]()
    with _terminating():
        try:
            for place in range(workers):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_member, args=(task, place, done, theirs, minutes, until))
                process.start()
                theirs.close()
                members.append((process, ours))
            return _follow(task, study, members, done, progress)
        finally:
            for process, _ in members:
                if process.is_alive():
                    process.terminate()
            for process, _ in members:
                process.join()
            study.write([network.name for network in task.networks])


def _follow(
    task: Task, study: Study, members: Sequence[tuple[Any, Connection]], done: Done, progress: Progress
) -> bool:
    """Tell what is finished until no worker is left."""
    known, buried, names = set(study.scores()), set[int](), [network.name for network in task.networks]
    images = task.scorer().missing(task.networks)
    while True:
        alive = [process.is_alive() for process, _ in members]
        scores = study.scores()
        for job in sorted(scores.keys() - known):
            progress.message(f"{names[job.candidate]}, rung {job.rung + 1}, seed {job.seed + 1}: {scores[job]:.2%}")
        if scores.keys() - known:
            known = set(scores)
            study.write(names)
        progress.update("trainings", len(scores) + sum(done.shares), task.total)
        if images:
            decoded = min(images, sum(done.images))  # two workers may decode the same ones
            progress.update("decoded images", decoded, images)
            images = images if decoded < images else 0
        for place, (process, pipe) in enumerate(members):
            if pipe.poll():
                try:
                    raise pipe.recv()
                except EOFError:
                    pass
            if not alive[place] and place not in buried:
                buried.add(place)
                if process.exitcode not in (0, STOPPED):
                    progress.message(f"a worker died (exit code {process.exitcode}); the others do its training again")
        if not any(alive):
            left = bool(task.plan(study.scores()))
            if left and all(process.exitcode not in (0, STOPPED) for process, _ in members):
                raise TrainingError("all workers died, perhaps for want of memory: the same command goes on")
            return not left
        time.sleep(LOOKS)


@contextmanager
def _terminating() -> Iterator[None]:
    """SIGTERM as Ctrl-C, in the main thread."""
    try:
        before = signal.signal(signal.SIGTERM, _interrupt)
    except ValueError:  # another thread: its owner hears the signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _member(task: Task, place: int, done: Done, pipe: Connection, minutes: float | None, until: int | None) -> None:
    """A worker's life. It stops between two steps, so that the database hears of it whatever it was at."""
    caught = list[int]()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process; the parent passes it on
    signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
    parent = os.getppid()
    if task.device == "cpu":
        torch.set_num_threads(1)

    def look() -> None:
        if caught or os.getppid() != parent:
            raise KeyboardInterrupt

    def decoded() -> None:
        done.images[place] += 1
        look()

    scorer = task.scorer(decoded)

    def plan(scores: Scores) -> Sequence[Job]:
        look()
        return task.plan(scores)

    def progress(steps: int, total: int) -> None:
        done.shares[place] = steps / total
        look()

    def score(job: Job) -> float:
        seed = int(np.random.SeedSequence((task.seed, job.rung, job.seed)).generate_state(1)[0])
        try:
            return scorer(task.networks[job.candidate], task.epochs[job.rung], seed, progress)
        finally:
            done.shares[place] = 0.0

    try:
        task.study().work(plan, score, minutes=minutes, until=until)
    except KeyboardInterrupt:
        sys.exit(STOPPED)
    except EffnetError as error:
        pipe.send(error)
        sys.exit(1)
