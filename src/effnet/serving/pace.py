"""Pace: how many images are computed together, how long they wait for others, and how many are admitted.

All three follow from the engine's measured times and the latency budget:

    places   by Little's law, images in flight = answers per second x seconds per answer; more would exceed the budget
    batch    half of the places, since an image that arrives just after a batch began waits for two batches
    delay    what a single image costs more than one in a full batch; waiting longer never pays

The answers per second are measured again while at least half of the places are taken, so photos that decode slowly, or
other programs on the machine, reduce the number of places instead of delaying answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from effnet.errors import ArgumentError

SHARE = 0.8  # of the budget for reading and computing; the rest is for the system and HTTP
WEIGHT = 0.1  # of the newest batch in the mean rate
FEWEST = 2  # places, so that one image can be read while another is computed


class Pace:
    """The pace that keeps a latency budget.

    Attributes:
        budget: seconds that nine of ten answers may take.
        times: batch size -> the engine's seconds.
        most: the engine's largest batch size.
        delay: most seconds that a batch waits for images that are still being read.
        rate: images answered per second under full load.
    """

    def __init__(self, budget: float, times: Mapping[int, float], most: int) -> None:
        if min(times, default=0) != 1:
            raise ArgumentError("times", dict(times), "must hold the seconds for one image, and for larger batches.")
        self.budget, self.times, self.most = budget, dict(sorted(times.items())), most
        images = max((n for n in times if fits(times[n], budget)), default=1)
        seconds = times[images]
        self.rate = images / seconds
        self.delay = max(0.0, min(times[1] - seconds / images, SHARE * budget - 2 * seconds))

    @property
    def places(self) -> int:
        """Most images in flight: being read, waiting or being computed."""
        return max(FEWEST, int(SHARE * self.budget * self.rate))

    @property
    def batch(self) -> int:
        """Most images that are computed together; as many again can be read meanwhile."""
        return min(self.most, self.places // 2)

    @property
    def keeps(self) -> bool:
        """Whether single images keep the budget."""
        return fits(self.times[1], self.budget)

    def observe(self, images: int, seconds: float) -> None:
        """Record that a busy server gave `images` answers in `seconds`."""
        self.rate += WEIGHT * (images / seconds - self.rate)


def fits(seconds: float, budget: float) -> bool:
    """Whether a batch that takes this long keeps the budget."""
    return 2 * seconds <= SHARE * budget


def measure_pace(budget: float, most: int, seconds_of: Callable[[int], float]) -> Pace:
    """The pace of an engine, measured for 1, 2, 4 ... and `most` images, as far as they fit the budget.

    Args:
        budget: seconds that nine of ten answers may take.
        most: the largest batch size.
        seconds_of: measures how long the engine takes for a batch of this size.
    """
    times = {1: seconds_of(1)}
    while fits(times[max(times)], budget) and max(times) < most:
        images = min(2 * max(times), most)
        times[images] = seconds_of(images)
    return Pace(budget, times, most)
