"""A study that is shared, interrupted and gone on with."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from effnet.errors import ArgumentError, TrainingError
from effnet.scaling.search import Job, jobs_in_all, ladder, verdict
from effnet.training.study import Study

RUNGS = ladder(6, rungs=2, seeds=2, least=2)
ABOUT = {"candidates": ["a", "b", "c", "d", "e", "f"]}
WORKER = """
import sys, time
from pathlib import Path
from effnet.scaling.search import ladder
from effnet.training.study import Study

out, slow = Path(sys.argv[1]), float(sys.argv[2])
def score(job):
    with open(out / "log", "a") as file:
        file.write(f"{job.rung} {job.seed} {job.candidate}\\n")
    time.sleep(slow)
    return job.candidate / 10 + job.seed / 100
study = Study(out, ladder(6, rungs=2, seeds=2, least=2), {"candidates": list("abcdef")}, heartbeat=1, grace=2)
print(study.work(score))
"""


def score(job: Job) -> float:
    return job.candidate / 10 + job.seed / 100


def test_it_does_all_and_writes_it(tmp_path: Path) -> None:
    study, told = Study(tmp_path / "s", RUNGS, ABOUT), list[Job]()
    assert study.work(score, told=lambda job, _: told.append(job))
    assert len(told) == len(set(told)) == jobs_in_all(RUNGS)
    assert verdict(RUNGS, study.scores()).best == 5
    rows = list(csv.DictReader((tmp_path / "s" / "trials.csv").read_text().splitlines()))
    assert [int(row["number"]) for row in rows] == sorted(int(row["number"]) for row in rows)
    assert {Job(int(r["rung"]), int(r["seed"]), int(r["candidate"])): float(r["score"]) for r in rows} == study.scores()
    assert study.work(lambda job: pytest.fail(f"{job} was done before"))


def test_it_stops_and_goes_on(tmp_path: Path) -> None:
    assert not Study(tmp_path / "s", RUNGS, ABOUT).work(score, trials=4)
    study = Study(tmp_path / "s", RUNGS, ABOUT)
    before = set(study.scores())
    assert len(before) == 4
    assert not study.work(score, minutes=0)
    told = list[Job]()

    def interrupted(job: Job) -> float:
        if job.rung == 1:
            raise KeyboardInterrupt
        told.append(job)
        return score(job)

    with pytest.raises(KeyboardInterrupt):
        study.work(interrupted)
    assert not before & set(told)
    assert study.work(score)
    assert len(study.scores()) == jobs_in_all(RUNGS)


def test_a_network_that_cannot_be_trained_is_worth_nothing(tmp_path: Path) -> None:
    def failing(job: Job) -> float:
        if job.candidate == 5:
            raise TrainingError("the loss is nan")
        return score(job)

    study = Study(tmp_path / "s", RUNGS, ABOUT)
    assert study.work(failing)
    assert study.scores()[Job(0, 0, 5)] == 0
    assert "the loss is nan" in (tmp_path / "s" / "trials.csv").read_text()
    assert verdict(RUNGS, study.scores()).best == 4


def test_another_search_is_not_gone_on_with(tmp_path: Path) -> None:
    Study(tmp_path / "s", RUNGS, ABOUT)
    with pytest.raises(ArgumentError, match="holds a search that differs in its candidates"):
        Study(tmp_path / "s", RUNGS, {"candidates": ["g"]})
    with pytest.raises(ArgumentError, match="differs in its rungs"):
        Study(tmp_path / "s", ladder(6), ABOUT)


def test_two_workers_one_of_which_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "s"
    Study(out, RUNGS, ABOUT, heartbeat=1, grace=2)
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(out), slow], stdout=subprocess.PIPE, text=True)
        for slow in ("60", "0.05")
    ]
    deadline = time.monotonic() + 60
    while not (out / "log").exists() or len((out / "log").read_text().splitlines()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers[0].kill()
    workers[0].communicate()
    assert workers[1].communicate(timeout=90)[0] == "True\n"
    study = Study(out, RUNGS, ABOUT)
    assert len(study.scores()) == jobs_in_all(RUNGS)
    begun = Counter((out / "log").read_text().splitlines())
    assert sum(begun.values()) <= jobs_in_all(RUNGS) + 1  # the killed worker's training, once more
