"""How far a run is: from steps to a share of the schedule, also where a time budget moves its end."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

SLACK = 0.02  # of the time budget: a smaller drift of the expected end is left alone


@dataclass(frozen=True)
class Horizon:
    """The planned end of a run, and the steps at which the plan was changed.

    The share of the schedule that is done grows evenly between two changes, so a changed end never makes it jump.
    """

    marks: tuple[tuple[int, int], ...]  # (step from which it holds, steps in all)

    @classmethod
    def of(cls, total: int) -> Horizon:
        """A run of `total` steps."""
        return cls(((0, max(1, total)),))

    @property
    def total(self) -> int:
        """Steps in all, by the latest plan."""
        return self.marks[-1][1]

    def progress(self, step: int) -> float:
        """The share of the schedule that is done before step `step`: 0 at the first, 1 behind the last."""
        if step >= self.total:
            return 1.0
        done = 0.0
        ends = [start for start, _ in self.marks[1:]] + [max(step, self.marks[-1][0])]
        for (start, total), end in zip(self.marks, ends, strict=True):
            done += (1 - done) * (min(step, end) - start) / max(1, total - start) if step > start else 0.0
        return min(1.0, done)

    def moved(self, step: int, total: int) -> Horizon:
        """The same with another end, from step `step` on; what is done stays done."""
        return dataclasses.replace(self, marks=(*self.marks, (step, max(total, step))))


@dataclass(frozen=True)
class Budget:
    """A time budget in seconds, and what has to fit into it beside the steps."""

    seconds: float
    validation: float  # of one validation
    ending: float  # what follows the last step: the evaluation of the best weights, the pictures
    steps_per_epoch: int

    def steps(self, used: float, per_step: float) -> int:
        """How many more steps fit when `used` seconds are gone, perhaps none; every epoch and the end are validated."""
        left = self.seconds - used - self.ending - self.validation
        return max(0, int(left / (per_step + self.validation / self.steps_per_epoch)))

    def replan(self, horizon: Horizon, step: int, used: float, per_step: float) -> Horizon:
        """The horizon after `step` steps, moved where it would miss the budget by more than SLACK of it."""
        total = step + self.steps(used, per_step)
        if abs(total - horizon.total) * per_step <= SLACK * self.seconds:
            return horizon
        return horizon.moved(step, total)
