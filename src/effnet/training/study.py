"""A search's trainings in a database that workers share: who does what, what is done, what is tried again.

Optuna keeps the trials, in a SQLite file or any database that SQLAlchemy knows. Which training comes next follows from
the finished ones (scaling/search.py), so a study that was killed goes on with what is missing and repeats nothing that
was finished. A worker shows that it lives by heartbeats; the training of one that died is given to another.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from effnet.errors import ArgumentError, MissingExtraError, TrainingError
from effnet.scaling.search import Job, Rung, open_jobs
from effnet.weights.folders import appearing_file

HEARTBEAT, GRACE = 20, 90  # seconds between signs of life, and without one until a worker counts as dead
WAITS = 2.0  # seconds until a worker without work looks again
FILE = "study.sqlite3"

Told = Callable[[Job, float], None]  # a training and its score


class Study:
    """One search.

    Args:
        out: its folder, with the database unless another one is named.
        rungs: what there is to do.
        about: what it is about, such as the candidates; a study of something else is not gone on with.
        storage: the URL of a database, in place of the file in `out`.
        heartbeat: seconds between signs of life.
        grace: seconds without one until a worker counts as dead.

    Raises:
        MissingExtraError: Optuna is not installed.
        ArgumentError: the storage holds a study of that name about something else.
    """

    def __init__(
        self,
        out: Path,
        rungs: Sequence[Rung],
        about: dict[str, Any],
        *,
        storage: str | None = None,
        heartbeat: int = HEARTBEAT,
        grace: int = GRACE,
    ) -> None:
        try:
            import optuna
        except ImportError as error:
            raise MissingExtraError("a search", "search") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self.out, self.rungs = optuna, out, tuple(rungs)
        out.mkdir(parents=True, exist_ok=True)
        url = storage or f"sqlite:///{(out / FILE).absolute()}"
        with self._quiet():
            database = optuna.storages.RDBStorage(url, heartbeat_interval=heartbeat, grace_period=grace)
        self.study = optuna.create_study(
            storage=database, study_name=out.resolve().name, load_if_exists=True, direction="maximize"
        )
        described = json.loads(json.dumps({"rungs": [dataclasses.asdict(rung) for rung in rungs], **about}))
        known = self.study.user_attrs.get("about")
        if known is None:
            self.study.set_user_attr("about", described)
        elif known != described:
            changed = sorted(name for name in known.keys() | described.keys() if known.get(name) != described.get(name))
            raise ArgumentError("out", str(out), f"holds a search that differs in its {', '.join(changed)}.")

    def scores(self) -> dict[Job, float]:
        """The scores of the finished trainings."""
        done = self._trials("COMPLETE")
        return {job: trial.value for trial in done if (job := _job(trial)) and trial.value is not None}

    def work(
        self,
        score: Callable[[Job], float],
        *,
        minutes: float | None = None,
        trials: int | None = None,
        told: Told | None = None,
    ) -> bool:
        """Do trainings until there are none left, or time is up; whether none are left.

        Args:
            score: does a training. A TrainingError is worth 0: such a network cannot be trained.
            minutes: no training begins after so many.
            trials: no more trainings than these.
            told: called behind each training.
        """
        began, done = time.monotonic(), 0

        def objective(trial: Any) -> float:
            job = _job(trial)
            if job is None or job in self.scores() or self._is_another_s(trial.number, job):
                raise self._optuna.TrialPruned
            for name, value in dataclasses.asdict(job).items():
                trial.suggest_int(name, 0, max(value, 999))
            try:
                value = score(job)
            except TrainingError as error:
                trial.set_user_attr("error", str(error))
                value = 0.0
            if told:
                told(job, value)
            return value

        while jobs := open_jobs(self.rungs, self.scores()):
            if (minutes is not None and time.monotonic() - began > 60 * minutes) or done == trials:
                return False
            with self._quiet():
                self._optuna.storages.fail_stale_trials(self.study)
            waiting, running = self._trials("WAITING"), {_job(trial) for trial in self._trials("RUNNING")}
            free = [job for job in jobs if job not in running]
            if not waiting and not free:
                time.sleep(WAITS)
                continue
            if not waiting:
                job = free[0]
                self.study.enqueue_trial(dataclasses.asdict(job), user_attrs={"job": dataclasses.asdict(job)})
            before = len(self._trials("COMPLETE"))
            with self._quiet():
                self.study.optimize(objective, n_trials=1)
            done += len(self._trials("COMPLETE")) > before
            self.write()
        return True

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Without the warning that heartbeats are an experiment, which they have been for years."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            yield

    def write(self) -> None:
        """Write trials.csv: a row for each finished training, by its number."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("number", "rung", "seed", "candidate", "score", "seconds", "error"))
        for trial in self._trials("COMPLETE"):
            if job := _job(trial):
                seconds = trial.duration.total_seconds() if trial.duration else ""
                error = trial.user_attrs.get("error", "")
                writer.writerow((trial.number, job.rung, job.seed, job.candidate, trial.value, seconds, error))
        with appearing_file(self.out / "trials.csv") as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8")

    def _trials(self, state: str) -> list[Any]:
        return self.study.get_trials(deepcopy=False, states=[self._optuna.trial.TrialState[state]])

    def _is_another_s(self, number: int, job: Job) -> bool:
        """Whether a worker that came first is at it: two may look at the same moment."""
        return any(trial.number < number and _job(trial) == job for trial in self._trials("RUNNING"))


def _job(trial: Any) -> Job | None:
    described = trial.user_attrs.get("job")
    return None if described is None else Job(**described)
