from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from effnet.errors import EffnetError
from effnet.searching.halving import Job, Trial
from effnet.searching.plan import CACHE, SearchPlan
from effnet.searching.score import attempt


class InThisProcess:
    """An executor that trains at once, without the seconds that a process takes to import torch."""

    slots = 1
    lost: tuple[type[BaseException], ...] = ()

    def __init__(self, plan: SearchPlan, workers: int) -> None:
        self.plan = plan

    def submit(self, job: Job) -> Future[Trial | EffnetError]:
        future = Future[Trial | EffnetError]()
        future.set_result(attempt(self.plan, job, self.plan.folder / CACHE))
        return future

    def partial(self) -> tuple[float, int]:
        return 0.0, 0

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def in_this_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("effnet.searching.search.LocalExecutor", InThisProcess)
        yield
