"""A study that is shared, interrupted and gone on with."""

from __future__ import annotations

import csv
import functools
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest

from effnet.errors import ArgumentError, TrainingError
from effnet.searching.halving import Job, jobs_in_all, ladder, open_jobs, verdict
from effnet.searching.study import GRACE, Study

RUNGS = ladder(6, rungs=2, seeds=2, finalists=2)
PLAN = functools.partial(open_jobs, RUNGS)
ABOUT = {"candidates": ["a", "b", "c", "d", "e", "f"]}
WORKER = """
import sys, time
from functools import partial
from pathlib import Path
from effnet.searching.halving import ladder, open_jobs
from effnet.searching.study import Study

out, slow = Path(sys.argv[1]), float(sys.argv[2])
def score(job):
    with open(out / "log", "a") as file:
        file.write(f"{job.rung} {job.seed} {job.candidate}\\n")
    time.sleep(slow)
    return job.candidate / 10 + job.seed / 100
plan = partial(open_jobs, ladder(6, rungs=2, seeds=2, finalists=2))
print(Study(out, heartbeat=1, grace=2).work(plan, score))
"""


def score(job: Job) -> float:
    return job.candidate / 10 + job.seed / 100


def begun(out: Path) -> Study:
    study = Study(out)
    study.begin(ABOUT)
    return study


def test_it_does_all_and_writes_it(tmp_path: Path) -> None:
    study, told = begun(tmp_path / "s"), list[Job]()

    def telling(job: Job) -> float:
        told.append(job)
        return score(job)

    assert study.work(PLAN, telling)
    assert len(told) == len(set(told)) == len(jobs_in_all(RUNGS))
    assert verdict(RUNGS, study.scores()).best == 5
    study.write(list("abcdef"))
    rows = list(csv.DictReader((tmp_path / "s" / "trials.csv").read_text().splitlines()))
    assert [int(row["number"]) for row in rows] == sorted(int(row["number"]) for row in rows)
    assert {Job(int(r["rung"]), int(r["seed"]), int(r["candidate"])): float(r["score"]) for r in rows} == study.scores()
    assert all(row["network"] == "abcdef"[int(row["candidate"])] for row in rows)
    assert study.work(PLAN, lambda job: pytest.fail(f"{job} was done before"))


def test_it_stops_and_goes_on(tmp_path: Path) -> None:
    assert not begun(tmp_path / "s").work(PLAN, score, until=4)
    study = begun(tmp_path / "s")
    before = set(study.scores())
    assert len(before) == 4
    assert not study.work(PLAN, score, minutes=0)
    told = list[Job]()

    def interrupted(job: Job) -> float:
        if job.rung == 1:
            raise KeyboardInterrupt
        told.append(job)
        return score(job)

    with pytest.raises(KeyboardInterrupt):
        study.work(PLAN, interrupted)
    assert not before & set(told)
    began = time.monotonic()
    assert study.work(PLAN, score)
    assert time.monotonic() - began < GRACE / 2  # nobody waits for the training that was stopped
    assert len(study.scores()) == len(jobs_in_all(RUNGS))


def test_a_network_that_cannot_be_trained_is_worth_nothing(tmp_path: Path) -> None:
    def failing(job: Job) -> float:
        if job.candidate == 5:
            raise TrainingError("the loss is nan")
        return score(job)

    study = begun(tmp_path / "s")
    assert study.work(PLAN, failing)
    assert study.scores()[Job(0, 0, 5)] == 0
    study.write(list("abcdef"))
    assert "the loss is nan" in (tmp_path / "s" / "trials.csv").read_text()
    assert verdict(RUNGS, study.scores()).best == 4


def test_another_search_is_not_gone_on_with(tmp_path: Path) -> None:
    begun(tmp_path / "s")
    with pytest.raises(ArgumentError, match="holds a search that differs in its candidates; choose another"):
        Study(tmp_path / "s").begin({"candidates": ["g"]})
    with pytest.raises(ArgumentError, match="differs in its candidates, seed"):
        Study(tmp_path / "s").begin({"seed": 1})


def test_a_database_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"`storage` .*cannot be opened"):
        Study(tmp_path / "s", storage="nonsense://x")
    with pytest.raises(ArgumentError, match=r"`storage` .*cannot be opened"):
        Study(tmp_path / "s", storage=f"sqlite:///{tmp_path}/none/study.sqlite3")


def test_a_database_elsewhere(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.sqlite3"
    Study(tmp_path / "here" / "s", storage=url).work(PLAN, score, until=3)
    assert len(Study(tmp_path / "there" / "s", storage=url).scores()) == 3
    assert not Study(tmp_path / "there" / "other", storage=url).scores()


def test_a_limit_of_trainings_counts_no_dead_worker(tmp_path: Path) -> None:
    out = tmp_path / "s"
    Study(out, heartbeat=1, grace=2)
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(out), "60"])
    deadline = time.monotonic() + 60
    while not (out / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    worker.kill()
    worker.wait()
    assert (out / "log").exists()
    time.sleep(3)
    study = Study(out, heartbeat=1, grace=2)
    assert not study.work(PLAN, score, until=1)
    assert len(study.scores()) == 1


@pytest.mark.parametrize("diverges", [False, True])
@pytest.mark.parametrize(("state", "again"), [("FAIL", 1), ("COMPLETE", 0)])
def test_a_training_that_somebody_else_ended(tmp_path: Path, state: str, again: int, diverges: bool) -> None:
    """It was given up for dead while a laptop slept; or two workers began it at the same moment, and one was faster."""
    study, told = begun(tmp_path / "s"), list[Job]()
    other = optuna.load_study(storage=f"sqlite:///{tmp_path}/s/study.sqlite3", study_name="s")

    def ended(job: Job) -> float:
        told.append(job)
        if len(told) == 1:
            (running,) = other.get_trials(states=[optuna.trial.TrialState.RUNNING])
            values = (running._trial_id, optuna.trial.TrialState[state], [score(job)] if state == "COMPLETE" else None)
            other._storage.set_trial_state_values(*values)
            if diverges:
                raise TrainingError("the loss is nan")
        return score(job)

    assert study.work(PLAN, ended)
    assert told.count(told[0]) == 1 + again
    assert len(told) == len(study.scores()) + again == len(jobs_in_all(RUNGS)) + again


def test_an_error_of_the_score_is_not_taken_for_that(tmp_path: Path) -> None:
    def wrong(job: Job) -> float:
        raise AssertionError("of the score itself")

    with pytest.raises(AssertionError, match="of the score itself"):
        begun(tmp_path / "t").work(PLAN, wrong)


def test_two_workers_one_of_which_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "s"
    Study(out, heartbeat=1, grace=2)
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
    assert len(Study(out).scores()) == len(jobs_in_all(RUNGS))
    began = Counter((out / "log").read_text().splitlines())
    assert sum(began.values()) <= len(jobs_in_all(RUNGS)) + 1  # the killed worker's training, once more
