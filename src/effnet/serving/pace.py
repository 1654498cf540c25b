"""Pace: how many images go through the engine together, how long one waits for others, and how many are let in.

All three follow from the engine's measured times and the latency budget:

    places   by Little's law images in flight = answers a second x seconds of each; one more would exceed the budget
    batch    half of the places: an image that comes just after a batch began waits for it and then for its own
    delay    an image that goes alone costs more than one in a full batch: waiting for longer than that never pays

How many are answered a second is measured anew while at least half of the places are taken, so photos that are slow to
decode, or another program on the machine, make places fewer rather than answers late.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from effnet.errors import ArgumentError

SHARE = 0.8  # of the budget, for reading and computing; the rest is left to the system and to HTTP
WEIGHT = 0.1  # of the newest batch in the mean rate
FEWEST = 2  # places: one image is read while another is computed


class Pace:
    """The pace that keeps a latency budget.

    Attributes:
        budget: seconds that nine of ten answers may take.
        times: images of a batch -> the engine's seconds.
        most: images of the largest batch that the engine is made for.
        delay: seconds that a batch waits, at most, for images that are still being read.
        rate: images that are answered a second when there is enough to do.
    """

    def __init__(self, budget: float, times: Mapping[int, float], most: int) -> None:
        if min(times, default=0) != 1:
            raise ArgumentError("times", dict(times), "must hold the seconds of one image, and of larger batches.")
        self.budget, self.times, self.most = budget, dict(sorted(times.items())), most
        images = max((n for n in times if fits(times[n], budget)), default=1)
        seconds = times[images]
        self.rate = images / seconds
        self.delay = max(0.0, min(times[1] - seconds / images, SHARE * budget - 2 * seconds))

    @property
    def places(self) -> int:
        """Images that may be in flight: read, waiting or computed."""
        return max(FEWEST, int(SHARE * self.budget * self.rate))

    @property
    def batch(self) -> int:
        """Images that may be computed together; as many more can be read meanwhile."""
        return min(self.most, self.places // 2)

    @property
    def keeps(self) -> bool:
        """Whether single images keep the budget."""
        return fits(self.times[1], self.budget)

    def observe(self, images: int, seconds: float) -> None:
        """Note that a busy server gave `images` answers in `seconds`."""
        self.rate += WEIGHT * (images / seconds - self.rate)


def fits(seconds: float, budget: float) -> bool:
    """Whether a batch that takes so long keeps the budget."""
    return 2 * seconds <= SHARE * budget


def measure_pace(budget: float, most: int, seconds_of: Callable[[int], float]) -> Pace:
    """The pace of an engine, measured for 1, 2, 4 ... and `most` images, as far as they fit into the budget.

    Args:
        budget: seconds that nine of ten answers may take.
        most: images of the largest batch.
        seconds_of: measures how long the engine takes for so many images.
    """
    times = {1: seconds_of(1)}
    while fits(times[max(times)], budget) and max(times) < most:
        images = min(2 * max(times), most)
        times[images] = seconds_of(images)
    return Pace(budget, times, most)
