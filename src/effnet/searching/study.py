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
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from effnet.errors import ArgumentError, MissingExtraError, TrainingError
from effnet.searching.halving import FAILED, Job, Plan
from effnet.training.run import write_text

HEARTBEAT, GRACE = 20, 90  # seconds between signs of life, and without one until a worker counts as dead
PATIENCE = 60  # seconds for which SQLite waits while another worker writes
WAITS = 2.0  # seconds until a worker without work looks again
FILE, TRIALS = "study.sqlite3", "trials.csv"
COLUMNS = ("number", "rung", "seed", "candidate", "network", "score", "seconds", "error")


class Study:
    """One search's database.

    Args:
        out: the search's folder, with the database unless another one is named; the folder's name is the study's.
        storage: the URL of a database, in place of the file in `out`.
        heartbeat: seconds between signs of life.
        grace: seconds without one until a worker counts as dead.

    Raises:
        MissingExtraError: Optuna is not installed.
        ArgumentError: the database cannot be opened.
    """

    def __init__(
        self, out: Path, *, storage: str | None = None, heartbeat: int = HEARTBEAT, grace: int = GRACE
    ) -> None:
        try:
            import optuna
            from sqlalchemy.exc import SQLAlchemyError
        except ImportError as error:
            raise MissingExtraError("a search", "search") from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna, self.out = optuna, out
        if storage is None:
            out.mkdir(parents=True, exist_ok=True)
        url = storage or f"sqlite:///{(out / FILE).absolute()}"
        engine = {"connect_args": {"timeout": PATIENCE}} if url.startswith("sqlite") else None
        try:
            with self._quiet():
                database = optuna.storages.RDBStorage(url, engine, heartbeat_interval=heartbeat, grace_period=grace)
        except (SQLAlchemyError, ImportError, RuntimeError, ValueError) as error:
            shown = re.sub(r"(?<=:)[^:/@]+(?=@)", "***", url)  # a password
            raise ArgumentError("storage", shown, f"cannot be opened: {str(error).splitlines()[0]}") from error
        self._study = optuna.create_study(
            storage=database, study_name=out.resolve().name, load_if_exists=True, direction="maximize"
        )

    @property
    def about(self) -> dict[str, Any] | None:
        """What the study was begun with; None for a new one."""
        known: dict[str, Any] | None = self._study.user_attrs.get("about")
        return known

    def begin(self, about: Mapping[str, Any]) -> None:
        """Say what the study is about: plain values, which no later worker may contradict.

        Raises:
            ArgumentError: it was begun about something else.
        """
        known, described = self.about, json.loads(json.dumps(about))
        if known is None:
            self._study.set_user_attr("about", described)
        elif known != described:
            changed = sorted(name for name in known.keys() | described.keys() if known.get(name) != described.get(name))
            raise ArgumentError(
                "out", str(self.out), f"holds a search that differs in its {', '.join(changed)}; choose another --out."
            )

    def scores(self) -> dict[Job, float]:
        """The scores of the finished trainings."""
        done = self._trials("COMPLETE")
        return {job: trial.value for trial in done if (job := _job(trial)) and trial.value is not None}

    def seconds(self) -> dict[Job, float]:
        """How long the finished trainings took."""
        done = self._trials("COMPLETE")
        return {job: trial.duration.total_seconds() for trial in done if (job := _job(trial)) and trial.duration}

    def work(
        self,
        plan: Plan,
        score: Callable[[Job], float],
        *,
        minutes: float | None = None,
        until: int | None = None,
    ) -> bool:
        """Do trainings until there are none left, or time is up; whether none are left.

        Args:
            plan: what there is to do now, in order; none when all is done.
            score: does a training. A TrainingError is worth 0: such a network cannot be trained.
            minutes: no training begins after so many.
            until: no training begins when so many are finished or being done, by all workers.
        """
        began, returned, stopped = time.monotonic(), False, False

        def objective(trial: Any) -> float:
            nonlocal returned, stopped
            job = _job(trial)
            if job is None or job in self.scores() or self._is_another_s(trial.number, job):
                returned = True
                raise self._optuna.TrialPruned
            for name, value in dataclasses.asdict(job).items():
                trial.suggest_int(name, 0, max(value, 999))
            try:
                value = score(job)
            except TrainingError as error:
                returned = True
                trial.set_user_attr("error", str(error))
                value = FAILED
            except KeyboardInterrupt as stop:
                stopped = True
                raise _StoppedError from stop  # of which Optuna takes note, so that nobody waits for this training
            returned = True
            return value

        while jobs := plan(scores := self.scores()):
            with self._quiet():
                self._optuna.storages.fail_stale_trials(self._study)
            late = minutes is not None and time.monotonic() - began > 60 * minutes
            running = {_job(trial) for trial in self._trials("RUNNING")}
            if late or (until is not None and len(scores) + len(running) >= until):
                return False
            free = [job for job in jobs if job not in running]
            if not free and not self._trials("WAITING"):
                time.sleep(WAITS)
                continue
            if not self._trials("WAITING"):
                job = dataclasses.asdict(free[0])
                self._study.enqueue_trial(job, user_attrs={"job": job})
            returned = False
            try:
                with self._quiet():
                    self._study.optimize(objective, n_trials=1)
            except (_StoppedError, AssertionError, ValueError) as error:
                if stopped:
                    raise KeyboardInterrupt from error
                # Optuna's own, when it tells a score: SQLite let two workers begin one training, or while this process
                # was suspended another one gave its training up as dead
                if not returned:
                    raise
        return True

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Without the warning that heartbeats are an experiment, which they have been for years."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            yield

    def write(self, names: Sequence[str]) -> None:
        """Write trials.csv: a row for each finished training, by its number; `names` are the candidates'."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for trial in self._trials("COMPLETE"):
            if job := _job(trial):
                seconds = f"{trial.duration.total_seconds():.1f}" if trial.duration else ""
                row = trial.number, job.rung, job.seed, job.candidate, names[job.candidate], trial.value
                writer.writerow((*row, seconds, trial.user_attrs.get("error", "")))
        write_text(self.out / TRIALS, text.getvalue())

    def _trials(self, state: str) -> list[Any]:
        return self._study.get_trials(deepcopy=False, states=[self._optuna.trial.TrialState[state]])

    def _is_another_s(self, number: int, job: Job) -> bool:
        """Whether a worker that came first is at it: two may look at the same moment."""
        return any(trial.number < number and _job(trial) == job for trial in self._trials("RUNNING"))


class _StoppedError(Exception):
    """Ctrl-C during a training."""


def _job(trial: Any) -> Job | None:
    described = trial.user_attrs.get("job")
    return None if described is None else Job(**described)
