"""An executor of searches that runs jobs immediately in this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from effnet.searching.halving import Job
from effnet.searching.jobs import TrialOutcome


class DiedError(Exception):
    """Of a worker."""


class InThisProcess:
    """Runs jobs without the seconds that a process takes to import torch."""

    lost = (DiedError,)

    def __init__(self, score: Callable[[Job], TrialOutcome], slots: int = 2) -> None:
        self.score, self.slots, self.jobs = score, slots, list[Job]()

    def submit(self, job: Job) -> Future[TrialOutcome]:
        self.jobs.append(job)
        future = Future[TrialOutcome]()
        try:
            future.set_result(self.score(job))
        except DiedError as error:
            future.set_exception(error)
        return future

    def partial(self) -> tuple[float, str]:
        return 0.0, ""

    def close(self) -> None:
        pass
