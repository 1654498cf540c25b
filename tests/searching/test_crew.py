"""Worker processes on one study: one is killed, all are stopped, one meets a broken image."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import draw_images, tiny_spec

from effnet.arch.spec import InputSpec
from effnet.data.dataset import Dataset, read_data, split_data
from effnet.errors import DataError, TrainingError
from effnet.searching import study
from effnet.searching.crew import Task, together
from effnet.searching.halving import jobs_in_all, ladder, open_jobs
from effnet.searching.study import Study
from effnet.training.recipe import read_recipe

RUNGS = ladder(4, rungs=2, seeds=2, finalists=2)
EPOCHS = (1.0, 3.0)


class Heard:
    """Notes what is said, and does something when trainings are finished."""

    def __init__(self, then: Callable[[float], None] = lambda done: None) -> None:
        self.words, self.then, self.progress = list[str](), then, list[float]()
        self.decoded = list[tuple[float, float]]()

    def message(self, words: str) -> None:
        self.words.append(words)

    def update(self, doing: str, done: float, total: float, detail: str = "") -> None:
        if doing == "decoded images":
            self.decoded.append((done, total))
            return
        assert (doing, total) == ("trainings", len(jobs_in_all(RUNGS)))
        self.progress.append(done)
        self.then(done)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return split_data(read_data(draw_images(tmp_path_factory.mktemp("shapes"), 40)), val=0.3, test=0)


def task(out: Path, data: Dataset, epochs: tuple[float, float] = EPOCHS) -> Task:
    networks = tuple(
        dataclasses.replace(tiny_spec(), width=width, name=f"w{width:g}") for width in (1.0, 1.5, 2.0, 3.0)
    )
    plan, total = functools.partial(open_jobs, RUNGS), len(jobs_in_all(RUNGS))
    recipe = read_recipe("scratch", batch=16)
    return Task(out, None, plan, total, networks, epochs, data, recipe, InputSpec(32, 32), 0, "cpu")


def test_scores_do_not_depend_on_the_number_of_workers(tmp_path: Path, shapes: Dataset) -> None:
    heard = Heard()
    assert not together(task(tmp_path / "one", shapes), 1, heard, until=3)
    assert len(Study(tmp_path / "one").scores()) == 3
    assert together(task(tmp_path / "one", shapes), 1, heard)
    assert together(task(tmp_path / "two", shapes), 2, heard)
    one, two = (Study(tmp_path / name).scores() for name in ("one", "two"))
    assert one == two
    assert len(one) == len(jobs_in_all(RUNGS))
    assert max(heard.progress) == len(one)
    assert {total for _, total in heard.decoded} == {len(shapes)}  # all networks see them at one size
    assert heard.decoded[-1][0] == len(shapes)
    assert "w1.5, rung 1, seed 1: " in " ".join(heard.words)
    assert "w1.5" in (tmp_path / "two" / "trials.csv").read_text()


def test_a_killed_worker_s_training_is_done_by_another(tmp_path: Path, shapes: Dataset) -> None:
    killed = list[int]()

    def kill(done: float) -> None:
        if done > 1 and not killed:
            killed.append(multiprocessing.active_children()[0].pid or 0)
            os.kill(killed[0], signal.SIGKILL)

    heard = Heard(kill)
    quick = dataclasses.replace(task(tmp_path / "s", shapes), beat=(1, 2))
    assert together(quick, 2, heard)
    assert killed
    assert any("a worker died (exit code -9)" in words for words in heard.words)
    assert len(Study(tmp_path / "s").scores()) == len(jobs_in_all(RUNGS))


def test_all_workers_killed(tmp_path: Path, shapes: Dataset) -> None:
    def kill(done: float) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(TrainingError, match="all workers died"):
        together(task(tmp_path / "s", shapes), 2, Heard(kill))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_keeps_what_is_finished(tmp_path: Path, shapes: Dataset, number: signal.Signals) -> None:
    out = tmp_path / "s"

    def stop(done: float) -> None:
        if done > 2:
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt):
        together(task(out, shapes), 2, Heard(stop))
    assert not multiprocessing.active_children()
    before = Study(out).scores()
    assert before
    began = time.monotonic()
    assert together(task(out, shapes), 2, Heard())
    assert time.monotonic() - began < study.GRACE  # nobody waits for the trainings that were stopped
    assert before.items() <= Study(out).scores().items()


def test_a_broken_image_stops_all(tmp_path: Path, shapes: Dataset) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    samples = (*shapes.samples, dataclasses.replace(shapes.part("train").samples[0], path=str(broken)))
    with pytest.raises(DataError, match=r"broken\.png"):
        together(task(tmp_path / "s", dataclasses.replace(shapes, samples=samples)), 2, Heard())
    assert not multiprocessing.active_children()
